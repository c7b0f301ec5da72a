"""Are a judge's probabilities rounded? Logits in bfloat16 leave only a few values for a label.

Between 16 and 32 neighbouring bfloat16 numbers are 0.125 apart, so that log-odds of two labels come
in steps of 0.125: near one half, probabilities in steps of three points, and many exact ties. Most
servers compute logits so; what they return looks like any other number.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

__all__ = ["STEPS", "log_odds_step", "rounding_note"]

STEPS = (0.5, 0.25, 0.125, 0.0625, 0.03125)
"""Steps that are looked for, in log-odds: those of bfloat16 logits between 4 and 128."""
_LEAST_VALUES = 10
_LEAST_VERDICTS = 50
_SHARE = 0.95  # some lie elsewhere: a logit near a power of two, a probability near 0
_CLOSE = 0.001
_SURE = 0.98  # nearer to 0 or 1, what engines return of a probability is too coarse for this


def log_odds_step(probabilities: Iterable[Sequence[float]]) -> float | None:
    """Return the step that the log-odds of two labels come in, or None where they have none.

    Args:
        probabilities: of each verdict's labels; the first two are compared.
    """
    pairs = np.array([row[:2] for row in probabilities if len(row) > 1], float).reshape(-1, 2)
    pairs = pairs[(pairs > 0).all(axis=1)]
    share = pairs[:, 0] / pairs.sum(axis=1)
    pairs = pairs[np.maximum(share, 1 - share) <= _SURE]
    odds = np.log(pairs[:, 0] / pairs[:, 1])
    if len(odds) < _LEAST_VERDICTS or len(np.unique(odds.round(3))) < _LEAST_VALUES:
        return None
    for step in STEPS:
        if np.mean(np.abs(odds - step * np.round(odds / step)) < _CLOSE) >= _SHARE:
            return step
    return None


def rounding_note(probabilities: Iterable[Sequence[float]]) -> str | None:
    """Return in words what ``log_odds_step`` finds and what to do about it, or None."""
    step = log_odds_step(probabilities)
    if step is None:
        return None
    points = 100 * (1 / (1 + math.exp(-step)) - 0.5)
    return (
        f"The probabilities are rounded: their log-odds come in steps of {step:g}, near one half "
        f"{points:.1f} points of probability, as from logits in bfloat16. A server that computes "
        'logits in float32 (vLLM: --hf-overrides \'{"head_dtype": "float32"}\') gives finer ones.'
    )
