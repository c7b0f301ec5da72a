"""Two arms on the same items: exact McNemar, sign flips by prompt, Holm, power.

Arms answer the same gold pairs, so only the items on which exactly one of them is right say
anything about their difference. Where several items share a prompt they are not independent, and
the test flips signs prompt by prompt instead of item by item.

This module knows nothing of judges or files; it takes arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feedback.intervals import group_sums

__all__ = [
    "Discordance",
    "approximate_items",
    "discordance",
    "holm",
    "mcnemar",
    "mcnemar_power",
    "needed_items",
    "sign_flip_test",
]

Floats = npt.NDArray[np.float64]
# Up to so many prompts with a difference, all sign patterns are enumerated.
_EXACT_PROMPTS = 16
_EXACT_ITEMS = 20_000


class Discordance(NamedTuple):
    """Items on which the arms differ."""

    only_first: int
    """Items that the first arm alone got right."""
    only_second: int
    """Items that the second arm alone got right."""
    items: int
    """All items that both arms answered."""

    @property
    def rate(self) -> float:
        """Share of items on which exactly one arm is right."""
        return (self.only_first + self.only_second) / self.items if self.items else math.nan

    @property
    def difference(self) -> float:
        """Accuracy of the second arm minus accuracy of the first."""
        return (self.only_second - self.only_first) / self.items if self.items else math.nan


def discordance(first: npt.ArrayLike, second: npt.ArrayLike) -> Discordance:
    """Count the items on which one arm is right and the other is not; both 0/1, shape (n,)."""
    one, two = np.asarray(first, float), np.asarray(second, float)
    return Discordance(int(np.sum(one > two)), int(np.sum(two > one)), len(one))


def mcnemar(counts: Discordance) -> float:
    """Return the two-sided exact p-value that both arms are equally often right (McNemar 1947)."""
    from statsmodels.stats.contingency_tables import mcnemar as exact

    table = [[0, counts.only_first], [counts.only_second, 0]]
    return float(min(exact(table, exact=True).pvalue, 1.0))


def sign_flip_test(
    differences: npt.ArrayLike,
    prompts: npt.NDArray[np.int64],
    *,
    replicates: int = 20_000,
    seed: int = 0,
) -> float:
    """Return the two-sided p-value that a mean difference is 0, flipping signs prompt by prompt.

    Under the null hypothesis each prompt's sum of differences is as likely to be negative as
    positive. With few prompts all patterns are enumerated, else they are drawn at random; the
    observed pattern counts as one of them, so that the test is valid at any number of draws
    (Phipson and Smyth 2010).

    Args:
        differences: second arm minus first arm for each item, (n,).
        prompts: prompt of each item, (n,).
        replicates: patterns to draw where there are too many to enumerate.
        seed: of the draw.
    """
    sums = group_sums(prompts, differences)[:, 0] if len(prompts) else np.zeros(0)
    sums = sums[sums != 0]
    if not len(sums):
        return 1.0
    observed = abs(float(sums.sum())) - 1e-9
    if len(sums) <= _EXACT_PROMPTS:
        patterns = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ sums) >= observed))
    rng = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, replicates, 1000):
        size = min(1000, replicates - start)
        signs = rng.integers(0, 2, (size, len(sums))) * 2 - 1
        extreme += int(np.sum(np.abs(signs @ sums) >= observed))
    return (extreme + 1) / (replicates + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for several comparisons, in the order given (Holm 1979)."""
    count = len(p_values)
    order = sorted(range(count), key=lambda place: p_values[place])
    adjusted, worst = [0.0] * count, 0.0
    for rank, place in enumerate(order):
        # The smallest faces all comparisons, the next one fewer; never below its predecessor.
        worst = max(worst, min((count - rank) * p_values[place], 1.0))
        adjusted[place] = worst
    return adjusted


def mcnemar_power(items: int, *, rate: float, difference: float, alpha: float = 0.05) -> float:
    """Return the power of the exact McNemar test, by summing over all outcomes.

    Args:
        items: how many items both arms answer.
        rate: share of items on which exactly one arm is right.
        difference: accuracy of the better arm minus that of the other; at most ``rate``.
        alpha: level of the test.
    """
    from scipy import stats

    if not 0 <= difference <= rate <= 1:
        raise ValueError(f"difference {difference} must lie between 0 and the rate {rate} <= 1")
    if rate == 0:
        return 0.0
    better = (rate + difference) / (2 * rate)
    counts = np.arange(items + 1)
    weights = stats.binom.pmf(counts, items, rate)
    power = 0.0
    for count in counts[weights > 1e-12]:
        # The largest number of wins of the worse arm that is still significant, by symmetry.
        critical = int(stats.binom.ppf(alpha / 2, count, 0.5))
        while critical >= 0 and 2 * stats.binom.cdf(critical, count, 0.5) > alpha:
            critical -= 1
        if critical >= 0:
            tails = stats.binom.cdf(critical, count, better)
            tails += stats.binom.sf(count - critical - 1, count, better)
            power += float(weights[count] * tails)
    return power


def approximate_items(
    rate: float, difference: float, *, alpha: float = 0.05, power: float = 0.8
) -> int:
    """Return how many items McNemar's test needs, by the normal approximation (Connor 1987)."""
    from scipy import stats

    z_level, z_power = float(stats.norm.ppf(1 - alpha / 2)), float(stats.norm.ppf(power))
    spread = math.sqrt(max(rate - difference**2, 0.0))
    return math.ceil(((z_level * math.sqrt(rate) + z_power * spread) / difference) ** 2)


def needed_items(*, rate: float, difference: float, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return how many items the exact McNemar test needs: by bisection on its exact power.

    Beyond 20,000 items, where exact sums are slow and no better, the normal approximation serves.

    Raises:
        ValueError: the difference is not positive, or larger than the rate.
    """
    if difference <= 0:
        raise ValueError("no number of items shows a difference of 0")
    near = approximate_items(rate, difference, alpha=alpha, power=power)
    if near > _EXACT_ITEMS:
        return near
    low, high = near // 2, near
    while mcnemar_power(high, rate=rate, difference=difference, alpha=alpha) < power:
        low, high = high, high + max(high // 8, 1)
    while high - low > 1:
        middle = (low + high) // 2
        reached = mcnemar_power(middle, rate=rate, difference=difference, alpha=alpha) >= power
        low, high = (low, middle) if reached else (middle, high)
    return high
