"""Intervals: exact ones against exact sums, bootstrap ones against scipy's, grouping by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from feedback.intervals import (
    Estimate,
    Resampler,
    average,
    binomial_interval,
    difference,
    from_standard_error,
    group_sums,
    mean,
    nothing,
    proportion,
    ratio,
)


@pytest.mark.parametrize(("successes", "trials"), [(3, 20), (1, 7), (19, 20), (250, 400)])
def test_binomial_bounds_solve_the_mid_p_equation(successes: int, trials: int) -> None:
    low, high = binomial_interval(successes, trials)
    at_low = stats.binom.sf(successes, trials, low) + stats.binom.pmf(successes, trials, low) / 2
    below = stats.binom.cdf(successes - 1, trials, high)
    at_high = below + stats.binom.pmf(successes, trials, high) / 2
    assert at_low == pytest.approx(0.025, abs=1e-9)
    assert at_high == pytest.approx(0.025, abs=1e-9)


def test_binomial_bounds_at_the_ends() -> None:
    """With 0 of n the upper bound solves (1 - p)^n / 2 = 0.025."""
    assert binomial_interval(0, 20) == (0.0, pytest.approx(1 - 0.05 ** (1 / 20)))
    assert binomial_interval(20, 20) == (pytest.approx(0.05 ** (1 / 20)), 1.0)
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        binomial_interval(3, 2)


def test_binomial_coverage_by_enumeration() -> None:
    """Exact coverage, averaged over true shares: near 95%, where Clopper-Pearson has 97%."""
    trials = 60
    bounds = np.array([binomial_interval(successes, trials) for successes in range(trials + 1)])
    shares = np.linspace(0.03, 0.97, 189)
    covered = [
        stats.binom.pmf(np.arange(trials + 1), trials, share)[
            (bounds[:, 0] <= share) & (share <= bounds[:, 1])
        ].sum()
        for share in shares
    ]
    assert 0.945 < np.mean(covered) < 0.965
    assert min(covered) > 0.92


@given(st.integers(0, 50), st.integers(1, 50))
@settings(max_examples=40, deadline=None)
def test_the_interval_holds_the_share(successes: int, more: int) -> None:
    trials = successes + more
    low, high = binomial_interval(successes, trials)
    assert 0 <= low <= successes / trials <= high <= 1


def test_copies_of_a_row_add_no_evidence() -> None:
    """Each prompt's row five times over: five times n, the same interval but for rounding."""
    hits = np.array([1] * 60 + [0] * 40)
    once = proportion(hits, np.arange(100))
    copied = proportion(np.repeat(hits, 5), np.repeat(np.arange(100), 5))
    assert (copied.n, copied.prompts) == (500, 100)
    assert copied.low == pytest.approx(once.low, abs=0.004)
    assert copied.high == pytest.approx(once.high, abs=0.004)
    naive = proportion(np.repeat(hits, 5), np.arange(500))
    assert copied.high - copied.low > 2 * (naive.high - naive.low)


def test_rows_that_cancel_within_a_prompt_narrow_the_interval() -> None:
    """One hit and one miss in nearly every prompt: far less noise than 200 coin flips."""
    hits = np.tile([1, 0], 100).astype(float)
    hits[[0, 11]] = 0, 1
    grouped = proportion(hits, np.repeat(np.arange(100), 2))
    free = proportion(hits, np.arange(200))
    assert grouped.high - grouped.low < 0.5 * (free.high - free.low)


def test_all_alike_counts_prompts_not_rows() -> None:
    estimate = proportion(np.ones(300), np.repeat(np.arange(20), 15))
    assert estimate.low == pytest.approx(0.05 ** (1 / 20))


def test_bootstrap_agrees_with_scipy() -> None:
    """The mean over prompts of skewed values: BCa bounds within a few percent of scipy's."""
    values = np.random.default_rng(3).exponential(size=120)
    ours = mean(Resampler(np.arange(120), replicates=6000), np.arange(120), values)
    theirs = stats.bootstrap(
        (values,), np.mean, method="BCa", n_resamples=6000, rng=np.random.default_rng(4)
    ).confidence_interval
    width = theirs.high - theirs.low
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.06 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.06 * width)


def test_bootstrap_resamples_prompts() -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(80), 10)
    values = np.repeat(random.normal(size=80), 10)
    clustered = mean(Resampler(groups), groups, values)
    free = mean(Resampler(np.arange(800)), np.arange(800), values)
    assert clustered.high - clustered.low > 2.5 * (free.high - free.low)


