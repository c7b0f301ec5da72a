"""How far a reward model can be trusted: accuracy, calibration, what length explains, ties.

Plain numpy on scores that were computed elsewhere. All figures weigh pairs by their weights; the
intervals treat the pairs of one prompt as one draw, since they share it. ``reliability_plot`` draws
the calibration part as an SVG.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau, rankdata

__all__ = ["ScoredCompletions", "ScoredPairs", "reliability_plot", "reward_report"]

Floats = NDArray[np.float64]

CONFIDENCE_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
RELIABILITY_BINS = 10
_Z = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredPairs:
    """P judged pairs with the model's rewards; all arrays (P,)."""

    differences: Floats
    """Reward of chosen minus reward of rejected."""
    p_chosen: Floats
    """The judge's P(chosen preferred)."""
    ties: NDArray[np.bool_]
    """The judge called it a tie: left out of accuracy and calibration."""
    margins: Floats
    weights: Floats
    length_differences: Floats
    """Tokens of chosen minus tokens of rejected."""
    prompts: NDArray[np.int64]
    """Number of the prompt that the pair belongs to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredCompletions:
    """C completions with the model's rewards; all arrays (C,)."""

    rewards: Floats
    lengths: Floats
    """In tokens."""
    prompts: NDArray[np.int64]
    ranks: NDArray[np.int64]
    """Place in the judge's ranking, 0 best, ties share one; -1: unranked."""


def reward_report(pairs: ScoredPairs, completions: ScoredCompletions) -> dict[str, Any]:
    """Return the report as a dictionary of plain numbers, ready for JSON.

    A share that has nothing to be computed from is None, never 0.
    """
    decided = ~pairs.ties & (pairs.p_chosen != 0.5) & (pairs.weights > 0)
    # A row may come with p below 1/2: then the judge prefers the one called rejected.
    agreement = np.where(pairs.p_chosen >= 0.5, pairs.differences, -pairs.differences)
    right = (agreement > 0) + 0.5 * (agreement == 0)
    confidence = np.maximum(pairs.p_chosen, 1 - pairs.p_chosen)
    cut = _take(pairs, decided)
    right, confidence = right[decided], confidence[decided]
    return {
        "prompts": len(np.unique(completions.prompts)),
        "completions": len(completions.rewards),
        "pairs": int(decided.sum()),
        "accuracy": _share(right, cut.weights, cut.prompts),
        "accuracy_by_confidence": _by_bin(confidence, right, cut, CONFIDENCE_EDGES),
        "accuracy_by_margin": _by_bin(cut.margins, right, cut, _quartiles(cut.margins)),
        "calibration": _calibration(agreement[decided], confidence, cut),
        "length": _length(pairs, completions),
        "ties": _ties(pairs, decided),
        "rankings": _rankings(completions),
        "rewards": {
            "mean": float(completions.rewards.mean()),
            "standard_deviation": float(completions.rewards.std()),
        },
    }


def _take(pairs: ScoredPairs, keep: NDArray[np.bool_]) -> ScoredPairs:
    return ScoredPairs(
        **{name: getattr(pairs, name)[keep] for name in ScoredPairs.__dataclass_fields__}
    )


def _share(values: Floats, weights: Floats, prompts: NDArray[np.int64]) -> dict[str, Any]:
    """Return a weighted share with a 95% interval, pairs of a prompt taken as one draw.

    Wilson's interval at the number of independent draws that would give the same variance.
    """
    total = weights.sum()
    if not len(values) or total == 0:
        return {"value": None, "low": None, "high": None, "pairs": 0}
    share = float((weights * values).sum() / total)
    _, cluster = np.unique(prompts, return_inverse=True)
    clusters = int(cluster.max()) + 1
    residuals = np.bincount(cluster, weights * (values - share))
    variance = float((residuals**2).sum()) / total**2 * clusters / max(clusters - 1, 1)
    draws = share * (1 - share) / variance if variance > 0 else clusters
    low, high = _wilson(share, max(min(draws, len(values)), 1.0))
    return {"value": share, "low": low, "high": high, "pairs": len(values)}


def _wilson(share: float, draws: float) -> tuple[float, float]:
    centre = (share + _Z**2 / (2 * draws)) / (1 + _Z**2 / draws)
    half = _Z * math.sqrt(share * (1 - share) / draws + _Z**2 / (4 * draws**2))
    half /= 1 + _Z**2 / draws
    # At a share of 0 or 1 rounding may put an end just inside of the share.
    return max(min(centre - half, share), 0.0), min(max(centre + half, share), 1.0)


