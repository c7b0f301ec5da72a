"""What one arm of an A/B test is like: accuracy, agreement, consistency, length, calibration, cost.

The same figures as on the report card, for the gold pairs of the test only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from feedback.agreement import (
    accuracy_halves,
    cohen_kappa,
    expected_calibration_error,
    halves,
)
from feedback.intervals import Estimate, Resampler, proportion
from feedback.observations import Pairs

__all__ = ["ArmFigures", "arm_figures", "arm_scores"]

Floats = npt.NDArray[np.float64]
# Differences of length that a reader would not notice do not count, as on the report card.
_LENGTH_THRESHOLD = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmFigures:
    """One arm's figures."""

    name: str
    accuracy: Estimate
    """Ties by the judge count one half."""
    kappa: Estimate
    order_consistency: Estimate
    prefers_longer: Estimate
    """Share of pairs in which the longer completion is preferred, where lengths differ by more than
    30 characters."""
    ece: Estimate
    answered: Estimate
    """Share of pairs with a verdict."""
    calls: int
    prompt_tokens: int
    completion_tokens: int
    cost: float
    """US dollars."""
    seconds: float
    """Sum of the calls' latencies."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-ready dict."""
        return {
            field: value.to_dict() if isinstance(value, Estimate) else value
            for field in self.__slots__
            if (value := getattr(self, field)) is not None
        }


def arm_scores(pairs: Pairs, keys: list[tuple[str, str, str]]) -> Floats:
    """Return the arm's score on each gold pair of ``keys``: 1, 0.5, 0, or NaN unanswered."""
    right = halves(pairs.verdict, pairs.gold)
    found = {
        (prompt, one, two): score
        for prompt, one, two, score in zip(
            (pairs.prompt_ids[place] for place in pairs.prompt),
            pairs.a,
            pairs.b,
            right,
            strict=True,
        )
    }
    return np.array([found.get(key, np.nan) for key in keys])


def arm_figures(name: str, pairs: Pairs, total: int, *, seed: int = 0) -> ArmFigures:
    """Return an arm's figures over the pairs it was asked about."""
    resampler = Resampler(pairs.prompt, seed=seed)
    both = pairs.both
    answered = np.isfinite(pairs.verdict)
    consistent = (pairs.winner[:, 0] == pairs.winner[:, 1])[both]
    hits = halves(pairs.verdict, pairs.gold)
    stated = np.maximum(pairs.mean_p, 1 - pairs.mean_p)
    known = np.isfinite(hits) & np.isfinite(stated) & pairs.soft
    lengths = pairs.lengths
    apart = answered & (pairs.verdict != 0)
    apart &= np.abs(lengths[:, 0] - lengths[:, 1]) > _LENGTH_THRESHOLD
    longer = np.sign(lengths[:, 0] - lengths[:, 1])[apart] == pairs.verdict[apart]
    usage = [call.usage for call in pairs.calls]
    return ArmFigures(
        name=name,
        accuracy=accuracy_halves(pairs, resampler),
        kappa=cohen_kappa(pairs.verdict, pairs.gold, pairs.prompt, resampler),
        order_consistency=proportion(consistent, pairs.prompt[both]),
        prefers_longer=proportion(longer, pairs.prompt[apart]),
        ece=expected_calibration_error(stated[known], hits[known], pairs.prompt[known], resampler),
        answered=proportion(answered, pairs.prompt),
        calls=len(pairs.calls),
        prompt_tokens=sum(one.prompt_tokens for one in usage),
        completion_tokens=sum(one.completion_tokens for one in usage),
        cost=sum(call.cost for call in pairs.calls),
        seconds=sum(call.latency_s for call in pairs.calls),
    )
