"""Verdicts to training rows: judged labels only, never equal texts, readable by trainers."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, manifest_of, write_candidates

from feedback import labeling, pairing
from feedback.config import EngineOptions
from feedback.errors import GateRefused, InputError, RecipeError, ShardError
from feedback.labeling import JudgeOptions
from feedback.pairing import PairOptions
from feedback.preference_rows import Labelled, PairRules, preference_rows, usable
from feedback.records import (
    Candidates,
    Comparison,
    Completion,
    Preference,
    Ranking,
    Verdict,
    normalise_text,
)
from feedback.shards import manifest_sha256, read_rows

VALUES = {f"p{n}": [0.0, 1.0, 2.5] for n in range(6)}


@pytest.fixture
def judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with candidates and verdicts of a judge whose log-odds are the difference."""
    return judge(tmp_path, monkeypatch, Scripted("judge", mass=0.99))


def judge(folder: Path, monkeypatch: pytest.MonkeyPatch, scripted: Scripted, **fields: Any) -> Path:
    monkeypatch.setattr(labeling, "open_backend", lambda options: scripted)
    if not (folder / "candidates.jsonl").exists():
        write_candidates(folder / "candidates.jsonl", VALUES)
    labeling.run(
        JudgeOptions(
            candidates=folder / "candidates.jsonl",
            out=folder / "verdicts",
            engine=EngineOptions(model="judge"),
            **fields,
        )
    )
    return folder


def pair(folder: Path, **fields: Any) -> tuple[list[Preference], list[Ranking]]:
    # Scripted judges are far from a report card's thresholds; the gate has tests of its own.
    fields.setdefault("accept_bias", ("position_bias", "length_bias", "outcomes", "format_bias"))
    pairing.run(
        PairOptions(
            verdicts=folder / "verdicts",
            candidates=folder / "candidates.jsonl",
            out=folder,
            **fields,
        )
    )
    return (
        list(read_rows(folder / "preferences", Preference)),
        list(read_rows(folder / "rankings", Ranking)),
    )


