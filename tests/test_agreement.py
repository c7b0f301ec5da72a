"""Agreement statistics against independent implementations and by hand."""

from __future__ import annotations

from collections.abc import Sequence

import krippendorff
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from judged import with_texts
from sklearn.metrics import cohen_kappa_score

from feedback.agreement import (
    accuracy_halves,
    cohen_kappa,
    expected_calibration_error,
    krippendorff_alpha,
    leave_one_out,
    three_way,
    unanimous,
    vote_structure,
)
from feedback.agreement_section import agreement_section
from feedback.intervals import Resampler
from feedback.records import GoldPair

CODES = st.sampled_from([-1.0, 0.0, 1.0])


@given(st.lists(st.tuples(CODES, CODES), min_size=3, max_size=60))
@settings(max_examples=60, deadline=None)
def test_kappa_agrees_with_sklearn(rows: list[tuple[float, float]]) -> None:
    left, right = (np.array(side) for side in zip(*rows, strict=True))
    ours = cohen_kappa(
        left, right, np.arange(len(rows)), Resampler(np.arange(len(rows)), replicates=2)
    )
    if len(set(left) | set(right)) == 1:
        assert ours.value is None  # chance agreement is total
    else:
        assert ours.value == pytest.approx(cohen_kappa_score(left.astype(int), right.astype(int)))


@given(st.lists(st.lists(CODES, min_size=1, max_size=5), min_size=2, max_size=40))
@settings(max_examples=60, deadline=None)
def test_alpha_agrees_with_the_krippendorff_package(units: list[list[float]]) -> None:
    table = np.full((5, len(units)), np.nan)
    for column, codes in enumerate(units):
        table[: len(codes), column] = codes
    groups = np.arange(len(units))
    ours = krippendorff_alpha(units, groups, Resampler(groups, replicates=2))
    paired = [code for codes in units if len(codes) > 1 for code in codes]
    if len(set(paired)) < 2:
        assert ours.value is None
    else:
        theirs = krippendorff.alpha(
            table, value_domain=[-1.0, 0.0, 1.0], level_of_measurement="nominal"
        )
        assert ours.value == pytest.approx(theirs)


def test_accuracy_conventions_by_hand() -> None:
    """Right, wrong, judge tie (both orders T), gold tie, order-dependent (level): by convention.

    ties half: (1 + 0 + 1/2 + 1/2) / 4 over the four pairs whose gold is not a tie;
    three-way: right, and the gold tie that the judge also calls a tie, of five.
    """
    pairs = with_texts(
        [
            ("t", "u", "12", "a"),
            ("t", "u", "12", "b"),
            ("t", "u", "TT", "a"),
            ("t", "u", "TT", "tie"),
            ("t", "u", "11", "b"),
        ]
    )
    resampler = Resampler(np.arange(5))
    halves = accuracy_halves(pairs, resampler)
    assert halves.value == pytest.approx((1 + 0 + 0.5 + 0.5) / 4)
    assert halves.n == 4
    assert three_way(pairs).value == pytest.approx(2 / 5)


def test_gold_is_turned_when_its_pair_is_the_other_way_round() -> None:
    """Ids sort x before y; a gold row that names y first means the same."""
    from judged import verdict

    from feedback.observations import Material, collect

    rows = [verdict("p", ("x", "y"), "1"), verdict("p", ("y", "x"), "2")]
    gold = {("p", "x", "y"): GoldPair(prompt_id="p", a="y", b="x", label="b")}
    (pairs,) = collect(rows, material=Material(), gold=gold)
    assert pairs.gold.tolist() == [1.0]
    assert accuracy_halves(pairs, Resampler(np.arange(1))).value == 1.0


def test_leave_one_out_by_hand() -> None:
    """Votes a, a, b; judge a. Rest of the first voter: a, b has no winner; of the third: a, a.

    Only the third person's rest is decided: that person is wrong, the judge right. In the second
    pair (b, b, b) every rest says b; all three people right, the judge wrong three times.
    """
    pairs = with_texts(
        [("t", "u", "12", "a"), ("t", "u", "12", "b")], votes=[["a", "a", "b"], ["b", "b", "b"]]
    )
    found = leave_one_out(pairs, Resampler(np.arange(2)))
    assert found is not None
    assert found.human.n == 4
    assert found.human.value == pytest.approx(3 / 4)
    assert found.judge.value == pytest.approx(1 / 4)
    assert found.difference.value == pytest.approx(-2 / 4)
    people = {name: (human.value, judge.value) for name, human, judge in found.by_annotator}
    assert people["vote 3"] == (0.5, 0.5)
    assert people["vote 1"] == (1.0, 0.0)


def test_leave_one_out_needs_three_votes() -> None:
    pairs = with_texts([("t", "u", "12", "a")], votes=[["a", "a"]])
    assert leave_one_out(pairs, Resampler(np.arange(1))) is None


def gold(votes: Sequence[str]) -> GoldPair:
    return GoldPair(prompt_id=str(votes), a="x", b="y", label="a", votes=list(votes))  # type: ignore[arg-type]


def test_votes_by_hand() -> None:
    rows = [gold("aaa"), gold("bbb"), gold(["a", "a", "tie"]), gold("aab")]
    assert unanimous(rows).value == pytest.approx(0.5)
    assert vote_structure(rows) == {(3, 0, 0): 2, (2, 0, 1): 1, (2, 1, 0): 1}


def test_calibration_error_by_hand() -> None:
    """Two bins: 0.95 stated and 1/2 right (gap 0.45), 0.6 stated and all right (gap 0.4)."""
    confidence, hit = np.array([0.95, 0.95, 0.6, 0.6]), np.array([1.0, 0.0, 1.0, 1.0])
    estimate = expected_calibration_error(confidence, hit, np.arange(4), Resampler(np.arange(4)))
    assert estimate.value == pytest.approx((0.45 * 2 + 0.4 * 2) / 4)


def test_section_has_tables_by_gap_and_confidence() -> None:
    from feedback.simulation import Planted, simulate

    pairs = simulate(Planted(soft=True, votes=5), prompts=60, seed=3).pairs()
    section = agreement_section(pairs, Resampler(np.arange(60)))
    assert section is not None
    tables = {table.name: table for table in section.tables}
    assert set(tables) == {"by_confidence", "by_gap", "votes", "annotators"}
    by_gap = [row[-1].value for row in tables["by_gap"].rows]
    assert by_gap[0] < by_gap[-1]
    assert sum(row[-1].n for row in tables["by_confidence"].rows) == 180
    names = {figure.name for figure in section.figures}
    assert {"agreement.kappa", "agreement.alpha", "agreement.human_ceiling"} <= names


def test_no_gold_no_section() -> None:
    pairs = with_texts([("t", "u", "12", None)])
    assert agreement_section(pairs, Resampler(np.arange(1))) is None
