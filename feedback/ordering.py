"""Which pairs are asked, in which orders, and how the orders of one pair become a comparison.

Both orders by default: the soft label is the mean of P(a preferred) over the two, so a judge that
only looks at the place says 1/2. Where an order is missing, was refused or could not be read, the
comparison has that outcome and no probability: half an answer is not a label.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

from feedback.judge import Question
from feedback.records import (
    Candidates,
    Comparison,
    Completion,
    Outcome,
    Verdict,
    content_id,
    normalise_text,
)

__all__ = [
    "Orders",
    "PairPolicy",
    "choose_pairs",
    "distinct_completions",
    "first_probability",
    "merge_orders",
    "pair_questions",
]

Orders = Literal["both", "one", "rotations"]
"""``rotations`` is for lists: each completion stands once at each place. Of a pair it is both."""
PairPolicy = Literal["all", "first", "random", "cross", "sort", "swiss", "active"]
"""The last three choose pairs by the answers so far (``feedback.pair_schedule``)."""
# Which order's outcome a comparison without a probability takes: the one to act on first.
_GRAVITY: tuple[Outcome, ...] = ("failed", "truncated", "unparsed", "refused")


def distinct_completions(candidates: Candidates) -> list[Completion]:
    """Return the completions without empty ones and repeats (after normalisation), in order."""
    seen: set[str] = set()
    kept = []
    for completion in candidates.completions:
        text = normalise_text(completion.completion)
        if text and text not in seen:
            seen.add(text)
            kept.append(completion)
    return kept


def choose_pairs(
    candidates: Candidates,
    policy: PairPolicy = "all",
    *,
    per_prompt: int | None = None,
    seed: int = 0,
) -> list[tuple[Completion, Completion]]:
    """Return the pairs of one prompt that are to be compared.

    Args:
        candidates: the prompt's completions; texts equal after normalisation are never paired.
        policy: ``all``; ``first``: the first completion with each other; ``cross``: completions
            of different models; ``random``: all pairs in seeded order.
        per_prompt: at most so many, in the seeded order for ``random``; None: no limit.
        seed: of the random order.
    """
    completions = distinct_completions(candidates)
    pairs = [
        (first, second)
        for place, first in enumerate(completions)
        for second in completions[place + 1 :]
    ]
    if policy == "first":
        pairs = [pair for pair in pairs if pair[0] is completions[0]]
    elif policy == "cross":
        pairs = [pair for pair in pairs if pair[0].model != pair[1].model]
    elif policy == "random":
        pairs.sort(
            key=lambda pair: content_id(
                seed, candidates.prompt_id, pair[0].completion_id, pair[1].completion_id
            )
        )
    return pairs if per_prompt is None else pairs[:per_prompt]


def pair_questions(
    candidates: Candidates,
    pairs: Iterable[tuple[Completion, Completion]],
    *,
    orders: Orders = "both",
    repeats: int = 1,
    seed: int = 0,
) -> Iterator[Question]:
    """Yield the questions about ``pairs``: both orders of a pair adjacent, or a seeded one."""
    for first, second in pairs:
        shown = [(first, second), (second, first)]
        if orders == "one":
            ids = sorted((first.completion_id, second.completion_id))
            side = int(content_id("order", seed, candidates.prompt_id, ids, length=8), 16) % 2
            # The side is drawn for the sorted pair, so it does not depend on who came first.
            shown = [pair for pair in shown if (pair[0].completion_id == ids[0]) == (side == 0)]
        for repeat in range(repeats):
            for one, two in shown:
                yield Question(
                    prompt_id=candidates.prompt_id,
                    prompt=candidates.prompt,
                    shown=(one.completion_id, two.completion_id),
                    completions=(one.completion, two.completion),
                    gold=candidates.gold,
                    repeat=repeat,
                )


def first_probability(verdict: Verdict) -> float | None:
    """Return P(the completion shown first is preferred), a tie counting half; None if undecided.

    From the label probabilities where there are any; else 1, 1/2 or 0 by the verdict's winner.
    """
    if verdict.outcome not in ("decided", "tie"):
        return None
    if verdict.probs is not None:
        tie = verdict.probs[2] if len(verdict.probs) > 2 else 0.0
        return verdict.probs[0] + tie / 2
    if verdict.outcome == "tie":
        return 0.5
    return 1.0 if verdict.winner == verdict.shown[0] else 0.0


class _Order(NamedTuple):
    """What one order of a pair says, its repeats averaged."""

    p: float | None
    """P(a preferred)."""
    tied: bool
    outcome: Outcome


def _read_order(verdicts: Sequence[Verdict], a: str) -> _Order | None:
    if not verdicts:
        return None
    values: list[float] = []
    for verdict in verdicts:
        value = first_probability(verdict)
        if value is None:
            worst = min((row.outcome for row in verdicts), key=_gravity)
            return _Order(None, False, worst)
        values.append(value if verdict.shown[0] == a else 1.0 - value)
    tied = all(verdict.outcome == "tie" for verdict in verdicts)
    return _Order(math.fsum(values) / len(values), tied, "tie" if tied else "decided")


def _gravity(outcome: Outcome) -> int:
    return _GRAVITY.index(outcome) if outcome in _GRAVITY else len(_GRAVITY)


def _side(order: _Order) -> int:
    """Return which way an order points: 1 for a, -1 for b, 0 for a tie."""
    if order.p is None or order.tied or order.p == 0.5:
        return 0
    return 1 if order.p > 0.5 else -1


def merge_orders(verdicts: Sequence[Verdict], *, orders: Orders = "both") -> Comparison:
    """Merge the verdicts on one pair (both orders, all repeats) into a comparison.

    ``a`` is the completion whose id sorts first: the result does not depend on the order of the
    rows. The outcome is ``tie`` where every order says so or their mean is exactly 1/2, otherwise
    ``decided``; ``failed`` where an order is missing, and an undecided order's where there is one.

    Args:
        verdicts: of one pair of one prompt, at least one.
        orders: which were asked.

    Raises:
        ValueError: the verdicts are not on one pair.
    """
    a, b = sorted(verdicts[0].shown)
    if any(set(verdict.shown) != {a, b} for verdict in verdicts):
        raise ValueError("the verdicts are not on one pair")
    read = [
        _read_order([verdict for verdict in verdicts if verdict.shown[0] == first], a)
        for first in (a, b)
    ]
    asked = [order for order in read if order is not None]
    missing = orders != "one" and len(asked) < 2
    values = [order.p for order in asked if order.p is not None]
    complete = not missing and len(values) == len(asked)
    p = math.fsum(values) / len(values) if complete else None
    outcome: Outcome
    if p is None:
        undecided = [order.outcome for order in asked if order.p is None]
        outcome = min(undecided, key=_gravity) if undecided else "failed"
    else:
        outcome = "tie" if p == 0.5 or all(order.tied for order in asked) else "decided"
    masses = [verdict.mass for verdict in verdicts if verdict.mass is not None]
    return Comparison(
        prompt_id=verdicts[0].prompt_id,
        a=a,
        b=b,
        p=p,
        p_orders=[None if order is None else order.p for order in read],
        consistent=_side(asked[0]) == _side(asked[1])
        if p is not None and len(asked) == 2
        else None,
        outcome=outcome,
        votes=[verdict.verdict_id for verdict in verdicts],
        mass=min(masses, default=None),
    )
