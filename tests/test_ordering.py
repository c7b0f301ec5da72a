"""Pairs, orders and their merging, checked against arithmetic done by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.ordering import (
    choose_pairs,
    distinct_completions,
    first_probability,
    merge_orders,
    pair_questions,
)
from feedback.records import Candidates, Completion, JudgeIdentity, Verdict


def candidates(*texts: str, models: str = "") -> Candidates:
    return Candidates(
        prompt_id="p",
        prompt="Q",
        completions=[
            Completion(completion_id=f"c{n}", completion=text, model=(models or "m" * 99)[n])
            for n, text in enumerate(texts)
        ],
    )


def verdict(shown: str, *, p: float | None = None, **fields: Any) -> Verdict:
    """A verdict on completions named by letters; ``p`` is that of the first shown."""
    values: dict[str, Any] = {"outcome": "decided", "probs": None}
    if p is not None:
        values |= {"probs": [p, 1 - p], "winner": shown[0] if p > 0.5 else shown[1]}
        if p == 0.5:
            values |= {"outcome": "tie", "winner": None}
    number = fields.pop("number", 0)
    return Verdict(
        verdict_id=f"{shown}-{number}",
        prompt_id="p",
        kind="pairwise",
        shown=list(shown),
        judge=JudgeIdentity(model="j"),
        template="t",
        template_sha256="0",
        **values | fields,
    )


def names(pairs: list[tuple[Completion, Completion]]) -> list[tuple[str, str]]:
    return [(first.completion, second.completion) for first, second in pairs]


# --- which pairs -------------------------------------------------------------------------------


def test_equal_and_empty_texts_are_never_paired() -> None:
    row = candidates("Yes.", " YES. ", "No.", "", "  ", "Ｙes.")
    assert [entry.completion for entry in distinct_completions(row)] == ["Yes.", "No."]
    assert names(choose_pairs(row)) == [("Yes.", "No.")]


def test_policies() -> None:
    row = candidates("a", "b", "c", models="xxy")
    assert names(choose_pairs(row)) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert names(choose_pairs(row, "first")) == [("a", "b"), ("a", "c")]
    assert names(choose_pairs(row, "cross")) == [("a", "c"), ("b", "c")]
    assert len(choose_pairs(row, "all", per_prompt=2)) == 2


def test_random_pairs_are_seeded_and_even() -> None:
    row = candidates(*"abcd")
    counts = dict.fromkeys(itertools.combinations("abcd", 2), 0)
    for seed in range(600):
        (pair,) = names(choose_pairs(row, "random", per_prompt=1, seed=seed))
        assert [pair] == names(choose_pairs(row, "random", per_prompt=1, seed=seed))
        counts[pair] += 1
    assert min(counts.values()) > 60  # 100 each on average; 60 is five standard deviations below


def test_both_orders_stand_side_by_side() -> None:
    row = candidates(*"abc")
    shown = [q.completions for q in pair_questions(row, choose_pairs(row))]
    assert shown == [tuple(pair) for pair in ("ab", "ba", "ac", "ca", "bc", "cb")]


def test_one_order_is_a_fair_coin_that_does_not_depend_on_the_row() -> None:
    row = candidates("a", "b")
    turned = Candidates(prompt_id="p", prompt="Q", completions=row.completions[::-1])
    firsts = 0
    for seed in range(400):
        (question,) = pair_questions(row, choose_pairs(row), orders="one", seed=seed)
        (other,) = pair_questions(turned, choose_pairs(turned), orders="one", seed=seed)
        assert question.shown == other.shown
        firsts += question.completions[0] == "a"
    assert 150 < firsts < 250


def test_repeats_are_questions_of_their_own() -> None:
    row = candidates("a", "b")
    asked = [(q.shown, q.repeat) for q in pair_questions(row, choose_pairs(row), repeats=2)]
    assert asked == [
        (("c0", "c1"), 0),
        (("c1", "c0"), 0),
        (("c0", "c1"), 1),
        (("c1", "c0"), 1),
    ]


# --- what one verdict says -----------------------------------------------------------------------


def test_a_ties_probability_is_split() -> None:
    tied = verdict("ab", outcome="tie", probs=[0.3, 0.1, 0.6])
    assert first_probability(tied) == pytest.approx(0.3 + 0.6 / 2)


def test_a_text_verdict_is_certain_of_its_winner() -> None:
    assert first_probability(verdict("ab", winner="a")) == 1.0
    assert first_probability(verdict("ab", winner="b")) == 0.0
    assert first_probability(verdict("ab", outcome="tie")) == 0.5


@pytest.mark.parametrize("outcome", ["unparsed", "refused", "truncated", "failed"])
def test_no_verdict_is_no_probability(outcome: str) -> None:
    assert first_probability(verdict("ab", outcome=outcome, probs=[0.9, 0.1])) is None


# --- merging ------------------------------------------------------------------------------------


def test_the_label_is_the_mean_of_both_orders() -> None:
    # Shown first, a wins with 0.9; shown second, with 1 - 0.3 = 0.7. The mean is 0.8.
    merged = merge_orders([verdict("ab", p=0.9), verdict("ba", p=0.3)])
    assert merged.p == pytest.approx(0.8)
    assert merged.p_orders == pytest.approx([0.9, 0.7])
    assert (merged.a, merged.b, merged.outcome, merged.consistent) == ("a", "b", "decided", True)
    assert merged.votes == ["ab-0", "ba-0"]


def test_a_judge_that_names_the_first_slot_says_one_half() -> None:
    merged = merge_orders([verdict("ab", p=0.9), verdict("ba", p=0.9)])
    assert merged.p == 0.5
    assert merged.outcome == "tie"
    assert merged.consistent is False


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_merging_does_not_depend_on_the_order_of_rows(one: float, two: float) -> None:
    rows = [verdict("ab", p=one), verdict("ba", p=two)]
    merged, turned = merge_orders(rows), merge_orders(rows[::-1])
    assert (merged.p, merged.p_orders) == (turned.p, turned.p_orders)
    assert merged.p == pytest.approx((one + 1 - two) / 2)


@pytest.mark.parametrize("outcome", ["unparsed", "refused", "truncated", "failed"])
def test_half_an_answer_is_no_label(outcome: str) -> None:
    merged = merge_orders([verdict("ab", p=0.9), verdict("ba", outcome=outcome)])
    assert merged.p is None
    assert merged.outcome == outcome
    assert merged.p_orders == [0.9, None]
    assert merged.consistent is None


def test_a_missing_order_has_failed() -> None:
    merged = merge_orders([verdict("ba", p=0.2)])
    assert (merged.p, merged.outcome) == (None, "failed")


def test_one_order_is_a_label_where_one_was_asked() -> None:
    merged = merge_orders([verdict("ba", p=0.2)], orders="one")
    assert merged.p == pytest.approx(0.8)
    assert merged.p_orders == [None, pytest.approx(0.8)]
    assert merged.consistent is None


def test_the_gravest_outcome_is_named() -> None:
    rows = [verdict("ab", outcome="refused"), verdict("ba", outcome="failed")]
    assert merge_orders(rows).outcome == "failed"


def test_ties() -> None:
    both = merge_orders([verdict("ab", outcome="tie"), verdict("ba", outcome="tie")])
    assert (both.p, both.outcome, both.consistent) == (0.5, "tie", True)
    half = merge_orders([verdict("ab", outcome="tie"), verdict("ba", winner="a")])
    assert (half.p, half.outcome, half.consistent) == (0.75, "decided", False)
    hard = merge_orders([verdict("ab", winner="a"), verdict("ba", winner="b")])
    assert (hard.p, hard.outcome, hard.consistent) == (0.5, "tie", False)


def test_repeats_are_averaged_within_their_order() -> None:
    rows = [
        verdict("ab", p=0.9),
        verdict("ab", p=0.7, number=1),
        verdict("ba", p=0.4),
        verdict("ba", p=0.2, number=1),
    ]
    merged = merge_orders(rows)
    assert merged.p_orders == pytest.approx([0.8, 0.7])
    assert merged.p == pytest.approx(0.75)


def test_the_smallest_mass_is_kept() -> None:
    merged = merge_orders([verdict("ab", p=0.9, mass=0.7), verdict("ba", p=0.3, mass=0.9)])
    assert merged.mass == 0.7


def test_verdicts_on_different_pairs_do_not_merge() -> None:
    with pytest.raises(ValueError, match="not on one pair"):
        merge_orders([verdict("ab", p=0.9), verdict("ca", p=0.3)])
