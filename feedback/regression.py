"""Logistic regression on probabilities; standard errors know that rows of a prompt go together.

Targets may be probabilities (a soft label is its own target). Newton's method with a ridge so small
that it matters only where the data separate perfectly; the covariance is the cluster sandwich with
the usual small-sample factor (Cameron and Miller 2015, Journal of Human Resources 50).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feedback.intervals import Estimate, from_standard_error, group_sums, nothing

__all__ = ["LogisticFit", "coefficient", "fit_logistic", "sigmoid", "standardise"]

Floats = npt.NDArray[np.float64]
_SEPARATED = 12.0


@dataclass(frozen=True, slots=True)
class LogisticFit:
    """Coefficients of a logistic regression, and how sure they are."""

    coefficients: Floats
    """(k,)"""
    covariance: Floats
    """(k, k), robust to correlation within prompts."""
    n: int
    prompts: int
    converged: bool

    def estimate(self, column: int) -> Estimate:
        """Return one coefficient with its interval; no interval where the data separate."""
        value = float(self.coefficients[column])
        if not self.converged or abs(value) > _SEPARATED:
            return Estimate(
                value, None, None, self.n, self.prompts, "no interval: the data separate perfectly"
            )
        return from_standard_error(
            value,
            float(np.sqrt(self.covariance[column, column])),
            n=self.n,
            prompts=self.prompts,
            method="logistic regression, errors clustered by prompt",
        )


def sigmoid(logits: Floats) -> Floats:
    """Return 1 / (1 + exp(-x)) without overflow."""
    return np.asarray(0.5 * (1.0 + np.tanh(0.5 * logits)))


def standardise(values: Floats) -> Floats:
    """Return ``values`` over their standard deviation, not centred; zeros where they are constant.

    Differences between two sides of a pair have a meaningful zero, so the mean stays.
    """
    spread = float(np.std(values)) if len(values) else 0.0
    return values / spread if spread > 0 else np.zeros_like(values)


def fit_logistic(
    design: Floats,
    target: Floats,
    groups: npt.NDArray[np.int64],
    *,
    weights: Floats | None = None,
    ridge: float = 1e-6,
    steps: int = 50,
) -> LogisticFit:
    """Fit ``P(target) = sigma(design @ coefficients)``.

    Args:
        design: (n, k) columns; no intercept is added.
        target: (n,) in [0, 1].
        groups: (n,) prompt of each row.
        weights: (n,) case weights; None: all 1.
        ridge: added to each diagonal of the Hessian, per row.
        steps: of Newton's method at most.
    """
    rows, width = design.shape
    case = np.ones(rows) if weights is None else weights
    penalty = ridge * max(rows, 1)
    beta = np.zeros(width)
    converged = False
    hessian = np.eye(width)
    for _ in range(steps):
        fitted = sigmoid(design @ beta)
        gradient = design.T @ (case * (target - fitted)) - penalty * beta
        hessian = design.T @ (design * (case * fitted * (1 - fitted))[:, None])
        hessian += penalty * np.eye(width)
        step = np.linalg.solve(hessian, gradient)
        step *= min(1.0, 3.0 / max(float(np.abs(step).max()), 1e-12))
        beta = beta + step
        if np.abs(step).max() < 1e-8:
            converged = True
            break
    residual = design * (case * (target - sigmoid(design @ beta)))[:, None]
    scores = group_sums(groups, *residual.T)
    count = len(scores)
    inverse = np.linalg.inv(hessian)
    factor = count / max(count - 1, 1) * (rows - 1) / max(rows - width, 1)
    covariance = inverse @ (scores.T @ scores) @ inverse * factor
    return LogisticFit(beta, covariance, rows, count, converged)


def coefficient(
    columns: list[Floats], target: Floats, groups: npt.NDArray[np.int64], *, which: int
) -> Estimate:
    """Fit on ``columns`` and return the estimate of one; nothing where it has no variation."""
    if len(target) <= len(columns) or not np.any(columns[which]):
        return nothing("no variation in the covariate")
    kept = [place for place, column in enumerate(columns) if np.any(column)]
    fit = fit_logistic(np.stack([columns[place] for place in kept], axis=1), target, groups)
    return fit.estimate(kept.index(which))
