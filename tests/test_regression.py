"""Logistic regression against statsmodels, on probabilities and with errors by prompt."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm

from feedback.regression import coefficient, fit_logistic, sigmoid, standardise


def data(rows: int = 400, prompts: int = 60) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(5)
    design = random.normal(size=(rows, 3))
    groups = random.integers(0, prompts, rows)
    lean = random.normal(0, 0.7, prompts)[groups]
    target = (random.random(rows) < sigmoid(design @ [0.8, -0.4, 0.0] + lean)).astype(float)
    return design, target, groups


def test_agrees_with_statsmodels_on_bare_verdicts() -> None:
    design, target, groups = data()
    ours = fit_logistic(design, target, groups, ridge=0.0)
    theirs = sm.GLM(target, design, family=sm.families.Binomial()).fit(
        cov_type="cluster", cov_kwds={"groups": groups}
    )
    assert ours.converged
    assert ours.coefficients == pytest.approx(theirs.params, abs=1e-6)
    assert np.sqrt(np.diag(ours.covariance)) == pytest.approx(theirs.bse, rel=1e-4)


def test_agrees_with_statsmodels_on_probabilities() -> None:
    design, target, groups = data()
    soft = 0.8 * target + 0.1
    ours = fit_logistic(design, soft, groups, ridge=0.0)
    theirs = sm.GLM(soft, design, family=sm.families.Binomial()).fit()
    assert ours.coefficients == pytest.approx(theirs.params, abs=1e-6)


def test_perfect_separation_has_no_interval() -> None:
    column = np.linspace(-1, 1, 40)
    estimate = coefficient([column], (column > 0).astype(float), np.arange(40), which=0)
    assert estimate.low is None
    assert "separate" in estimate.method


def test_a_constant_covariate_is_nothing() -> None:
    zeros, other = np.zeros(20), np.linspace(-1, 1, 20)
    target = np.full(20, 0.5)
    assert coefficient([zeros, other], target, np.arange(20), which=0).value is None
    assert coefficient([zeros, other], target, np.arange(20), which=1).value == pytest.approx(0.0)


def test_standardise_keeps_zero() -> None:
    assert standardise(np.array([-2.0, 0.0, 2.0]))[1] == 0.0
    assert np.std(standardise(np.array([1.0, 5.0, 9.0]))) == pytest.approx(1.0)
    assert standardise(np.ones(3)).tolist() == [0.0, 0.0, 0.0]


def test_sigmoid_does_not_overflow() -> None:
    assert sigmoid(np.array([-1e9, 0.0, 1e9])).tolist() == [0.0, 0.5, 1.0]
