"""Which pairs are asked: counts, budgets, no repeats, resumption, and what active choice saves."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from feedback.bradley_terry import Duel, fit_bradley_terry
from feedback.cycles import cyclic_triples, kendall_tau
from feedback.pair_schedule import SchedulePlan, most_pairs, next_pairs

METHODS = ("all", "sort", "swiss", "active", "random")


def play(count, plan, judge, *, salt="", rounds=None):
    """Ask until done; return the answers in the order asked."""
    answers: dict[tuple[int, int], float | None] = {}
    while pairs := next_pairs(count, answers, plan, salt=salt):
        assert len(set(pairs)) == len(pairs)
        for pair in pairs:
            assert pair[0] < pair[1]
            assert pair not in answers
            answers[pair] = judge(pair)
        if rounds is not None:
            rounds.append(len(pairs))
    return answers


def certain(pair):
    """Prefers the smaller index."""
    return 1.0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8, 13])
def test_no_pair_twice_and_the_end_comes(method, count):
    plan = SchedulePlan(method=method)
    answers = play(count, plan, certain)
    assert len(answers) <= most_pairs(count, plan) <= count * (count - 1) // 2
    if count >= 2:
        assert {item for pair in answers for item in pair} == set(range(count))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [1, 4, 9, 1000])
def test_budget_is_kept(method, budget):
    answers = play(7, SchedulePlan(method=method, budget=budget), certain)
    assert len(answers) <= min(budget, 21)
    if method in ("all", "active", "random"):
        assert len(answers) == min(budget, 21)


def test_all_asks_everything():
    assert len(play(6, SchedulePlan(method="all"), certain)) == 15


@pytest.mark.parametrize("count", [2, 3, 4, 6, 8, 11, 16])
def test_sort_recovers_the_order_with_few_pairs(count):
    answers = play(count, SchedulePlan(method="sort"), certain)
    assert (
        len(answers) <= count * math.ceil(math.log2(count)) - 2 ** math.ceil(math.log2(count)) + 1
    )
    # As rankings are fitted: each pair a little in doubt.
    duels = [Duel(i, j, p + 0.05, 1.05 - p) for (i, j), p in answers.items()]
    assert fit_bradley_terry(count, duels).order() == list(range(count))


def test_sort_waits_for_several_merges_at_once():
    rounds: list[int] = []
    play(16, SchedulePlan(method="sort"), certain, rounds=rounds)
    assert rounds[0] == 8


def test_sort_survives_ties_and_missing_verdicts():
    for answer in (0.5, None):
        answers = play(8, SchedulePlan(method="sort"), lambda pair, value=answer: value)
        assert len(answers) <= 17


def test_swiss_pairs_like_with_like():
    rounds: list[int] = []
    answers = play(8, SchedulePlan(method="swiss"), certain, rounds=rounds)
    assert rounds == [4, 4, 4, 4]
    assert (0, 1) in answers or (0, 2) in answers  # winners meet


def test_order_of_candidates_does_not_decide_who_meets_whom():
    first = next_pairs(8, {}, SchedulePlan(method="swiss"), salt="one prompt")
    assert first != next_pairs(8, {}, SchedulePlan(method="swiss"), salt="another")
    assert first == next_pairs(8, {}, SchedulePlan(method="swiss"), salt="one prompt")


@pytest.mark.parametrize("method", METHODS)
def test_answers_alone_decide_what_comes_next(method):
    """A run that stops and resumes from what is on disk asks nothing twice and nothing more."""
    plan = SchedulePlan(method=method, budget=12)
    full = play(8, plan, certain)
    for stop in range(len(full)):
        answers = dict(itertools.islice(full.items(), stop))
        while pairs := next_pairs(8, answers, plan):
            answers |= {pair: certain(pair) for pair in pairs}
        assert len(answers) == len(full)


def test_active_asks_where_the_answer_is_open():
    """0 beats everyone by far, the rest are level: no pair with 0 is worth a call."""
    answers = {(0, 1): 0.99, (0, 2): 0.99, (0, 3): 0.99, (1, 2): 0.5, (1, 4): 0.5, (0, 4): 0.99}
    pairs = next_pairs(5, answers, SchedulePlan(method="active", budget=10, batch=3))
    assert len(pairs) == 3
    assert all(0 not in pair for pair in pairs)


def noisy_judge(strengths, random):
    def judge(pair):
        gap = strengths[pair[0]] - strengths[pair[1]]
        return float(random.random() < 1 / (1 + math.exp(-gap)))

    return judge


def tau_after(method: str, budget: int, *, count: int = 16, prompts: int = 60) -> float:
    """Mean Kendall tau between fitted and true strengths."""
    taus = []
    for prompt in range(prompts):
        random = np.random.default_rng(prompt)
        strengths = random.normal(scale=3.0, size=count)
        judge = noisy_judge(strengths, random)
        plan = SchedulePlan(method=method, budget=budget, prior_sd=3.0)
        answers = play(count, plan, judge, salt=str(prompt))
        duels = [Duel(i, j, p, 1 - p) for (i, j), p in answers.items()]
        fit = fit_bradley_terry(count, duels, prior_sd=3.0)
        taus.append(kendall_tau(fit.values, strengths))
    return float(np.mean(taus))


@pytest.mark.slow
def test_active_needs_fewer_calls_than_random():
    """k = 16, a noisy judge: 40 actively chosen pairs rank better than 56 drawn at random."""
    active, random = tau_after("active", 40), tau_after("random", 56)
    print(f"tau: active 40 pairs {active:.3f}, random 56 pairs {random:.3f}")
    assert active > random


def test_cyclic_triples_by_hand():
    cycle = [(0, 1, 0.9), (1, 2, 0.8), (0, 2, 0.3)]
    found = cyclic_triples(3, cycle)
    assert (found.cyclic, found.complete, found.triples) == (1, 1, [(0, 1, 2)])
    assert cyclic_triples(3, [(0, 1, 0.9), (1, 2, 0.8), (0, 2, 0.7)]).cyclic == 0
    level = cyclic_triples(3, [(0, 1, 0.9), (1, 2, 0.8), (0, 2, 0.5)])
    assert (level.cyclic, level.complete) == (0, 0)


def test_cyclic_triples_against_enumeration():
    random = np.random.default_rng(9)
    count = 9
    p = random.random((count, count))
    pairs = [(i, j, float(p[i, j])) for i, j in itertools.combinations(range(count), 2)]
    beats = {(i, j) for i, j, value in pairs if value > 0.5}
    beats |= {(j, i) for i, j, value in pairs if value < 0.5}
    expected = sum(
        {(a, b), (b, c), (c, a)} <= beats or {(b, a), (c, b), (a, c)} <= beats
        for a, b, c in itertools.combinations(range(count), 3)
    )
    found = cyclic_triples(count, pairs, most=1000)
    assert found.cyclic == expected == len(found.triples)
    assert found.complete == math.comb(count, 3)
    assert all({(i, j), (j, k), (k, i)} <= beats for i, j, k in found.triples)


def test_kendall_tau():
    assert kendall_tau([3, 2, 1], [30, 20, 10]) == 1.0
    assert kendall_tau([1, 2, 3], [3, 2, 1]) == -1.0
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
