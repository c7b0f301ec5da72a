"""What a fit of strengths says: log-odds values, their uncertainty, the chances of pairs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

__all__ = ["Strengths", "sum_zero_basis"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Strengths:
    """Strengths of k items, as logarithms, summing to 0."""

    values: Floats
    """(k,): log-odds; without ties P(i over j) = sigmoid(values[i] - values[j])."""
    covariance: Floats
    """(k, k): of ``values``."""
    tie: float | None
    """Logarithm of Davidson's tie parameter; None where ties were not modelled."""
    log_likelihood: float

    def order(self) -> list[int]:
        """Return the items' indices, best first; level ones by index."""
        return sorted(range(len(self.values)), key=lambda item: (-self.values[item], item))

    def intervals(self, level: float = 0.95) -> Floats:
        """Return (k, 2): lower and upper ends of each value's interval, by normal approximation."""
        half = NormalDist().inv_cdf(0.5 + level / 2) * np.sqrt(np.diag(self.covariance))
        return np.stack([self.values - half, self.values + half], axis=1)

    def difference_sd(self) -> Floats:
        """Return (k, k): standard deviations of all differences of two values."""
        variance = np.diag(self.covariance)
        spread = variance[:, None] + variance[None, :] - 2 * self.covariance
        return np.asarray(np.sqrt(np.maximum(spread, 0.0)))

    def probabilities(self) -> Floats:
        """Return (k, k): P(i preferred to j), a tie's probability split evenly."""
        gap = self.values[:, None] - self.values[None, :]
        if self.tie is None:
            return np.asarray(1.0 / (1.0 + np.exp(-gap)))
        win, lose, tie = np.exp(gap / 2), np.exp(-gap / 2), np.exp(self.tie)
        return np.asarray((win + tie / 2) / (win + lose + tie))


@lru_cache(maxsize=256)
def sum_zero_basis(count: int) -> Floats:
    """Return (count, count - 1) with orthonormal columns that each sum to 0."""
    full = np.eye(count) - 1.0 / count
    basis = np.asarray(np.linalg.svd(full)[0][:, : count - 1])
    basis.setflags(write=False)  # one array serves every caller
    return basis
