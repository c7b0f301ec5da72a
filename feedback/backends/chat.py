"""Chat messages to token ids, for every engine that runs a model itself.

One BOS at most, whatever template and tokenizer each add; a system turn is merged into the first
user turn where the template refuses or drops it; special tokens inside a message's text are
defused, so that only the template itself can write them.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import jinja2

from feedback.backends.turns import merge_system
from feedback.errors import BackendError
from feedback.records import Message

__all__ = ["ChatTokenizer"]

_MARKER = "zqxjk"
# Added tokens that look like control tokens; others ("\t\t", "    ") are ordinary text.
_CONTROL_SHAPE = re.compile(r"<[^ ]+>|\[[A-Z_/]+\]", re.DOTALL)
# The judge templates' own fences, which a tokenizer may hold as plain added tokens (the pocket
# model's does). Breaking them would break every question; inside candidates, templates defuse them.
_FENCE = re.compile(r"</?(?:conversation|reply(?:_[ab12])?)>")


class ChatTokenizer:
    """A tokenizer with its chat template, asked for token ids only.

    Args:
        tokenizer: of ``transformers``.
        template_arguments: further variables of the chat template (``enable_thinking``, say).
    """

    def __init__(self, tokenizer: Any, *, template_arguments: dict[str, Any] | None = None):
        self.tokenizer = tokenizer
        self.templated = bool(tokenizer.chat_template)
        self._arguments = template_arguments or {}
        self._control = _control_pattern(tokenizer)
        self._backend = _plain_backend(tokenizer)
        self.system_role = self.templated and self._keeps_system()
        self._labels: dict[str, int] = {}

    @property
    def threaded(self) -> bool:
        """Whether ``ids_of`` may run in several threads at the same time."""
        return self._backend is not None

    def text(self, messages: Sequence[Message], *, reply: str | None = None) -> str:
        """Return what the model reads, up to where its reply starts (or with the whole reply)."""
        turns = [
            Message(role=turn["role"], content=self.defuse(turn["content"])) for turn in messages
        ]
        if not self.templated:
            return "\n\n".join(turn["content"] for turn in turns) + ("\n" if turns else "")
        if not self.system_role:
            turns = merge_system(turns)
        if reply is not None:
            turns.append(Message(role="assistant", content=reply))
        return self._render(turns, opening=reply is None)

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of ``messages``, up to where a reply starts."""
        return self.ids_of([messages])[0]

    def ids_of(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        """Return the token ids of several conversations, tokenised in one go."""
        if not conversations:
            return []
        return self._encode([self.text(messages) for messages in conversations])

    def label_ids(self, labels: Sequence[str]) -> list[int]:
        """Return the token id of each label at the place where the reply starts.

        Raises:
            BackendError: a label is not exactly one token there, or two labels share one.
        """
        for label in labels:
            if label not in self._labels:
                self._labels[label] = self._label_id(label)
        ids = [self._labels[label] for label in labels]
        if len(set(ids)) != len(ids):
            raise BackendError(f"the labels {', '.join(labels)} do not have a token each")
        return ids

    def _label_id(self, label: str) -> int:
        opening = self.text([Message(role="user", content="A or B?")])
        before, after = self._encode([opening, opening + label])
        if len(after) == len(before) + 1 and after[: len(before)] == before:
            return after[-1]
        pieces = self.tokenizer.convert_ids_to_tokens(self._encode([label])[0])
        if len(after) <= len(before):
            what = "melts into the chat template's last token"
        else:
            what = f"is {len(after) - len(before)} tokens there ({' '.join(map(repr, pieces))})"
        raise BackendError(
            f"label {label!r} is no single token: where the judge's reply starts, it {what}; "
            "give the template labels of one token for this tokenizer (A and B, or 1 and 2)"
        )

    def end_id(self) -> int | None:
        """Return the token that ends a reply in the chat template, or else EOS."""
        eos: int | None = self.tokenizer.eos_token_id
        if not self.templated:
            return eos
        user = Message(role="user", content="a")
        tail = self.text([user], reply=_MARKER).rpartition(_MARKER)[2]
        special = set(self.tokenizer.all_special_ids) | set(self.tokenizer.added_tokens_decoder)
        ending = self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        return next((token for token in ending if token in special), eos)

    def stop_ids(self, configured: Any = None) -> set[int]:
        """Return the ids that end a reply: EOS, the template's end of turn, and ``configured``."""
        ids = {self.tokenizer.eos_token_id, self.end_id()}
        ids |= set(configured) if isinstance(configured, list | tuple) else {configured}
        return {token for token in ids if token is not None}

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of generated ids; special tokens are left out."""
        text: str = self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def completion_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the token ids of completions, without BOS or end."""
        texts = [self.defuse(text) for text in texts]
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return ids

    def count(self, text: str) -> int:
        """Return the number of tokens of a piece of text."""
        return len(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def cut(self, text: str, tokens: int) -> str:
        """Return the longest head of ``text`` of at most ``tokens`` tokens, cut between tokens."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        if len(offsets) <= tokens:
            return text
        # Tokens that are bytes of one character all span it: such a character is left out.
        return text[: min(offsets[tokens - 1][1], offsets[tokens][0])] if tokens > 0 else ""

    def tail(self, text: str, tokens: int) -> str:
        """Return the longest tail of ``text`` of at most ``tokens`` tokens, cut between tokens."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        if len(offsets) <= tokens:
            return text
        return text[max(offsets[-tokens][0], offsets[-tokens - 1][1]) :] if tokens > 0 else ""

    def defuse(self, text: str) -> str:
        """Break every special token of this tokenizer that stands in ``text``."""
        if self._control is None:
            return text
        return self._control.sub(lambda found: found[0][0] + "\u200b" + found[0][1:], text)

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # A template writes BOS itself where the model wants one.
        special = not self.templated
        if self._backend is not None:
            found = self._backend.encode_batch_fast(texts, add_special_tokens=special)
            rows: list[list[int]] = [encoding.ids for encoding in found]
        else:
            rows = self.tokenizer(texts, add_special_tokens=special)["input_ids"]
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        for place, row in enumerate(rows):
            if bos is not None and len(row) > 1 and row[0] == row[1] == bos:
                rows[place] = row[1:]
            elif not self.templated and len(row) > 1 and row[-1] == eos:
                rows[place] = row[:-1]  # some tokenizers append EOS to everything
        return rows

    def _render(self, turns: Sequence[Message], *, opening: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                list(turns), tokenize=False, add_generation_prompt=opening, **self._arguments
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise BackendError(f"the model's chat template fails: {error}") from error
        return text

    def _keeps_system(self) -> bool:
        turns = [Message(role="system", content=_MARKER), Message(role="user", content="a")]
        try:
            return _MARKER in self._render(turns, opening=True)
        except BackendError:
            return False


def _plain_backend(tokenizer: Any) -> Any:
    """Return a copy of the Rust tokenizer that neither cuts nor pads; None: there is none.

    Its batch encoding holds no lock of Python and changes nothing in it, so that several threads
    may use it at the same time; calling the wrapper sets cutting and padding anew each time.
    """
    if not tokenizer.is_fast:
        return None
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    return backend


def _control_pattern(tokenizer: Any) -> re.Pattern[str] | None:
    special = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        fence = not token.special and _FENCE.fullmatch(token.content)
        if token.special or (_CONTROL_SHAPE.fullmatch(token.content) and not fence):
            special.add(token.content)
    words = [re.escape(word) for word in sorted(special, key=len, reverse=True) if len(word) > 1]
    return re.compile("|".join(words)) if words else None
