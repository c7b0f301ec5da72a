"""Rankings of one prompt from pairs, lists and ratings; what is not judged has no place."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from feedback.comparing import prompt_comparisons
from feedback.preference_rows import PairRules, preference_rows, ranking_row, usable
from feedback.ranking import RankedPair, mean_scores, rank_lists, rank_pairs, tied_groups
from feedback.records import Candidates, Completion, JudgeIdentity, Verdict


def candidates(count: int) -> Candidates:
    return Candidates(
        prompt_id="p",
        prompt="Which?",
        completions=[
            Completion(completion_id=f"c{place}", completion=f"text {place}", model="m")
            for place in range(count)
        ],
    )


def verdict(kind: str, shown: list[str], number: int, **fields) -> Verdict:
    values = {"outcome": "decided"} | fields
    return Verdict(
        verdict_id=f"v{number}",
        prompt_id="p",
        kind=kind,
        shown=shown,
        judge=JudgeIdentity(model="j"),
        template="t",
        template_sha256="s",
        **values,
    )


def pair(i: int, j: int, p: float, tie: bool = False) -> RankedPair:
    return RankedPair(f"c{i}", f"c{j}", p, tie)


def test_one_pair_keeps_its_log_odds_but_for_the_doubt():
    ranking = rank_pairs(candidates(2), [pair(0, 1, 0.8)])
    gap = ranking.scores[0] - ranking.scores[1]
    assert gap == pytest.approx(math.log(0.85 / 0.25), abs=1e-5)
    assert ranking.ranking == [[0], [1]]
    assert ranking.comparisons == [(0, 1, 0.8)]


def test_certain_calls_do_not_make_infinite_scores():
    pairs = [pair(i, j, 1.0) for i, j in itertools.combinations(range(4), 2)]
    ranking = rank_pairs(candidates(4), pairs)
    assert ranking.ranking == [[0], [1], [2], [3]]
    assert all(abs(score) < 10 for score in ranking.scores)
    assert ranking.source["cyclic_triples"] == 0
    assert ranking.source["complete_triples"] == 4
    low, high = np.array(ranking.source["intervals"]).T
    assert (low < ranking.scores).all() and (ranking.scores < high).all()


def test_cycles_are_reported():
    ranking = rank_pairs(candidates(3), [pair(0, 1, 0.9), pair(1, 2, 0.9), pair(2, 0, 0.9)])
    assert ranking.source["cyclic_triples"] == 1
    assert ranking.source["cycles"] == [(0, 1, 2)]
    assert ranking.ranking == [[0, 1, 2]]


def test_ties_make_tied_groups():
    pairs = [pair(0, 1, 0.5, tie=True), pair(0, 2, 0.9), pair(1, 2, 0.9)]
    ranking = rank_pairs(candidates(3), pairs)
    assert ranking.ranking == [[0, 1], [2]]
    assert ranking.source["ties"] == "davidson"


def test_what_was_not_compared_has_no_place():
    ranking = rank_pairs(candidates(5), [pair(0, 1, 0.9), pair(3, 4, 0.7)])
    assert ranking.scores[2] is None
    assert ranking.source["intervals"][2] is None
    assert sorted(itertools.chain(*ranking.ranking)) == [0, 1, 3, 4]
    assert ranking.source["connected"] is False
    assert rank_pairs(candidates(3), []) is None


def test_lists_merge_over_orders():
    shown = ["c0", "c1", "c2"]
    verdicts = [
        verdict("listwise", shown, 1, ranking=[["c1"], ["c0"], ["c2"]]),
        verdict("listwise", shown[::-1], 2, ranking=[["c1"], ["c2", "c0"]]),
        verdict("listwise", shown, 3, outcome="unparsed"),
    ]
    pairs = [
        RankedPair(row.a, row.b, row.p)
        for row in prompt_comparisons(verdicts[:2])
        if row.p is not None
    ]
    ranking = rank_lists(candidates(3), verdicts, pairs)
    assert ranking.ranking == [[1], [0], [2]]
    assert ranking.source["lists"] == 2
    assert ranking.source["method"] == "plackett-luce"
    # c1 before c0 and c2 in both; c0 before c2 once, level once.
    assert {(i, j): p for i, j, p in ranking.comparisons} == {
        (0, 1): 0.0,
        (0, 2): 0.75,
        (1, 2): 1.0,
    }
    # (c1 c0 c2) against (c1 {c0 c2}): two concordant pairs of three, one tied: 2 / sqrt(3 * 2).
    assert ranking.source["list_agreement"] == pytest.approx(2 / math.sqrt(6), abs=1e-6)


def test_rows_from_ratings_keep_the_scale():
    verdicts = [
        verdict("rating", [f"c{place}"], place, scores=[score])
        for place, score in enumerate((3.0, 4.5, 3.0))
    ]
    rows = candidates(3)
    completions = {row.completion_id: row for row in rows.completions}
    labelled = usable(prompt_comparisons(verdicts), completions, {}, Counter())
    ranking = ranking_row(rows, labelled, PairRules(), source={"judge": "j"}, verdicts=verdicts)
    assert ranking.scores == [3.0, 4.5, 3.0]
    assert ranking.ranking == [[1], [0, 2]]
    assert ranking.source["method"] == "rating"
    assert ranking.source["judge"] == "j"
    best_rest = preference_rows(
        rows, labelled, PairRules(pairs="best-rest"), ranking=ranking, source={}, counts=Counter()
    )
    assert [row.chosen for row in best_rest] == ["text 1", "text 1"]


def test_criteria_are_weighted_and_all_are_needed():
    verdicts = [
        verdict("rating", ["c0"], 1, scores=[5.0], meta={"criterion": "accuracy"}),
        verdict("rating", ["c0"], 2, scores=[1.0], meta={"criterion": "tone"}),
        verdict("rating", ["c1"], 3, scores=[3.0], meta={"criterion": "accuracy"}),
        verdict("rating", ["c1"], 4, outcome="refused", meta={"criterion": "tone"}),
    ]
    weights = {"accuracy": 3.0, "tone": 1.0}
    assert mean_scores(verdicts, weights=weights) == {"c0": 4.0}  # (3 * 5 + 1 * 1) / 4
    (comparison,) = prompt_comparisons(verdicts, weights=weights)
    assert (comparison.p, comparison.outcome) == (None, "refused")
    verdicts[3] = verdict("rating", ["c1"], 4, scores=[2.0], meta={"criterion": "tone"})
    (comparison,) = prompt_comparisons(verdicts, weights=weights)
    assert comparison.p == pytest.approx(0.75)  # c0 wins on accuracy, weight 3 of 4


def test_probabilities_over_the_scale_make_pair_probabilities():
    """P(c0 > c1) + half of P(level) = 0.5 * 0.8 + 0.5 * (0.5 * 0.2 + 0.5 * 0.8) by hand."""
    verdicts = [
        verdict("rating", ["c0"], 1, scores=[1.5], probs=[0.5, 0.5]),
        verdict("rating", ["c1"], 2, scores=[1.2], probs=[0.8, 0.2]),
    ]
    (comparison,) = prompt_comparisons(verdicts)
    assert comparison.p == pytest.approx(0.5 * 0.8 + 0.5 * (0.5 * 0.2 + 0.5 * 0.8))


def test_tied_groups():
    assert tied_groups([1.0, None, 3.0, 1.0]) == [[2], [0, 3]]
    assert tied_groups([None, None]) == []


def test_best_worst_takes_a_pair_that_was_compared():
    rows = candidates(4)
    pairs = [(0, 1, 0.9), (1, 2, 0.9), (2, 3, 0.9)]
    verdicts = [
        verdict("pairwise", [f"c{i}", f"c{j}"], number, probs=[p, 1 - p], winner=f"c{i}")
        for number, (i, j, p) in enumerate(pairs)
    ]
    completions = {row.completion_id: row for row in rows.completions}
    found = prompt_comparisons(verdicts, orders="one")
    labelled = usable(found, completions, {}, Counter())
    ranking = ranking_row(rows, labelled, PairRules(), source={}, verdicts=verdicts)
    assert ranking.ranking == [[0], [1], [2], [3]]
    (row,) = preference_rows(
        rows, labelled, PairRules(pairs="best-worst"), ranking=ranking, source={}, counts=Counter()
    )
    assert (row.chosen, row.rejected) == ("text 0", "text 1")
