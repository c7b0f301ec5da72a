"""Bradley-Terry, Davidson and Plackett-Luce: closed forms, independent fits, simulated coverage."""

from __future__ import annotations

import math

import choix
import numpy as np
import pytest
import statsmodels.api as sm

from feedback.bradley_terry import Duel, bootstrap_intervals, fit_bradley_terry
from feedback.plackett_luce import fit_plackett_luce


def simulate_duels(strengths, pairs, random, *, tie=None) -> list[Duel]:
    duels = []
    for i, j in pairs:
        gap = strengths[i] - strengths[j]
        weights = np.array([math.exp(gap / 2), math.exp(-gap / 2), 0 if tie is None else tie])
        outcome = random.choice(3, p=weights / weights.sum())
        duels.append(Duel(i, j, *np.eye(3)[outcome]))
    return duels


def all_pairs(count: int, times: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i + 1, count)] * times


def test_two_items_by_hand():
    """3 wins to 1: s_0 - s_1 = ln 3, variance 1 / (4 * 3/4 * 1/4) = 4/3."""
    fit = fit_bradley_terry(2, [Duel(0, 1, 3.0, 1.0)])
    assert fit.values == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-8)
    assert fit.difference_sd()[0, 1] == pytest.approx(math.sqrt(4 / 3), abs=1e-6)
    assert fit.probabilities()[0, 1] == pytest.approx(0.75)
    assert fit.log_likelihood == pytest.approx(3 * math.log(0.75) + math.log(0.25))
    low, high = fit.intervals()[0]
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(4 / 3) / 2, abs=1e-5)


def test_closed_form_of_two_items_is_the_general_fit():
    duels = [Duel(0, 1, 0.9, 0.3, 0.4), Duel(1, 0, 0.2, 1.0)]
    closed = fit_bradley_terry(2, duels)
    general = fit_bradley_terry(2, duels, prior_sd=1e6)
    assert closed.values == pytest.approx(general.values, abs=1e-6)
    assert closed.covariance == pytest.approx(general.covariance, abs=1e-6)
    assert closed.log_likelihood == pytest.approx(general.log_likelihood)


def test_one_soft_comparison_is_the_judges_own_log_odds():
    fit = fit_bradley_terry(2, [Duel(0, 1, 0.8, 0.2)])
    assert fit.values[0] - fit.values[1] == pytest.approx(math.log(4))


def test_davidson_by_hand():
    """Two items, shares 1/2, 1/4, 1/4 for win, lose, tie.

    exp(d/2) : exp(-d/2) : nu = 2 : 1 : 1, so d = ln 2 and nu = 1 / sqrt(2).
    """
    fit = fit_bradley_terry(2, [Duel(0, 1, 2.0, 1.0, 1.0)], ties=True)
    assert fit.values[0] - fit.values[1] == pytest.approx(math.log(2))
    assert fit.tie == pytest.approx(-math.log(2) / 2)
    assert fit.probabilities()[0, 1] == pytest.approx(0.625)


def test_equals_statsmodels_on_soft_labels():
    """An independent implementation: a binomial GLM on differences with fractional responses."""
    random = np.random.default_rng(1)
    count = 6
    duels = []
    for i, j in all_pairs(count, 2):
        p = random.uniform(0.05, 0.95)
        duels.append(Duel(i, j, p, 1 - p))
    design = np.zeros((len(duels), count))
    for row, duel in enumerate(duels):
        design[row, duel.i], design[row, duel.j] = 1, -1
    share = np.array([duel.win for duel in duels])
    # The last item is the baseline.
    other = sm.GLM(share, design[:, :-1], family=sm.families.Binomial()).fit()
    fit = fit_bradley_terry(count, duels)
    assert fit.values[:-1] - fit.values[-1] == pytest.approx(other.params, abs=1e-6)
    assert fit.difference_sd()[:-1, -1] == pytest.approx(other.bse, abs=1e-6)


def test_equals_choix_on_hard_labels():
    random = np.random.default_rng(2)
    strengths = np.array([1.0, 0.5, 0.0, -0.5, -1.0])
    duels = simulate_duels(strengths, all_pairs(5, 12), random)
    wins = [(duel.i, duel.j) if duel.win else (duel.j, duel.i) for duel in duels]
    other = choix.opt_pairwise(5, wins)
    fit = fit_bradley_terry(5, duels)
    assert fit.values == pytest.approx(other - other.mean(), abs=1e-4)


def test_infinite_strengths_are_refused_without_a_prior():
    duels = [Duel(0, 1, 1, 0), Duel(1, 2, 1, 0), Duel(0, 2, 1, 0)]
    with pytest.raises(ValueError, match="never lost"):
        fit_bradley_terry(3, duels)
    fit = fit_bradley_terry(3, duels, prior_sd=1.5)
    assert fit.order() == [0, 1, 2]
    assert np.isfinite(fit.values).all()


def test_prior_by_hand():
    """One hard win under a prior of sd 1: d/2 = sigmoid(-d), the slope of the posterior being 0."""
    fit = fit_bradley_terry(2, [Duel(0, 1, 1, 0)], prior_sd=1.0)
    gap = fit.values[0] - fit.values[1]
    assert gap / 2 == pytest.approx(1 / (1 + math.exp(gap)), abs=1e-7)


