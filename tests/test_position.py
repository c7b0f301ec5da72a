"""Position bias counted by hand, with both conventions for ties."""

from __future__ import annotations

import math

import numpy as np
import pytest
from judged import pairs_of, verdict

from feedback.figures import Figure
from feedback.intervals import Resampler
from feedback.observations import Pairs, collect
from feedback.position import logit_shift, position_section
from feedback.records import ORDER_UNKNOWN


def figures(pairs: Pairs) -> dict[str, Figure]:
    section = position_section(pairs, Resampler(np.arange(len(pairs.prompt_ids))))
    return {figure.name.removeprefix("position_bias."): figure for figure in section.figures}


def value(pairs: Pairs, name: str) -> float:
    found = figures(pairs)[name].estimate.value
    assert found is not None
    return found


def test_counts_by_hand() -> None:
    """Ten pairs: 5 the same winner, 1 tie twice, 2 first twice, 1 second twice, 1 tie once.

    12 and 21 name the same answer; 11 the first place; 22 the second; TT agrees; T1 is a tie with
    x first and the first place (y) with y first.
    """
    pairs = pairs_of("12", "12", "21", "21", "12", "TT", "11", "11", "22", "T1")
    assert value(pairs, "order_consistency") == pytest.approx(6 / 10)
    assert value(pairs, "conflict_rate") == pytest.approx(4 / 10)
    assert value(pairs, "order_consistency_decided") == pytest.approx(5 / 8)
    assert value(pairs, "first_slot_both") == pytest.approx(2 / 10)
    assert value(pairs, "second_slot_both") == pytest.approx(1 / 10)
    assert value(pairs, "first_slot_of_rest") == pytest.approx(2 / 4)
    assert value(pairs, "second_slot_of_rest") == pytest.approx(1 / 4)
    # Recency 1 (22), primacy 3 (11, 11, T1), over ten pairs.
    assert value(pairs, "preference_fairness") == pytest.approx((1 - 3) / 10)
    # Single decided verdicts: 5 pairs give one first each, 11 two, T1 one; 17 decided in all.
    assert value(pairs, "first_slot_share") == pytest.approx((5 + 4 + 1) / 17)


def test_undecided_orders_count_nowhere() -> None:
    pairs = pairs_of("12", "1?", "?2", "1-")
    found = figures(pairs)
    assert found["order_consistency"].estimate.n == 1
    assert found["first_slot_share"].estimate.n == 5


def test_logit_shift_of_bare_verdicts_by_hand() -> None:
    """Nine times first twice, once second twice: half the log odds of 9.5 to 1.5."""
    pairs = pairs_of(*["11"] * 9, "22", *["12"] * 20)
    estimate = logit_shift(pairs, Resampler(np.arange(30)))
    assert estimate.value == pytest.approx(math.log(9.5 / 1.5) / 2)
    assert estimate.n == 10
    assert estimate.low is not None
    assert estimate.low > 0


def test_logit_shift_of_probabilities_is_free_of_quality() -> None:
    """sigma(q + s) in one order and sigma(-q + s) in the other, whatever q."""
    shift = 0.7
    verdicts = []
    for number, quality in enumerate(np.linspace(-3, 3, 25)):
        for sign, shown in ((1, ("x", "y")), (-1, ("y", "x"))):
            p = 1 / (1 + math.exp(-(sign * quality + shift)))
            said = "1" if p > 0.5 else "2"
            verdicts.append(verdict(f"p{number}", shown, said, p_first=p))
    (pairs,) = collect(verdicts)
    estimate = logit_shift(pairs, Resampler(pairs.prompt))
    assert estimate.value == pytest.approx(shift)


def test_one_order_says_only_how_often_the_first_place_won() -> None:
    pairs = pairs_of("1-", "1-", "2-")
    section = position_section(pairs, Resampler(pairs.prompt))
    assert [figure.name for figure in section.figures] == ["position_bias.first_slot_share"]
    assert section.figures[0].estimate.value == pytest.approx(2 / 3)
    assert "No pair was asked in both orders" in section.notes[0]


def test_nothing_is_said_where_the_order_is_unknown() -> None:
    import dataclasses

    rows = [
        dataclasses.replace(verdict("p", shown, said), flags=[ORDER_UNKNOWN])
        for shown, said in ((("x", "y"), "1"), (("y", "x"), "1"))
    ]
    section = position_section(collect(rows)[0], Resampler(np.arange(1)))
    assert section.figures == []
    assert "not known" in section.notes[0]


def test_listwise_pairs_have_an_order() -> None:
    """A list shown as x, y, z and then z, y, x: every pair was asked in both orders."""
    import dataclasses

    rows = [
        dataclasses.replace(
            verdict("p", shown, "T"),
            kind="listwise",
            outcome="decided",
            ranking=[[name] for name in ranked],
            verdict_id=str(shown),
        )
        for shown, ranked in ((("x", "y", "z"), "xyz"), (("z", "y", "x"), "xzy"))
    ]
    (pairs,) = collect(rows)
    assert len(pairs) == 3
    assert pairs.both.all()
    # x beats y and z both times; y and z change places, each winning when shown first.
    assert value(pairs, "order_consistency") == pytest.approx(2 / 3)
    assert value(pairs, "first_slot_both") == pytest.approx(1 / 3)