def test_many_prompts_are_resampled_in_blocks() -> None:
    random = np.random.default_rng(1)
    values = random.normal(size=10_000)
    resampler = Resampler(np.arange(10_000))
    assert resampler.blocks == 4000
    estimate = mean(resampler, np.arange(10_000), values)
    expected = 2 * 1.96 / np.sqrt(10_000)
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.1)


def test_same_seed_same_interval() -> None:
    groups = np.arange(50)
    values = np.random.default_rng(2).normal(size=50)
    one, two = (mean(Resampler(groups, seed=7), groups, values) for _ in range(2))
    assert one == two


def test_ratio_by_hand() -> None:
    estimate = ratio(Resampler(np.arange(3)), np.arange(3), [1.0, 2.0, 3.0], [2.0, 4.0, 4.0])
    assert estimate.value == pytest.approx(0.6)
    assert estimate.n == 3


def test_no_interval_where_nothing_varies_or_little_is_defined() -> None:
    groups = np.arange(10)
    same = mean(Resampler(groups), groups, np.ones(10))
    assert (same.value, same.low) == (1.0, None)
    assert "same in every resample" in same.method
    rare = ratio(Resampler(groups), groups, np.eye(10)[0], np.eye(10)[0])
    assert rare.value == 1.0
    assert "undefined in too many resamples" in rare.method
    assert mean(Resampler(groups), np.array([], int), []).value is None


def test_average_is_exact_on_zeros_and_ones() -> None:
    groups = np.arange(40)
    resampler = Resampler(groups)
    assert "exact" in average(resampler, groups, np.ones(40)).method
    assert "bootstrap" in average(resampler, groups, np.linspace(0, 1, 40)).method


def test_differences_that_are_all_zero_have_an_exact_bound() -> None:
    """0.025^(1/100) = 0.9638: with 3.6% of prompts differing, none among 100 is just possible."""
    groups = np.repeat(np.arange(100), 2)
    resampler = Resampler(groups, replicates=200)
    none = difference(resampler, groups, np.zeros(200))
    assert none.value == 0.0 and none.n == 200 and none.prompts == 100
    assert none.high == pytest.approx(0.0362, abs=1e-4) and none.low == -none.high
    some = difference(resampler, groups, np.eye(1, 200)[0])
    assert some == mean(Resampler(groups, replicates=200), groups, np.eye(1, 200)[0])
    assert difference(resampler, groups[:0], []).value is None


def test_standard_error_interval() -> None:
    estimate = from_standard_error(2.0, 0.5, n=30, prompts=11, method="test")
    reach = stats.t.ppf(0.975, 10) * 0.5
    assert (estimate.low, estimate.high) == (pytest.approx(2 - reach), pytest.approx(2 + reach))
    assert from_standard_error(2.0, 0.5, n=3, prompts=1, method="test").low is None


def test_group_sums_by_hand() -> None:
    sums = group_sums(np.array([5, 2, 5]), [1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    assert sums.tolist() == [[2.0, 1.0], [4.0, 2.0]]


def test_estimates_print_and_serialise() -> None:
    assert str(Estimate(0.5, 0.25, 0.75, 1200, 40, "")) == "0.500 [0.250, 0.750] (n = 1,200)"
    assert str(nothing()) == "- (n = 0)"
    assert Estimate(0.5, None, None, 3, 3, "x").to_dict()["method"] == "x"


@pytest.mark.parametrize(
    ("prompts", "most", "share", "spread"), [(60, 1, 2.0, 0.0), (100, 6, 1.5, 1.2)]
)
def test_coverage_on_grouped_data(prompts: int, most: int, share: float, spread: float) -> None:
    """300 runs of grouped 0/1 rows: the interval holds the truth in 92% to 98% of them."""
    random = np.random.default_rng(11)
    chances = 1 / (1 + np.exp(-random.normal(share, max(spread, 1e-9), 400_000)))
    truth = float(chances.mean())
    held = []
    for _ in range(300):
        sizes = random.integers(1, most + 1, prompts)
        groups = np.repeat(np.arange(prompts), sizes)
        chance = random.choice(chances, prompts)[groups]
        estimate = proportion(random.random(len(groups)) < chance, groups)
        held.append(estimate.low <= truth <= estimate.high)
    assert 0.92 <= np.mean(held) <= 0.985