def test_no_ties_or_only_ties_stay_finite():
    none = fit_bradley_terry(2, [Duel(0, 1, 3, 1)], ties=True)
    assert none.values[0] - none.values[1] == pytest.approx(math.log(3), rel=0.2)
    only = fit_bradley_terry(3, [Duel(0, 1, 0, 0, 1), Duel(1, 2, 0, 0, 1)], ties=True, prior_sd=1)
    assert only.values == pytest.approx([0, 0, 0], abs=1e-6)


def test_strengths_are_recovered_and_intervals_cover():
    """95% intervals hold the truth in 93 to 97% of 500 simulations (Wald, observed information)."""
    random = np.random.default_rng(3)
    strengths = np.array([0.9, 0.4, 0.1, -0.4, -1.0])
    covered, errors = [], []
    for _ in range(500):
        duels = simulate_duels(strengths, all_pairs(5, 20), random)
        fit = fit_bradley_terry(5, duels)
        low, high = fit.intervals().T
        covered.append((low <= strengths) & (strengths <= high))
        errors.append(fit.values - strengths)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.abs(np.mean(errors, axis=0)).max() < 0.03


def test_davidson_recovers_strengths_and_ties():
    random = np.random.default_rng(4)
    strengths = np.array([0.8, 0.2, -0.3, -0.7])
    covered, ties = [], []
    for _ in range(250):
        duels = simulate_duels(strengths, all_pairs(4, 25), random, tie=0.7)
        fit = fit_bradley_terry(4, duels, ties=True)
        low, high = fit.intervals().T
        covered.append((low <= strengths) & (strengths <= high))
        ties.append(fit.tie)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert np.mean(ties) == pytest.approx(math.log(0.7), abs=0.05)


def test_bootstrap_intervals_agree_with_information_on_hard_labels():
    random = np.random.default_rng(5)
    strengths = np.array([0.7, 0.0, -0.7])
    duels = simulate_duels(strengths, all_pairs(3, 60), random)
    width = np.diff(fit_bradley_terry(3, duels).intervals(), axis=1).ravel()
    drawn = np.diff(bootstrap_intervals(3, duels, draws=300, seed=1), axis=1).ravel()
    assert drawn == pytest.approx(width, rel=0.15)


def test_bootstrap_sees_that_soft_labels_vary_less():
    """A judge whose probabilities barely vary: information counts each as a coin, draws do not."""
    random = np.random.default_rng(6)
    strengths = np.array([0.6, 0.0, -0.6])
    duels = []
    for i, j in all_pairs(3, 20):
        gap = strengths[i] - strengths[j] + random.normal(scale=0.2)
        p = 1 / (1 + math.exp(-gap))
        duels.append(Duel(i, j, p, 1 - p))
    width = np.diff(fit_bradley_terry(3, duels).intervals(), axis=1).ravel()
    drawn = np.diff(bootstrap_intervals(3, duels, draws=200, seed=1), axis=1).ravel()
    assert (drawn < width / 3).all()


def test_plackett_luce_of_two_items_is_bradley_terry():
    rankings = [[[0], [1]]] * 3 + [[[1], [0]]]
    fit = fit_plackett_luce(2, rankings)
    assert fit.values == pytest.approx(fit_bradley_terry(2, [Duel(0, 1, 3, 1)]).values, abs=1e-7)


def test_plackett_luce_of_two_items_with_ties_is_davidson():
    rankings = [[[0], [1]]] * 2 + [[[1], [0]]] + [[[0, 1]]]
    fit = fit_plackett_luce(2, rankings)
    other = fit_bradley_terry(2, [Duel(0, 1, 2, 1, 1)], ties=True)
    assert fit.values == pytest.approx(other.values, abs=1e-6)
    assert fit.tie == pytest.approx(other.tie, abs=1e-6)


def test_plackett_luce_by_hand():
    """One ranking 0 > 1 > 2 has the likelihood e^a/(e^a+e^b+e^c) * e^b/(e^b+e^c)."""
    fit = fit_plackett_luce(3, [[[0], [1], [2]]], prior_sd=1.0)
    a, b, c = np.exp(fit.values)
    assert fit.log_likelihood == pytest.approx(math.log(a / (a + b + c) * b / (b + c)))
    assert fit.order() == [0, 1, 2]


def test_plackett_luce_equals_choix():
    random = np.random.default_rng(7)
    strengths = np.array([1.0, 0.3, -0.2, -1.1])
    rankings = []
    for _ in range(120):
        noisy = strengths + random.gumbel(size=4)  # Plackett-Luce by the Gumbel trick
        rankings.append(np.argsort(-noisy).tolist())
    other = choix.opt_rankings(4, rankings)
    fit = fit_plackett_luce(4, [[[item] for item in ranking] for ranking in rankings])
    assert fit.values == pytest.approx(other - other.mean(), abs=1e-4)


def test_plackett_luce_intervals_cover_and_partial_rankings_count():
    random = np.random.default_rng(8)
    strengths = np.array([0.8, 0.2, -0.2, -0.8])
    covered = []
    for _ in range(250):
        rankings = []
        for _ in range(40):
            shown = random.permutation(4)[:3]
            noisy = strengths[shown] + random.gumbel(size=3)
            rankings.append([[int(item)] for item in shown[np.argsort(-noisy)]])
        low, high = fit_plackett_luce(4, rankings).intervals().T
        covered.append((low <= strengths) & (strengths <= high))
    assert 0.93 <= np.mean(covered) <= 0.97


def test_plackett_luce_refuses_what_it_cannot_sum():
    everything = [list(range(30))]
    with pytest.raises(ValueError, match="pairwise"):
        fit_plackett_luce(30, [everything, [list(range(15)), list(range(15, 30))]], prior_sd=1)
