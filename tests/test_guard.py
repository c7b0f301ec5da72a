"""The guard's decisions, by hand and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from train.guard import Guard, prompt_means


def test_better_probes_become_the_best() -> None:
    guard = Guard()
    assert guard.add(0, [1.0, 2.0, 3.0]).outcome == "best"
    probe = guard.add(10, [2.0, 2.0, 4.0])
    assert (probe.outcome, guard.best_step, probe.gold) == ("best", 10, pytest.approx(8 / 3))
    assert probe.change == pytest.approx(2 / 3)


def test_worse_means_more_than_the_tolerance_in_standard_errors() -> None:
    """Differences -1, 0, -1, 0: mean -0.5, deviation 0.577, error 0.289: worse at 1, level at 2."""
    best, later = [1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0]
    for tolerance, outcome in ((1.0, "worse"), (2.0, "level")):
        guard = Guard(tolerance=tolerance)
        guard.add(0, best)
        probe = guard.add(10, later)
        assert probe.outcome == outcome
        assert probe.error == pytest.approx(math.sqrt(1 / 3) / 2)


def test_only_a_row_of_worse_probes_stops_the_run() -> None:
    guard = Guard(patience=2)
    high, low = [1.0, 1.1, 0.9], [0.0, 0.1, 0.1]
    guard.add(0, high)
    assert guard.add(10, low).outcome == "worse"
    assert not guard.stop
    assert guard.add(20, high).outcome == "level"
    guard.add(30, low)
    assert not guard.stop
    guard.add(40, low)
    assert guard.stop
    assert guard.best_step == 0


def test_missing_gold_scores_are_left_out() -> None:
    guard = Guard()
    guard.add(0, [1.0, math.nan, 1.0, 1.0])
    probe = guard.add(10, [2.0, -50.0, math.nan, 2.0])
    assert probe.change == 1.0
    assert guard.add(20, [math.nan] * 4).outcome == "unknown"
    means = prompt_means(torch.tensor([1.0, 3.0, math.nan, 4.0, math.nan, math.nan]), completions=2)
    assert means[:2] == [2.0, 4.0]
    assert math.isnan(means[2])


def test_a_probe_with_fewer_than_two_known_scores_is_never_the_best() -> None:
    """All gold calls of the first probe fail: what follows is compared with the first known one."""
    guard = Guard(patience=2)
    for step, scores in ((0, [math.nan] * 3), (5, [math.nan, 1.0, math.nan])):
        found = guard.add(step, scores)
        assert (found.outcome, found.known, guard.best_step) == ("unknown", step // 5, -1)
    assert guard.add(10, [-200.0, -201.0, -199.0]).outcome == "best"
    for step, low in ((20, -400.0), (30, -600.0)):
        assert guard.add(step, [low, low - 1, low + 1]).outcome == "worse"
    assert guard.stop
    assert guard.best_step == 10


def test_an_outage_of_the_gold_scorer_does_not_forgive_a_fall() -> None:
    guard = Guard(patience=2)
    guard.add(0, [1.0, 1.1, 0.9])
    guard.add(10, [0.0, 0.1, 0.1])
    assert guard.add(20, [math.nan] * 3).outcome == "unknown"
    assert not guard.stop
    guard.add(30, [0.0, 0.1, 0.1])
    assert guard.stop


def test_state_survives() -> None:
    guard = Guard()
    guard.add(0, [1.0, 2.0])
    guard.add(10, [0.0, 0.9])
    copy = Guard()
    copy.load_state_dict(guard.state_dict())
    assert copy.add(20, [0.0, 0.0]) == guard.add(20, [0.0, 0.0])
    assert copy.stop == guard.stop


def test_a_level_policy_is_rarely_stopped_and_a_falling_one_nearly_always() -> None:
    """64 prompts, noise 1: of 300 runs of 10 probes without change few stop; at -0.5 all do."""
    rng = np.random.default_rng(0)

    def stops(drift: float) -> float:
        stopped = 0
        for _ in range(300):
            guard = Guard(patience=2, tolerance=2.0)
            talent = rng.normal(size=64)
            for step in range(11):
                shift = 0.0 if step == 0 else drift
                guard.add(step, (talent + shift + rng.normal(size=64)).tolist())
                if guard.stop:
                    stopped += 1
                    break
        return stopped / 300

    assert stops(0.0) < 0.25
    assert stops(-0.8) > 0.95
