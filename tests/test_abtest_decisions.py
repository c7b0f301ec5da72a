"""What an A/B test concludes, by hand arithmetic and by simulation of known truths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from feedback.abtest_decisions import compare_arms, more_pairs
from feedback.paired import Discordance


def simulated(rng: np.random.Generator, n: int, base: float, gain: float, differ: float) -> Any:
    """Scores of a baseline and an arm that differ on a share of pairs, the arm ahead by gain."""
    first = (rng.random(n) < base).astype(float)
    second = first.copy()
    for place in np.flatnonzero(rng.random(n) < differ):
        better = rng.random() < (differ + gain) / (2 * differ)
        first[place], second[place] = (0.0, 1.0) if better else (1.0, 0.0)
    return np.stack([first, second], axis=1)


def conclude(scores: Any, **options: Any) -> Any:
    prompts = np.arange(len(scores))
    (found,) = compare_arms(
        ["base", "arm"], scores, prompts, margin=0.05, replicates=100, **options
    )
    return found


def test_clear_differences_are_found_both_ways() -> None:
    scores = simulated(np.random.default_rng(0), 600, base=0.7, gain=0.1, differ=0.2)
    assert conclude(scores).conclusion == "better"
    assert conclude(scores[:, ::-1]).conclusion == "worse"


def test_the_same_answers_are_equivalent_once_there_are_enough() -> None:
    right = np.ones((100, 2))
    assert conclude(right).conclusion == "equivalent"
    few = conclude(right[:20])
    assert few.conclusion == "undecided" and few.need_more is not None


def test_undecided_says_how_many_more() -> None:
    scores = simulated(np.random.default_rng(1), 60, base=0.7, gain=0.0, differ=0.3)
    found = conclude(scores)
    assert found.conclusion == "undecided"
    assert found.need_more is not None and found.need_more > 60


def test_need_more_of_many_looks_is_what_then_decides() -> None:
    """Equal arms: so many pairs like these, and the sequence does close; one less, it does not."""
    scores = simulated(np.random.default_rng(1), 200, base=0.7, gain=0.0, differ=0.02)
    found = conclude(scores, sequential=True)
    assert found.conclusion == "undecided" and found.always is not None
    need = found.need_more
    assert need is not None and need > 20
    enough = np.tile(scores, (64, 1))
    assert conclude(enough[: 200 + need], sequential=True).conclusion != "undecided"
    assert conclude(enough[: 200 + need - 1], sequential=True).conclusion == "undecided"


def test_where_nothing_differs_the_interval_says_what_may_have_been_missed() -> None:
    """0.025^(1/100) = 0.9638: with 3.6% of pairs differing, none among 100 is just possible."""
    difference = conclude(np.ones((100, 2))).difference
    assert difference.value == 0.0
    assert difference.high == pytest.approx(0.0362, abs=1e-4) and difference.low == -difference.high


def test_ties_by_the_judge_are_taken_at_their_size() -> None:
    """60 halves won against 40 whole losses: more wins, but less accuracy; never 'better'."""
    scores = np.array([[0.0, 0.5]] * 60 + [[1.0, 0.0]] * 40 + [[1.0, 1.0]] * 50)
    found = conclude(scores)
    assert found.test == "sign flips by prompt"
    assert found.difference.value == pytest.approx((30 - 40) / 150)
    assert found.conclusion == "undecided"
    many = np.random.default_rng(6).permutation(np.tile(scores, (8, 1)))
    assert conclude(many).conclusion == "worse"
    assert conclude(many, sequential=True).conclusion == "undecided"


def test_an_order_that_is_not_random_proves_nothing() -> None:
    """Wins first, then losses: the bounds cross, which is no equivalence."""
    scores = np.repeat([[0.0, 1.0], [1.0, 0.0]], 400, axis=0)
    assert conclude(scores, sequential=True).conclusion == "undecided"


def test_more_pairs_by_hand() -> None:
    """Rate 0.2, margin 0.05: 0.2 * ((1.645 + 1.2816) / 0.05)^2 = 685.2; no difference observed."""
    counts = Discordance(only_first=20, only_second=20, items=200)
    assert more_pairs(counts, margin=0.05, alpha=0.05, power=0.8) == 686 - 200


def test_unanswered_pairs_are_left_out() -> None:
    scores = np.array([[1.0, np.nan], [0.0, 1.0], [np.nan, 1.0], [1.0, 1.0]])
    found = conclude(scores)
    assert found.counts == Discordance(0, 1, 2)


def test_pairs_of_one_prompt_switch_to_sign_flips() -> None:
    scores = simulated(np.random.default_rng(2), 200, base=0.7, gain=0.05, differ=0.2)
    prompts = np.repeat(np.arange(50), 4)
    (found,) = compare_arms(["base", "arm"], scores, prompts, margin=0.05)
    assert found.test == "sign flips by prompt"


@pytest.mark.parametrize("sequential", [False, True])
def test_a_true_null_is_rarely_called_a_difference(sequential: bool) -> None:
    """With looks after every 50 pairs for the sequential test, which may stop at any of them."""
    rng = np.random.default_rng(3)
    runs, wrong = 300, 0
    for _ in range(runs):
        scores = simulated(rng, 300, base=0.7, gain=0.0, differ=0.2)
        ends = range(50, 301, 50) if sequential else (300,)
        found = [conclude(scores[:end], sequential=sequential).conclusion for end in ends]
        wrong += bool({"better", "worse"} & set(found))
    assert wrong / runs <= 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5


def test_equivalence_is_rarely_claimed_at_the_margin() -> None:
    """A true difference of exactly the margin must be called equivalent at most 5% of the time."""
    rng = np.random.default_rng(4)
    wrong = sum(
        conclude(simulated(rng, 800, base=0.6, gain=0.05, differ=0.15)).conclusion == "equivalent"
        for _ in range(300)
    )
    assert wrong / 300 <= 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5


def test_holm_over_several_arms() -> None:
    rng = np.random.default_rng(5)
    base = (rng.random(300) < 0.7).astype(float)
    arms = [base] + [np.where(rng.random(300) < 0.15, 1 - base, base) for _ in range(4)]
    found = compare_arms(list("abcde"), np.stack(arms, axis=1), np.arange(300), margin=0.05)
    assert len(found) == 4
    assert all(entry.p_adjusted >= entry.p_value for entry in found)