def _quartiles(values: Floats) -> tuple[float, ...]:
    if not len(values):
        return ()
    return tuple(float(edge) for edge in np.unique(np.quantile(values, (0, 0.25, 0.5, 0.75, 1))))


def _by_bin(
    values: Floats, right: Floats, pairs: ScoredPairs, edges: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Return the accuracy in each bin [low, high); the last one includes its upper edge."""
    rows = []
    if len(edges) == 1:
        edges = (edges[0], edges[0])
    for number, (low, high) in enumerate(pairwise(edges)):
        last = number == len(edges) - 2
        inside = (values >= low) & ((values <= high) if last else (values < high))
        if inside.any():
            accuracy = _share(right[inside], pairs.weights[inside], pairs.prompts[inside])
            rows.append({"low": low, "high": high, "accuracy": accuracy})
    return rows


def _calibration(agreement: Floats, confidence: Floats, pairs: ScoredPairs) -> dict[str, Any]:
    """Return how well sigma(reward difference) works as a probability.

    ``agreement`` is the reward of what the judge prefers minus that of the other. Brier and NLL are
    given against the judge's choice, and against its probability (the lowest NLL there is the
    judge's own entropy). The bins hold the model's confidence in its own choice, in [0.5, 1].
    """
    if not len(agreement) or pairs.weights.sum() == 0:
        return {"ece": None, "brier": None, "nll": None, "bins": []}
    weights = pairs.weights / pairs.weights.sum()
    q = _sigmoid(agreement)
    # log sigma(x) = -log(1 + e^-x), without overflow on either side.
    for_it, against = -np.logaddexp(0, -agreement), -np.logaddexp(0, agreement)
    own = np.maximum(q, 1 - q)
    right = (agreement > 0) + 0.5 * (agreement == 0)
    place = np.minimum(((own - 0.5) * 2 * RELIABILITY_BINS).astype(int), RELIABILITY_BINS - 1)
    bins, ece = [], 0.0
    for number in range(RELIABILITY_BINS):
        inside = place == number
        mass = float(weights[inside].sum())
        if mass == 0:
            continue
        mean = float((weights[inside] * own[inside]).sum() / mass)
        share = _share(right[inside], pairs.weights[inside], pairs.prompts[inside])
        ece += mass * abs(mean - share["value"])
        bins.append({"confidence": mean, "accuracy": share, "mass": mass})
    return {
        "ece": ece,
        "brier": float((weights * (q - 1) ** 2).sum()),
        "nll": float(-(weights * for_it).sum()),
        "brier_soft": float((weights * (q - confidence) ** 2).sum()),
        "nll_soft": float(-(weights * (confidence * for_it + (1 - confidence) * against)).sum()),
        "judge_entropy": float((weights * _entropy(confidence)).sum()),
        "bins": bins,
    }


def _sigmoid(x: Floats) -> Floats:
    return np.exp(-np.logaddexp(0, -x))


def _entropy(p: Floats) -> Floats:
    inside = np.clip(p, 1e-300, 1 - 1e-16)
    return -(inside * np.log(inside) + (1 - inside) * np.log1p(-inside))


def _correlation(x: Floats, y: Floats, weights: Floats) -> float | None:
    """Return the correlation about zero (pairs may be written either way round: no mean)."""
    scale = (weights * x * x).sum() * (weights * y * y).sum()
    return float((weights * x * y).sum() / math.sqrt(scale)) if scale > 0 else None


def _length(pairs: ScoredPairs, completions: ScoredCompletions) -> dict[str, Any]:
    """Return what length has to do with reward.

    ``raw`` correlates reward and length differences within pairs; ``partial`` does so once what
    the judge's own preference (its log-odds, at most 3 either way) explains of both is taken out:
    what is left is the model's own liking of length. ``rank_within_prompts`` is the same as ``raw``
    on ranks of all completions, each prompt's mean taken out.
    """
    d, lengths, w = pairs.differences, pairs.length_differences, pairs.weights
    p = np.clip(pairs.p_chosen, 0.05, 0.95)
    judged = np.log(p) - np.log1p(-p)
    energy = float((w * judged**2).sum())

    def without_judge(x: Floats) -> Floats:
        return x - judged * float((w * x * judged).sum()) / energy if energy > 0 else x

    within = _centre(completions.rewards, completions.prompts)
    within_lengths = _centre(completions.lengths, completions.prompts)
    unequal = (lengths != 0) & (w > 0)
    longer = np.sign(lengths)
    return {
        "raw": _correlation(d, lengths, w),
        "partial": _correlation(without_judge(d), without_judge(lengths), w),
        "rank_within_prompts": _correlation(
            _centred_ranks(within), _centred_ranks(within_lengths), np.ones_like(within)
        ),
        "model_prefers_longer": _mean((d * longer > 0)[unequal], w[unequal]),
        "judge_prefers_longer": _mean((judged * longer > 0)[unequal], w[unequal]),
    }


def _mean(values: NDArray[Any], weights: Floats) -> float | None:
    return float((weights * values).sum() / weights.sum()) if weights.sum() > 0 else None


def _centre(values: Floats, prompts: NDArray[np.int64]) -> Floats:
    _, cluster = np.unique(prompts, return_inverse=True)
    return values - (np.bincount(cluster, values) / np.bincount(cluster))[cluster]


def _centred_ranks(values: Floats) -> Floats:
    ranks: Floats = rankdata(np.round(values, 12))
    return ranks - ranks.mean()


def _ties(pairs: ScoredPairs, decided: NDArray[np.bool_]) -> dict[str, Any]:
    """Return whether judged ties get small differences: P(|d| of a tie < |d| of a decided pair)."""
    size = np.abs(pairs.differences)
    tied, other = size[pairs.ties], size[decided]
    separation = None
    if len(tied) and len(other):
        ranks = rankdata(np.concatenate([tied, other]))
        above = ranks[: len(tied)].sum() - len(tied) * (len(tied) + 1) / 2
        separation = 1 - float(above) / (len(tied) * len(other))
    return {
        "pairs": len(tied),
        "mean_difference": float(tied.mean()) if len(tied) else None,
        "mean_difference_decided": float(other.mean()) if len(other) else None,
        "separation": separation,
    }


def _rankings(completions: ScoredCompletions) -> dict[str, Any]:
    """Return agreement with whole rankings: Kendall's tau-b per prompt, and whose best is best."""
    taus, best = [], []
    for prompt in np.unique(completions.prompts[completions.ranks >= 0]):
        inside = (completions.prompts == prompt) & (completions.ranks >= 0)
        ranks, rewards = completions.ranks[inside], completions.rewards[inside]
        if len(np.unique(ranks)) < 2:
            continue
        best.append(float(ranks[rewards.argmax()] == ranks.min()))
        tau = kendalltau(-ranks, rewards).statistic
        if not math.isnan(tau):
            taus.append(float(tau))
    return {
        "rankings": len(best),
        "kendall_tau": float(np.mean(taus)) if taus else None,
        "best_is_best": float(np.mean(best)) if best else None,
    }


def reliability_plot(report: dict[str, Any], path: Path, *, title: str = "Reliability") -> None:
    """Draw confidence against accuracy, with intervals and each bin's share, as an SVG."""
    import matplotlib

    bins = report["calibration"]["bins"]
    with matplotlib.rc_context({"svg.hashsalt": "reliability", "font.size": 9}):
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure

        figure = Figure(figsize=(4.2, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        upper, lower = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
        upper.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=1, linestyle="--")
        x = [row["confidence"] for row in bins]
        y = [row["accuracy"]["value"] for row in bins]
        below = [row["accuracy"]["value"] - row["accuracy"]["low"] for row in bins]
        above = [row["accuracy"]["high"] - row["accuracy"]["value"] for row in bins]
        upper.errorbar(x, y, yerr=[below, above], fmt="o", markersize=4, color="#1f5fa8", capsize=2)
        ece = report["calibration"]["ece"]
        upper.set_title(title if ece is None else f"{title} (ECE {ece:.3f})")
        upper.set_ylabel("agrees with the judge")
        upper.set_ylim(min([0.4, *(row["accuracy"]["low"] for row in bins)]), 1.02)
        lower.bar(x, [row["mass"] for row in bins], width=0.03, color="#9db8d6")
        lower.set_ylabel("share")
        lower.set_xlabel("the model's confidence in its choice")
        lower.set_xlim(0.49, 1.01)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
