"""Which pairs of one prompt to ask next, given the answers so far, to rank its completions.

``next_pairs`` is a pure function of the answers: a run that stops and resumes asks the same pairs
again only if they were never answered, and many prompts' rankings advance side by side.

    answers = {}
    while pairs := next_pairs(k, answers, plan):
        answers |= ask(pairs)          # {(i, j): P(i preferred), or None if undecided}

| method | pairs asked of k completions | for |
|---|---|---|
| ``all`` | k (k - 1) / 2 | small k |
| ``sort`` | about k log2 k, one at a time per merge | a judge that is sure of itself |
| ``swiss`` | k / 2 a round, log2 k + 1 rounds | many at once, no model |
| ``active`` | as many as the budget, where they tell most | a noisy judge and a tight budget |

Calls are pairs times orders times repeats; the budget counts pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

from feedback.bradley_terry import Duel, fit_bradley_terry
from feedback.records import content_id

__all__ = ["Answers", "Method", "Pair", "SchedulePlan", "most_pairs", "next_pairs"]

Method = Literal["all", "sort", "swiss", "active", "random"]
Pair = tuple[int, int]
"""Two indices, the smaller first."""
Answers = Mapping[Pair, float | None]
"""P(first of the pair preferred); None where there is no verdict, which is not asked again."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulePlan:
    """How the pairs of a prompt are chosen."""

    method: Method = "all"
    """``random`` is the yardstick for the others: pairs in seeded order, up to the budget."""
    budget: int | None = None
    """Most pairs per prompt; None: what the method needs, and k log2 k for ``active``."""
    batch: int = 0
    """Pairs asked at a time by ``active``; 0: a quarter of k."""
    prior_sd: float = 1.5
    """Spread of strengths expected before any answer, in log-odds (``active``)."""
    seed: int = 0


def next_pairs(count: int, answers: Answers, plan: SchedulePlan, *, salt: str = "") -> list[Pair]:
    """Return the pairs to ask now; empty when the ranking is done or its budget spent.

    Args:
        count: completions of the prompt.
        answers: to all pairs asked so far.
        plan: method and budget.
        salt: mixed into the seed (the prompt's id), so that prompts differ.
    """
    left = most_pairs(count, plan) - len(answers)
    if left <= 0 or count < 2:
        return []
    schedule = {"all": _all, "sort": _sort, "swiss": _swiss, "active": _active, "random": _random}
    pairs = schedule[plan.method](count, answers, plan, salt)
    return [pair for pair in pairs if pair not in answers][:left]


