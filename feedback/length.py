"""The length budget of a question: completions are cut fairly, to the token, and it is told.

The longest completion gives way first; where several must, they end up equally long. Criteria,
conversation and labels are never cut: a question that does not fit without its completions is an
error of the call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from feedback.records import Message

__all__ = ["CUT_MARK", "LengthBudget", "TextTokenizer", "fair_lengths"]

CUT_MARK = " [...]"
# More tokens than any chat template writes around its messages.
_OVERHEAD = 512


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


@dataclass(frozen=True, slots=True)
class LengthBudget:
    """At most ``max_tokens`` for a question, chat template included."""

    tokenizer: TextTokenizer
    max_tokens: int

    def fit(
        self,
        completions: Sequence[str],
        messages: Sequence[Message],
        render: Callable[[Sequence[str]], tuple[Message, ...]],
    ) -> tuple[Message, ...] | None:
        """Return messages with completions cut to fit, or None where nothing must be cut."""
        # A token is at least one byte: most questions need no tokenizer.
        if sum(len(turn["content"].encode()) for turn in messages) + _OVERHEAD < self.max_tokens:
            return None
        excess = len(self.tokenizer.ids(messages)) - self.max_tokens
        if excess <= 0:
            return None
        counts = [self.tokenizer.count(text) for text in completions]
        room = sum(counts) - excess
        while True:
            lengths = fair_lengths(counts, room)
            result = render(
                [
                    text if length >= count else self.tokenizer.cut(text, length) + CUT_MARK
                    for text, count, length in zip(completions, counts, lengths, strict=True)
                ]
            )
            over = len(self.tokenizer.ids(result)) - self.max_tokens
            if over <= 0 or room <= 0:
                return result
            room -= over  # the mark, and text that tokenises differently beside new neighbours


def fair_lengths(counts: Sequence[int], room: int) -> list[int]:
    """Return lengths of at most ``counts`` that sum to at most ``room``, the longest cut first."""
    lengths = list(counts)
    order = sorted(range(len(counts)), key=lambda place: counts[place])
    for done, place in enumerate(order):
        share = max(room, 0) // (len(order) - done)
        lengths[place] = min(counts[place], share)
        room -= lengths[place]
    return lengths
