"""The gate: judged on intervals, refusing by name, accepting by name, recorded in manifests."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from feedback.card import make_card
from feedback.errors import GateRefused, RecipeError
from feedback.gate import GateThresholds, check_gate, judge_card, require_gate
from feedback.records import Candidates, GoldPair, Preference, Prompt, Verdict
from feedback.report import ReportOptions, run
from feedback.shards import ShardWriter
from feedback.simulation import Planted, Simulated, simulate


def leave(simulated: Simulated, out: Path, *, gold: bool = True) -> Path:
    """Write a simulated run as folders; return the verdicts'."""
    with ShardWriter[Candidates](out / "candidates", "candidates") as writer:
        for name, known in simulated.material.prompts.items():
            writer.append(
                Candidates(
                    prompt_id=name,
                    prompt=known.prompt,
                    completions=list(known.completions.values()),
                    meta=known.meta,
                )
            )
        writer.finish({})
    if gold:
        with ShardWriter[GoldPair](out / "gold", "gold") as writer_gold:
            for pair in simulated.gold.values():
                writer_gold.append(pair)
            writer_gold.finish({})
    with ShardWriter[Verdict](out / "verdicts", "verdicts") as writer_verdicts:
        for verdict in simulated.verdicts:
            writer_verdicts.append(verdict)
        writer_verdicts.finish({"orders": "both"}, count=lambda row: row.outcome)
    return out / "verdicts"


SOUND = Planted(sensitivity=3.0, lean=0.1, soft=True)
LEANING = Planted(sensitivity=0.4, position=3.0, soft=True)


def test_a_sound_judge_passes() -> None:
    result = judge_card(make_card([simulate(SOUND, prompts=120).pairs()]), GateThresholds())
    assert result.status == "passed"
    assert {row.name for row in result.rows} >= {
        "evidence.pairs",
        "position_bias.order_consistency",
        "length_bias.excess",
        "agreement.accuracy",
    }
    # With gold the raw length preference is not held against the judge.
    assert "length_bias.prefer_longer" not in {row.name for row in result.rows}


def test_a_judge_that_follows_the_place_is_refused_by_name(tmp_path: Path) -> None:
    verdicts = leave(simulate(LEANING, prompts=80), tmp_path)
    with pytest.raises(GateRefused) as caught:
        check_gate(verdicts)
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "\n" not in message
    assert "position_bias.order_consistency = " in message
    assert "must be at least 0.6" in message
    names = "position_bias.order_consistency position_bias.preference_fairness"
    assert f"--accept-bias {names}" in message


def test_accepting_by_name_is_recorded(tmp_path: Path) -> None:
    verdicts = leave(simulate(LEANING, prompts=80), tmp_path)
    names = ["position_bias.order_consistency", "position_bias.preference_fairness"]
    with pytest.raises(GateRefused, match="preference_fairness") as caught:
        check_gate(verdicts, accept=names[:1])
    assert f"{names[0]} =" not in str(caught.value)
    result = check_gate(verdicts, accept=names)
    record = result.manifest()
    assert record["status"] == "accepted"
    assert record["accepted"] == names
    assert [row["name"] for row in record["failed"]] == names
    assert record["thresholds"]["min_order_consistency"] == 0.6
    # The name of a section accepts all of it.
    assert check_gate(verdicts, accept=["position_bias"]).status == "accepted"


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    verdicts = leave(simulate(SOUND, prompts=40), tmp_path)
    with pytest.raises(RecipeError, match="did you mean 'position_bias'"):
        check_gate(verdicts, accept=["position-bias"])


def test_thresholds_are_held_against_the_interval() -> None:
    """The same value fails, is unclear or passes as its interval lies to the threshold."""
    card = make_card([simulate(SOUND, prompts=60).pairs()])
    figure = next(f for _, f in card.figures() if f.name == "agreement.accuracy")
    low, high = figure.estimate.low, figure.estimate.high
    assert low is not None
    assert high is not None
    states = {}
    for name, limit in (("ok", low - 0.01), ("unclear", (low + high) / 2), ("fail", high + 0.005)):
        result = judge_card(card, GateThresholds(min_accuracy=limit))
        (row,) = [row for row in result.rows if row.name == "agreement.accuracy"]
        states[name] = row.state
    assert states == {"ok": "ok", "unclear": "unclear", "fail": "fail"}
    strict = judge_card(card, GateThresholds(min_accuracy=(low + high) / 2, strict=True))
    assert strict.status == "refused"
    off = judge_card(card, GateThresholds(min_accuracy=None))
    assert "agreement.accuracy" not in {row.name for row in off.rows}