def most_pairs(count: int, plan: SchedulePlan) -> int:
    """Return the most pairs that a prompt with ``count`` completions can be asked about."""
    if count < 2:
        return 0
    complete = count * (count - 1) // 2
    rounds = math.ceil(math.log2(count))
    needed = {
        "all": complete,
        "sort": count * rounds - 2**rounds + 1,
        "swiss": (rounds + 1) * (count // 2),
        "active": count * rounds,
        "random": count * rounds,
    }[plan.method]
    if plan.budget is not None:
        needed = min(needed, plan.budget) if plan.method == "sort" else plan.budget
    return min(needed, complete)


def _all(count: int, answers: Answers, plan: SchedulePlan, salt: str) -> list[Pair]:
    return list(combinations(range(count), 2))


def _shuffled(count: int, plan: SchedulePlan, salt: str) -> list[int]:
    """Return the items in seeded order: the order of the candidates must not matter."""
    return sorted(range(count), key=lambda item: content_id("schedule", plan.seed, salt, item))


def _random(count: int, answers: Answers, plan: SchedulePlan, salt: str) -> list[Pair]:
    pairs = combinations(range(count), 2)
    return sorted(pairs, key=lambda pair: content_id("pair", plan.seed, salt, pair))


class _Unknown(Exception):
    """A comparison that has no answer yet."""

    def __init__(self, pairs: list[Pair]):
        super().__init__()
        self.pairs = pairs


def _sort(count: int, answers: Answers, plan: SchedulePlan, salt: str) -> list[Pair]:
    """Merge sort with the judge as comparator; the merges of one level wait side by side."""
    try:
        _merge_sort(_shuffled(count, plan, salt), answers)
    except _Unknown as unknown:
        return unknown.pairs
    return []


def _merge_sort(items: list[int], answers: Answers) -> list[int]:
    if len(items) < 2:
        return items
    halves, waiting = [], []
    for half in (items[: len(items) // 2], items[len(items) // 2 :]):
        try:
            halves.append(_merge_sort(half, answers))
        except _Unknown as unknown:
            waiting += unknown.pairs
    if waiting:
        raise _Unknown(waiting)
    left, right = halves
    merged: list[int] = []
    while left and right:
        merged.append((right if _prefers(right[0], left[0], answers) else left).pop(0))
    return merged + left + right


def _prefers(first: int, second: int, answers: Answers) -> bool:
    """Return whether ``first`` was preferred; a tie or no verdict leaves the order as it is."""
    pair = (min(first, second), max(first, second))
    if pair not in answers:
        raise _Unknown([pair])
    p = answers[pair]
    if p is None or p == 0.5:
        return False
    return (p > 0.5) == (first == pair[0])


def _swiss(count: int, answers: Answers, plan: SchedulePlan, salt: str) -> list[Pair]:
    """Pair neighbours by points, round by round, no pair twice."""
    rounds = math.ceil(math.log2(count)) + 1
    if plan.budget is not None:
        rounds = math.ceil(plan.budget / max(count // 2, 1))
    order = _shuffled(count, plan, salt)
    met: set[Pair] = set()
    points = dict.fromkeys(range(count), 0.0)
    for _ in range(rounds):
        pairs = _swiss_round(order, points, met)
        waiting = [pair for pair in pairs if pair not in answers]
        if waiting:
            return waiting
        for pair in pairs:
            p = answers[pair]
            share = 0.5 if p is None else p
            points[pair[0]] += share
            points[pair[1]] += 1 - share
        met.update(pairs)
    return []


def _swiss_round(order: list[int], points: Mapping[int, float], met: set[Pair]) -> list[Pair]:
    """Return disjoint pairs of items of like points that have not met; an odd one sits out."""
    waiting = sorted(order, key=lambda item: (-points[item], order.index(item)))
    pairs = []
    while waiting:
        item = waiting.pop(0)
        for other in waiting:
            pair = (min(item, other), max(item, other))
            if pair not in met:
                pairs.append(pair)
                waiting.remove(other)
                break
    return pairs


def _active(count: int, answers: Answers, plan: SchedulePlan, salt: str) -> list[Pair]:
    """Ask where an answer tells most about the strengths, as known so far.

    The gain of a pair is the mutual information between its answer and the strengths (Lindley
    1956; "BALD"), with the posterior taken as normal around the fit. A batch is chosen one by one,
    each pick shrinking the uncertainty as its answer will.
    """
    batch = plan.batch or max(count // 4, 1)
    order = _shuffled(count, plan, salt)
    if not answers:
        # Everybody plays once: nothing is known yet, and disjoint pairs tell most.
        return [(min(pair), max(pair)) for pair in zip(order[::2], order[1::2], strict=False)]
    duels = [Duel(i, j, p, 1.0 - p) for (i, j), p in answers.items() if p is not None]
    fit = fit_bradley_terry(count, duels, prior_sd=plan.prior_sd)
    open_pairs = [pair for pair in combinations(range(count), 2) if pair not in answers]
    first, second = np.array(open_pairs).T if open_pairs else (np.zeros(0, int), np.zeros(0, int))
    place = np.array(order).argsort()
    covariance = fit.covariance.copy()
    chosen: list[Pair] = []
    for _ in range(min(batch, len(open_pairs))):
        mean = fit.values[first] - fit.values[second]
        variance = covariance[first, first] + covariance[second, second]
        variance = np.maximum(variance - 2 * covariance[first, second], 0.0)
        gain = _information_gain(mean, variance)
        gain[[pair in chosen for pair in open_pairs]] = -1.0
        # Level gains go by the seeded order.
        best = max(
            range(len(open_pairs)),
            key=lambda at: (round(float(gain[at]), 12), place[first[at]], place[second[at]]),
        )
        i, j = open_pairs[best]
        chosen.append((i, j))
        covariance = _after_answer(covariance, i, j, float(mean[best]))
    return chosen


_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(24)


def _information_gain(mean: Floats, variance: Floats) -> Floats:
    """Return, in nats, what answers tell whose log-odds are normal with this mean and variance."""
    logits = mean[:, None] + np.sqrt(variance)[:, None] * _NODES[None, :]
    chances = 1.0 / (1.0 + np.exp(-logits))
    weights = _WEIGHTS / _WEIGHTS.sum()
    return np.asarray(_entropy(chances @ weights) - _entropy(chances) @ weights)


def _entropy(p: Floats) -> Floats:
    p = np.clip(p, 1e-12, 1 - 1e-12)
    return np.asarray(-p * np.log(p) - (1 - p) * np.log(1 - p))


def _after_answer(covariance: Floats, i: int, j: int, gap: float) -> Floats:
    """Return the covariance once the pair is answered: one more observation of s_i - s_j."""
    along = covariance[:, i] - covariance[:, j]
    p = 1.0 / (1.0 + math.exp(-gap))
    curvature = p * (1 - p)
    spread = along[i] - along[j]
    return np.asarray(
        covariance - np.outer(along, along) * (curvature / (1.0 + curvature * spread))
    )
