"""Agreement with gold labels and with people: accuracy, kappa, alpha, leave-one-out, human ceiling.

Every statistic is a function of sums over prompts, so that one bootstrap serves all. Labels are a,
b and tie. Two conventions for ties, each named where it is used: *ties half* (pairs whose gold is a
tie are left out, a tie by the judge counts one half) and *three-way* (a tie is a label like any
other and must be matched).

Cohen 1960; Krippendorff 2011, "Computing Krippendorff's alpha-reliability", nominal data.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feedback.intervals import Estimate, Resampler, average, difference, nothing, proportion
from feedback.observations import Pairs
from feedback.records import GoldPair

__all__ = [
    "LeaveOneOut",
    "accuracy_halves",
    "alpha_of_sums",
    "cohen_kappa",
    "confusion_columns",
    "expected_calibration_error",
    "halves",
    "kappa_of_sums",
    "krippendorff_alpha",
    "leave_one_out",
    "three_way",
    "unanimous",
    "vote_structure",
]

Floats = npt.NDArray[np.float64]
_CODES = {"a": 1.0, "b": -1.0, "tie": 0.0}


def halves(verdict: Floats, gold: Floats) -> Floats:
    """Return 1 right, 0 wrong, 1/2 tie by the judge; NaN where gold ties or either is unknown."""
    score = np.where(verdict == 0, 0.5, (verdict == gold).astype(float))
    return np.where(np.isfinite(verdict) & np.isfinite(gold) & (gold != 0), score, np.nan)


def accuracy_halves(pairs: Pairs, resampler: Resampler, verdict: Floats | None = None) -> Estimate:
    """Return accuracy by the ties-half convention; exact where no verdict is a tie."""
    score = halves(pairs.verdict if verdict is None else verdict, pairs.gold)
    rows = np.isfinite(score)
    values, groups = score[rows], pairs.prompt[rows]
    if not len(values):
        return nothing("no pair has both a verdict and a gold winner")
    return average(resampler, groups, values)


def three_way(pairs: Pairs) -> Estimate:
    """Return the share of pairs whose label (a, b or tie) equals gold's."""
    verdict = pairs.verdict
    rows = np.isfinite(verdict) & np.isfinite(pairs.gold)
    return proportion(verdict[rows] == pairs.gold[rows], pairs.prompt[rows])


# --- kappa and alpha -------------------------------------------------------------------------


def confusion_columns(left: npt.ArrayLike, right: npt.ArrayLike) -> Floats:
    """Return one-hot columns of the 3 x 3 confusion of two codings in {-1, 0, 1}: (n, 9)."""
    one = np.asarray(left, float).astype(int) + 1
    two = np.asarray(right, float).astype(int) + 1
    columns = np.zeros((len(one), 9))
    columns[np.arange(len(one)), one * 3 + two] = 1.0
    return columns


def kappa_of_sums(sums: Floats) -> Floats:
    """Return Cohen's kappa from confusion sums (..., 9); NaN where chance agreement is total."""
    table = sums.reshape(*sums.shape[:-1], 3, 3)
    total = table.sum(axis=(-1, -2))
    observed = np.trace(table, axis1=-2, axis2=-1) / total
    expected = (table.sum(axis=-1) * table.sum(axis=-2)).sum(axis=-1) / total**2
    return np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)


def cohen_kappa(
    left: Floats, right: Floats, groups: npt.NDArray[np.int64], resampler: Resampler
) -> Estimate:
    """Return Cohen's kappa of two codings in {-1, 0, 1}; pairs unknown to either are left out."""
    rows = np.isfinite(left) & np.isfinite(right)
    columns = confusion_columns(left[rows], right[rows])
    return resampler.estimate(groups[rows], columns, kappa_of_sums)


def coincidence_columns(units: Iterable[Sequence[float]]) -> Floats:
    """Return each unit's share of the coincidence matrix: (units, 9); units of one coder are 0."""
    rows = []
    for codes in units:
        tally = np.zeros(3)
        for code in codes:
            tally[int(code) + 1] += 1
        size = tally.sum()
        pairs = np.outer(tally, tally) - np.diag(tally)
        rows.append((pairs / (size - 1) if size > 1 else pairs * 0).ravel())
    return np.array(rows).reshape(-1, 9)


def alpha_of_sums(sums: Floats) -> Floats:
    """Return Krippendorff's nominal alpha from coincidence sums (..., 9)."""
    table = sums.reshape(*sums.shape[:-1], 3, 3)
    margin = table.sum(axis=-1)
    total = margin.sum(axis=-1)
    apart = total - np.trace(table, axis1=-2, axis2=-1)
    by_chance = total**2 - (margin**2).sum(axis=-1)
    return np.where(by_chance > 0, 1 - (total - 1) * apart / by_chance, np.nan)


def krippendorff_alpha(
    units: Sequence[Sequence[float]], groups: npt.NDArray[np.int64], resampler: Resampler
) -> Estimate:
    """Return alpha over units, each a list of codes in {-1, 0, 1}, one per coder who answered."""
    if not units:
        return nothing()
    columns = coincidence_columns(units)
    rows = columns.any(axis=1)
    return resampler.estimate(groups[rows], columns[rows], alpha_of_sums)


