"""Verdicts of any kind as comparisons of pairs, streamed prompt by prompt.

A pairwise verdict is one order of a pair. A listwise one is every pair in it, the completion that
stood earlier counting as shown first. Two ratings are a pair without an order: P(a preferred) is
the chance that a draw from one scale distribution beats a draw from the other, level draws halved.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from feedback.ordering import Orders, merge_orders
from feedback.panel import Combination, by_member, combine
from feedback.panel_ratings import strongest_ratings
from feedback.ranking import criterion_of
from feedback.records import Comparison, Outcome, Verdict
from feedback.verdict_index import RUN_RECORD, VerdictIndex

__all__ = [
    "compare_ratings",
    "comparisons",
    "member_comparisons",
    "pairs_in_list",
    "prompt_comparisons",
    "run_record",
]


def pairs_in_list(verdict: Verdict) -> Iterator[Verdict]:
    """Yield the pairwise verdicts that a listwise one contains, under the same verdict id."""
    place = {name: number for number, group in enumerate(verdict.ranking or []) for name in group}
    for first, second in itertools.combinations(verdict.shown, 2):
        outcome: Outcome = verdict.outcome
        winner = None
        if outcome in ("decided", "tie"):
            outcome = "tie" if place[first] == place[second] else "decided"
            winner = min((first, second), key=place.__getitem__) if outcome == "decided" else None
        yield dataclasses.replace(
            verdict,
            kind="pairwise",
            shown=[first, second],
            outcome=outcome,
            winner=winner,
            probs=None,
            ranking=None,
        )


def compare_ratings(
    first: Sequence[Verdict],
    second: Sequence[Verdict],
    *,
    weights: Mapping[str, float] | None = None,
) -> Comparison:
    """Compare two completions of one prompt by their ratings (all repeats of each).

    With several criteria rated one by one, P(a preferred) is the weighted mean over them, and each
    criterion must have been rated on both sides.
    """
    a, b = sorted((first, second), key=lambda verdicts: verdicts[0].shown[0])
    undecided = [row.outcome for row in (*a, *b) if row.outcome != "decided"]
    p = None if undecided else _mean_chance(a, b, weights or {"": 1.0})
    if p is None and not undecided:
        undecided = ["failed"]
    outcome: Outcome = undecided[0] if undecided else "tie" if p == 0.5 else "decided"
    masses = [row.mass for row in (*a, *b) if row.mass is not None]
    return Comparison(
        prompt_id=a[0].prompt_id,
        a=a[0].shown[0],
        b=b[0].shown[0],
        p=p,
        p_orders=[p, None],
        consistent=None,
        outcome=outcome,
        votes=[row.verdict_id for row in (*a, *b)],
        mass=min(masses, default=None),
    )


def _mean_chance(
    a: Sequence[Verdict], b: Sequence[Verdict], weights: Mapping[str, float]
) -> float | None:
    parts = []
    for criterion, weight in weights.items():
        mine = [row for row in a if criterion_of(row) == criterion]
        other = [row for row in b if criterion_of(row) == criterion]
        if not mine or not other:
            return None
        chances = [_beats(one, two) for one in mine for two in other]
        parts.append(weight * math.fsum(chances) / len(chances))
    return math.fsum(parts) / math.fsum(weights.values())


def _beats(one: Verdict, two: Verdict) -> float:
    """Return P(one rated above two), level ratings counting half."""
    if one.probs is None or two.probs is None:
        mine, other = (one.scores or [0.0])[0], (two.scores or [0.0])[0]
        return 1.0 if mine > other else 0.0 if mine < other else 0.5
    total = below = 0.0
    for p, q in zip(one.probs, two.probs, strict=True):
        total += p * (below + q / 2)
        below += q
    return total


def prompt_comparisons(
    verdicts: Iterable[Verdict],
    *,
    orders: Orders = "both",
    weights: Mapping[str, float] | None = None,
    combination: Combination | None = None,
) -> list[Comparison]:
    """Return the comparisons in the verdicts of one prompt, of whatever kind.

    Args:
        verdicts: of one prompt.
        orders: which were asked.
        weights: of criteria that were rated one by one.
        combination: how several judges' comparisons are merged; None for a single judge.
    """
    if combination is not None:
        return _several(list(verdicts), combination, orders=orders, weights=weights)
    pairs: dict[tuple[str, ...], list[Verdict]] = defaultdict(list)
    rated: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        if verdict.kind == "rating":
            rated[verdict.shown[0]].append(verdict)
            continue
        single = [verdict] if verdict.kind == "pairwise" else pairs_in_list(verdict)
        for row in single:
            pairs[tuple(sorted(row.shown))].append(row)
    found = [merge_orders(rows, orders=orders) for rows in pairs.values()]
    found += [
        compare_ratings(*both, weights=weights)
        for both in itertools.combinations(rated.values(), 2)
    ]
    return found


def _several(
    verdicts: Sequence[Verdict],
    combination: Combination,
    *,
    orders: Orders,
    weights: Mapping[str, float] | None,
) -> list[Comparison]:
    if combination.rule == "cascade" and any(row.kind == "rating" for row in verdicts):
        # One completion may be rated by the first judge, the other one by the strong judge.
        return prompt_comparisons(strongest_ratings(verdicts), orders=orders, weights=weights)
    pairs_of: dict[tuple[str, str], dict[int, Comparison]] = defaultdict(dict)
    for number, found in member_comparisons(verdicts, orders=orders, weights=weights).items():
        for one in found:
            pairs_of[one.a, one.b][number] = one
    return [combine(members, combination) for members in pairs_of.values()]


def member_comparisons(
    verdicts: Iterable[Verdict],
    *,
    orders: Orders = "both",
    weights: Mapping[str, float] | None = None,
) -> dict[int, list[Comparison]]:
    """Return the comparisons of one prompt by the number of the judge that made them."""
    return {
        number: prompt_comparisons(rows, orders=orders, weights=weights)
        for number, rows in by_member(verdicts).items()
    }


def run_record(folder: Path) -> dict[str, Any]:
    """Return what a verdict folder's run has written down of itself; {} where it has not."""
    path = folder / RUN_RECORD
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def comparisons(
    source: Path | VerdictIndex,
    *,
    orders: Orders = "both",
    prompts: Iterable[str] | None = None,
    weights: Mapping[str, float] | None = None,
    combination: Combination | None = None,
) -> Iterator[Comparison]:
    """Stream the comparisons of a verdict folder, prompt by prompt; memory does not grow.

    Args:
        source: verdict folder, or its index (which should hold failed calls too).
        orders: which orders the run asked for; its manifest says.
        prompts: prompt ids to read, in this order; None: all, as they first appear.
        weights: of criteria that were rated one by one; a folder's own record says.
        combination: how several judges are merged; a folder's own record says.
    """
    if isinstance(source, Path):
        record = run_record(source)
        with VerdictIndex(source, failed=True) as index:
            yield from comparisons(
                index,
                orders=orders,
                prompts=prompts,
                weights=record.get("criteria"),
                combination=Combination.read(record.get("combine")),
            )
        return
    for prompt_id in source.prompts() if prompts is None else prompts:
        yield from prompt_comparisons(
            source.verdicts(prompt_id), orders=orders, weights=weights, combination=combination
        )
