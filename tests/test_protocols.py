"""The judging protocols in the driver, with scripted judges: what is asked, kept and merged."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import pytest
from scripted import Scripted, manifest_of, write_candidates

from feedback import labeling
from feedback.comparing import comparisons
from feedback.config import EngineOptions
from feedback.errors import BackendError, BudgetExceeded, RecipeError, ShardError, TemplateError
from feedback.judge_options import JudgeOptions
from feedback.pairing import PairOptions
from feedback.pairing import run as pair
from feedback.panel import CascadeOptions, PanelJudge, PanelOptions
from feedback.records import Ranking, Verdict
from feedback.shards import read_rows

REPLY_LABELS = re.compile(r"<reply name=\"(\w+)\">(\n)")
SIX = {"p1": [3, 1, 2, 5, 4, 0], "p2": [0, 1, 2, 3, 4, 5]}


@pytest.fixture
def judges(monkeypatch):
    """Scripted engines by model name, opened in place of real ones."""
    engines: dict[str, Scripted] = {}
    monkeypatch.setattr(labeling, "open_backend", lambda options: engines[options.model])
    return engines


def engine(name: str) -> EngineOptions:
    return EngineOptions(model=name)


def judge(tmp_path: Path, rows=None, *, name="cheap", **fields) -> Path:
    candidates = tmp_path / "candidates.jsonl"
    if not candidates.exists():
        write_candidates(candidates, rows or SIX)
    options = JudgeOptions(
        candidates=candidates, out=tmp_path / "verdicts", engine=engine(name), **fields
    )
    labeling.run(options)
    return options.out


def rankings(tmp_path: Path, verdicts: Path) -> dict[str, Ranking]:
    options = PairOptions(
        verdicts=verdicts,
        candidates=tmp_path / "candidates.jsonl",
        out=tmp_path,
        accept_bias=("evidence.pairs",),  # two prompts are few, and that is not tested here
    )
    pair(options)
    return {row.prompt_id: row for row in read_rows(tmp_path / "rankings", Ranking)}


def best_first(values: list[float]) -> list[list[int]]:
    return [[place] for place in sorted(range(len(values)), key=lambda at: -values[at])]


@pytest.mark.parametrize("method", ["sort", "swiss", "active"])
def test_adaptive_pairs_rank_both_prompts(tmp_path, judges, method):
    judges["cheap"] = Scripted(
        "cheap", p=lambda first, second, call: 0.95 if first > second else 0.05
    )
    folder = judge(tmp_path, pairs=method)
    verdicts = list(read_rows(folder, Verdict))
    pairs = Counter(tuple(sorted(row.shown)) for row in verdicts)
    assert set(pairs.values()) == {2}  # both orders of each pair
    assert len(pairs) <= 2 * 15
    assert len(judges["cheap"].waves) > 1  # later pairs follow from answers
    assert manifest_of(folder)["questions"] >= len(verdicts)
    if method == "sort":
        assert len(pairs) <= 2 * 11
        found = rankings(tmp_path, folder)
        assert {name: row.ranking for name, row in found.items()} == {
            name: best_first(values) for name, values in SIX.items()
        }


def test_adaptive_budget_counts_pairs(tmp_path, judges):
    judges["cheap"] = Scripted("cheap")
    folder = judge(tmp_path, pairs="active", pairs_per_prompt=7)
    assert len(list(read_rows(folder, Verdict))) == 2 * 7 * 2


def test_adaptive_run_that_stopped_asks_only_what_is_missing(tmp_path, judges):
    judges["cheap"] = Scripted("cheap")
    whole = (
        judge(tmp_path / "whole", pairs="sort") if (tmp_path / "whole").mkdir() is None else None
    )
    expected = {row.verdict_id for row in read_rows(whole, Verdict)}
    asked = 0
    for limit in (1, 3, 8, 1000):
        judges["cheap"] = Scripted("cheap")
        try:
            folder = judge(tmp_path, pairs="sort", max_calls=limit)
        except BudgetExceeded:
            folder = tmp_path / "verdicts"
        asked += len(judges["cheap"].calls)
    rows = [row.verdict_id for row in read_rows(folder, Verdict)]
    assert len(rows) == len(set(rows)) == asked
    assert set(rows) == expected


@pytest.mark.parametrize("method", ["sort", "swiss", "active"])
def test_adaptive_pairs_whose_calls_failed_are_asked_again(tmp_path, judges, method):
    """Also by a run that was itself stopped before it came to them."""
    fields = {"pairs": method, "pairs_per_prompt": 7 if method == "active" else None}
    broken = Scripted("cheap", fail=lambda call: int(call.call_id, 16) % 3 != 0)
    judges["cheap"] = broken
    folder = judge(tmp_path, **fields)
    failed = {row.verdict_id for row in read_rows(folder, Verdict) if row.outcome == "failed"}
    begun = {call.call_id for call in broken.calls}
    assert len(failed) > len(begun) / 2
    judges["cheap"] = Scripted("cheap")
    with pytest.raises(BudgetExceeded):
        judge(tmp_path, **fields, max_calls=2)
    judges["cheap"] = Scripted("cheap")
    judge(tmp_path, **fields)
    verdicts = list(read_rows(folder, Verdict))
    assert {row.outcome for row in verdicts} == {"decided"}
    assert failed <= {row.verdict_id for row in verdicts}
    if method == "active":
        assert {row.verdict_id for row in verdicts} == begun, "the budget holds for both runs"
    assert [path.name for path in folder.glob(".begun*")] == []


def test_criteria_are_asked_one_by_one_and_weighted(tmp_path, judges):
    judges["cheap"] = Scripted("cheap")
    folder = judge(tmp_path, template="rating-criteria")
    verdicts = list(read_rows(folder, Verdict))
    weights = manifest_of(folder)["criteria"]
    assert weights == {"correctness": 3.0, "completeness": 2.0, "clarity": 1.0, "brevity": 1.0}
    per_completion = Counter((row.shown[0], row.meta["criterion"]) for row in verdicts)
    assert len(per_completion) == 12 * 4 and set(per_completion.values()) == {1}
    shown = {
        call.messages[-1]["content"].split("<criteria>")[1].split(":")[0].strip()
        for call in judges["cheap"].calls
    }
    assert shown == set(weights)
    found = rankings(tmp_path, folder)["p2"]
    assert found.scores[4] == pytest.approx(4 * 0.92 + 0.02 * (1 + 2 + 3 + 5))
    assert found.ranking[-1] == [0, 1]  # 0 and 1 both clip to the scale's lowest point


def test_structured_criteria_come_in_one_reply(tmp_path, judges):
    def text(call):
        names = list(call.schema["properties"]["scores"]["properties"])
        value = min(max(round(Scripted.values(call)[0]), 1), 5)
        return json.dumps({"rationale": "so", "scores": dict.fromkeys(names, value)})

    judges["cheap"] = Scripted("cheap", text=text)
    folder = judge(tmp_path, template="rating-structured")
    verdicts = list(read_rows(folder, Verdict))
    assert len(verdicts) == 12
    assert all(row.rationale == "so" and len(row.meta["scores"]) == 4 for row in verdicts)
    assert rankings(tmp_path, folder)["p2"].scores == [1.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_structured_pairs_carry_a_schema(tmp_path, judges):
    def text(call):
        assert call.schema["properties"]["verdict"]["enum"] == ["A", "B", "C"]
        first, second = Scripted.values(call)
        return json.dumps({"rationale": "longer", "verdict": "A" if first > second else "B"})

    judges["cheap"] = Scripted("cheap", text=text)
    folder = judge(tmp_path, {"p": [1, 2]}, template="pairwise-structured-tie")
    assert [row.winner for row in read_rows(folder, Verdict)] == ["p-1", "p-1"]


def test_an_engine_that_follows_no_schema_is_named_at_start_up(tmp_path, judges, capsys):
    judges["cheap"] = Scripted("cheap", text=lambda call: '{"rationale": "x", "verdict": "A"}')
    judge(tmp_path, {"p": [1, 2]}, template="pairwise-structured")
    assert "cannot be held to a JSON schema" in capsys.readouterr().out
    judge(tmp_path, {"p": [1, 2]}, template="pairwise-rationale", on_change="set-aside")
    assert "JSON schema" not in capsys.readouterr().out


def test_rotations_show_each_reply_once_at_each_place(tmp_path, judges):
    def text(call):
        labels = [name for name, _ in REPLY_LABELS.findall(call.messages[-1]["content"])]
        values = dict(zip(labels, Scripted.values(call), strict=True))
        return " > ".join(sorted(values, key=lambda label: -values[label]))

    judges["cheap"] = Scripted("cheap", text=text)
    folder = judge(tmp_path, template="listwise-balanced", orders="rotations")
    verdicts = [row for row in read_rows(folder, Verdict) if row.prompt_id == "p1"]
    assert len(verdicts) == 6
    for place in range(6):
        assert len({row.shown[place] for row in verdicts}) == 6
    found = rankings(tmp_path, folder)["p1"]
    assert found.ranking == best_first(SIX["p1"])
    assert found.source["list_agreement"] == 1.0


def test_a_list_that_is_too_long_is_refused(tmp_path, judges):
    judges["cheap"] = Scripted("cheap", text=lambda call: "")
    with pytest.raises(TemplateError, match="has 9 completions"):
        judge(tmp_path, {"p": list(range(9))}, template="listwise")


def test_constitution_draws_one_principle_per_pair(tmp_path, judges):
    judges["cheap"] = Scripted("cheap")
    folder = judge(tmp_path, template="principle", constitution="harmlessness")
    by_pair: dict[tuple, set] = {}
    for row in read_rows(folder, Verdict):
        by_pair.setdefault((row.prompt_id, *sorted(row.shown)), set()).add(row.principle)
    assert all(len(drawn) == 1 for drawn in by_pair.values())
    assert len(set().union(*by_pair.values())) > 5
    shown = judges["cheap"].calls[0].messages[-1]["content"]
    assert next(iter(read_rows(folder, Verdict))).principle in shown
    assert manifest_of(folder)["constitution"]["principles"] == 16


def test_constitution_and_template_must_fit(tmp_path, judges):
    with pytest.raises(TemplateError, match="give --constitution"):
        judge(tmp_path, template="principle")
    with pytest.raises(TemplateError, match="would do nothing"):
        judge(tmp_path, template="pairwise", constitution="harmlessness")


def test_cascade_asks_the_strong_judge_only_where_the_first_is_unsure(tmp_path, judges):
    judges["cheap"] = Scripted("cheap")
    judges["strong"] = Scripted("strong", p=lambda first, second, call: float(first > second))
    rows = {"p": [0.0, 5.0, 5.2]}
    folder = judge(tmp_path, rows, cascade=CascadeOptions(engine=engine("strong"), unsure=0.25))
    assert len(judges["cheap"].calls) == 6
    # 0 against 5 is clear; 5 against 5.2 is 0.55: only that pair goes on, in both orders.
    assert len(judges["strong"].calls) == 2
    found = {(row.a, row.b): row.p for row in comparisons(folder)}
    assert found["p-1", "p-2"] == pytest.approx(0.0, abs=1e-6)
    assert found["p-0", "p-1"] == pytest.approx(1 / (1 + math.exp(5)), abs=1e-6)
    report = manifest_of(folder)["panel"]
    assert report["calls"] == [6, 2]
    assert report["asked"] == [3, 1]
    assert judges["cheap"].closed == judges["strong"].closed == 1


@pytest.mark.parametrize(
    ("fields", "escalated"),
    [
        ({"mass": 0.3}, 3),  # low mass
        ({"p": lambda first, second, call: 0.9}, 3),  # always the first shown: orders disagree
        ({"p": lambda first, second, call: 0.99 if first > second else 0.01}, 0),
        ({"fail": lambda call: True}, 0),  # failed calls are asked again, not escalated
    ],
)
def test_what_counts_as_unsure(tmp_path, judges, fields, escalated):
    judges["cheap"] = Scripted("cheap", **fields)
    judges["strong"] = Scripted("strong")
    failing = "fail" in fields
    with pytest.raises(BackendError, match="6 of 6") if failing else contextlib.nullcontext():
        judge(tmp_path, {"p": [0.0, 3.0, 6.0]}, cascade=CascadeOptions(engine=engine("strong")))
    assert len(judges["strong"].calls) == 2 * escalated


def test_cascade_that_stopped_continues_in_either_stage(tmp_path, judges):
    rows = {f"p{number}": [0.0, 0.1] for number in range(5)}
    cascade = CascadeOptions(engine=engine("strong"))
    total = 0
    for limit in (3, 9, 14, 100):
        judges["cheap"], judges["strong"] = Scripted("cheap"), Scripted("strong")
        try:
            folder = judge(tmp_path, rows, cascade=cascade, max_calls=limit)
        except BudgetExceeded:
            assert limit < 100
        total += len(judges["cheap"].calls) + len(judges["strong"].calls)
    assert total == 20
    assert Counter(row.meta["member"] for row in read_rows(folder, Verdict)) == {0: 10, 1: 10}


def test_panel_means_and_reports_agreement(tmp_path, judges):
    judges["cheap"] = Scripted(
        "cheap", p=lambda first, second, call: 0.8 if first > second else 0.2
    )
    judges["other"] = Scripted(
        "other", p=lambda first, second, call: 0.4 if first > second else 0.6
    )
    panel = PanelOptions(judges=(PanelJudge(engine=engine("other"), weight=3.0),))
    folder = judge(tmp_path, {"p": [1, 2, 3]}, panel=panel)
    found = {(row.a, row.b): row for row in comparisons(folder)}
    assert found["p-0", "p-1"].p == pytest.approx((0.2 + 3 * 0.6) / 4)
    assert found["p-0", "p-1"].consistent is False  # the judges point different ways
    assert len(found["p-0", "p-1"].votes) == 4
    report = manifest_of(folder)["panel"]
    assert report["agreement"] == [[1.0, 0.0], [0.0, 1.0]]
    assert report["calls"] == [6, 6]
    row = rankings(tmp_path, folder)["p"]
    assert row.comparisons[0][2] == pytest.approx(0.5, abs=0.01)


def test_panel_majority_of_three(tmp_path, judges):
    for name, sure in (("cheap", 0.9), ("second", 0.6), ("third", 0.2)):
        judges[name] = Scripted(
            name, p=lambda first, second, call, sure=sure: sure if first > second else 1 - sure
        )
    panel = PanelOptions(
        judges=(PanelJudge(engine=engine("second")), PanelJudge(engine=engine("third"))),
        combine="majority",
    )
    folder = judge(tmp_path, {"p": [2, 1]}, panel=panel)
    (row,) = comparisons(folder)
    assert (row.p, row.outcome) == (pytest.approx(2 / 3), "decided")


def test_panel_needs_more_than_half_of_its_judges(tmp_path, judges):
    judges["cheap"] = Scripted("cheap", mass=0.01)  # under min_mass: unparsed
    judges["other"] = Scripted("other")
    folder = judge(
        tmp_path, {"p": [2, 1]}, panel=PanelOptions(judges=(PanelJudge(engine=engine("other")),))
    )
    (row,) = comparisons(folder)
    assert (row.p, row.outcome) == (None, "unparsed")


def test_several_judges_are_checked_before_anything_is_sent(tmp_path, judges):
    judges["cheap"] = Scripted("cheap")
    with pytest.raises(RecipeError, match="same engine"):
        judge(tmp_path, panel=PanelOptions(judges=(PanelJudge(engine=engine("cheap")),)))
    with pytest.raises(RecipeError, match=r"no \[\[judge.panel.judges\]\]"):
        judge(tmp_path, panel=PanelOptions())
    with pytest.raises(RecipeError, match="pairwise and rating"):
        mixed = PanelJudge(engine=engine("other"), template="rating")
        judge(tmp_path, panel=PanelOptions(judges=(mixed,)))
    with pytest.raises(RecipeError, match="pairs or ratings; for lists use a panel"):
        judge(tmp_path, template="listwise", cascade=CascadeOptions(engine=engine("strong")))
    with pytest.raises(RecipeError, match="on one scale"):
        nine = PanelJudge(engine=engine("other"), template="rating-nine")
        judge(tmp_path, template="rating", panel=PanelOptions(judges=(nine,)))
    with pytest.raises(RecipeError, match="not both"):
        judge(tmp_path, panel=PanelOptions(), cascade=CascadeOptions())
    assert not judges["cheap"].calls


def test_a_folder_of_one_judge_does_not_become_a_panels(tmp_path, judges):
    judges["cheap"], judges["other"] = Scripted("cheap"), Scripted("other")
    judge(tmp_path, {"p": [2, 1]})
    with pytest.raises(ShardError, match="another"):
        judge(tmp_path, panel=PanelOptions(judges=(PanelJudge(engine=engine("other")),)))


def test_dry_run_counts_every_judge(tmp_path, judges, capsys):
    judge(
        tmp_path,
        {"p": [1, 2, 3]},
        cascade=CascadeOptions(engine=engine("strong")),
        dry_run=True,
    )
    said = capsys.readouterr().out
    assert "6 calls to cheap" in said
    assert "at most 6 calls to strong" in said