# --- people ----------------------------------------------------------------------------------


class LeaveOneOut(NamedTuple):
    """How one person, and the judge in that person's place, agree with the rest; ties half."""

    human: Estimate
    """Mean agreement of each person with the majority of the others: the human ceiling."""
    judge: Estimate
    """The judge's agreement with the same majorities."""
    difference: Estimate
    """Judge less human, on the same votes."""
    by_annotator: list[tuple[str, Estimate, Estimate]]
    """Name, that person's agreement with the rest, the judge's agreement with the same rest."""


def _oriented_votes(row: GoldPair) -> list[tuple[str, float]]:
    """Return (annotator, code), as seen from the completion whose id sorts first."""
    sign = 1.0 if row.a <= row.b else -1.0
    names = row.annotators or [f"vote {place + 1}" for place in range(len(row.votes))]
    return [(name, sign * _CODES[vote]) for name, vote in zip(names, row.votes, strict=True)]


def _majority(codes: Iterable[float]) -> float | None:
    """Return the winner (1 or -1) that most others named; None where there is none."""
    tally = Counter(codes).most_common()
    if not tally or (len(tally) > 1 and tally[0][1] == tally[1][1]) or tally[0][0] == 0:
        return None
    return tally[0][0]


def leave_one_out(pairs: Pairs, resampler: Resampler) -> LeaveOneOut | None:
    """Hold every person, and the judge, against the majority of the other people.

    Votes whose rest has no single winner are left out. None where no pair has three votes.
    """
    verdict = pairs.verdict
    groups: list[int] = []
    names: list[str] = []
    scores: list[tuple[float, float]] = []
    for row, gold in enumerate(pairs.gold_pairs):
        if gold is None or len(gold.votes) < 3 or not np.isfinite(verdict[row]):
            continue
        votes = _oriented_votes(gold)
        for place, (name, code) in enumerate(votes):
            rest = _majority(other for index, (_, other) in enumerate(votes) if index != place)
            if rest is not None:
                groups.append(int(pairs.prompt[row]))
                names.append(name)
                scores.append((_half(code, rest), _half(float(verdict[row]), rest)))
    if not scores:
        return None
    prompts = np.array(groups)
    table = np.array(scores)
    return LeaveOneOut(
        human=average(resampler, prompts, table[:, 0]),
        judge=average(resampler, prompts, table[:, 1]),
        difference=difference(resampler, prompts, table[:, 1] - table[:, 0]),
        by_annotator=_by_annotator(np.array(names), prompts, table, resampler),
    )


def _half(code: float, rest: float) -> float:
    return 0.5 if code == 0 else float(code == rest)


def _by_annotator(
    names: npt.NDArray[np.str_], prompts: npt.NDArray[np.int64], table: Floats, resampler: Resampler
) -> list[tuple[str, Estimate, Estimate]]:
    found = []
    for name in sorted(set(names.tolist())):
        rows = names == name
        human = average(resampler, prompts[rows], table[rows, 0])
        judge = average(resampler, prompts[rows], table[rows, 1])
        found.append((name, human, judge))
    return found


def unanimous(gold: Sequence[GoldPair]) -> Estimate:
    """Return the share of pairs with several votes whose votes all agree."""
    rows = [row for row in gold if len(row.votes) > 1]
    names = {row.prompt_id: index for index, row in enumerate(rows)}
    groups = np.array([names[row.prompt_id] for row in rows], int)
    return proportion([len(set(row.votes)) == 1 for row in rows], groups)


def vote_structure(gold: Iterable[GoldPair]) -> Counter[tuple[int, int, int]]:
    """Count pairs by (votes for the winner, votes against it, ties): (5, 0, 0) is unanimous."""
    found: Counter[tuple[int, int, int]] = Counter()
    for row in gold:
        if row.votes:
            tally = Counter(row.votes)
            high, low = sorted((tally["a"], tally["b"]), reverse=True)
            found[(high, low, tally["tie"])] += 1
    return found


# --- confidence ------------------------------------------------------------------------------


def expected_calibration_error(
    confidence: Floats,
    hit: Floats,
    groups: npt.NDArray[np.int64],
    resampler: Resampler,
    *,
    bins: int = 10,
) -> Estimate:
    """Return the mean gap between stated confidence and share right, over equal-width bins.

    Args:
        confidence: (n,) in [0.5, 1], the probability given to the side that was named.
        hit: (n,) 1 where that side is gold's, else 0.
        groups: (n,) prompts.
        resampler: of the card.
        bins: over [0.5, 1].

    Noise alone makes it positive: with few pairs a perfectly calibrated judge shows a few percent.
    """
    if not len(confidence):
        return nothing()
    place = np.minimum(((confidence - 0.5) * 2 * bins).astype(int), bins - 1)
    columns = np.zeros((len(place), bins + 1))
    columns[np.arange(len(place)), place] = confidence - hit
    columns[:, -1] = 1.0
    return resampler.estimate(
        groups, columns, lambda sums: np.abs(sums[:, :-1]).sum(axis=1) / sums[:, -1]
    )
