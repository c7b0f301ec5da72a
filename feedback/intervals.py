"""Estimates with 95% intervals: exact where there is an exact one, else a bootstrap by prompt.

Rows of one prompt are not independent, so nothing here resamples rows. A share gets the exact
binomial interval (mid-P) at its effective sample size; any other statistic is written as a function
of sums over prompts, and prompts are resampled (BCa). The same resamples serve every figure of a
card, so that figures of one card vary together, as they do in truth.

This module knows nothing of judges or verdicts; it takes arrays.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "LEVEL",
    "Estimate",
    "Resampler",
    "average",
    "binomial_interval",
    "difference",
    "from_standard_error",
    "group_sums",
    "mean",
    "nothing",
    "proportion",
    "ratio",
]

LEVEL = 0.95
Array = npt.NDArray[np.float64]
Statistic = Callable[[Array], Array]
"""From sums of shape (..., d) to values of shape (...,)."""

_MAX_BLOCKS = 4000
_ENOUGH_GROUPS = 30
_CHUNK = 250


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its interval. ``value`` is None where there was nothing to count."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    """Observations behind the value."""
    prompts: int
    """Prompts (independent groups) behind the value."""
    method: str
    """How the interval was made, in words."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dict, without numpy types."""
        return asdict(self)

    def __str__(self) -> str:
        if self.value is None:
            return f"- (n = {self.n})"
        if self.low is None or self.high is None:
            return f"{self.value:z.3f} (n = {self.n:,})"
        return f"{self.value:z.3f} [{self.low:z.3f}, {self.high:z.3f}] (n = {self.n:,})"


def nothing(method: str = "nothing to count") -> Estimate:
    """Return the estimate of a figure that has no observations."""
    return Estimate(None, None, None, 0, 0, method)


def binomial_interval(successes: float, trials: float, level: float = LEVEL) -> tuple[float, float]:
    """Return the mid-P interval of a binomial share; takes non-integer (effective) counts.

    The bounds solve ``P(X > x) + P(X = x) / 2 = (1 - level) / 2`` and its mirror image; mid-P keeps
    the coverage of the Clopper-Pearson interval near its level instead of above it (Berry and
    Armitage 1995, The Statistician 44).

    Raises:
        ValueError: there are no trials, or more successes than trials.
    """
    from scipy import special

    if trials <= 0 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials")
    tail = (1 - level) / 2
    failures = trials - successes

    def mid_p(share: float) -> float:
        """P(X > x) + P(X = x) / 2 when the true share is ``share``."""
        at_least = special.betainc(successes, failures + 1, share) if successes > 0 else 1.0
        more = special.betainc(successes + 1, failures, share) if failures > 0 else 0.0
        return float(at_least + more) / 2

    low = 0.0 if successes == 0 else _bisect(mid_p, tail)
    high = 1.0 if failures == 0 else _bisect(mid_p, 1 - tail)
    return low, high


