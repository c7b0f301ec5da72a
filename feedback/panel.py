"""Several judges on the same questions: panels, and cascades of a cheap judge before a strong one.

A panel asks every judge everything and merges what they say of each pair by the (weighted) mean of
their probabilities, or by majority; pairs, ratings and lists alike. A cascade asks the first judge
about everything and the second only about the pairs or ratings that the first is unsure of. Where
pairs are chosen by answers, the first judge chooses them for all. In all of it, each judge's own
verdicts stay in the folder, with the judge's number in ``meta["member"]``.

    [judge]                         [judge]
    engine.model = "small"          engine.model = "small"
    [judge.panel]                   [judge.cascade]
    combine = "mean"                engine.model = "large"
    [[judge.panel.judges]]          unsure = 0.25
    engine.model = "another"
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from feedback.config import EngineOptions
from feedback.errors import RecipeError
from feedback.records import Comparison, Outcome, Verdict

__all__ = [
    "CascadeOptions",
    "Combination",
    "PanelJudge",
    "PanelOptions",
    "by_member",
    "combine",
    "is_unsure",
]


@dataclass(frozen=True, kw_only=True)
class PanelJudge:
    """A further judge of a panel."""

    engine: EngineOptions = field(default_factory=EngineOptions)
    """The judge."""
    template: str | None = None
    """Its template; None: the first judge's."""
    rubric: str | None = None
    """Its criteria; None: the first judge's."""
    weight: float = 1.0
    """Its weight in the mean."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not self.weight > 0:
            raise RecipeError(f"weight is {self.weight}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class PanelOptions:
    """Several judges on every pair."""

    judges: tuple[PanelJudge, ...] = ()
    """The judges beside the first one, each a [[judge.panel.judges]] table."""
    combine: Literal["mean", "majority"] = "mean"
    """mean: the weighted mean of their probabilities; majority: the share of judges for each."""
    weight: float = 1.0
    """Weight of the first judge in the mean."""


@dataclass(frozen=True, kw_only=True)
class CascadeOptions:
    """A strong judge for what the first one is unsure of."""

    engine: EngineOptions = field(default_factory=EngineOptions)
    """The strong judge."""
    template: str | None = None
    """Its template; None: the first judge's."""
    rubric: str | None = None
    """Its criteria; None: the first judge's."""
    unsure: float = 0.25
    """Ask it where the first judge's probability is nearer to 1/2 than this."""
    inconsistent: bool = True
    """Ask it where the first judge's two orders disagree."""
    min_mass: float = 0.5
    """Ask it where the first judge's offered labels hold less probability than this."""
    max_entropy: float = 0.5
    """Of ratings: ask it where the first judge spreads its probability over the scale by more than
    this share of the largest entropy (an even spread has 1, certainty 0)."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 0 <= self.unsure <= 0.5:
            raise RecipeError(f"unsure is {self.unsure}; it must be in [0, 0.5]")
        if not 0 <= self.min_mass <= 1:
            raise RecipeError(f"min_mass is {self.min_mass}; it must be in [0, 1]")
        if not 0 <= self.max_entropy <= 1:
            raise RecipeError(f"max_entropy is {self.max_entropy}; it must be in [0, 1]")


class Combination(NamedTuple):
    """How the comparisons of several judges on one pair become one."""

    rule: Literal["mean", "majority", "cascade"]
    weights: tuple[float, ...]
    """One per judge, the first judge's first."""

    def record(self) -> dict[str, Any]:
        """Return what ``run.json`` and the manifest say of it."""
        return {"rule": self.rule, "weights": list(self.weights)}

    @classmethod
    def read(cls, record: Mapping[str, Any] | None) -> Combination | None:
        """Return what ``record`` has written down; None for a single judge."""
        return None if record is None else cls(record["rule"], tuple(record["weights"]))


def by_member(verdicts: Iterable[Verdict]) -> dict[int, list[Verdict]]:
    """Return verdicts by the number of the judge that gave them."""
    members: dict[int, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        members[verdict.meta.get("member", 0)].append(verdict)
    return members


def is_unsure(comparison: Comparison, options: CascadeOptions) -> bool:
    """Return whether a pair goes on to the strong judge.

    It does where the first judge gave no verdict, disagrees with itself, holds little mass on the
    offered labels or is near 1/2. A call that failed does not: it is asked again.
    """
    if comparison.p is None:
        return comparison.outcome != "failed"
    if options.inconsistent and comparison.consistent is False:
        return True
    if comparison.mass is not None and comparison.mass < options.min_mass:
        return True
    return abs(comparison.p - 0.5) < options.unsure


def combine(members: Mapping[int, Comparison], combination: Combination) -> Comparison:
    """Merge the judges' comparisons of one pair.

    Args:
        members: by judge's number; all are of the same pair.
        combination: the rule.

    In a cascade the strong judge's comparison counts where it holds a verdict; where it failed, the
    pair has failed until it is asked again; where it declined, the first judge's stands. In a panel
    more than half of the judges must have a verdict: the rest may have declined.
    """
    if combination.rule == "cascade":
        return _cascade(members)
    return _panel(members, combination)


def _cascade(members: Mapping[int, Comparison]) -> Comparison:
    first = members.get(0)
    strong = members.get(1)
    if strong is None:
        assert first is not None
        return first
    votes = [*(first.votes if first is not None else []), *strong.votes]
    chosen = strong
    if strong.p is None and strong.outcome != "failed" and first is not None:
        chosen = first
    return dataclasses.replace(chosen, votes=votes)


def _panel(members: Mapping[int, Comparison], combination: Combination) -> Comparison:
    rows = [members[number] for number in sorted(members)]
    known = {number: row for number, row in members.items() if row.p is not None}
    a, b = rows[0].a, rows[0].b
    masses = [row.mass for row in rows if row.mass is not None]
    p: float | None = None
    outcome: Outcome = "failed"
    if len(known) * 2 > len(combination.weights):
        weights = {number: combination.weights[number] for number in known}
        values = {
            number: (row.p or 0.0) if combination.rule == "mean" else _side(row)
            for number, row in known.items()
        }
        if combination.rule == "majority":
            weights = dict.fromkeys(known, 1.0)
        p = math.fsum(weights[n] * values[n] for n in known) / math.fsum(weights.values())
        tied = p == 0.5 or all(row.outcome == "tie" for row in known.values())
        outcome = "tie" if tied else "decided"
    else:
        outcome = _gravest(rows)
    sides = {_side(row) for row in known.values()}
    return Comparison(
        prompt_id=rows[0].prompt_id,
        a=a,
        b=b,
        p=p,
        p_orders=[_mean([row.p_orders[place] for row in known.values()]) for place in (0, 1)],
        consistent=None
        if p is None
        else len(sides) == 1 and all(row.consistent is not False for row in known.values()),
        outcome=outcome,
        votes=[vote for row in rows for vote in row.votes],
        mass=min(masses, default=None),
    )


def _side(row: Comparison) -> float:
    """Return a judge's vote: 1 for a, 0 for b, 1/2 for a tie."""
    if row.outcome == "tie" or row.p is None or row.p == 0.5:
        return 0.5
    return 1.0 if row.p > 0.5 else 0.0


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _gravest(rows: Sequence[Comparison]) -> Outcome:
    """Return the outcome to act on first among the judges without a verdict."""
    order: tuple[Outcome, ...] = ("failed", "truncated", "unparsed", "refused")
    found = {row.outcome for row in rows}
    return next((outcome for outcome in order if outcome in found), "failed")
