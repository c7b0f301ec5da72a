"""Paired tests: against enumeration, closed forms and simulation; looking early does not cheat."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from feedback.paired import (
    Discordance,
    discordance,
    holm,
    mcnemar,
    mcnemar_power,
    needed_items,
    sign_flip_test,
)
from feedback.sequential import confidence_sequence, sign_e_process


def test_discordance_counts_items_that_one_arm_alone_got_right() -> None:
    counts = discordance([1, 1, 0, 0, 1], [1, 0, 1, 1, 1])
    assert counts == Discordance(only_first=1, only_second=2, items=5)
    assert counts.rate == pytest.approx(3 / 5)
    assert counts.difference == pytest.approx(1 / 5)


def test_mcnemar_by_hand() -> None:
    """1 against 6 of 7: 2 * (1 + 7) / 2^7 = 0.125."""
    assert mcnemar(Discordance(1, 6, 50)) == pytest.approx(0.125)
    assert mcnemar(Discordance(0, 0, 50)) == 1.0
    assert mcnemar(Discordance(4, 4, 50)) == 1.0


def test_sign_flips_enumerate_all_patterns() -> None:
    """Sums 3, 2, -1: of 8 patterns |total| >= 4 holds for +++ (6), ++- (4) and their mirrors."""
    prompts = np.array([0, 0, 1, 2])
    assert sign_flip_test([1, 2, 2, -1], prompts) == pytest.approx(4 / 8)


def test_sign_flips_agree_with_mcnemar_for_one_item_a_prompt() -> None:
    differences = np.array([1.0] * 20 + [-1.0] * 7 + [0.0] * 30)
    flips = sign_flip_test(differences, np.arange(len(differences)), replicates=100_000)
    assert flips == pytest.approx(mcnemar(Discordance(7, 20, 57)), abs=0.003)


def test_sign_flips_see_that_items_of_a_prompt_go_together() -> None:
    """Eight copies of each prompt's answer are not eight times the evidence."""
    rng = np.random.default_rng(1)
    rejected = 0
    for trial in range(300):
        differences = np.repeat(rng.choice([-1.0, 0.0, 1.0], 12), 8)
        prompts = np.repeat(np.arange(12), 8)
        rejected += sign_flip_test(differences, prompts, seed=trial) <= 0.05
    assert rejected / 300 <= 0.08


def test_holm_by_hand() -> None:
    """Sorted 0.01 * 3, 0.02 * 2, 0.04 * 1, made monotone."""
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([]) == []


def test_power_equals_enumeration() -> None:
    items, rate, difference = 9, 0.6, 0.4
    probabilities = [(rate - difference) / 2, (rate + difference) / 2, 1 - rate]
    power = 0.0
    for worse, better in itertools.product(range(items + 1), repeat=2):
        if worse + better > items:
            continue
        chance = stats.multinomial.pmf(
            [worse, better, items - worse - better], items, probabilities
        )
        if mcnemar(Discordance(worse, better, items)) <= 0.05:
            power += float(chance)
    assert mcnemar_power(items, rate=rate, difference=difference) == pytest.approx(power, abs=1e-9)


def test_needed_items_reaches_the_power_asked_for() -> None:
    items = needed_items(rate=0.3, difference=0.1)
    assert mcnemar_power(items, rate=0.3, difference=0.1) >= 0.8
    assert mcnemar_power(items // 2, rate=0.3, difference=0.1) < 0.8
    with pytest.raises(ValueError, match="difference of 0"):
        needed_items(rate=0.3, difference=0.0)


def test_e_process_by_hand() -> None:
    """Two wins: integral of p^2 dp * 2^2 = 4/3; then a zero changes nothing; then a loss: 8/12."""
    values = np.exp(sign_e_process([1, 1, 0, -1]))
    assert values == pytest.approx([1.0, 4 / 3, 4 / 3, 8 / 12])


def test_e_process_rarely_rejects_a_true_null_however_often_one_looks() -> None:
    rng = np.random.default_rng(0)
    runs = 2000
    differences = rng.choice([-1.0, 0.0, 1.0], (runs, 400), p=[0.2, 0.6, 0.2])
    ever = sum(sign_e_process(row).max() >= math.log(20) for row in differences)
    assert ever / runs <= 0.05


def test_e_process_finds_a_real_difference() -> None:
    rng = np.random.default_rng(0)
    differences = rng.choice([-1.0, 0.0, 1.0], (200, 600), p=[0.1, 0.7, 0.2])
    found = sum(sign_e_process(row).max() >= math.log(20) for row in differences)
    assert found / 200 >= 0.8


def test_confidence_sequence_holds_at_all_times_at_once() -> None:
    rng = np.random.default_rng(0)
    misses = 0
    for _ in range(400):
        values = rng.choice([-1.0, 0.0, 1.0], 500, p=[0.15, 0.6, 0.25])
        looks = confidence_sequence(values)
        misses += bool(np.any((looks.low > 0.1) | (looks.high < 0.1)))
    assert misses / 400 <= 0.05


def test_confidence_sequence_narrows() -> None:
    rng = np.random.default_rng(0)
    looks = confidence_sequence(rng.choice([-1.0, 0.0, 1.0], 4000, p=[0.1, 0.8, 0.1]))
    assert looks.high[-1] - looks.low[-1] < 0.08
    with pytest.raises(ValueError, match="outside"):
        confidence_sequence([2.0])
