"""Panels and cascades: merging by hand, agreement, what correlated judges are worth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from feedback.errors import RecipeError
from feedback.panel import CascadeOptions, Combination, combine, is_unsure
from feedback.panel_report import agreement_matrix, effective_number
from feedback.records import Comparison


def comparison(p, *, outcome=None, consistent=True, mass=0.9, votes=("v",)) -> Comparison:
    return Comparison(
        prompt_id="q",
        a="a",
        b="b",
        p=p,
        p_orders=[p, p],
        consistent=consistent,
        outcome=outcome or ("tie" if p == 0.5 else "decided"),
        votes=list(votes),
        mass=mass,
    )


def none(outcome: str) -> Comparison:
    return comparison(None, outcome=outcome, consistent=None)


MEAN = Combination("mean", (1.0, 1.0, 2.0))
MAJORITY = Combination("majority", (1.0, 1.0, 2.0))
CASCADE = Combination("cascade", (1.0, 1.0))


def test_mean_is_weighted():
    merged = combine({0: comparison(0.9), 1: comparison(0.7), 2: comparison(0.2)}, MEAN)
    assert merged.p == pytest.approx((0.9 + 0.7 + 2 * 0.2) / 4)
    assert (merged.outcome, merged.consistent) == ("tie" if merged.p == 0.5 else "decided", False)


def test_majority_counts_heads():
    merged = combine({0: comparison(0.9), 1: comparison(0.7), 2: comparison(0.01)}, MAJORITY)
    assert merged.p == pytest.approx(2 / 3)
    level = combine({0: comparison(0.9), 1: comparison(0.5), 2: comparison(0.2)}, MAJORITY)
    assert (level.p, level.outcome) == (0.5, "tie")


def test_agreeing_judges_are_consistent():
    merged = combine({0: comparison(0.9), 1: comparison(0.7), 2: comparison(0.6)}, MEAN)
    assert merged.consistent is True
    swayed = comparison(0.7, consistent=False)
    assert combine({0: comparison(0.9), 1: swayed, 2: comparison(0.6)}, MEAN).consistent is False


def test_ties_of_all_are_a_tie():
    merged = combine({0: comparison(0.5), 1: comparison(0.5), 2: comparison(0.5)}, MEAN)
    assert (merged.p, merged.outcome) == (0.5, "tie")


def test_one_of_three_may_decline_two_may_not():
    merged = combine({0: comparison(0.9), 1: none("refused"), 2: comparison(0.6)}, MEAN)
    assert merged.p == pytest.approx((0.9 + 2 * 0.6) / 3)
    assert merged.mass == 0.9
    few = combine({0: comparison(0.9), 1: none("refused"), 2: none("failed")}, MEAN)
    assert (few.p, few.outcome, few.consistent) == (None, "failed", None)
    missing = combine({0: comparison(0.9)}, MEAN)
    assert (missing.p, missing.outcome) == (None, "failed")


def test_cascade_takes_the_strong_judge_where_it_spoke():
    first = comparison(0.55, votes=("c1", "c2"))
    assert combine({0: first}, CASCADE).p == 0.55
    strong = combine({0: first, 1: comparison(0.1, votes=("s1", "s2"))}, CASCADE)
    assert (strong.p, strong.votes) == (0.1, ["c1", "c2", "s1", "s2"])
    declined = combine({0: first, 1: none("refused")}, CASCADE)
    assert (declined.p, declined.votes) == (0.55, ["c1", "c2", "v"])
    assert combine({0: first, 1: none("failed")}, CASCADE).outcome == "failed"


@pytest.mark.parametrize(
    ("row", "unsure"),
    [
        (comparison(0.9), False),
        (comparison(0.74), True),
        (comparison(0.26), True),
        (comparison(0.05), False),
        (comparison(0.9, consistent=False), True),
        (comparison(0.9, mass=0.2), True),
        (comparison(0.9, mass=None), False),
        (none("unparsed"), True),
        (none("refused"), True),
        (none("failed"), False),
    ],
)
def test_unsure(row, unsure):
    assert is_unsure(row, CascadeOptions()) is unsure


def test_options_that_mean_nothing_are_refused():
    with pytest.raises(RecipeError, match="unsure"):
        CascadeOptions(unsure=0.7)
    with pytest.raises(RecipeError, match="min_mass"):
        CascadeOptions(min_mass=1.5)


def test_agreement_by_hand():
    p = np.array([[0.9, 0.8], [0.9, 0.1], [0.5, 0.5], [0.2, math.nan], [0.3, 0.5]])
    # Of four pairs that both judged: agree, differ, both tie, one ties.
    assert agreement_matrix(p).tolist() == [[1.0, 0.5], [0.5, 1.0]]


def test_effective_number_of_the_extremes():
    random = np.random.default_rng(1)
    same = random.random((500, 1)) @ np.ones((1, 4))
    assert effective_number(same) == pytest.approx(1.0)
    apart = random.random((20_000, 4))
    assert effective_number(apart) == pytest.approx(4.0, abs=0.15)
    assert math.isnan(effective_number(np.ones((50, 3))))
    assert math.isnan(effective_number(np.full((50, 3), np.nan)))


def test_effective_number_is_the_variance_that_averaging_saves():
    """k judges with error correlation r: the mean's variance is 1 / n_eff of one judge's."""
    random = np.random.default_rng(2)
    for count, correlation in ((3, 0.5), (5, 0.3), (4, 0.8)):
        shared = random.normal(size=(40_000, 1)) * math.sqrt(correlation)
        own = random.normal(size=(40_000, count)) * math.sqrt(1 - correlation)
        errors = shared + own
        expected = count / (1 + (count - 1) * correlation)
        assert effective_number(errors) == pytest.approx(expected, rel=0.03)
        saved = errors[:, 0].var() / errors.mean(axis=1).var()
        assert effective_number(errors) == pytest.approx(saved, rel=0.04)
