"""What an A/B test concludes: better, worse, equivalent, or undecided and how many pairs it needs.

Arms are compared with the baseline on the pairs that both answered. A verdict that is a tie counts
one half. With one look the decision rests on exact McNemar (on sign flips by prompt where several
pairs share a prompt or a verdict is a tie), adjusted by Holm over the arms, and on the interval of
the difference; with several looks on an e-process and a confidence sequence, which hold at every
look at once.

This module knows nothing of engines or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from feedback.intervals import Estimate, Resampler, difference, group_sums
from feedback.paired import (
    Discordance,
    approximate_items,
    discordance,
    holm,
    mcnemar,
    sign_flip_test,
)
from feedback.sequential import confidence_sequence, sign_e_process

__all__ = ["Comparison", "Conclusion", "compare_arms", "more_pairs"]

Floats = npt.NDArray[np.float64]
Conclusion = Literal["better", "worse", "equivalent", "undecided"]
# How far ahead 'need n more' looks, in multiples of the prompts at hand.
_AHEAD = 64
_EXACT = "exact McNemar"
_FLIPS = "sign flips by prompt"
_ANYTIME = "e-process on the sign of each prompt's difference"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One arm against the baseline."""

    arm: str
    baseline: str
    conclusion: Conclusion
    difference: Estimate
    """Accuracy of the arm minus accuracy of the baseline, with a 95% interval."""
    counts: Discordance
    test: str
    """The test that decided, in words."""
    p_value: float
    p_adjusted: float
    """Adjusted over the arms (Holm)."""
    e_value: float | None = None
    """Evidence against equality at the last look, where there were several."""
    always: tuple[float, float] | None = None
    """Bounds on the difference per prompt that hold at every look at once."""
    need_more: int | None = None
    """Gold pairs still needed for a decision if they are like those so far; None where there is a
    decision, or where no number at hand would bring one."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dict."""
        return {
            **asdict(self),
            "difference": self.difference.to_dict(),
            "counts": self.counts._asdict(),
        }


def compare_arms(
    names: Sequence[str],
    scores: Floats,
    prompts: npt.NDArray[np.int64],
    *,
    margin: float,
    alpha: float = 0.05,
    power: float = 0.8,
    sequential: bool = False,
    replicates: int = 2000,
    seed: int = 0,
) -> list[Comparison]:
    """Compare every arm with the first.

    Args:
        names: of the arms.
        scores: 1 right, 0 wrong, 0.5 tie, NaN unanswered; rows in the order in which pairs were
            used, (pairs, arms).
        prompts: prompt of each pair, (pairs,).
        margin: difference that does not matter.
        alpha: level over all arms together.
        power: for the number of pairs still needed.
        sequential: decide by tests that hold at every look.
        replicates: resamples behind the interval of each difference.
        seed: of resamples.
    """
    arms = [_paired(scores[:, 0], scores[:, arm], prompts) for arm in range(1, len(names))]
    p_values = [
        mcnemar(arm.counts) if arm.plain else sign_flip_test(arm.change, arm.prompts, seed=seed)
        for arm in arms
    ]
    resampler = Resampler(prompts, replicates=replicates, seed=seed)
    # Holm's first step; what is still needed is asked of every arm at this level.
    level = alpha / max(len(arms), 1)
    found = []
    for name, arm, p_value, p_adjusted in zip(
        names[1:], arms, p_values, holm(p_values), strict=True
    ):
        estimate = difference(resampler, arm.prompts, arm.change)
        looks = _anytime(arm.change, arm.prompts, margin, level) if sequential else None
        if looks is not None:
            conclusion, need = looks.conclusion, looks.need_more
        else:
            near = _within(arm.change, arm.prompts, margin, alpha)
            conclusion = _decide(estimate, p_adjusted, near, alpha)
            need = more_pairs(arm.counts, margin=margin, alpha=level, power=power)
        found.append(
            Comparison(
                arm=name,
                baseline=names[0],
                conclusion=conclusion,
                difference=estimate,
                counts=arm.counts,
                test=_ANYTIME if looks is not None else _EXACT if arm.plain else _FLIPS,
                p_value=p_value,
                p_adjusted=p_adjusted,
                e_value=None if looks is None else looks.e_value,
                always=None if looks is None else looks.bounds,
                need_more=need if conclusion == "undecided" else None,
            )
        )
    return found


class _Paired(NamedTuple):
    """An arm and the baseline on the pairs that both answered."""

    change: Floats
    """Score of the arm less that of the baseline, (n,)."""
    prompts: npt.NDArray[np.int64]
    counts: Discordance
    plain: bool
    """One pair per prompt and no tie: what McNemar's table takes. Half points have no place there;
    sign flips take them at their size."""


