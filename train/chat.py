"""Text to token ids as sampling sees them: prompts by the chat template, completions with an end.

Prompt and completion are tokenised apart and joined as ids, so the boundary is where a model that
generates finds it; a completion ends in the chat template's own end-of-turn token. What goes wrong
silently elsewhere (no end token, a second BOS, pad = EOS) is an error or a counted warning here.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
import numpy as np

from feedback.errors import InputError
from feedback.records import PromptText, prompt_messages

__all__ = ["ChatFormat", "DataReport"]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class DataReport:
    """What reading the data did to it; ``warnings`` are sentences that name the fix."""

    rows: int = 0
    groups: int = 0
    completions: int = 0
    pairs: int = 0
    rankings: int = 0
    ties: int = 0
    identical: int = 0
    """Pairs dropped because both completions are equal after normalisation."""
    weightless: int = 0
    """Rows left out because their weight is 0."""
    unjudged: int = 0
    """Rankings left out because fewer than two of their completions were judged."""
    cut_equal: int = 0
    """Pairs, and rankings, dropped because the cut to max_length left completions equal."""
    unlabelled: int = 0
    """Groups dropped because no label is left in them."""
    truncated_completions: int = 0
    truncated_prompts: int = 0
    dropped_overlong: int = 0
    """Completions dropped for their length."""
    split_groups: int = 0
    """Groups split because all of their completions together do not fit into a row."""
    tokens: int = 0
    warnings: list[str] = field(default_factory=list)

    def warn(self, message: str) -> None:
        """Keep a warning for the model card and log it."""
        self.warnings.append(message)
        logger.warning(message)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts for a manifest."""
        return dataclasses.asdict(self)


class ChatFormat:
    """How a tokenizer writes a prompt and ends a completion; checked once, before any row is read.

    With a chat template a plain-text prompt is one user turn. Without one, a prompt must be text,
    and a completion ends in the tokenizer's EOS.

    Raises:
        InputError: there is nothing that ends a completion, or the template cannot be used.
    """

    def __init__(self, tokenizer: Any, *, report: DataReport | None = None):
        self.tokenizer = tokenizer
        self.templated = bool(tokenizer.chat_template)
        self.end_ids: list[int] = self._find_end()
        """Token ids that end a completion."""
        self.end_text: str = tokenizer.decode(self.end_ids, skip_special_tokens=False)
        if report and tokenizer.pad_token_id in self.end_ids:
            report.warn(
                f"the pad token {tokenizer.pad_token!r} also ends completions: harmless here, "
                "where padding is never read, but other tools will mask every completion's end; "
                "give the tokenizer a pad token of its own"
            )

    def _find_end(self) -> list[int]:
        tokenizer = self.tokenizer
        if not self.templated:
            if tokenizer.eos_token_id is None:
                raise InputError(
                    "the tokenizer has neither a chat template nor an EOS token: a model trained "
                    "with it would never stop; set eos_token in its tokenizer_config.json"
                )
            return [tokenizer.eos_token_id]
        marker = "zqxjk"  # survives templates that trim the content
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": marker}]
        text = self._render(turns, add_generation_prompt=False)
        _, found, tail = text.rpartition(marker)
        if not found:
            raise InputError("the chat template does not print the assistant's content")
        tail_ids = tokenizer(tail, add_special_tokens=False)["input_ids"]
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        for place, token in enumerate(tail_ids):
            if token in special:
                return list(tail_ids[: place + 1])
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the chat template ends an assistant turn without a special token, and the "
                "tokenizer has no EOS: a model trained with it would never stop; add eos_token to "
                "the template"
            )
        return [*tail_ids, tokenizer.eos_token_id]

    def _render(self, messages: Sequence[Any], *, add_generation_prompt: bool) -> str:
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise InputError(f"the chat template fails: {error}") from error
        return text

    def prompt_text(self, prompt: PromptText) -> str:
        """Return the prompt as text, up to where a completion starts.

        Raises:
            InputError: chat messages, but no chat template.
        """
        if self.templated:
            return self._render(prompt_messages(prompt), add_generation_prompt=True)
        if not isinstance(prompt, str):
            raise InputError(
                "prompts are chat messages but the tokenizer has no chat template; give one with "
                "--chat-template"
            )
        return prompt

    def prompt_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return the token ids of prompts from ``prompt_text``; an empty one is BOS (or EOS)."""
        if not texts:
            return []
        # A template writes BOS itself; a second one would be a different prompt.
        encoded = self.tokenizer(list(texts), add_special_tokens=not self.templated)["input_ids"]
        start = self._start_id()
        rows = []
        for ids in encoded:
            if not self.templated and len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
                ids = ids[:-1]  # some tokenizers append EOS to everything
            rows.append(np.asarray(ids or [start], dtype=np.int32))
        return rows

    def completion_ids(self, completions: Sequence[str]) -> list[np.ndarray]:
        """Return each completion's token ids with the end-of-turn tokens."""
        ends = np.asarray(self.end_ids, dtype=np.int32)
        return [np.concatenate([ids, ends]) for ids in self.plain_ids(completions)]

    def plain_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return each text's token ids, nothing added."""
        if not texts:
            return []
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]

    def text_ids(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return each document's token ids, from BOS (or EOS) to EOS."""
        start, end = self._start_id(), self.tokenizer.eos_token_id
        end = self.end_ids[-1] if end is None else end
        documents = []
        for ids in self.plain_ids(texts):
            head = [start] if start is not None and ids[:1].tolist() != [start] else []
            tail = [end] if ids[-1:].tolist() != [end] else []
            documents.append(np.concatenate([head, ids, tail]).astype(np.int32))
        return documents

    def _start_id(self) -> int | None:
        start = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if start is None else start
