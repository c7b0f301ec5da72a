"""Planted biases come back within their intervals: a short run of the simulation benchmark."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from feedback.card import make_card
from feedback.simulation import Planted, simulate


@pytest.fixture(scope="module")
def bench(root: Path) -> ModuleType:
    path = root / "benchmarks" / "report_simulation.py"
    spec = importlib.util.spec_from_file_location("report_simulation", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("planted", "figure", "truth"),
    [
        (Planted(position=0.9), "position_bias.logit_shift", 0.9),
        (Planted(position=-0.4, soft=True, noise=0.7), "position_bias.logit_shift", -0.4),
        (Planted(position=0.5, soft=True, tie=-1.0, noise=0.7), "position_bias.logit_shift", 0.5),
        (Planted(length=1.2, sensitivity=0.0, lean=0.0), "length_bias.effect", 1.2),
        (Planted(unparsed=0.1), "outcomes.parse_rate", 0.9),
        (Planted(), "self_preference.equal_opportunity", 0.0),
        (Planted(), "position_bias.preference_fairness", 0.0),
        (Planted(), "length_bias.excess", 0.0),
    ],
)
def test_a_planted_bias_is_found(planted: Planted, figure: str, truth: float) -> None:
    """One run of 400 prompts; a 99.9% reach of the interval, so that the test is about bias."""
    card = make_card([simulate(planted, prompts=400, seed=17).pairs()], replicates=500)
    estimate = next(found.estimate for _, found in card.figures() if found.name == figure)
    assert estimate.value is not None
    assert estimate.low is not None
    assert estimate.high is not None
    reach = 1.7 * (estimate.high - estimate.low) / 2 + 1e-9
    assert abs(estimate.value - truth) < reach
    assert estimate.high - estimate.low < 0.6


def test_directions_of_planted_biases() -> None:
    """What cannot be planted as a number has the right sign, clear of zero."""
    planted = Planted(position=0.8, length=0.8, own=1.0, noise=0.5, repeats=2, votes=3)
    card = make_card([simulate(planted, prompts=300, seed=4).pairs()], replicates=500)
    low = {figure.name: figure.estimate.low for _, figure in card.figures()}
    high = {figure.name: figure.estimate.high for _, figure in card.figures()}
    assert low["self_preference.equal_opportunity"] > 0
    assert low["length_bias.excess"] > 0
    assert low["length_bias.effect_given_gold"] > 0
    assert high["position_bias.preference_fairness"] < 0  # the first place: primacy
    assert low["position_bias.first_slot_share"] > 0.5
    assert high["stability.repeats"] < 1.0


@pytest.mark.slow
def test_coverage_of_the_intervals(bench: ModuleType) -> None:
    """93% to 97% of all intervals hold the truth, and no figure is clearly under 93%.

    How many runs: the mean over figures must be known to a third of the two percent between 95% and
    the bounds. Figures of one run go together, so only the scenarios count as independent.
    """
    runs = math.ceil(0.95 * 0.05 * (3 / 0.02) ** 2 / len(bench.SCENARIOS))
    held = []
    for scenario in bench.SCENARIOS.values():
        rows = bench.run_scenario(
            scenario, replicates=runs, prompts=60, truth_prompts=6000, resamples=300
        )
        held += [float(row["coverage"]) for row in rows]
    assert 0.93 <= np.mean(held) <= 0.97
    # One figure among some thirty: 3.3 standard errors are its simultaneous 97% bound.
    assert min(held) >= 0.93 - 3.3 * math.sqrt(0.95 * 0.05 / runs)


def test_order_consistency_with_ties_and_noise_holds_its_level(bench: ModuleType) -> None:
    """2,000 runs: 95% give or take three standard errors of half a percent."""
    row = bench.consistency_coverage(bench.SCENARIOS[bench.TIES].planted, runs=2000, prompts=60)
    assert abs(row["coverage"] - 0.95) < 3 * math.sqrt(0.95 * 0.05 / 2000)
    assert row["mean_estimate"] == pytest.approx(row["truth"], abs=0.003)


def test_runs_drawn_as_arrays_are_those_of_the_simulation(bench: ModuleType) -> None:
    planted = bench.SCENARIOS[bench.TIES].planted
    winner = simulate(planted, prompts=1500, seed=3).pairs().winner
    drawn = bench.drawn_winners(planted, runs=1, prompts=1500, seed=3).reshape(-1, 2)
    for one, two in ((np.isnan(winner), np.isnan(drawn)), (winner == 0, drawn == 0)):
        assert one.mean() == pytest.approx(two.mean(), abs=0.01)
    same = [np.mean(rows[:, 0] == rows[:, 1]) for rows in (winner, drawn)]
    assert same[0] == pytest.approx(same[1], abs=0.02)


def test_the_simulation_writes_what_the_table_reads(bench: ModuleType, tmp_path: Path) -> None:
    scenario = bench.Scenario(
        Planted(unparsed=0.1), ("outcomes.parse_rate",), {"outcomes.parse_rate": 0.9}
    )
    (row,) = bench.run_scenario(scenario, replicates=3, prompts=40, truth_prompts=50)
    assert set(row) >= {"figure", "planted", "truth", "mean_estimate", "coverage", "replicates"}
    assert row["truth"] == 0.9
    assert row["mean_estimate"] == pytest.approx(0.9, abs=0.05)
