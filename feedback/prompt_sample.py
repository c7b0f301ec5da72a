"""A bounded sample of a verdict folder: whole prompts, drawn by their ids, read in one pass.

Statistics of a judge are clustered by prompt, so a card of some thousand prompts has intervals of a
percentage point or so; holding a million verdicts for a further digit buys nothing. Whether a
prompt is drawn depends on its id alone: the same folder gives the same sample whatever the order of
its rows, and several judges on the same prompts are compared on the same ones.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from feedback.records import Verdict, content_id

__all__ = ["PromptSample"]

_HALVINGS = 60


@dataclass(slots=True)
class PromptSample:
    """Verdicts of as many prompts as fit; ``read`` fills it."""

    most: int
    """Most verdicts held, beside those of prompts in ``always``."""
    always: Collection[str] = ()
    """Ids of prompts that are in it anyway: those with gold, of which there are never too many."""
    read_rows: int = 0
    """Verdicts read."""
    level: int = 0
    """The share drawn is 1 / 2**level."""
    _rows: dict[str, list[Verdict]] = field(default_factory=dict)
    _held: int = 0

    def read(self, verdicts: Iterable[Verdict]) -> None:
        """Take the verdicts of the prompts that are drawn; draws fewer as the room fills."""
        for verdict in verdicts:
            self.read_rows += 1
            if not self.holds(verdict.prompt_id):
                continue
            self._rows.setdefault(verdict.prompt_id, []).append(verdict)
            self._held += verdict.prompt_id not in self.always
            while self._held > self.most and self.level < _HALVINGS:
                self._halve()

    def _halve(self) -> None:
        self.level += 1
        for name in [name for name in self._rows if not self.holds(name)]:
            self._held -= len(self._rows.pop(name))

    def holds(self, prompt_id: str) -> bool:
        """Whether a prompt is drawn."""
        if self.level == 0 or prompt_id in self.always:
            return True
        return _place(prompt_id) >> (_HALVINGS - self.level) == 0

    def verdicts(self) -> Iterator[Verdict]:
        """Yield the verdicts drawn, prompt by prompt."""
        for rows in self._rows.values():
            yield from rows

    def record(self) -> dict[str, Any] | None:
        """Return what a card says of the sample; None where everything is in it."""
        if self.level == 0:
            return None
        return {
            "verdicts": sum(map(len, self._rows.values())),
            "of_verdicts": self.read_rows,
            "prompts": len(self._rows),
            "share_of_prompts": 2.0**-self.level,
            "prompts_with_gold": "all",
        }


def _place(prompt_id: str) -> int:
    """Return a number of 60 bits that looks random and never changes."""
    return int(content_id("sample", prompt_id, length=_HALVINGS // 4), 16)
