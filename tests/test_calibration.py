"""Calibration maps: planted temperature and bias come back; maps are symmetric and stored whole."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import special

from feedback.calibration import (
    Calibration,
    apply,
    fit_isotonic,
    fit_temperature,
    labels_needed,
    load_calibrations,
    save_calibrations,
    scores,
)
from feedback.errors import InputError
from feedback.records import JudgeIdentity

WHO: dict[str, Any] = {
    "judge": JudgeIdentity(model="some-judge"),
    "template": "pairwise",
    "template_sha256": "0" * 64,
}


def stated(rng: np.random.Generator, n: int, temperature: float, bias: float) -> tuple[Any, Any]:
    """A judge whose honest logit is z says temperature * z, plus bias for the first slot."""
    honest = rng.normal(0, 1.5, n)
    label = (rng.random(n) < special.expit(honest)).astype(float)
    logits = np.stack([temperature * honest + bias, temperature * honest - bias], axis=1)
    return special.expit(logits), label


def test_planted_temperature_and_bias_are_recovered() -> None:
    p, label = stated(np.random.default_rng(0), 4000, temperature=2.5, bias=0.8)
    fitted = fit_temperature(p, label, **WHO)
    assert fitted.standard_error is not None
    assert abs(math.log(fitted.temperature / 2.5)) < 3 * fitted.standard_error
    assert fitted.bias == pytest.approx(0.8, abs=0.01)
    before = scores(p.mean(axis=1), label).nll.mean()
    assert scores(apply(fitted, p), label).nll.mean() < before


def test_standard_error_is_that_of_repeated_fits() -> None:
    rng = np.random.default_rng(1)
    fits = [fit_temperature(*stated(rng, 300, 2.0, 0.0), **WHO) for _ in range(40)]
    spread = float(np.std([math.log(fit.temperature) for fit in fits]))
    claimed = float(np.mean([fit.standard_error for fit in fits]))  # type: ignore[arg-type]
    assert claimed == pytest.approx(spread, rel=0.4)


def test_a_calibrated_judge_is_left_alone() -> None:
    p, label = stated(np.random.default_rng(2), 4000, temperature=1.0, bias=0.0)
    fitted = fit_temperature(p, label, **WHO)
    assert fitted.temperature == pytest.approx(1.0, abs=0.1)
    assert fitted.bias == pytest.approx(0.0, abs=0.01)


def test_temperature_by_hand() -> None:
    """Half of ln 9 is ln 3: sigmoid 0.75. A bias of ln 3 takes ln 9 to ln 3 and to ln 27."""
    halved = Calibration(method="temperature", temperature=2.0, **WHO)
    assert apply(halved, [0.9, 0.9]) == pytest.approx(0.75)
    biased = Calibration(method="temperature", bias=math.log(3), **WHO)
    assert apply(biased, [0.9, 0.9]) == pytest.approx((3 / 4 + 27 / 28) / 2)


@pytest.mark.parametrize("method", ["temperature", "isotonic"])
def test_maps_are_symmetric(method: str) -> None:
    rng = np.random.default_rng(3)
    p, label = stated(rng, 500, temperature=2.0, bias=0.5)
    fit = fit_temperature if method == "temperature" else fit_isotonic
    fitted = fit(p, label, **WHO)
    # Renaming a pair swaps the orders and complements the probabilities.
    assert apply(fitted, 1 - p[:, ::-1]) == pytest.approx(1 - apply(fitted, p))


def test_isotonic_rises_and_improves() -> None:
    p, label = stated(np.random.default_rng(4), 2000, temperature=3.0, bias=0.0)
    fitted = fit_isotonic(p, label, **WHO)
    x, y = zip(*fitted.knots, strict=True)
    assert list(x) == sorted(x) and list(y) == sorted(y)
    assert scores(apply(fitted, p), label).brier.mean() < scores(p.mean(1), label).brier.mean()


def test_one_order_alone_has_no_bias() -> None:
    p, label = stated(np.random.default_rng(5), 500, temperature=2.0, bias=1.0)
    p[:, 1] = np.nan
    fitted = fit_temperature(p, label, **WHO)
    assert fitted.bias == 0.0
    assert np.isfinite(apply(fitted, p)).all()
    assert math.isnan(float(apply(fitted, [math.nan, math.nan])))


def test_gold_ties_pull_towards_doubt() -> None:
    p = np.full((200, 2), 0.9)
    without = fit_temperature(p, np.ones(200), **WHO)
    with_ties = fit_temperature(p, np.where(np.arange(200) < 100, 0.5, 1.0), **WHO)
    assert with_ties.temperature > without.temperature


def test_labels_needed_shrinks_the_interval_as_promised() -> None:
    rng = np.random.default_rng(6)
    small = fit_temperature(*stated(rng, 100, 2.0, 0.0), **WHO)
    needed = labels_needed(small)
    assert needed is not None and needed > 100
    enough = fit_temperature(*stated(rng, needed, 2.0, 0.0), **WHO)
    assert enough.standard_error is not None
    assert 1.96 * enough.standard_error < 1.3 * math.log(1.25)


def test_stored_maps_come_back(tmp_path: Path) -> None:
    p, label = stated(np.random.default_rng(7), 200, 2.0, 0.3)
    maps = [fit_temperature(p, label, **WHO, prompts=50)]
    save_calibrations(tmp_path / "calibration.json", maps, held_out={"pairs": 3})
    found = load_calibrations(tmp_path / "calibration.json")
    assert found == {("some-judge", "0" * 64): maps[0]}


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="rlaif calibrate writes it"):
        load_calibrations(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{"format": 1}')
    with pytest.raises(InputError, match="not a calibration file"):
        load_calibrations(tmp_path / "bad.json")


def test_no_labels_is_an_error() -> None:
    with pytest.raises(ValueError, match="no pair"):
        fit_temperature(np.full((3, 2), np.nan), np.ones(3), **WHO)
