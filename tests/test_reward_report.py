"""The reward model's report: hand arithmetic on a few pairs, simulation for the statistics."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from train.reward_report import (
    ScoredCompletions,
    ScoredPairs,
    reliability_plot,
    reward_report,
)


def scored_pairs(differences: Any, p_chosen: Any, **given: Any) -> ScoredPairs:
    d = np.asarray(differences, dtype=float)
    n = len(d)
    fields = {
        "p_chosen": np.asarray(p_chosen, dtype=float),
        "ties": np.zeros(n, dtype=bool),
        "margins": 2 * np.asarray(p_chosen, dtype=float) - 1,
        "weights": np.ones(n),
        "length_differences": np.zeros(n),
        "prompts": np.arange(n),
    }
    return ScoredPairs(differences=d, **(fields | given))


def completions(rewards: Any = (0.0,), **given: Any) -> ScoredCompletions:
    n = len(rewards)
    fields = {
        "lengths": np.ones(n),
        "prompts": np.zeros(n, dtype=int),
        "ranks": np.full(n, -1),
    }
    return ScoredCompletions(rewards=np.asarray(rewards, dtype=float), **(fields | given))


def test_accuracy_and_calibration_by_hand() -> None:
    """Four pairs and a tie.

    d = log 3, -log 3, log 9, 0 with p = 0.9, 0.6, 0.2, 0.55. The third judge prefers 'rejected', so
    agreement is log 3, -log 3, -log 9, 0: accuracy (1 + 0 + 0 + 1/2) / 4 = 0.375.
    q = 0.75, 0.25, 0.1, 0.5: Brier (0.0625 + 0.5625 + 0.81 + 0.25) / 4 = 0.42125;
    NLL -(log 0.75 + log 0.25 + log 0.1 + log 0.5) / 4 = log(1 / 0.009375) / 4 = 1.167427.
    Own confidence 0.75, 0.75, 0.9, 0.5, right 1, 0, 0, 1/2. Bins: 0.75 twice at accuracy 0.5
    (gap 0.25, mass 1/2), 0.9 at 0 (0.9, 1/4), 0.5 at 0.5 (0): ECE = 0.125 + 0.225 = 0.35.
    """
    tie = [False, False, False, False, True]
    d = [math.log(3), -math.log(3), math.log(9), 0.0, 5.0]
    pairs = scored_pairs(d, [0.9, 0.6, 0.2, 0.55, 0.5], ties=np.array(tie))
    report = reward_report(pairs, completions())
    assert report["pairs"] == 4
    assert report["accuracy"]["value"] == pytest.approx(0.375)
    calibration = report["calibration"]
    assert calibration["brier"] == pytest.approx(0.42125)
    assert calibration["nll"] == pytest.approx(1.167427, abs=1e-6)
    assert calibration["ece"] == pytest.approx(0.35)
    soft = -(0.9 * math.log(0.75) + 0.1 * math.log(0.25)) - (
        0.6 * math.log(0.25) + 0.4 * math.log(0.75)
    )
    soft += -(0.8 * math.log(0.1) + 0.2 * math.log(0.9)) - math.log(0.5)
    assert calibration["nll_soft"] == pytest.approx(soft / 4)
    assert report["ties"] == {
        "pairs": 1,
        "mean_difference": 5.0,
        "mean_difference_decided": pytest.approx((2 * math.log(3) + math.log(9)) / 4),
        "separation": 0.0,
    }
    by_confidence = {
        (row["low"], row["high"]): row["accuracy"] for row in report["accuracy_by_confidence"]
    }
    assert by_confidence[(0.9, 0.95)]["value"] == 1.0
    assert by_confidence[(0.6, 0.7)]["value"] == 0.0
    assert sum(row["pairs"] for row in by_confidence.values()) == 4
    assert sum(row["accuracy"]["pairs"] for row in report["accuracy_by_margin"]) == 4


def test_weights_count_and_a_zero_weight_does_not() -> None:
    pairs = scored_pairs([1.0, -1.0, -1.0], [0.9] * 3, weights=np.array([3.0, 1.0, 0.0]))
    report = reward_report(pairs, completions())
    assert report["pairs"] == 2
    assert report["accuracy"]["value"] == pytest.approx(0.75)


def test_writing_pairs_the_other_way_round_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    d, p = rng.normal(size=50), rng.uniform(0.5, 1, size=50)
    lengths = rng.integers(-9, 9, size=50).astype(float)
    flip = np.where(np.arange(50) % 2, 1, -1)
    one = reward_report(scored_pairs(d, p, margins=p, length_differences=lengths), completions())
    other = reward_report(
        scored_pairs(
            d * flip,
            np.where(flip > 0, p, 1 - p),
            margins=p,
            length_differences=lengths * flip,
        ),
        completions(),
    )
    assert json.dumps(_rounded(one)) == json.dumps(_rounded(other))


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    return round(value, 9) if isinstance(value, float) else value


def test_a_calibrated_model_is_found_calibrated_and_an_overconfident_one_is_not() -> None:
    """Simulation: the judge's choice is drawn with chance sigma(d)."""
    rng = np.random.default_rng(1)
    d = rng.normal(scale=1.5, size=40_000)
    won = rng.random(len(d)) < 1 / (1 + np.exp(-d))
    agreement = np.where(won, d, -d)
    honest = reward_report(scored_pairs(agreement, np.ones(len(d))), completions())["calibration"]
    loud = reward_report(scored_pairs(3 * agreement, np.ones(len(d))), completions())["calibration"]
    assert honest["ece"] < 0.012
    assert loud["ece"] > 0.1
    assert honest["nll"] < loud["nll"] and honest["brier"] < loud["brier"]


