"""The length budget of a question: what must give way does so fairly, to the token, and it is told.

Completions give way first, the longest one before the others: where several must, they end up
equally long. They keep half of the budget between them; what is still too much is taken from the
front of the conversation, whose end is what the completions answer. Criteria and labels are never
cut: a question that does not fit even so is an error of its call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from feedback.records import Message, PromptText
from feedback.templates import neutralise

__all__ = ["CUT_MARK", "Fitted", "LengthBudget", "TextTokenizer", "fair_lengths"]

CUT_MARK = " [...]"
_FRONT_MARK = "[...] "
# More tokens than any chat template writes around its messages.
_OVERHEAD = 512
_ROUNDS = 16


class TextTokenizer(Protocol):
    """What the budget needs of a judge's tokenizer; ``backends.chat.ChatTokenizer`` has it."""

    def ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a question."""
        ...

    def count(self, text: str) -> int:
        """Return the number of tokens of a text."""
        ...

    def cut(self, text: str, tokens: int) -> str:
        """Return the longest head of ``text`` of at most ``tokens`` tokens."""
        ...

    def tail(self, text: str, tokens: int) -> str:
        """Return the longest tail of ``text`` of at most ``tokens`` tokens."""
        ...


class Fitted(NamedTuple):
    """A question as it is sent, and which parts were cut."""

    messages: tuple[Message, ...]
    flags: tuple[str, ...] = ()
    """``truncated_completions``, ``truncated_prompt``."""


Render = Callable[[PromptText, Sequence[str]], tuple[Message, ...]]


@dataclass(frozen=True, slots=True)
class LengthBudget:
    """At most ``max_tokens`` for a question, chat template included."""

    tokenizer: TextTokenizer
    max_tokens: int

    def fit(self, prompt: PromptText, completions: Sequence[str], render: Render) -> Fitted:
        """Return the question about ``completions``, cut where it is too long."""
        messages = render(prompt, completions)
        # A token is at least one byte: most questions need no tokenizer.
        if sum(len(turn["content"].encode()) for turn in messages) + _OVERHEAD < self.max_tokens:
            return Fitted(messages)
        over = len(self.tokenizer.ids(messages)) - self.max_tokens
        if over <= 0:
            return Fitted(messages)
        # Counted and cut as they are sent: a control token is one token, defused it is several.
        prompt = _defused(prompt)
        completions = [neutralise(text) for text in completions]
        counts = [self.tokenizer.count(text) for text in completions]
        room, least = sum(counts), min(sum(counts), self.max_tokens // 2)
        prompt_room = prompt_count = self._prompt_tokens(prompt)
        for _ in range(_ROUNDS):
            # Marks, and text that tokenises differently beside new neighbours, take a few rounds.
            from_completions = min(over, room - least)
            room -= from_completions
            prompt_room = max(prompt_room - (over - from_completions), 0)
            shorter = self._shorten(completions, counts, room)
            kept = prompt if prompt_room >= prompt_count else self._end_of(prompt, prompt_room)
            messages = render(kept, shorter)
            over = len(self.tokenizer.ids(messages)) - self.max_tokens
            if over <= 0 or (prompt_room == 0 and room <= least):
                break
        flags = []
        if room < sum(counts):
            flags.append("truncated_completions")
        if prompt_room < prompt_count:
            flags.append("truncated_prompt")
        return Fitted(messages, tuple(flags))

    def _shorten(self, completions: Sequence[str], counts: Sequence[int], room: int) -> list[str]:
        return [
            text if length >= count else self.tokenizer.cut(text, length) + CUT_MARK
            for text, count, length in zip(
                completions, counts, fair_lengths(counts, room), strict=True
            )
        ]

    def _prompt_tokens(self, prompt: PromptText) -> int:
        texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
        return sum(map(self.tokenizer.count, texts))

    def _end_of(self, prompt: PromptText, tokens: int) -> PromptText:
        """Return the end of a conversation: old turns go, the oldest left loses its front."""
        if isinstance(prompt, str):
            return _FRONT_MARK + self.tokenizer.tail(prompt, tokens)
        kept: list[Message] = []
        for turn in reversed(prompt):
            count = self.tokenizer.count(turn["content"])
            if count > tokens:
                text = _FRONT_MARK + self.tokenizer.tail(turn["content"], tokens)
                kept.append(Message(role=turn["role"], content=text))
                break
            kept.append(turn)
            tokens -= count
        return kept[::-1]


def _defused(prompt: PromptText) -> PromptText:
    if isinstance(prompt, str):
        return neutralise(prompt)
    return [Message(role=turn["role"], content=neutralise(turn["content"])) for turn in prompt]


def fair_lengths(counts: Sequence[int], room: int) -> list[int]:
    """Return lengths of at most ``counts`` that sum to at most ``room``, the longest cut first."""
    lengths = list(counts)
    order = sorted(range(len(counts)), key=lambda place: counts[place])
    for done, place in enumerate(order):
        share = max(room, 0) // (len(order) - done)
        if counts[place] > share:
            # All that is left is longer still: each gets the same, also where a token remains.
            for rest in order[done:]:
                lengths[rest] = share
            break
        room -= counts[place]
    return lengths
