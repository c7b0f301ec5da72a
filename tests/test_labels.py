"""Labels on groups: hard and soft, ties, smoothing, rankings from scores and pairs."""

from __future__ import annotations

import pytest

from feedback.errors import InputError
from train.chat import DataReport
from train.data import Group, Pair
from train.labels import label_pairs, ranked_from_labels, require_small_ties


def group(*pairs: Pair, count: int = 2, **labels: object) -> Group:
    ids = [[7]] * count
    return Group(prompt_id="x", prompt_ids=[5], completions=ids, pairs=pairs, **labels)  # type: ignore[arg-type]


def test_soft_hard_and_smoothed() -> None:
    rows = [group(Pair(0, 1, 0.8), Pair(1, 0, 0.3), Pair(0, 1, 0.5, tie=True))]

    def p(**options: object) -> list[float]:
        found = label_pairs(rows, DataReport(), **options)  # type: ignore[arg-type]
        return [pair.p for pair in found[0].pairs]

    assert p() == [0.8, 0.3, 0.5]
    assert p(soft_labels=False) == [1.0, 0.0, 0.5]
    assert p(soft_labels=False, label_smoothing=0.1) == pytest.approx([0.9, 0.1, 0.5])
    assert p(label_smoothing=0.1) == pytest.approx([0.74, 0.34, 0.5])


def test_dropping_ties_is_counted() -> None:
    rows = [group(Pair(0, 1, 0.8), Pair(0, 1, 0.5)), group(Pair(0, 1, 0.5, tie=True))]
    report = DataReport()
    kept = label_pairs(rows, report, ties="drop")
    assert [len(one.pairs) for one in kept] == [1]
    assert "2 tied pairs" in report.warnings[0]
    with pytest.raises(InputError, match="ties to 'use'"):
        label_pairs(rows[1:], DataReport(), ties="drop")
    alone = [Group(prompt_id="a", prompt_ids=[1], completions=[[2]])]
    with pytest.raises(InputError, match="no prompt has two judged completions"):
        label_pairs(alone, DataReport(), ties="use")


def test_rankings_from_scores_and_single_pairs() -> None:
    scored = group(count=4, scores=(1.0, 3.0, 1.0, 2.0))
    assert ranked_from_labels([scored])[0].ranking == ((1,), (3,), (0, 2))
    partly = group(Pair(1, 0, 0.9), scores=(1.0, None))
    assert ranked_from_labels([partly])[0].ranking == ((1,), (0,))
    assert ranked_from_labels([group(Pair(0, 1, 0.4))])[0].ranking == ((1,), (0,))
    assert ranked_from_labels([group(Pair(0, 1, 0.5, tie=True))])[0].ranking == ((0, 1),)
    own = group(Pair(0, 1), ranking=((1,), (0,)))
    assert ranked_from_labels([own])[0].ranking == ((1,), (0,))


def test_rows_order_completions_by_their_weights() -> None:
    """1 beats 0 once with weight 3; 0 beats 1 twice with weight 1: 3 against 2 of 5."""
    rows = [group(Pair(0, 1), Pair(0, 1), Pair(1, 0, 1.0, 3.0))]
    assert ranked_from_labels(rows)[0].ranking == ((1,), (0,))
    ignored = [group(Pair(0, 1), Pair(1, 0, 1.0, 0.0), Pair(2, 0, 1.0, 0.0), count=3)]
    assert ranked_from_labels(ignored, mixed=True)[0].ranking == ((0,), (1,))


def test_ties_too_large_for_plackett_luce_are_refused() -> None:
    tied = group(count=13, ranking=(tuple(range(13)),))
    apart = group(count=13, ranking=tuple((i,) for i in range(13)))
    require_small_ties([apart])
    with pytest.raises(InputError, match="'x': 13 completions are tied"):
        require_small_ties([apart, tied])
    with pytest.raises(InputError, match="'x': 13 completions are ranked"):
        require_small_ties([apart], "davidson")


def test_pairs_of_many_make_a_ranking_only_for_those_who_look_at_the_pairs() -> None:
    """0 beats 1 and 2 beats 3: nothing is known of 0 against 3. 4 was never compared."""
    rows = [group(Pair(0, 1), Pair(2, 3, 0.9), count=5)]
    with pytest.raises(InputError, match="rankings folder"):
        ranked_from_labels(rows)
    assert ranked_from_labels(rows, mixed=True)[0].ranking == ((0,), (2,), (3,), (1,))