@pytest.fixture(autouse=True)
def accept_what_the_card_says(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six prompts make no report card; the gate is held open except where it is the subject."""
    if "gate" in request.node.name:
        return
    from feedback import pairing_run

    monkeypatch.setattr(pairing_run, "_check_gate", lambda options: {"status": "passed"})


def sigmoid(x: float) -> float:
    import math

    return 1 / (1 + math.exp(-x))


def test_the_soft_label_is_the_judges_probability(judged: Path) -> None:
    preferences, rankings = pair(judged)
    assert len(preferences) == 18
    by_gap = Counter(round(row.p_chosen, 6) for row in preferences)
    assert by_gap == {round(sigmoid(gap), 6): 6 for gap in (1.0, 1.5, 2.5)}
    for row in preferences:
        assert row.chosen.split()[-1] > row.rejected.split()[-1]  # type: ignore[union-attr]
        assert row.margin == pytest.approx(2 * row.p_chosen - 1)
        assert row.p_raw == row.p_chosen
        assert not row.tie
    assert len(rankings) == 6
    for ranking in rankings:
        assert ranking.ranking == [[2], [1], [0]]
        assert len(ranking.comparisons) == 3


def test_every_row_names_the_calls_behind_it(judged: Path) -> None:
    preferences, rankings = pair(judged)
    verdicts = {row.verdict_id: row for row in read_rows(judged / "verdicts", Verdict)}
    for row in preferences:
        calls = [verdicts[name] for name in row.source["verdicts"]]
        assert len(calls) == 2
        # The label follows from the calls alone.
        chosen, _ = row.source["completions"]
        chances = []
        for call in calls:
            assert call.prompt_id == row.prompt_id
            assert call.probs is not None
            chances.append(call.probs[call.shown.index(chosen)])
        assert sum(chances) / 2 == pytest.approx(row.p_chosen)
        assert row.source["judge"] == "judge"
        assert row.source["template_sha256"] == calls[0].template_sha256
        assert row.source["manifest_sha256"] == manifest_sha256(judged / "verdicts")
    assert {name for row in rankings for name in row.source["verdicts"]} == set(verdicts)


def test_no_label_without_a_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # One order of one pair fails everywhere, another pair holds too little mass.
    scripted = Scripted("judge", fail=lambda call: Scripted.values(call) == [0.0, 1.0])
    whole = scripted.answer

    def answer(call: Any) -> Any:
        scripted.mass = 0.001 if set(Scripted.values(call)) == {0.0, 2.5} else 0.99
        return whole(call)

    monkeypatch.setattr(scripted, "answer", answer)
    judge(tmp_path, monkeypatch, scripted)
    preferences, rankings = pair(tmp_path)
    assert {round(row.p_chosen, 6) for row in preferences} == {round(sigmoid(1.5), 6)}
    counts = manifest_of(tmp_path / "preferences")["comparisons"]
    assert counts["no label: failed"] == 6
    assert counts["no label: unparsed"] == 6
    assert counts["preferences kept"] == 6
    for ranking in rankings:
        assert ranking.scores[0] is None
        assert sorted(place for group in ranking.ranking for place in group) == [1, 2]


def test_ties_are_kept_as_ties_and_fall_on_either_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_candidates(tmp_path / "candidates.jsonl", {f"p{n}": [1.0, 1.0] for n in range(60)})
    judge(tmp_path, monkeypatch, Scripted("judge"))
    preferences, _ = pair(tmp_path)
    assert len(preferences) == 60
    for row in preferences:
        assert (row.tie, row.p_chosen, row.margin) == (True, 0.5, 0.0)
    firsts = sum("answer 0" in str(row.chosen) for row in preferences)
    assert 15 < firsts < 45
    with pytest.raises(InputError, match="no comparison holds a label"):
        pair(tmp_path, ties="drop")


def test_text_that_is_equal_after_normalisation_is_never_a_pair() -> None:
    same = [
        Completion(completion_id="a", completion="Yes.", model="m"),
        Completion(completion_id="b", completion=" YES. ", model="m"),
    ]
    comparison = Comparison(
        prompt_id="p",
        a="a",
        b="b",
        p=0.9,
        p_orders=[0.9, 0.9],
        consistent=True,
        outcome="decided",
        votes=["v"],
    )
    counts: Counter[str] = Counter()
    assert usable([comparison], {entry.completion_id: entry for entry in same}, {}, counts) == []
    assert counts == {"equal after normalisation": 1}
    row = Candidates(prompt_id="p", prompt="Q", completions=same)
    label = Labelled(same[0], same[1], 0.9, 0.9, False, True, ["v"])
    with pytest.raises(AssertionError, match="chosen equals rejected"):
        preference_rows(row, [label], PairRules(), ranking=None, source={}, counts=counts)


# --- policies ------------------------------------------------------------------------------------


def label(
    first: str, second: str, p: float, *, tie: bool = False, consistent: bool = True
) -> Labelled:
    one, two = (
        Completion(completion_id=n, completion=f"text {n}", model="m") for n in (first, second)
    )
    return Labelled(one, two, p, p, tie, consistent, [f"{first}{second}"])


def rows_of(
    labelled: list[Labelled], ranking: Ranking | None = None, **rules: Any
) -> tuple[list[Preference], Counter[str]]:
    row = Candidates(
        prompt_id="p",
        prompt="Q",
        completions=[Completion(completion_id=n, completion=f"text {n}", model="m") for n in "abc"],
    )
    counts: Counter[str] = Counter()
    rows = preference_rows(
        row, labelled, PairRules(**rules), ranking=ranking, source={"judge": "j"}, counts=counts
    )
    return rows, counts


LABELS = [label("a", "b", 0.9), label("a", "c", 0.52), label("b", "c", 0.1, consistent=False)]


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        ({}, {("a", "b", 0.9), ("a", "c", 0.52), ("c", "b", 0.9)}),
        ({"labels": "hard"}, {("a", "b", 1.0), ("a", "c", 1.0), ("c", "b", 1.0)}),
        ({"near_ties": "drop", "band": 0.05}, {("a", "b", 0.9), ("c", "b", 0.9)}),
        ({"inconsistent": "drop"}, {("a", "b", 0.9), ("a", "c", 0.52)}),
    ],
)
def test_rules(rules: dict[str, Any], kept: set[tuple[str, str, float]]) -> None:
    rows, _ = rows_of(LABELS, **rules)
    found = {(str(row.chosen)[-1], str(row.rejected)[-1], round(row.p_chosen, 9)) for row in rows}
    assert found == kept
    for row in rows:
        assert row.p_raw is not None
        assert row.p_raw >= 0.5


def test_a_near_tie_can_become_a_tie() -> None:
    rows, counts = rows_of(LABELS, near_ties="tie", band=0.05)
    ties = [row for row in rows if row.tie]
    assert [row.p_chosen for row in ties] == [0.5]
    assert counts["ties kept"] == 1


def test_what_is_left_out_is_counted() -> None:
    rows, counts = rows_of(LABELS, near_ties="drop", band=0.05, inconsistent="drop")
    assert len(rows) == 1
    assert counts["near tie"] == 1
    assert counts["orders disagree"] == 1


def test_the_limit_per_prompt_is_drawn_by_seed() -> None:
    seen = set()
    for seed in range(40):
        rows, counts = rows_of(LABELS, most=1, seed=seed)
        assert len(rows) == 1
        assert counts["over the limit per prompt"] == 2
        seen.add(tuple(rows[0].source["completions"]))
    assert len(seen) == 3


def ranking_of(scores: list[float | None]) -> Ranking:
    order = sorted((n for n in range(3) if scores[n] is not None), key=lambda n: -(scores[n] or 0))
    return Ranking(
        prompt="Q",
        completions=["text a", "text b", "text c"],
        scores=scores,
        ranking=[[n] for n in order],
        prompt_id="p",
    )


def test_best_against_worst_and_best_against_rest() -> None:
    ranking = ranking_of([1.0, -1.0, 0.2])
    worst, _ = rows_of(LABELS, ranking, pairs="best-worst")
    assert [tuple(row.source["completions"]) for row in worst] == [("a", "b")]
    rest, _ = rows_of(LABELS, ranking, pairs="best-rest")
    assert {tuple(row.source["completions"]) for row in rest} == {("a", "b"), ("a", "c")}


def test_best_against_worst_takes_what_was_compared() -> None:
    # b is worst, but a and b were never compared: no label is inferred.
    rows, _ = rows_of(LABELS[1:], ranking_of([1.0, -1.0, 0.2]), pairs="best-worst")
    assert [tuple(row.source["completions"]) for row in rows] == [("a", "c")]


@pytest.mark.parametrize(
    "fields", [{"band": 0.5}, {"band": -0.1}, {"near_ties": "drop"}, {"near_ties": "tie"}]
)
def test_senseless_options(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        PairOptions(verdicts=tmp_path, candidates=tmp_path, out=tmp_path, **fields)


# --- what belongs together -----------------------------------------------------------------------


def test_unfinished_verdicts_are_refused(judged: Path) -> None:
    (judged / "verdicts/manifest.json").unlink()
    with pytest.raises(ShardError, match="not finished"):
        pair(judged)
    assert not (judged / "preferences").exists()


def test_verdicts_of_other_prompts_are_refused(judged: Path) -> None:
    write_candidates(judged / "candidates.jsonl", {"p0": [0.0, 1.0, 2.5]})
    with pytest.raises(InputError, match="30 verdicts are about prompts that are not in"):
        pair(judged)
    assert not (judged / "preferences/manifest.json").exists()


def test_other_completions_are_refused(judged: Path) -> None:
    write_candidates(judged / "candidates.jsonl", {name: [0.0, 1.0] for name in VALUES})
    with pytest.raises(InputError, match="has no completion 'p0-2'"):
        pair(judged)


def test_pairing_again_replaces_the_rows(judged: Path) -> None:
    first, _ = pair(judged)
    second, _ = pair(judged, pairs="best-worst")
    assert (len(first), len(second)) == (18, 6)


def test_the_gate_refuses_and_can_be_opened_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A judge that always names the first slot.
    write_candidates(tmp_path / "candidates.jsonl", {f"p{n}": [0.0, 1.0] for n in range(60)})
    judge(tmp_path, monkeypatch, Scripted("judge", p=lambda first, second, call: 0.9, mass=0.99))
    with pytest.raises(GateRefused, match="position_bias") as caught:
        pair(tmp_path, accept_bias=())
    assert not (tmp_path / "preferences").exists()
    names = str(caught.value).split("--accept-bias ")[1].split()
    pair(tmp_path, accept_bias=tuple(names))
    gate = manifest_of(tmp_path / "preferences")["gate"]
    assert gate["status"] == "accepted"
    assert gate["accepted"] == names


# --- calibration ---------------------------------------------------------------------------------


def test_calibration_moves_the_label_and_keeps_the_judges_own(judged: Path) -> None:
    from feedback.calibration import Calibration, save_calibrations

    verdict = next(iter(read_rows(judged / "verdicts", Verdict)))
    calibration = Calibration(
        judge=verdict.judge,
        template=verdict.template,
        template_sha256=verdict.template_sha256,
        method="temperature",
        temperature=2.0,
        **required_fields(Calibration),
    )
    save_calibrations(judged / "calibration.json", [calibration])
    preferences, _ = pair(judged, calibration=judged / "calibration.json")
    for row in preferences:
        gap = float(str(row.chosen).split()[-1]) - float(str(row.rejected).split()[-1])
        assert row.p_chosen == pytest.approx(sigmoid(gap / 2), abs=1e-6)
        assert row.p_raw == pytest.approx(sigmoid(gap), abs=1e-6)
    other = dataclasses.replace(calibration, template_sha256="0" * 64)
    save_calibrations(judged / "other.json", [other])
    with pytest.raises(InputError, match="holds no map for judge"):
        pair(judged, calibration=judged / "other.json")


def required_fields(kind: Any) -> dict[str, Any]:
    """Values for fields of a calibration that this test does not care about."""
    given = {"judge", "template", "template_sha256", "method", "temperature"}
    return {
        entry.name: 0
        for entry in dataclasses.fields(kind)
        if entry.default is dataclasses.MISSING
        and entry.default_factory is dataclasses.MISSING
        and entry.name not in given
    }


# --- the libraries that read the rows ------------------------------------------------------------


def mixed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates of which some prompts are text and some chat messages, judged and paired."""
    write_candidates(folder / "candidates.jsonl", VALUES)
    rows = [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]
    for row in rows[::2]:
        row["prompt"] = [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hello"},
            {"role": "user", "content": row["prompt"]},
        ]
    (folder / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge(folder, monkeypatch, Scripted("judge", mass=0.99))


def load(folder: Path, kind: str, cache: Path) -> Any:
    import datasets

    files = [str(path) for path in sorted((folder / kind).glob(f"{kind}-*.jsonl"))]
    return datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(cache))


def test_mixed_prompts_load_as_conversations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed(tmp_path, monkeypatch)
    preferences, rankings = pair(tmp_path)
    loaded = load(tmp_path, "preferences", tmp_path / "cache")
    assert len(loaded) == len(preferences) == 18
    for row in loaded:
        assert row["chosen"][0]["role"] == row["rejected"][0]["role"] == "assistant"
        assert row["prompt"][-1]["role"] == "user"
        assert 0.5 <= row["p_chosen"] <= 1
    assert len(load(tmp_path, "rankings", tmp_path / "cache")) == len(rankings) == 6
    with pytest.raises(InputError, match="3 prompts are chat messages"):
        pair(tmp_path, prompts="text")


@pytest.mark.parametrize("form", ["text", "messages"])
def test_trl_trains_on_the_rows_unchanged(
    judged: Path, tiny_model: Path, tmp_path: Path, form: str
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    pair(judged, prompts=form)
    rows = load(judged, "preferences", tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    common: dict[str, Any] = {
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "max_length": 128,
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    policy = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before = [p.detach().clone() for p in policy.parameters()]
    dpo = DPOTrainer(
        policy,
        args=DPOConfig(output_dir=str(tmp_path / "dpo"), **common),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    dpo.train()
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    scorer = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, dtype=torch.float32
    )
    reward = RewardTrainer(
        scorer,
        args=RewardConfig(output_dir=str(tmp_path / "reward"), **common),
        train_dataset=rows,
        processing_class=tokenizer,
    )
    reward.train()
    assert reward.state.global_step == 1


def test_no_row_ever_holds_equal_texts(judged: Path) -> None:
    preferences, _ = pair(judged)
    for row in preferences:
        assert normalise_text(str(row.chosen)) != normalise_text(str(row.rejected))
