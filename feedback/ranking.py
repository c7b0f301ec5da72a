"""From what a judge said about one prompt to one ranking row: scores, order, pair probabilities.

Three kinds of verdicts lead here:

* comparisons of pairs: Bradley-Terry strengths (Davidson's where some pairs were called ties);
* whole lists: Plackett-Luce strengths over all orders shown;
* ratings: the mean score of each completion, criteria weighted.

The row's ``source`` holds what is known about the fit: intervals, cycles, whether all completions
hang together, agreement between the lists. What was not judged has no score and no place.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from feedback.bradley_terry import Duel, fit_bradley_terry, is_connected
from feedback.cycles import cyclic_triples, kendall_tau
from feedback.plackett_luce import fit_plackett_luce
from feedback.records import Candidates, Ranking, Verdict
from feedback.strengths import Strengths

__all__ = [
    "RankedPair",
    "criterion_of",
    "mean_scores",
    "rank_lists",
    "rank_pairs",
    "rank_ratings",
    "rank_scores",
    "tied_groups",
]

# Each compared pair counts as if it had also gone this much either way: one call that says "A" with
# certainty moves the strengths about 3 apart, not infinitely far. Unlike a prior on the strengths
# themselves it keeps the order of a consistent judge.
_DOUBT = 0.05
# Only there so that completions in no common comparison have finite strengths at all.
_LOOSE_PRIOR_SD = 10.0
_DIGITS = 6


class RankedPair(NamedTuple):
    """A comparison as a ranking uses it: completion ids and P(first preferred)."""

    first: str
    second: str
    p: float
    tie: bool = False


def rank_pairs(candidates: Candidates, pairs: Sequence[RankedPair]) -> Ranking | None:
    """Return the ranking by pairwise comparisons; None without any."""
    if not pairs:
        return None
    triples = _triples(candidates, pairs)
    items = sorted({item for i, j, _ in triples for item in (i, j)})
    local = {item: index for index, item in enumerate(items)}
    duels = [
        Duel(local[i], local[j], _DOUBT, _DOUBT, 1.0)
        if pair.tie
        else Duel(local[i], local[j], p + _DOUBT, 1.0 - p + _DOUBT)
        for (i, j, p), pair in zip(triples, pairs, strict=True)
    ]
    ties = any(duel.tie for duel in duels)
    connected = is_connected(len(items), duels)
    fit = fit_bradley_terry(
        len(items), duels, ties=ties, prior_sd=None if connected else _LOOSE_PRIOR_SD
    )
    cycles = cyclic_triples(len(candidates.completions), triples)
    source: dict[str, Any] = {
        "method": "bradley-terry",
        "ties": "davidson" if ties else "none",
        "connected": connected,
        "cyclic_triples": cycles.cyclic,
        "complete_triples": cycles.complete,
        "cycles": cycles.triples,
    }
    return _row(candidates, fit, items, triples, source)


def _triples(candidates: Candidates, pairs: Sequence[RankedPair]) -> list[tuple[int, int, float]]:
    place = {row.completion_id: index for index, row in enumerate(candidates.completions)}
    return [(place[pair.first], place[pair.second], pair.p) for pair in pairs]


def rank_lists(
    candidates: Candidates, verdicts: Sequence[Verdict], pairs: Sequence[RankedPair]
) -> Ranking | None:
    """Return the ranking by whole lists (all orders shown, all repeats); None without any.

    Args:
        candidates: the prompt's completions.
        verdicts: of kind listwise.
        pairs: the comparisons that the lists contain.
    """
    place = {row.completion_id: index for index, row in enumerate(candidates.completions)}
    orders = [
        [[place[name] for name in group] for group in verdict.ranking]
        for verdict in verdicts
        if verdict.ranking is not None and verdict.outcome in ("decided", "tie")
    ]
    if not orders:
        return None
    items = sorted({item for order in orders for group in order for item in group})
    local = {item: index for index, item in enumerate(items)}
    try:
        fit = fit_plackett_luce(
            len(items),
            [[[local[item] for item in group] for group in order] for order in orders],
            prior_sd=_LISTS_PRIOR_SD,
        )
    except ValueError:  # too many possible ties to sum over
        return rank_pairs(candidates, pairs)
    source = {
        "method": "plackett-luce",
        "lists": len(orders),
        "list_agreement": _agreement(orders),
    }
    return _row(candidates, fit, items, _triples(candidates, pairs), source)


# Lists that all agree leave plain Plackett-Luce without a finite optimum.
_LISTS_PRIOR_SD = 3.0


def _agreement(orders: Sequence[Sequence[Sequence[int]]]) -> float | None:
    """Return the mean Kendall tau between the lists; None for a single one."""
    positions = [
        {item: rank for rank, group in enumerate(order) for item in group} for order in orders
    ]
    taus = []
    for first, second in combinations(positions, 2):
        shared = sorted(set(first) & set(second))
        tau = kendall_tau([first[item] for item in shared], [second[item] for item in shared])
        if not math.isnan(tau):
            taus.append(tau)
    return round(math.fsum(taus) / len(taus), _DIGITS) if taus else None


def rank_ratings(
    candidates: Candidates,
    verdicts: Sequence[Verdict],
    pairs: Sequence[RankedPair],
    *,
    weights: Mapping[str, float] | None = None,
) -> Ranking | None:
    """Return the ranking by ratings: each completion's mean score; None where none was rated.

    Args:
        candidates: the prompt's completions.
        verdicts: of kind rating; repeats are averaged.
        pairs: the comparisons that the ratings make.
        weights: of criteria that were rated one by one.
    """
    return rank_scores(candidates, mean_scores(verdicts, weights=weights), pairs, weights=weights)


def rank_scores(
    candidates: Candidates,
    found: Mapping[str, float],
    pairs: Sequence[RankedPair],
    *,
    weights: Mapping[str, float] | None = None,
) -> Ranking | None:
    """Return the ranking by scores, given by completion id; None without any."""
    scores = [found.get(row.completion_id) for row in candidates.completions]
    if not found:
        return None
    return Ranking(
        prompt=candidates.prompt,
        completions=[row.completion for row in candidates.completions],
        scores=scores,
        ranking=tied_groups(scores),
        prompt_id=candidates.prompt_id,
        comparisons=_triples(candidates, pairs),
        source={"method": "rating", "criteria": dict(weights or {})},
    )


def mean_scores(
    verdicts: Sequence[Verdict], *, weights: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Return each rated completion's score by its id: repeats averaged, criteria weighted.

    A completion counts as rated when each of its calls gave a score, on every criterion.
    """
    heard: dict[str, dict[str, list[float | None]]] = defaultdict(lambda: defaultdict(list))
    for verdict in verdicts:
        score = verdict.scores[0] if verdict.scores and verdict.outcome == "decided" else None
        heard[verdict.shown[0]][criterion_of(verdict)].append(score)
    needed = dict(weights) if weights else {"": 1.0}
    total = math.fsum(needed.values())
    means = {}
    for name, found in heard.items():
        values = [found.get(criterion, [None]) for criterion in needed]
        known = [[score for score in scores if score is not None] for scores in values]
        if all(len(some) == len(all_) for some, all_ in zip(known, values, strict=True)):
            parts = [
                weight * math.fsum(scores) / len(scores)
                for weight, scores in zip(needed.values(), known, strict=True)
            ]
            means[name] = round(math.fsum(parts) / total, _DIGITS)
    return means


