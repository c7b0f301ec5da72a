"""Maximum likelihood for choices among alternatives with linear utilities: a conditional logit.

Bradley-Terry with Davidson's ties and Plackett-Luce with tied groups are both of this form, so they
share one fit. At each stage one alternative is taken out of several; alternative ``a`` has utility
``x_a . beta`` and the chance ``exp(x_a . beta) / sum_b exp(x_b . beta)``. Weights may be fractions
(a judge's probability for each alternative): the likelihood is then the cross-entropy.

The log-likelihood is concave, so the optimum found is the only one.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["ChoiceFit", "Stages", "fit_choices"]

Floats = npt.NDArray[np.float64]
_MOST_STEPS = 200
_SMALLEST_STEP = 1e-9
_RIDGE = 1e-12
# Log-odds beyond this are an estimate on its way to infinity.
_INFINITE = 50.0


class Stages(NamedTuple):
    """All stages, padded to the longest."""

    features: Floats
    """(stages, alternatives, parameters)."""
    weights: Floats
    """(stages, alternatives): how much each alternative was chosen."""
    offered: npt.NDArray[np.bool_]
    """(stages, alternatives): False for padding."""


class ChoiceFit(NamedTuple):
    """Estimates and the curvature around them."""

    beta: Floats
    """(parameters,)."""
    information: Floats
    """(parameters, parameters): observed information, the prior's included."""
    log_likelihood: float
    """Without the prior's part."""


class _Point(NamedTuple):
    """The log-likelihood and its derivatives at one ``beta``."""

    value: float
    gradient: Floats
    information: Floats


def _evaluate(beta: Floats, stages: Stages) -> _Point:
    features, weights, offered = stages
    utility = np.where(offered, features @ beta, -np.inf)
    top = utility.max(axis=1, keepdims=True)
    raised = np.exp(utility - top)
    sums = raised.sum(axis=1, keepdims=True)
    chances = raised / sums
    logs = np.where(offered, utility - top - np.log(sums), 0.0)
    total = weights.sum(axis=1)
    flat = features.reshape(-1, features.shape[2])
    surplus = (weights - total[:, None] * chances).ravel()
    mean = (chances[:, :, None] * features).sum(axis=1)
    second = flat.T @ ((total[:, None] * chances).ravel()[:, None] * flat)
    return _Point(
        value=float((weights * logs).sum()),
        gradient=flat.T @ surplus,
        information=second - mean.T @ (total[:, None] * mean),
    )


def fit_choices(stages: Stages, *, precision: Floats) -> ChoiceFit:
    """Fit ``beta`` by maximum likelihood, or by its posterior mode under a normal prior.

    Newton's method: the objective is concave, so a step is halved until it gains.

    Args:
        stages: what was offered and chosen.
        precision: (parameters,) inverse variances of the zero-mean prior; zeros for none.

    Raises:
        ValueError: no finite optimum: without a prior, the data do not pin the strengths down.
    """
    beta = np.zeros(stages.features.shape[2])
    point = _evaluate(beta, stages)
    tolerance = 1e-9 * max(float(stages.weights.sum()), 1.0)
    for _ in range(_MOST_STEPS):
        gradient = point.gradient - precision * beta
        if np.abs(gradient).max(initial=0.0) <= tolerance:
            information = point.information + np.diag(precision)
            return ChoiceFit(beta=beta, information=information, log_likelihood=point.value)
        curvature = point.information + np.diag(precision + _RIDGE)
        step = np.linalg.solve(curvature, gradient)
        objective = point.value - 0.5 * float(precision @ beta**2)
        size = 1.0
        while size > _SMALLEST_STEP:
            trial = beta + size * step
            point = _evaluate(trial, stages)
            if point.value - 0.5 * float(precision @ trial**2) >= objective - 1e-12:
                break
            size /= 2
        beta = trial
        if np.abs(beta).max() > _INFINITE:
            break
    raise ValueError("the strengths have no finite estimate; give a prior")
