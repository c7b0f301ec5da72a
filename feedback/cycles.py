"""Cycles among pairwise preferences, and agreement of orders.

A judge that prefers a to b, b to c and c to a has no order to recover there; the share of such
triples is a fact about the judge (or about candidates that are equally good).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Cycles", "cyclic_triples", "kendall_tau"]


class Cycles(NamedTuple):
    """Cyclic triples among the complete ones."""

    cyclic: int
    complete: int
    """Triples of which all three pairs were compared and none is exactly level."""
    triples: list[tuple[int, int, int]]
    """The first ones, each (i, j, k) with i preferred to j, j to k, k to i."""


def cyclic_triples(
    count: int, comparisons: Iterable[tuple[int, int, float]], *, most: int = 20
) -> Cycles:
    """Count the cyclic triples among ``count`` items.

    Args:
        count: items.
        comparisons: (i, j, P(i preferred to j)); several of one pair are averaged.
        most: triples listed.
    """
    comparisons = list(comparisons)
    if len(comparisons) < 3:
        return Cycles(0, 0, [])
    total = np.zeros((count, count))
    seen = np.zeros((count, count))
    for i, j, p in comparisons:
        total[i, j] += p - 0.5
        total[j, i] += 0.5 - p
        seen[i, j] += 1
        seen[j, i] += 1
    beats = ((total > 1e-12) & (seen > 0)).astype(np.int64)
    known = beats + beats.T
    # Each cyclic triple closes three directed walks of length 3, each complete one six.
    cyclic = int(np.trace(beats @ beats @ beats)) // 3
    complete = int(np.trace(known @ known @ known)) // 6
    return Cycles(cyclic, complete, _list(beats, most) if cyclic else [])


def _list(beats: npt.NDArray[np.int64], most: int) -> list[tuple[int, int, int]]:
    found: list[tuple[int, int, int]] = []
    for i in range(len(beats)):
        for j in np.flatnonzero(beats[i]):
            for k in np.flatnonzero(beats[j] & beats[:, i]):
                if i < min(j, k):
                    found.append((i, int(j), int(k)))
                    if len(found) == most:
                        return found
    return found


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Kendall's tau-b of two score lists, in [-1, 1]; NaN where one of them is constant."""
    from scipy.stats import kendalltau  # takes a second to import; judging need not wait for it

    return float(kendalltau(first, second).statistic)