def _bisect(increasing: Callable[[float], float], target: float) -> float:
    """Return where a function that increases from 0 to 1 over [0, 1] takes the value ``target``."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if increasing(middle) < target else (low, middle)
    return (low + high) / 2


def group_sums(groups: npt.NDArray[np.int64], *columns: npt.ArrayLike) -> Array:
    """Return the sums of ``columns`` over each group that occurs: shape (groups, columns)."""
    if len(groups) == 0:
        return np.zeros((0, len(columns)))
    _, index = np.unique(groups, return_inverse=True)
    size = int(index.max()) + 1
    return np.stack(
        [np.bincount(index, np.asarray(column, float), size) for column in columns], axis=1
    )


def proportion(
    hits: npt.ArrayLike, groups: npt.NDArray[np.int64], level: float = LEVEL
) -> Estimate:
    """Estimate a share of 0/1 observations that come in groups.

    The interval is the exact binomial one at the effective sample size ``n / deff``, deff being the
    design effect of the grouping (Korn and Graubard 1998, Survey Methodology 24); without grouping
    it is the plain exact interval. Where every observation agrees the grouping's effect cannot be
    seen, and the effective size is the number of groups.
    """
    values = np.asarray(hits, float)
    n = len(values)
    if n == 0:
        return nothing()
    sums = group_sums(np.asarray(groups), values, np.ones(n))
    count = len(sums)
    share = float(values.mean())
    effective = _effective_size(sums, share, n)
    low, high = binomial_interval(min(share * effective, effective), effective, level)
    method = "exact binomial, mid-P"
    if count < n:
        method += f", at the effective size {effective:.0f} of {n:,} rows in {count:,} prompts"
    return Estimate(share, low, high, n, count, method)


def _effective_size(sums: Array, share: float, n: int) -> float:
    """Return n over the design effect, adjusted for the degrees of freedom.

    Two orders of one pair often cancel, and then the effective size exceeds n. With few groups that
    cannot be told from luck, so it is allowed from 30 groups on, up to ten times n.
    """
    from scipy import special

    count = len(sums)
    if count == n:
        return float(n)
    if share in (0.0, 1.0) or count < 2:
        return float(count)
    residual = sums[:, 0] - share * sums[:, 1]
    variance = count / (count - 1) * float(residual @ residual) / n**2
    binomial = share * (1 - share) / n
    most = float(10 * n if count >= _ENOUGH_GROUPS else n)
    if variance <= 0:
        return most
    # With few groups the variance itself is uncertain; the squared ratio of t quantiles widens the
    # interval accordingly.
    widen = (special.stdtrit(count - 1, 0.975) / special.stdtrit(n - 1, 0.975)) ** 2
    return min(most, n * binomial / variance / float(widen))


class Resampler:
    """Resamples of the prompts of one card, drawn once and used for every figure.

    Args:
        groups: the prompt of each row, as integers; figures may use any subset of the rows.
        replicates: how many resamples.
        seed: of the draw.

    More than 4,000 prompts are put together at random into 4,000 blocks, which changes no expected
    width and keeps the cost flat.
    """

    def __init__(
        self, groups: npt.NDArray[np.int64], *, replicates: int = 2000, seed: int = 0
    ) -> None:
        self.prompts = int(groups.max()) + 1 if len(groups) else 0
        self.replicates = replicates
        self._rng = np.random.default_rng(seed)
        self._block = np.arange(self.prompts)
        if self.prompts > _MAX_BLOCKS:
            self._block = self._rng.permutation(self.prompts) % _MAX_BLOCKS
        self._counts: npt.NDArray[np.float32] | None = None

    @property
    def blocks(self) -> int:
        """How many units are resampled."""
        return min(self.prompts, _MAX_BLOCKS)

    def _weights(self) -> npt.NDArray[np.float32]:
        """Return how often each block occurs in each resample: (replicates, blocks)."""
        if self._counts is None:
            draws = self._rng.integers(0, self.blocks, (self.replicates, self.blocks))
            offset = np.arange(self.replicates)[:, None] * self.blocks
            flat = np.bincount((draws + offset).ravel(), minlength=draws.size)
            self._counts = flat.reshape(draws.shape).astype(np.float32)
        return self._counts

    def estimate(
        self,
        groups: npt.NDArray[np.int64],
        columns: npt.ArrayLike,
        statistic: Statistic,
        *,
        n: int | None = None,
        level: float = LEVEL,
    ) -> Estimate:
        """Estimate a statistic of column sums, with a BCa bootstrap interval by prompt.

        Args:
            groups: prompt of each row, (n,), numbered as in the constructor.
            columns: what is summed, (n, d).
            statistic: from sums (..., d) to values (...); NaN where it is undefined.
            n: observations to report, where that is not the number of rows.
            level: of the interval.

        See Efron 1987, JASA 82, for BCa. A statistic that does not vary over the resamples, or is
        undefined in more than one of twenty, has a value and no interval.
        """
        table = np.asarray(columns, float)
        rows = len(table)
        if rows == 0:
            return nothing()
        present = len(np.unique(groups))
        sums = np.zeros((self.blocks, table.shape[1]))
        np.add.at(sums, self._block[groups], table)
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(sums.sum(axis=0)[None])[0])
            if math.isnan(value):
                return Estimate(None, None, None, n or rows, present, "undefined here")
            weights = self._weights()
            draws = np.concatenate(
                [
                    statistic(weights[start : start + _CHUNK] @ sums)
                    for start in range(0, self.replicates, _CHUNK)
                ]
            )
            left_out = statistic(sums.sum(axis=0)[None] - sums)
        low, high, method = _bca(value, draws, left_out, level, min(present, self.blocks))
        return Estimate(value, low, high, n or rows, present, method)


def _bca(
    value: float, draws: Array, left_out: Array, level: float, units: int
) -> tuple[float | None, float | None, str]:
    """Return bias-corrected and accelerated bounds, and the method's name.

    The tails are taken a little further out, as Student's t would with so many units: resamples
    vary less than samples do (Hesterberg 2015, The American Statistician 69).
    """
    from scipy import special

    total = len(draws)
    draws = draws[np.isfinite(draws)]
    if len(draws) < 0.95 * total or units < 2:
        return None, None, "no interval: undefined in too many resamples"
    if float(np.ptp(draws)) <= 1e-12 * max(1.0, abs(value)):
        return None, None, "no interval: the same in every resample"
    # Ties with the value count half, or a coarse statistic would look biased.
    below = (np.sum(draws < value) + np.sum(draws == value) / 2) / len(draws)
    bias = float(special.ndtri(np.clip(below, 1e-4, 1 - 1e-4)))
    spread = left_out[np.isfinite(left_out)]
    spread = spread.mean() - spread
    scale = float((spread**2).sum()) ** 1.5
    acceleration = float((spread**3).sum()) / (6 * scale) if scale > 0 else 0.0
    tail = float(special.stdtrit(units - 1, (1 - level) / 2)) * math.sqrt(units / (units - 1))
    bounds = [
        special.ndtr(bias + (bias + z) / (1 - acceleration * (bias + z))) for z in (tail, -tail)
    ]
    low, high = np.quantile(draws, bounds)
    return float(low), float(high), f"bootstrap by prompt, BCa, {total:,} resamples"


def ratio(
    resampler: Resampler,
    groups: npt.NDArray[np.int64],
    over: npt.ArrayLike,
    under: npt.ArrayLike,
    *,
    n: int | None = None,
) -> Estimate:
    """Estimate sum(over) / sum(under), with a bootstrap interval by prompt."""
    columns = np.stack([np.asarray(over, float), np.asarray(under, float)], axis=1)
    return resampler.estimate(groups, columns, lambda sums: sums[:, 0] / sums[:, 1], n=n)


def mean(resampler: Resampler, groups: npt.NDArray[np.int64], values: npt.ArrayLike) -> Estimate:
    """Estimate a mean over rows, with a bootstrap interval by prompt."""
    array = np.asarray(values, float)
    return ratio(resampler, groups, array, np.ones(len(array)))


def average(resampler: Resampler, groups: npt.NDArray[np.int64], values: npt.ArrayLike) -> Estimate:
    """Estimate a mean of values in [0, 1]: exactly where all are 0 or 1, else by the bootstrap."""
    array = np.asarray(values, float)
    if np.isin(array, (0.0, 1.0)).all():
        return proportion(array, groups)
    return mean(resampler, groups, array)


def difference(
    resampler: Resampler, groups: npt.NDArray[np.int64], values: npt.ArrayLike
) -> Estimate:
    """Estimate a mean of differences in [-1, 1], with a bootstrap interval by prompt.

    Where every difference is 0 resamples say nothing, and the interval is the exact bound on the
    share of prompts that differ when none among so many does.
    """
    array = np.asarray(values, float)
    if not len(array) or np.any(array):
        return mean(resampler, groups, array)
    count = len(np.unique(groups))
    reach = 1 - ((1 - LEVEL) / 2) ** (1 / count)
    words = "exact bound on the share of prompts that differ and were not met"
    return Estimate(0.0, -reach, reach, len(array), count, words)


def from_standard_error(
    value: float, error: float, *, n: int, prompts: int, method: str, level: float = LEVEL
) -> Estimate:
    """Return a Student-t interval with ``prompts - 1`` degrees of freedom."""
    from scipy import special

    if prompts < 2 or not math.isfinite(error):
        return Estimate(value, None, None, n, prompts, "no interval: too few prompts")
    reach = float(special.stdtrit(prompts - 1, (1 + level) / 2)) * error
    return Estimate(value, value - reach, value + reach, n, prompts, method)