def _paired(base: Floats, arm: Floats, prompts: npt.NDArray[np.int64]) -> _Paired:
    rows = np.isfinite(base) & np.isfinite(arm)
    change, groups = arm[rows] - base[rows], prompts[rows]
    plain = len(np.unique(groups)) == len(groups) and not np.any(np.abs(change) == 0.5)
    return _Paired(change, groups, discordance(base[rows], arm[rows]), plain)


def _decide(estimate: Estimate, p_adjusted: float, near: bool, alpha: float) -> Conclusion:
    if estimate.value is None:
        return "undecided"
    if p_adjusted <= alpha and estimate.value != 0:
        return "better" if estimate.value > 0 else "worse"
    return "equivalent" if near else "undecided"


def _within(change: Floats, prompts: npt.NDArray[np.int64], margin: float, alpha: float) -> bool:
    """Whether two one-sided tests at ``alpha`` put the difference within the margin.

    Prompts are the units (Schuirmann 1987's procedure on their means, with the t distribution).
    Where nothing differs at all, the bound is that of the rule of three: the share of differing
    pairs that could still be missed in so many prompts.
    """
    from scipy import stats

    sums = group_sums(prompts, change, np.ones(len(change)))
    count = len(sums)
    if count < 2:
        return False
    value = float(sums[:, 0].sum() / sums[:, 1].sum())
    if not np.any(change):
        return -math.log(alpha) / count < margin
    residual = sums[:, 0] - value * sums[:, 1]
    error = math.sqrt(count / (count - 1) * float(residual @ residual)) / float(sums[:, 1].sum())
    reach = float(stats.t.ppf(1 - alpha, count - 1)) * error
    return -margin < value - reach and value + reach < margin


class _Looks(NamedTuple):
    """What tests that hold at every look say at the last one."""

    conclusion: Conclusion
    e_value: float
    bounds: tuple[float, float]
    """Of the mean difference per prompt."""
    need_more: int | None


def _anytime(change: Floats, prompts: npt.NDArray[np.int64], margin: float, alpha: float) -> _Looks:
    """Decide over prompts, in the order in which they came.

    What is still needed is read off by letting the prompts so far come again and again.
    """
    if not len(change):
        return _Looks("undecided", 1.0, (-1.0, 1.0), None)
    _, first = np.unique(prompts, return_index=True)
    sums = group_sums(prompts, change, np.ones(len(change)))[np.argsort(first)]
    per_prompt = sums[:, 0] / sums[:, 1]
    count = len(per_prompt)
    ahead = np.tile(per_prompt, _AHEAD)
    log_e = sign_e_process(ahead)
    # Two one-sided statements about equivalence at alpha are one two-sided bound at 2 alpha.
    looks = confidence_sequence(ahead, alpha=min(2 * alpha, 0.5))
    direction = float(np.sign(np.sign(per_prompt).sum()))
    # The e-process counts signs; where their sizes say the opposite, neither is concluded.
    differs = (log_e >= -math.log(alpha)) & (direction * change.sum() > 0)
    # Bounds that cross say that the prompts' order was not random; nothing follows from them.
    near = (-margin < looks.low) & (looks.high < margin) & (looks.low <= looks.high)
    bounds = (float(looks.low[count - 1]), float(looks.high[count - 1]))
    conclusion: Conclusion = "undecided"
    if differs[count - 1]:
        conclusion = "better" if direction > 0 else "worse"
    elif near[count - 1]:
        conclusion = "equivalent"
    later = np.flatnonzero((differs | near)[count:])
    need = math.ceil((int(later[0]) + 1) * len(change) / count) if len(later) else None
    return _Looks(conclusion, math.exp(min(float(log_e[count - 1]), 700.0)), bounds, need)


def more_pairs(counts: Discordance, *, margin: float, alpha: float, power: float) -> int | None:
    """Return how many further pairs would decide, at the rates seen so far.

    That is the smaller of two numbers: pairs to show a difference of the size observed, and pairs
    to show that it lies within the margin if there is none. None where nothing has been seen.
    """
    from scipy import stats

    if not counts.items:
        return None
    rate = max(counts.rate, 1.0 / counts.items)
    z = float(stats.norm.ppf(1 - alpha) + stats.norm.ppf((1 + power) / 2))
    options = [math.ceil(rate * (z / margin) ** 2)]
    difference = min(abs(counts.difference), rate)
    if difference > 0:
        options.append(approximate_items(rate, difference, alpha=alpha, power=power))
    return max(min(options) - counts.items, 1)
