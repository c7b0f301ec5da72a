"""Calibrated labels: maps from a judge's stated probability to one that its record bears out.

A judge that says 0.95 and is right 80 times in 100 teaches a soft-label loss the wrong strength. On
a slice of gold pairs a map is fitted and stored as a small JSON; ``pair`` applies it and keeps the
raw probability in the row.

The *temperature* map works on the logits of each order, where the position bias is visible:
``p = mean over orders of sigmoid((logit P(first shown) - bias) / temperature)``, read in candidate
space. The *isotonic* map works on the order-averaged probability and is made symmetric, so that
naming the pair (a, b) or (b, a) gives complementary answers, as it does for temperature.

Guo et al. 2017, arXiv 1706.04599 (temperature); Zadrozny and Elkan 2002 (isotonic).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from feedback.errors import InputError
from feedback.records import JudgeIdentity
from feedback.shards import write_json

__all__ = [
    "Calibration",
    "Scores",
    "apply",
    "fit_isotonic",
    "fit_temperature",
    "labels_needed",
    "load_calibrations",
    "save_calibrations",
    "scores",
]

Floats = npt.NDArray[np.float64]
Method = Literal["temperature", "isotonic"]
# Stated probabilities of exactly 0 or 1 would have infinite logits.
_FLOOR = 1e-6
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """One map, for one judge with one template."""

    judge: JudgeIdentity
    template: str
    template_sha256: str
    method: Method
    temperature: float = 1.0
    """Logits are divided by it: above 1 the judge was over-confident."""
    bias: float = 0.0
    """Logit by which the judge favours the completion shown first."""
    knots: list[tuple[float, float]] = field(default_factory=list)
    """Isotonic: (stated, calibrated) probabilities, interpolated linearly."""
    pairs: int = 0
    """Gold pairs that it was fitted on."""
    prompts: int = 0
    standard_error: float | None = None
    """Of log temperature, from the observed information."""


class Scores(NamedTuple):
    """How well probabilities fit labels; lower is better."""

    nll: Floats
    """Cross-entropy of each pair in nats, (n,)."""
    brier: Floats
    """Squared error of each pair, (n,)."""


def apply(calibration: Calibration, p_orders: npt.ArrayLike) -> Floats:
    """Return calibrated P(a preferred).

    Args:
        calibration: the map.
        p_orders: stated P(a preferred) with a shown first and with b shown first, (n, 2) or (2,);
            NaN for an order that was not asked.

    Returns:
        Array of shape (n,), or () for one pair; NaN where neither order is known.
    """
    stated = np.asarray(p_orders, float)
    if calibration.method == "temperature":
        return _mean(_tempered(stated, calibration.temperature, calibration.bias))
    mean = _mean(stated)
    x, y = np.array(calibration.knots).T
    return np.where(np.isfinite(mean), np.interp(mean, x, y), np.nan)


def _mean(p_orders: Floats) -> Floats:
    known = np.isfinite(p_orders)
    total = np.where(known, p_orders, 0.0).sum(axis=-1)
    count = known.sum(axis=-1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _tempered(p_orders: Floats, temperature: float, bias: float) -> Floats:
    from scipy import special

    logits = special.logit(np.clip(p_orders, _FLOOR, 1 - _FLOOR))
    # In the second order b stands first, so the pull to the first slot works against a.
    pull = np.array([bias, -bias])
    return np.asarray(special.expit((logits - pull) / temperature), float)


def scores(p: Floats, label: Floats) -> Scores:
    """Return cross-entropy and squared error; ``label`` is 1 (a), 0 (b) or 0.5 (tie), (n,)."""
    bounded = np.clip(p, _FLOOR, 1 - _FLOOR)
    nll = -(label * np.log(bounded) + (1 - label) * np.log1p(-bounded))
    return Scores(nll, (p - label) ** 2)


def fit_temperature(
    p_orders: Floats,
    label: Floats,
    *,
    judge: JudgeIdentity,
    template: str,
    template_sha256: str,
    prompts: int = 0,
    with_bias: bool = True,
) -> Calibration:
    """Fit temperature and position bias.

    The bias is what the two orders of a pair disagree by: the median of half the difference of
    their logits. It needs both orders and no gold; one order cannot tell it from the truth. The
    temperature then maximises the likelihood of the order-averaged probability. A gold tie counts
    as a label of one half: it pulls towards doubt instead of being left out.

    Args:
        p_orders: stated P(a preferred) in each order, (n, 2); NaN where not asked.
        label: 1 (a better), 0 (b better) or 0.5 (tie), (n,).
        judge: whom the map is for.
        template: the template's name.
        template_sha256: the template's hash.
        prompts: how many prompts the pairs come from.
        with_bias: fit the bias too.

    Raises:
        ValueError: no pair has both a probability and a label.
    """
    from scipy import optimize

    rows = np.isfinite(_mean(p_orders)) & np.isfinite(label)
    if not rows.any():
        raise ValueError("no pair has both a probability and a gold label")
    stated, truth = p_orders[rows], label[rows]
    bias = _bias(stated) if with_bias else 0.0

    def loss(log_temperature: float) -> float:
        p = _mean(_tempered(stated, math.exp(log_temperature), bias))
        # A faint pull to temperature 1 keeps a perfect judge's temperature from running to 0.
        return float(scores(p, truth).nll.sum()) + 0.5 * (log_temperature / 3.0) ** 2

    found = optimize.minimize_scalar(loss, bounds=(-5.0, 5.0), method="bounded")
    return Calibration(
        judge=judge,
        template=template,
        template_sha256=template_sha256,
        method="temperature",
        temperature=math.exp(float(found.x)),
        bias=bias,
        pairs=int(rows.sum()),
        prompts=prompts,
        standard_error=_standard_error(loss, float(found.x)),
    )


def _bias(p_orders: Floats) -> float:
    """Return the logit by which the first slot is favoured; 0 where no pair has both orders."""
    from scipy import special

    both = p_orders[np.isfinite(p_orders).all(axis=1)]
    if not len(both):
        return 0.0
    logits = special.logit(np.clip(both, _FLOOR, 1 - _FLOOR))
    return float(np.median((logits[:, 0] - logits[:, 1]) / 2))


def _standard_error(loss: Callable[[float], float], at: float, step: float = 0.05) -> float | None:
    """Return 1 / sqrt of the loss's second derivative, by finite differences."""
    curvature = (loss(at + step) - 2 * loss(at) + loss(at - step)) / step**2
    return 1 / math.sqrt(curvature) if curvature > 0 else None


