"""The overoptimisation guard: a gold scorer watches, and the best policy it saw is what is kept.

A reward that is optimised hard enough stops measuring what it stood for (Gao et al., arXiv
2210.10760). Every few steps the policy writes completions for held-out prompts, always from the
same seeds (which vLLM on a GPU does not follow); a gold scorer that took no part in the reward
scores them. A probe is worse than the best one when the mean difference over the prompts lies below
zero by more than ``tolerance`` standard errors; after ``patience`` worse probes in a row the run
stops, and its result is the policy of the best probe. A probe in which the gold scorer scored fewer
than two prompts decides nothing, and is never the best.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = ["Guard", "Probe", "prompt_means"]


class Probe(NamedTuple):
    """What one probe found."""

    step: int
    gold: float
    """Mean gold score; NaN where none is known."""
    change: float
    """Mean difference to the best probe so far, over the prompts."""
    error: float
    """Its standard error."""
    outcome: Literal["best", "level", "worse", "unknown"]
    """unknown: fewer than two prompts can be compared."""
    known: int
    """Prompts with a gold score."""


def prompt_means(scores: Tensor, *, completions: int) -> list[float]:
    """Return the mean score of each prompt's completions, NaN where none has one.

    Args:
        scores: (prompts * completions,), NaN where there is none.
        completions: per prompt.
    """
    return torch.nanmean(scores.view(-1, completions), dim=1).tolist()


class Guard:
    """Remembers the best probe and decides when to stop.

    Args:
        patience: worse probes in a row before ``stop`` is true.
        tolerance: standard errors that a worse probe lies below the best.
    """

    def __init__(self, *, patience: int = 2, tolerance: float = 1.0):
        self.patience = patience
        self.tolerance = tolerance
        self.best_step = -1
        self.best: list[float] = []
        self.worse = 0

    @property
    def stop(self) -> bool:
        """Whether the gold score has fallen for good."""
        return self.worse >= self.patience

    def add(self, step: int, scores: Sequence[float]) -> Probe:
        """Compare a probe with the best so far; ``scores`` is one per prompt, NaN unknown."""
        known = [score for score in scores if not math.isnan(score)]
        gold = sum(known) / len(known) if known else math.nan
        change, error = _paired(scores, self.best or scores)
        outcome = self._judge(change, error)
        if outcome == "best":
            self.best_step, self.best = step, list(scores)
        if outcome != "unknown":  # an outage of the gold scorer says nothing of the policy
            self.worse = self.worse + 1 if outcome == "worse" else 0
        return Probe(step, gold, change, error, outcome, len(known))

    def _judge(self, change: float, error: float) -> Literal["best", "level", "worse", "unknown"]:
        if math.isinf(error):
            return "unknown"
        if change > 0 or not self.best:
            return "best"
        return "worse" if change < -self.tolerance * error else "level"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"best_step": self.best_step, "best": list(self.best), "worse": self.worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.best_step, self.best = int(state["best_step"]), list(state["best"])
        self.worse = int(state["worse"])


def _paired(scores: Sequence[float], best: Sequence[float]) -> tuple[float, float]:
    """Return the mean difference over prompts known in both, and its standard error.

    The error is infinite where fewer than two are.
    """
    differences = [
        new - old
        for new, old in zip(scores, best, strict=True)
        if not math.isnan(new) and not math.isnan(old)
    ]
    count = len(differences)
    if count < 2:
        return 0.0, math.inf
    mean = sum(differences) / count
    variance = sum((value - mean) ** 2 for value in differences) / (count - 1)
    return mean, math.sqrt(variance / count)