def test_intervals_cover_when_pairs_of_a_prompt_move_together() -> None:
    """400 draws of 60 prompts with 5 pairs each that are right or wrong largely together."""
    rng = np.random.default_rng(2)
    truth, covered = 0.7, 0
    for _ in range(400):
        shared = rng.random(60) < truth
        own = rng.random((60, 5)) < truth
        right = np.where(rng.random((60, 5)) < 0.8, shared[:, None], own).ravel()
        pairs = scored_pairs(
            np.where(right, 1.0, -1.0), np.ones(300), prompts=np.repeat(np.arange(60), 5)
        )
        accuracy = reward_report(pairs, completions())["accuracy"]
        covered += accuracy["low"] <= truth <= accuracy["high"]
    assert 0.92 <= covered / 400 <= 0.98


def test_length_that_the_judge_likes_is_told_from_length_that_the_model_likes() -> None:
    """Rewards are the judge's log-odds, plus 0.5 * length for the biased model."""
    rng = np.random.default_rng(3)
    lengths = rng.normal(size=20_000)
    judged = np.clip(0.8 * lengths + rng.normal(size=len(lengths)), -2.9, 2.9)
    p = 1 / (1 + np.exp(-judged))
    fair = reward_report(scored_pairs(judged, p, length_differences=lengths), completions())
    biased = reward_report(
        scored_pairs(judged + 0.5 * lengths, p, length_differences=lengths), completions()
    )
    assert fair["length"]["raw"] > 0.5
    assert fair["length"]["partial"] == pytest.approx(0.0, abs=0.05)
    assert biased["length"]["partial"] > 0.9
    assert fair["length"]["model_prefers_longer"] == fair["length"]["judge_prefers_longer"] > 0.6


def test_rankings_by_hand() -> None:
    """Prompt 0: ranks 0 1 2, rewards 3 1 2: tau 1/3, best is best. Prompt 1: reversed pair: -1, no.

    Prompt 2 is one tied block: nothing to agree with.
    """
    report = reward_report(
        scored_pairs([1.0], [0.9]),
        completions(
            [3.0, 1.0, 2.0, 0.0, 1.0, 5.0, 6.0],
            prompts=np.array([0, 0, 0, 1, 1, 2, 2]),
            ranks=np.array([0, 1, 2, 0, 1, 0, 0]),
        ),
    )["rankings"]
    assert report == {"rankings": 2, "kendall_tau": pytest.approx(-1 / 3), "best_is_best": 0.5}


def test_nothing_decided_gives_nothing_not_zero() -> None:
    pairs = scored_pairs([1.0], [0.5], ties=np.array([True]))
    report = reward_report(pairs, completions())
    assert report["accuracy"]["value"] is None
    assert report["calibration"]["ece"] is None
    json.dumps(report, allow_nan=False)


def test_reliability_plot(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    report = reward_report(scored_pairs(rng.normal(1, 1, 200), np.ones(200)), completions())
    reliability_plot(report, tmp_path / "plot.svg")
    reliability_plot(report, tmp_path / "again.svg")
    tree = ElementTree.parse(tmp_path / "plot.svg")
    assert tree.getroot().tag.endswith("svg")
    assert (tmp_path / "plot.svg").read_bytes() == (tmp_path / "again.svg").read_bytes()
    empty = reward_report(scored_pairs([1.0], [0.5], ties=np.array([True])), completions())
    reliability_plot(empty, tmp_path / "empty.svg")