def criterion_of(verdict: Verdict) -> str:
    """Return the criterion that a rating is about; an empty string for the whole rubric."""
    return str(verdict.meta.get("criterion", ""))


def tied_groups(scores: Sequence[float | None]) -> list[list[int]]:
    """Return groups of indices with equal scores, best first; without a score, in no group."""
    known: dict[float, list[int]] = defaultdict(list)
    for index, score in enumerate(scores):
        if score is not None:
            known[score].append(index)
    return [known[score] for score in sorted(known, reverse=True)]


def _row(
    candidates: Candidates,
    fit: Strengths,
    items: Sequence[int],
    pairs: list[tuple[int, int, float]],
    source: dict[str, Any],
) -> Ranking:
    scores: list[float | None] = [None] * len(candidates.completions)
    intervals: list[list[float] | None] = [None] * len(candidates.completions)
    for item, value, (low, high) in zip(items, fit.values, fit.intervals(), strict=True):
        scores[item] = round(float(value), _DIGITS) + 0.0
        intervals[item] = [round(float(low), _DIGITS), round(float(high), _DIGITS)]
    return Ranking(
        prompt=candidates.prompt,
        completions=[row.completion for row in candidates.completions],
        scores=scores,
        ranking=tied_groups(scores),
        prompt_id=candidates.prompt_id,
        comparisons=pairs,
        source={**source, "intervals": intervals},
    )
