"""What an A/B test concludes: better, worse, equivalent, or undecided and how many pairs it needs.

Arms are compared with the baseline on the pairs that both answered. A verdict that is a tie counts
one half. With one look the decision rests on exact McNemar (on sign flips by prompt where several
pairs share a prompt), adjusted by Holm over the arms, and on the interval of the difference; with
several looks on an e-process and a confidence sequence, which hold at every look at once.

This module knows nothing of engines or files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from feedback.intervals import Estimate, Resampler, group_sums, mean
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
    """Gold pairs still needed for a decision; None where there is one."""

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
    others = range(1, len(names))
    answered = [np.isfinite(scores[:, 0]) & np.isfinite(scores[:, arm]) for arm in others]
    differences = [
        scores[rows, arm] - scores[rows, 0] for arm, rows in zip(others, answered, strict=True)
    ]
    counts = [
        discordance(scores[rows, 0], scores[rows, arm])
        for arm, rows in zip(others, answered, strict=True)
    ]
    grouped = [len(np.unique(prompts[rows])) < int(rows.sum()) for rows in answered]
    p_values = [
        sign_flip_test(change, prompts[rows], seed=seed) if shared else mcnemar(count)
        for change, rows, shared, count in zip(differences, answered, grouped, counts, strict=True)
    ]
    adjusted = holm(p_values)
    resampler = Resampler(prompts, replicates=replicates, seed=seed)
    found = []
    for place, arm in enumerate(others):
        change, rows = differences[place], answered[place]
        estimate = mean(resampler, prompts[rows], change)
        test = "sign flips by prompt" if grouped[place] else "exact McNemar"
        e_value, always = None, None
        if sequential:
            test = "e-process on the sign of each prompt's difference"
            e_value, always = _anytime(change, prompts[rows], alpha / len(others))
            conclusion = _decide_anytime(change, e_value, always, margin, len(others) / alpha)
        else:
            near = _within(change, prompts[rows], margin, alpha)
            conclusion = _decide(estimate, adjusted[place], near, alpha)
        need = None
        if conclusion == "undecided":
            need = more_pairs(counts[place], margin=margin, alpha=alpha, power=power)
        found.append(
            Comparison(
                arm=names[arm],
                baseline=names[0],
                conclusion=conclusion,
                difference=estimate,
                counts=counts[place],
                test=test,
                p_value=p_values[place],
                p_adjusted=adjusted[place],
                e_value=e_value,
                always=always,
                need_more=need,
            )
        )
    return found


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


def _anytime(
    change: Floats, prompts: npt.NDArray[np.int64], alpha: float
) -> tuple[float, tuple[float, float]]:
    """Return the e-value and the bounds over prompts, in the order in which prompts came."""
    if not len(change):
        return 1.0, (-1.0, 1.0)
    _, first = np.unique(prompts, return_index=True)
    sums = group_sums(prompts, change, np.ones(len(change)))[np.argsort(first)]
    per_prompt = sums[:, 0] / sums[:, 1]
    log_e = float(sign_e_process(per_prompt)[-1])
    # Two one-sided statements about equivalence at alpha are one two-sided bound at 2 alpha.
    looks = confidence_sequence(per_prompt, alpha=min(2 * alpha, 0.5))
    return math.exp(min(log_e, 700.0)), (float(looks.low[-1]), float(looks.high[-1]))


def _decide_anytime(
    change: Floats, e_value: float, bounds: tuple[float, float], margin: float, needed: float
) -> Conclusion:
    if e_value >= needed:
        return "better" if change.sum() > 0 else "worse"
    return "equivalent" if -margin < bounds[0] and bounds[1] < margin else "undecided"


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
