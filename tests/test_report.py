"""The report end to end: from folders to JSON, page and table, and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from judged import verdict
from test_gate import leave

from feedback.card import make_card, read_card
from feedback.errors import InputError
from feedback.figures import plain
from feedback.observations import collect
from feedback.records import JudgeIdentity
from feedback.report import ReportOptions, run
from feedback.report_run import card_of_folder, print_card, read_evidence
from feedback.simulation import Planted, simulate

PLANTED = Planted(position=0.4, length=0.5, soft=True, votes=3, tie=-2.0, unparsed=0.05)


def test_report_writes_card_page_and_viewer_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts = leave(simulate(PLANTED, prompts=60), tmp_path)
    run(ReportOptions(verdicts=verdicts, replicates=200))
    out = tmp_path / "report-card"
    card = json.loads((out / "report.json").read_text())
    assert card["kind"] == "report_card"
    assert card["gate"]["status"] in ("passed", "refused")
    (arm,) = card["arms"]
    names = [section["name"] for section in arm["sections"]]
    assert names == [
        "outcomes",
        "agreement",
        "position_bias",
        "length_bias",
        "format_bias",
        "self_preference",
        "stability",
        "slices",
    ]
    assert [section["name"] for section in card["across"]] == ["mitigation"]
    for section in arm["sections"]:
        for figure in section["figures"]:
            estimate = figure["estimate"]
            assert figure["meaning"]
            assert estimate["n"] > 0 or estimate["value"] is None, figure["name"]
            if estimate["low"] is None:
                assert estimate["value"] is None or "no interval" in estimate["method"]
            else:
                assert estimate["low"] <= estimate["value"] <= estimate["high"], figure["name"]
    assert (out / "report.html").stat().st_size > 50_000
    assert json.loads((out / "llm-comparator.json").read_text())["examples"]
    printed = capsys.readouterr().out
    assert "Same verdict in both orders" in printed
    assert "gate: " in printed
    assert f"report card: {out / 'report.html'}" in printed


def test_a_card_survives_the_journey_through_json(tmp_path: Path) -> None:
    simulated = simulate(PLANTED, prompts=40)
    card = make_card([simulated.pairs()], source={"verdicts": ["x"]}, replicates=200)
    path = tmp_path / "report.json"
    path.write_text(json.dumps({**card.to_dict(), "gate": {}}), encoding="utf-8")
    assert plain(read_card(path).to_dict()) == plain(card.to_dict())


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "report_card", "card_version": 99}', "{}"])
def test_damaged_cards_are_one_clear_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(InputError, match="not a report card"):
        read_card(path)


def test_missing_folders_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        run(ReportOptions(verdicts=tmp_path / "none"))
    with pytest.raises(InputError, match="no verdicts to report on"):
        make_card([])


def test_several_judges_and_templates_are_arms_of_one_card(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = []
    for judge in ("j1", "j2"):
        for template in ("letters", "numbers"):
            for number in range(8):
                for shown in (("x", "y"), ("y", "x")):
                    said = "1" if shown[0] == "x" or (template == "numbers" and number < 2) else "2"
                    rows.append(
                        verdict(f"p{number}", shown, said, template=template,
                                judge=JudgeIdentity(model=judge))
                    )  # fmt: skip
    card = make_card(collect(rows), replicates=100)
    assert [arm.name for arm in card.arms] == [
        "j1 · letters",
        "j1 · numbers",
        "j2 · letters",
        "j2 · numbers",
    ]
    schemes = [section for section in card.across if section.name == "scheme"]
    assert len(schemes) == 1
    flips = {
        figure.name: figure.estimate.value
        for figure in schemes[0].figures
        if figure.name.startswith("scheme.flips")
    }
    assert flips == {
        "scheme.flips:j1:letters:numbers": pytest.approx(2 / 16),
        "scheme.flips:j2:letters:numbers": pytest.approx(2 / 16),
    }
    from feedback.gate import GateThresholds, judge_card

    print_card(card, judge_card(card, GateThresholds(min_pairs=1)))
    assert "Further measurements" in capsys.readouterr().out


def test_failed_calls_that_were_asked_again_count_once() -> None:
    first = verdict("p", ("x", "y"), "!")
    (pairs,) = collect([first, verdict("p", ("x", "y"), "1"), verdict("p", ("y", "x"), "!")])
    assert pairs.outcomes == {"decided": 1, "failed": 1}
    (again,) = collect([verdict("p", ("x", "y"), "1"), first])
    assert again.outcomes == {"decided": 1}


def test_slices_by_name(tmp_path: Path) -> None:
    verdicts = leave(simulate(PLANTED, prompts=24), tmp_path)
    evidence = read_evidence([verdicts])
    card = make_card(evidence.arms, slices=["topic"], replicates=100)
    (table,) = next(part for part in card.arms[0].sections if part.name == "slices").tables
    assert [row[0] for row in table.rows] == ["topic 0", "topic 1", "topic 2", "topic 3"]
    assert sum(row[1] for row in table.rows) == 72
    with pytest.raises(InputError, match="no row has a meta field 'topics'; did you mean 'topic'"):
        make_card(evidence.arms, slices=["topics"])


def test_rows_to_look_at_first_are_the_contested_ones() -> None:
    simulated = simulate(Planted(position=1.0, soft=True, noise=1.0), prompts=50, seed=2)
    card = make_card([simulated.pairs()], replicates=100)
    bits = [row["entropy"] for row in card.arms[0].look_first]
    assert bits == sorted(bits, reverse=True)
    assert bits[0] == 1.0
    assert card.arms[0].look_first[0]["p_orders"][0] is not None


def test_gold_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    verdicts = leave(simulate(PLANTED, prompts=5), tmp_path)
    gold = tmp_path / "gold.jsonl"
    row = {"prompt_id": "prompt-00000", "a": "x", "b": "y", "label": "a"}
    swapped = {"prompt_id": "prompt-00000", "a": "y", "b": "x", "label": "a"}
    gold.write_text("\n".join(json.dumps(line) for line in (row, swapped)))
    with pytest.raises(InputError, match="two different labels"):
        card_of_folder(verdicts, gold=gold)
    gold.write_text(json.dumps(row) + "\n" + json.dumps(swapped | {"label": "b"}))
    card_of_folder(verdicts, gold=gold)


def test_a_report_without_texts_says_what_it_cannot_say(tmp_path: Path) -> None:
    simulated = simulate(PLANTED, prompts=20)
    card = make_card(collect(simulated.verdicts), replicates=100)
    notes = {section.name: section.notes for section in card.arms[0].sections}
    assert "--candidates" in notes["length_bias"][0]
    assert "--candidates" in notes["self_preference"][0]