def test_too_little_evidence_is_a_row_of_its_own(tmp_path: Path) -> None:
    verdicts = leave(simulate(SOUND, prompts=3), tmp_path)
    with pytest.raises(GateRefused, match=r"evidence\.pairs = 9\.000.*at least 30"):
        check_gate(verdicts)
    assert check_gate(verdicts, accept=["evidence.pairs"]).status == "accepted"


def test_the_card_beside_the_verdicts_is_used_while_it_is_theirs(tmp_path: Path) -> None:
    """Its recorded thresholds too; a card of other verdicts is computed anew."""
    verdicts = leave(simulate(SOUND, prompts=60), tmp_path)
    run(ReportOptions(verdicts=verdicts, thresholds=GateThresholds(min_pairs=10**6)))
    with pytest.raises(GateRefused, match=r"evidence\.pairs"):
        check_gate(verdicts)
    assert check_gate(verdicts, GateThresholds()).status == "passed"
    with pytest.raises(GateRefused):
        check_gate(tmp_path / "report-card" / "report.json")
    manifest = verdicts / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"orders": "both"', '"orders": "both "'))
    assert check_gate(verdicts).status == "passed"


def preferences(folder: Path, gate: dict[str, object] | None) -> Path:
    row = Preference(prompt="q", chosen="x", rejected="y", margin=0.5, p_chosen=0.75, prompt_id="p")
    with ShardWriter[Preference](folder, "preferences") as writer:
        writer.append(row)
        writer.finish({} if gate is None else {"gate": gate})
    return folder


def test_label_folders_carry_the_gate_with_them(tmp_path: Path) -> None:
    card = make_card([simulate(LEANING, prompts=80).pairs()])
    refused = judge_card(card, GateThresholds()).manifest()
    assert refused["status"] == "refused"
    folder = preferences(tmp_path / "refused", refused)
    with pytest.raises(GateRefused, match=r"position_bias\.order_consistency"):
        require_gate(folder)
    names = [row["name"] for row in refused["failed"]]
    record = require_gate(folder, accept=names)
    assert record is not None
    assert record["accepted"] == sorted(names)
    accepted = judge_card(card, GateThresholds(), accept=names).manifest()
    found = require_gate(preferences(tmp_path / "accepted", accepted))
    assert found is not None
    assert found["status"] == "accepted"
    assert require_gate(preferences(tmp_path / "people", None)) is None


def test_the_gate_is_light_to_import() -> None:
    heavy = "{'numpy', 'scipy', 'matplotlib', 'torch', 'jinja2'}"
    code = f"import sys, feedback.gate; found = {heavy} & set(sys.modules); assert not found, found"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rows_print_what_a_reader_needs() -> None:
    card = make_card([simulate(SOUND, prompts=60).pairs()])
    rows = judge_card(card, GateThresholds()).rows
    text = str(next(row for row in rows if row.name == "agreement.accuracy"))
    assert "n = 180" in text
    assert "must be at least 0.6" in text
    assert dataclasses.asdict(rows[0])["rule"] == "at least 30"


def test_prompt_folders_have_no_gate(tmp_path: Path) -> None:
    with ShardWriter[Prompt](tmp_path / "prompts", "prompts") as writer:
        writer.append(Prompt(prompt_id="p", prompt="q"))
        writer.finish({})
    assert require_gate(tmp_path / "prompts") is None


def test_thresholds_come_from_a_recipe(tmp_path: Path) -> None:
    """[report.thresholds] in TOML; a misspelt key names the nearest."""
    from feedback.config import build_options, load_recipe

    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        '[report]\nverdicts = "v"\n[report.thresholds]\nmin_accuracy = 0.7\nstrict = true\n'
    )
    options = build_options(ReportOptions, load_recipe(recipe)["report"])
    assert options.thresholds == GateThresholds(min_accuracy=0.7, strict=True)
    recipe.write_text('[report]\nverdicts = "v"\n[report.thresholds]\nmin_acuracy = 0.7\n')
    with pytest.raises(RecipeError, match="did you mean 'min_accuracy'"):
        build_options(ReportOptions, load_recipe(recipe)["report"])
