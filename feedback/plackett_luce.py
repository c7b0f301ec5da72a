"""Strengths from whole rankings: Plackett-Luce, with tied groups.

A ranking is a series of choices: the best group out of all items, the next out of the rest, and so
on. A tied group is one choice of several items at once (Davidson-Luce, as in Turner, van Etten,
Firth and Kosmidis 2020, arXiv 1810.12068): a set S has utility mean(s_i, i in S) + t_|S|, with
t_1 = 0 and one tie parameter per size of group that occurs. For two items this is Davidson's model.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
import numpy.typing as npt

from feedback.choice_model import Stages, fit_choices
from feedback.strengths import Strengths, sum_zero_basis

__all__ = ["fit_plackett_luce"]

Floats = npt.NDArray[np.float64]
_MOST_SETS = 20_000


def fit_plackett_luce(
    count: int,
    rankings: Sequence[Sequence[Sequence[int]]],
    *,
    weights: Sequence[float] | None = None,
    prior_sd: float | None = None,
) -> Strengths:
    """Fit the strengths of ``count`` items.

    Args:
        count: items, at least 2.
        rankings: each a list of tied groups of item indices, best first; partial ones are fine.
        weights: of the rankings; 1 each by default.
        prior_sd: standard deviation of a normal prior on each strength; None for none.

    Raises:
        ValueError: the sets of possible ties are too many to sum over, or the fit does not converge
            (an item that is always best, without a prior).
    """
    basis = sum_zero_basis(count)
    sizes = sorted({len(group) for ranking in rankings for group in ranking} - {1})
    rows: list[tuple[Floats, int, float]] = []
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        remaining = [item for group in ranking for item in group]
        for group in ranking:
            if len(remaining) > 1:
                sets = _sets(remaining, sizes)
                chosen = sets.index(tuple(sorted(group)))
                rows.append((_features(sets, basis, sizes), chosen, weight))
            remaining = [item for item in remaining if item not in group]
    stages = _pad(rows, basis.shape[1] + len(sizes))
    precision = np.zeros(stages.features.shape[2])
    if prior_sd is not None:
        precision[: count - 1] = prior_sd**-2
        precision[count - 1 :] = 0.04  # a tie parameter that the data leave open stays finite
    fit = fit_choices(stages, precision=precision)
    inverse = np.linalg.pinv(fit.information)[: count - 1, : count - 1]
    return Strengths(
        values=basis @ fit.beta[: count - 1],
        covariance=basis @ inverse @ basis.T,
        tie=float(fit.beta[count - 1 + sizes.index(2)]) if 2 in sizes else None,
        log_likelihood=fit.log_likelihood,
    )


def _sets(items: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return every set that could have been chosen: single items, and groups of the sizes seen."""
    possible = [size for size in sizes if size <= len(items)]
    if sum(comb(len(items), size) for size in possible) > _MOST_SETS:
        raise ValueError(
            f"{len(items)} items with ties of up to {max(possible)}: too many possible ties; "
            "fit the pairwise model instead"
        )
    ordered = sorted(items)
    sets: list[tuple[int, ...]] = [(item,) for item in ordered]
    for size in possible:
        sets += combinations(ordered, size)
    return sets


def _features(sets: list[tuple[int, ...]], basis: Floats, sizes: Sequence[int]) -> Floats:
    features = np.zeros((len(sets), basis.shape[1] + len(sizes)))
    for place, items in enumerate(sets):
        features[place, : basis.shape[1]] = basis[list(items)].mean(axis=0)
        if len(items) > 1:
            features[place, basis.shape[1] + sizes.index(len(items))] = 1.0
    return features


def _pad(rows: Sequence[tuple[Floats, int, float]], parameters: int) -> Stages:
    longest = max((len(features) for features, _, _ in rows), default=1)
    features = np.zeros((len(rows), longest, parameters))
    weights = np.zeros((len(rows), longest))
    offered = np.zeros((len(rows), longest), dtype=bool)
    for place, (row, chosen, weight) in enumerate(rows):
        features[place, : len(row)] = row
        weights[place, chosen] = weight
        offered[place, : len(row)] = True
    return Stages(features, weights, offered)
