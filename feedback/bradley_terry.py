"""Strengths from pairwise comparisons: Bradley-Terry, with soft probabilities and Davidson's ties.

Without ties, P(i over j) = sigmoid(s_i - s_j) (Bradley and Terry 1952). With ties (Davidson 1970,
"On extending the Bradley-Terry model to accommodate ties"), up to one common factor

    i wins: exp((s_i - s_j) / 2)    j wins: exp((s_j - s_i) / 2)    tie: exp(t)

A judge's probability enters as it is: the likelihood of a comparison is its cross-entropy, one
comparison weighing one observation whatever its certainty. Observed information then overstates
what soft comparisons vary by; ``bootstrap`` does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feedback.choice_model import Stages, fit_choices
from feedback.strengths import Strengths, sum_zero_basis

__all__ = ["Duel", "bootstrap_intervals", "fit_bradley_terry", "is_connected"]

Floats = npt.NDArray[np.float64]


class Duel(NamedTuple):
    """One comparison of items ``i`` and ``j``; the three weights sum to the number of calls."""

    i: int
    j: int
    win: float
    """Weight of 'i preferred'."""
    lose: float
    tie: float = 0.0


def fit_bradley_terry(
    count: int, duels: Sequence[Duel], *, ties: bool = False, prior_sd: float | None = None
) -> Strengths:
    """Fit the strengths of ``count`` items.

    Args:
        count: items, at least 2.
        duels: comparisons; a tie's weight is split evenly where ties are not modelled.
        ties: model ties by Davidson's parameter.
        prior_sd: standard deviation, in log-odds, of a normal prior on each strength; None for
            plain maximum likelihood.

    Raises:
        ValueError: without a prior, where some group of items never lost to the others: their
            strengths have no finite estimate (Ford 1957).
    """
    if prior_sd is None and not _pinned_down(count, duels):
        raise ValueError(
            "some items never lost to the others, directly or in turn: without a prior their "
            "strengths are infinite; give prior_sd"
        )
    if count == 2 and not ties and prior_sd is None:
        return _two_items(duels)
    basis = sum_zero_basis(count)
    stages = _stages(basis, duels, ties=ties)
    parameters = stages.features.shape[2]
    precision = np.zeros(parameters)
    if prior_sd is not None:
        precision[: count - 1] = prior_sd**-2
    tied = sum(duel.tie for duel in duels)
    if ties and tied in (0, sum(map(_weight, duels))):
        precision[-1] = 0.25  # no tie, or nothing else: its parameter would run to an infinity
    fit = fit_choices(stages, precision=precision)
    inverse = np.linalg.pinv(fit.information)[: count - 1, : count - 1]
    return Strengths(
        values=basis @ fit.beta[: count - 1],
        covariance=basis @ inverse @ basis.T,
        tie=float(fit.beta[-1]) if ties else None,
        log_likelihood=fit.log_likelihood,
    )


def _two_items(duels: Sequence[Duel]) -> Strengths:
    """Return the closed form: the log-odds of the first item's share."""
    win = sum(
        duel.win + duel.tie / 2 if duel.i == 0 else duel.lose + duel.tie / 2 for duel in duels
    )
    total = sum(map(_weight, duels))
    share = win / total
    half = math.log(share / (1.0 - share)) / 2
    variance = 1.0 / (4.0 * total * share * (1.0 - share))
    return Strengths(
        values=np.array([half, -half]),
        covariance=variance * np.array([[1.0, -1.0], [-1.0, 1.0]]),
        tie=None,
        log_likelihood=win * math.log(share) + (total - win) * math.log(1.0 - share),
    )


def _weight(duel: Duel) -> float:
    return duel.win + duel.lose + duel.tie


def _stages(basis: Floats, duels: Sequence[Duel], *, ties: bool) -> Stages:
    number = len(duels)
    first = np.array([duel.i for duel in duels], dtype=np.int64)
    second = np.array([duel.j for duel in duels], dtype=np.int64)
    weights = np.array([[duel.win, duel.lose, duel.tie] for duel in duels]).reshape(-1, 3)
    half = (basis[first] - basis[second]) / 2 if number else np.zeros((0, basis.shape[1]))
    columns = basis.shape[1] + (1 if ties else 0)
    features = np.zeros((number, 3 if ties else 2, columns))
    features[:, 0, : basis.shape[1]] = half
    features[:, 1, : basis.shape[1]] = -half
    if ties:
        features[:, 2, -1] = 1.0
    else:
        weights = weights[:, :2] + weights[:, 2:] / 2
    return Stages(features, weights, np.ones(weights.shape, dtype=bool))


def is_connected(count: int, duels: Sequence[Duel]) -> bool:
    """Return whether comparisons, direct or in turn, link every item with every other."""
    return _pinned_down(count, [Duel(duel.i, duel.j, 1.0, 1.0) for duel in duels])


def _pinned_down(count: int, duels: Sequence[Duel]) -> bool:
    """Return whether every item reaches every other along wins and ties."""
    ahead: list[set[int]] = [set() for _ in range(count)]
    behind: list[set[int]] = [set() for _ in range(count)]
    for i, j, win, lose, tie in duels:
        if win + tie > 0:
            ahead[i].add(j)
            behind[j].add(i)
        if lose + tie > 0:
            ahead[j].add(i)
            behind[i].add(j)
    return all(len(_reached(edges)) == count for edges in (ahead, behind))


def _reached(edges: Sequence[set[int]]) -> set[int]:
    """Return the items that item 0 reaches, itself included."""
    reached, frontier = {0}, [0]
    while frontier:
        found = edges[frontier.pop()] - reached
        reached |= found
        frontier += found
    return reached


def bootstrap_intervals(
    count: int,
    duels: Sequence[Duel],
    *,
    ties: bool = False,
    prior_sd: float | None = None,
    draws: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> Floats:
    """Return (count, 2): basic bootstrap intervals of the strengths, comparisons resampled.

    A draw without a finite estimate is left out; ``prior_sd`` avoids that.

    Raises:
        ValueError: fewer than half of the draws have an estimate.
    """
    random = np.random.default_rng(seed)
    centre = fit_bradley_terry(count, duels, ties=ties, prior_sd=prior_sd).values
    values = []
    for _ in range(draws):
        drawn = [duels[place] for place in random.integers(len(duels), size=len(duels))]
        try:
            values.append(fit_bradley_terry(count, drawn, ties=ties, prior_sd=prior_sd).values)
        except ValueError:
            continue
    if len(values) < draws / 2:
        raise ValueError("most resamples have no finite estimate; give prior_sd")
    low, high = np.quantile(values, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    return np.stack([2 * centre - high, 2 * centre - low], axis=1)
