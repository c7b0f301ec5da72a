"""Policy against policy: both orders, ties half, intervals by prompt, length held equal.

Completion number i of one policy meets completion number i of the other on each prompt. Two texts
that are equal after normalisation are level without a call; a pair whose verdict failed, was
refused or could not be read counts nowhere and is reported.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from feedback.comparing import prompt_comparisons
from feedback.intervals import Estimate, Resampler, mean, nothing
from feedback.judge import Question
from feedback.length_control import Duels, controlled_win_rate
from feedback.ordering import pair_questions
from feedback.records import Candidates, Comparison, Completion, normalise_text
from feedback.verdict_index import VerdictIndex

__all__ = [
    "NEW",
    "OLD",
    "Meeting",
    "WinRate",
    "meeting_questions",
    "meetings",
    "meetings_row",
    "win_rate",
]

# Completion ids in an evaluation row begin with the side.
NEW, OLD = "new", "old"


class Meeting(NamedTuple):
    """One completion of the new policy against one of the old, as judged."""

    prompt_id: str
    new: Completion
    old: Completion
    p: float | None
    """P(new preferred); None where the judge gave no verdict."""
    consistent: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WinRate:
    """What one judge says of the new policy against the old."""

    win_rate: Estimate
    """Share of pairs won, level ones half."""
    preference: Estimate
    """Mean of P(new preferred)."""
    consistent_win_rate: Estimate
    """Share won among the pairs on which both orders agree."""
    at_equal_length: Estimate
    """``win_rate`` with the difference in length held at zero: what length alone won is the
    difference between the two."""
    preference_at_equal_length: Estimate
    """``preference`` with the difference in length held at zero."""
    won: int
    level: int
    lost: int
    undecided: int
    """Pairs without a verdict; they count nowhere."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return dataclasses.asdict(self)


def meetings_row(new: Candidates, old: Candidates) -> Candidates:
    """Return one evaluation row of two policies' samples on the same prompt.

    Raises:
        ValueError: the rows are of different prompts.
    """
    if new.prompt_id != old.prompt_id or new.prompt != old.prompt:
        raise ValueError(f"prompts {new.prompt_id!r} and {old.prompt_id!r} are not the same")
    sides = ((NEW, new.completions), (OLD, old.completions))
    completions = [
        dataclasses.replace(entry, completion_id=f"{side}-{number}")
        for side, entries in sides
        for number, entry in enumerate(entries)
    ]
    return dataclasses.replace(new, completions=completions)


def _pairs(row: Candidates) -> Iterator[tuple[Completion, Completion]]:
    by_id = {entry.completion_id: entry for entry in row.completions}
    for number in range(len(row.completions)):
        new, old = by_id.get(f"{NEW}-{number}"), by_id.get(f"{OLD}-{number}")
        if new is None or old is None:
            return
        yield new, old


def _equal(new: Completion, old: Completion) -> bool:
    return normalise_text(new.completion) == normalise_text(old.completion)


def meeting_questions(rows: Iterable[Candidates]) -> Iterator[Question]:
    """Yield the questions of evaluation rows: each pair in both orders."""
    for row in rows:
        yield from pair_questions(row, (pair for pair in _pairs(row) if not _equal(*pair)))


def meetings(rows: Iterable[Candidates], verdicts: Path) -> Iterator[Meeting]:
    """Yield every meeting with what a verdict folder says of it."""
    with VerdictIndex(verdicts, failed=True) as index:
        for row in rows:
            found = prompt_comparisons(index.verdicts(row.prompt_id))
            by_pair = {frozenset((each.a, each.b)): each for each in found}
            for new, old in _pairs(row):
                if _equal(new, old):
                    yield Meeting(row.prompt_id, new, old, 0.5, True)
                    continue
                pair = frozenset((new.completion_id, old.completion_id))
                yield _meeting(row.prompt_id, new, old, by_pair.get(pair))


def _meeting(prompt_id: str, new: Completion, old: Completion, found: Comparison | None) -> Meeting:
    if found is None or found.p is None:
        return Meeting(prompt_id, new, old, None, None)
    p = found.p if found.a == new.completion_id else 1.0 - found.p
    p = 0.5 if found.outcome == "tie" else p
    return Meeting(prompt_id, new, old, p, found.consistent)


def win_rate(results: Sequence[Meeting], *, seed: int = 0) -> WinRate:
    """Return the win rate of the new policy over judged meetings."""
    decided = [entry for entry in results if entry.p is not None]
    if not decided:
        empty = nothing()
        return WinRate(
            win_rate=empty,
            preference=empty,
            consistent_win_rate=empty,
            at_equal_length=empty,
            preference_at_equal_length=empty,
            won=0,
            level=0,
            lost=0,
            undecided=len(results),
        )
    names = {name: place for place, name in enumerate({entry.prompt_id: 0 for entry in decided})}
    groups = np.array([names[entry.prompt_id] for entry in decided], dtype=np.int64)
    p = np.array([entry.p for entry in decided], dtype=np.float64)
    wins = (p > 0.5) + 0.5 * (p == 0.5)
    agree = np.array([entry.consistent is True for entry in decided])
    gaps = np.array(
        [len(entry.new.completion) - len(entry.old.completion) for entry in decided],
        dtype=np.float64,
    )
    resampler = Resampler(groups, seed=seed)
    return WinRate(
        win_rate=mean(resampler, groups, wins),
        preference=mean(resampler, groups, p),
        consistent_win_rate=mean(resampler, groups[agree], wins[agree]),
        at_equal_length=controlled_win_rate(Duels("new", wins, gaps, groups)),
        preference_at_equal_length=controlled_win_rate(Duels("new", p, gaps, groups)),
        won=int((p > 0.5).sum()),
        level=int((p == 0.5).sum()),
        lost=int((p < 0.5).sum()),
        undecided=len(results) - len(decided),
    )