def fit_isotonic(
    p_orders: Floats,
    label: Floats,
    *,
    judge: JudgeIdentity,
    template: str,
    template_sha256: str,
    prompts: int = 0,
) -> Calibration:
    """Fit a rising step map on the order-averaged probability, symmetric about one half.

    Raises:
        ValueError: no pair has both a probability and a label.
    """
    from scipy import optimize

    mean = _mean(p_orders)
    rows = np.isfinite(mean) & np.isfinite(label)
    if not rows.any():
        raise ValueError("no pair has both a probability and a gold label")
    # Each pair counts from both of its sides, which makes the map symmetric.
    x = np.concatenate([mean[rows], 1 - mean[rows]])
    y = np.concatenate([label[rows], 1 - label[rows]])
    values, place, counts = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(place, y) / counts
    fitted = optimize.isotonic_regression(means, weights=counts).x
    keep = np.ones(len(values), bool)
    keep[1:-1] = (fitted[1:-1] != fitted[:-2]) | (fitted[1:-1] != fitted[2:])
    knots = [(float(one), float(two)) for one, two in zip(values[keep], fitted[keep], strict=True)]
    return Calibration(
        judge=judge,
        template=template,
        template_sha256=template_sha256,
        method="isotonic",
        knots=knots,
        pairs=int(rows.sum()),
        prompts=prompts,
    )


def labels_needed(calibration: Calibration, *, precision: float = 0.25) -> int | None:
    """Return how many gold pairs would pin the temperature down to within ``precision``.

    That is: its 95% interval reaches no further than a factor of ``1 + precision`` either way. None
    where the fit says nothing about its own precision.
    """
    if calibration.standard_error is None or not calibration.pairs:
        return None
    target = math.log1p(precision) / 1.96
    return math.ceil(calibration.pairs * (calibration.standard_error / target) ** 2)


def save_calibrations(path: Path, calibrations: list[Calibration], **report: Any) -> None:
    """Write maps, and the report of how they were fitted, as one JSON file."""
    maps = [asdict(calibration) for calibration in calibrations]
    write_json(path, {"format": FORMAT, "calibrations": maps, **report})


def load_calibrations(path: Path) -> dict[tuple[str, str], Calibration]:
    """Read maps by (judge model, template hash).

    Raises:
        InputError: the file is missing, or is not a calibration file of this format.
    """
    if not path.is_file():
        raise InputError("no such calibration file (rlaif calibrate writes it)", path=path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, not {FORMAT}")
        found = [_from_dict(table) for table in content["calibrations"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"not a calibration file: {error}", path=path) from error
    return {(entry.judge.model, entry.template_sha256): entry for entry in found}


def _from_dict(table: dict[str, Any]) -> Calibration:
    judge = JudgeIdentity(**table.pop("judge"))
    knots = [(float(x), float(y)) for x, y in table.pop("knots")]
    return Calibration(judge=judge, knots=knots, **table)
