"""Preferences made elsewhere, in each project's true layout, become rows to judge anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted

from feedback import labeling, pairing
from feedback.config import EngineOptions
from feedback.errors import InputError
from feedback.importing import ImportOptions, run
from feedback.labeling import JudgeOptions
from feedback.pairing import PairOptions
from feedback.records import Candidates, GoldPair, Preference, Verdict
from feedback.report_run import card_of_folder
from feedback.shards import read_manifest, read_rows

HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\n\nAssistant: {}"


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


def read(source: Path, form: str, **options: Any) -> Path:
    out = source.parent / "out"
    run(ImportOptions(source=source, format=form, out=out, **options))
    return out


def preferences(out: Path) -> list[Preference]:
    return list(read_rows(out / "preferences", Preference))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "q", "chosen": "good", "rejected": "bad"}, "q"),
        ({"prompt": [user("q")], "chosen": [said("good")], "rejected": [said("bad")]}, [user("q")]),
        # The prompt inside both sides, and beside them as well.
        ({"chosen": [user("q"), said("good")], "rejected": [user("q"), said("bad")]}, [user("q")]),
        (
            {"prompt": "q", "chosen": [user("q"), said("good")], "rejected": [user("q"),
                                                                              said("bad")]},
            [user("q")],
        ),
        ({"prompt": "q", "chosen": [said("good")], "rejected": [said("bad")]}, "q"),
        ({"prompt": [user("q")], "chosen": "good", "rejected": "bad"}, [user("q")]),
    ],
)  # fmt: skip
def test_every_form_of_trl(tmp_path: Path, row: dict[str, Any], prompt: Any) -> None:
    out = read(write(tmp_path / "rows.jsonl", [row]), "trl")
    (made,) = preferences(out)
    assert made.prompt == prompt
    texts = [side if isinstance(side, str) else side[0]["content"] for side in
             (made.chosen, made.rejected)]  # fmt: skip
    assert texts == ["good", "bad"]
    assert (made.p_chosen, made.margin, made.tie) == (1.0, 1.0, False)
    (candidates,) = read_rows(out / "candidates", Candidates)
    (gold,) = read_rows(out / "gold", GoldPair)
    better = {one.completion_id: one.completion for one in candidates.completions}
    assert candidates.prompt == prompt and better[gold.a] == "good" and gold.label == "a"


def test_hh_dialogues(tmp_path: Path) -> None:
    rows = [
        {"chosen": HH.format("Because.\n\nReally."), "rejected": HH.format("No.")},
        {"chosen": HH.format("Same"), "rejected": HH.format("same ")},
        {"chosen": HH.format("Fine."), "rejected": HH.replace("Hi", "Ho").format("Bad.")},
        {"chosen": HH.format(""), "rejected": HH.format("Said.")},
        {"chosen": HH.format("Other."), "rejected": HH.format("No.")},
    ]
    out = read(write(tmp_path / "rows.jsonl", rows), "hh")
    first, last = preferences(out)
    assert first.prompt == [user("Hi"), said("Hello."), user("Why?")]
    assert first.chosen == [said("Because.\n\nReally.")] and last.chosen == [said("Other.")]
    assert first.source == {"imported": "rows.jsonl", "row": 1}
    # Two pairs of one prompt are one row of three candidates.
    (candidates,) = read_rows(out / "candidates", Candidates)
    assert len(candidates.completions) == 3
    assert len(list(read_rows(out / "gold", GoldPair))) == 2


def test_what_is_left_out_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"chosen": HH.format("a"), "rejected": HH.format(other)} for other in ("b", "a", "A ")]
    read(write(tmp_path / "rows.jsonl", rows), "hh")
    assert "left out: 2 pairs that are equal on both sides" in capsys.readouterr().out


def test_scores_and_probabilities_are_kept(tmp_path: Path) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [
        {**row, "score_chosen": 8.0, "score_rejected": 5.5},
        {**row, "prompt": "r", "score_chosen": 5, "score_rejected": 5},
        {**row, "prompt": "s", "p_chosen": 0.7},
    ]
    out = read(write(tmp_path / "rows.jsonl", rows), "trl", model="writer")
    scored, level, soft = preferences(out)
    assert (scored.margin, scored.p_chosen, scored.tie) == (2.5, 1.0, False)
    assert (level.margin, level.p_chosen, level.tie) == (0.0, 0.5, True)
    assert (soft.margin, soft.p_chosen) == (pytest.approx(0.4), 0.7)
    labels = {row.gap: row.label for row in read_rows(out / "gold", GoldPair)}
    assert labels[0.0] == "tie" and labels[2.5] == "a"
    models = {c.model for row in read_rows(out / "candidates", Candidates) for c in row.completions}
    assert models == {"writer"}


FEEDBACK = {
    "source": "evol_instruct",
    "instruction": "Name a prime.",
    "models": ["one", "two"],
    "completions": [
        {
            "model": name,
            "response": f"It is {value}",
            "overall_score": 7.0,
            "custom_system_prompt": "",
            "annotations": {
                "honesty": {"Rating": str(value), "Rationale": "why"},
                "helpfulness": {"Rating": "5" if name != "two" else "N/A", "Rationale": "so",
                                "Rationale For Rating": "because"},
            },
        }
        for name, value in (("one", 5), ("two", 2), ("three", 3))
    ],
}  # fmt: skip


def test_ultrafeedback_ratings_are_verdicts_of_their_judge(tmp_path: Path) -> None:
    out = read(write(tmp_path / "rows.jsonl", [FEEDBACK]), "ultrafeedback")
    (candidates,) = read_rows(out / "candidates", Candidates)
    assert [one.model for one in candidates.completions] == ["one", "two", "three"]
    assert candidates.meta == {"source": "evol_instruct"}
    verdicts = list(read_rows(out / "verdicts", Verdict))
    assert len(verdicts) == 6 and {row.kind for row in verdicts} == {"rating"}
    assert {row.judge.model for row in verdicts} == {"gpt-4"}
    by = {(row.shown[0].partition(":")[0], row.meta["criterion"]): row for row in verdicts}
    assert by["one", "honesty"].scores == [5.0]
    assert by["one", "helpfulness"].rationale == "because"
    assert by["two", "helpfulness"].outcome == "unparsed"
    assert read_manifest(out / "verdicts")["criteria"] == {"helpfulness": 1.0, "honesty": 1.0}
    assert read_manifest(out / "verdicts")["counts"] == {"decided": 5, "unparsed": 1}


def test_ultrafeedback_becomes_preferences_by_rlaif_pair(tmp_path: Path) -> None:
    rows = [{**FEEDBACK, "instruction": f"Name prime {n}."} for n in range(40)]
    out = read(write(tmp_path / "rows.jsonl", rows), "ultrafeedback")
    assert card_of_folder(out / "verdicts").arms[0].pairs
    pairing.run(
        PairOptions(
            verdicts=out / "verdicts",
            candidates=out / "candidates",
            out=out,
            accept_bias=("outcomes", "length_bias"),
        )
    )
    made = preferences(out)
    # Two lacks a rating, so it is compared with nobody; one and three are level in one aspect.
    assert len(made) == 40
    assert made[0].p_chosen == pytest.approx(0.75)
    assert made[0].chosen == "It is 5" and made[0].rejected == "It is 3"


def test_imported_pairs_are_judged_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": f"q{n}", "chosen": "worth 2", "rejected": "worth 1"} for n in range(5)]
    out = read(write(tmp_path / "rows.jsonl", rows), "trl")
    monkeypatch.setattr(labeling, "open_backend", lambda options: Scripted("new", mass=0.99))
    labeling.run(
        JudgeOptions(
            candidates=out / "candidates", out=out / "verdicts", engine=EngineOptions(model="new")
        )
    )
    figures = {figure.name: figure.estimate.value for _, figure in card_of_folder(
        out / "verdicts").figures()}  # fmt: skip
    assert figures["agreement.accuracy"] == 1.0, (
        "gold beside the verdicts is what came with the data"
    )


def saved(tmp_path: Path, how: str) -> tuple[Path, dict[str, Any]]:
    """Write two rows in one of the ways in which data sets lie about."""
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_list(
        [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(2)]
    )
    path = tmp_path / "data"
    if how == "parquet":
        path = tmp_path / "data.parquet"
        rows.to_parquet(path)
    elif how == "save_to_disk":
        rows.save_to_disk(path)
    elif how == "splits on disk":
        DatasetDict({"train": rows.select([0]), "test": rows}).save_to_disk(path)
        return path, {"split": "test"}
    elif how == "folder with a card":
        (path / "pairs").mkdir(parents=True)
        rows.to_parquet(path / "pairs" / "held-0.parquet")
        (path / "README.md").write_text(
            "---\nconfigs:\n- config_name: pairs\n  data_files:\n  - split: held\n"
            "    path: pairs/held-*.parquet\n---\n"
        )
        return path, {"split": "held", "config": "pairs"}
    else:
        path.mkdir()
        rows.to_json(path / "train.jsonl")
    return path, {}


@pytest.mark.parametrize(
    "how", ["parquet", "save_to_disk", "splits on disk", "folder with a card", "folder of json"]
)
def test_data_sets_from_disk(tmp_path: Path, how: str) -> None:
    source, options = saved(tmp_path, how)
    out = read(source, "trl", **options)
    assert [row.prompt for row in preferences(out)] == ["q0", "q1"]


def test_a_split_that_is_not_there_is_named(tmp_path: Path) -> None:
    source, _ = saved(tmp_path, "splits on disk")
    with pytest.raises(InputError, match=r"no split 'tset' \(there are: train, test\)"):
        read(source, "trl", split="tset")


def test_a_name_that_is_neither_here_nor_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a file or folder here, nor read from the Hub"):
        run(ImportOptions(source=Path("nobody/nothing"), format="trl", out=tmp_path / "out"))
    with pytest.raises(InputError, match="no such file or folder, nor user/name"):
        run(ImportOptions(source=tmp_path / "a" / "b", format="trl", out=tmp_path / "out"))


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("trl", {"prompt": "q", "choosen": "a", "rejected": "b"},
         "no column 'chosen'; did you mean 'choosen'"),
        ("trl", {"chosen": "a", "rejected": "b"}, "no column 'prompt' beside the texts"),
        ("trl", {"prompt": "q", "chosen": 1, "rejected": "b"}, "must be text, or lists of"),
        ("trl", {"prompt": "q", "chosen": "a", "rejected": "b", "p_chosen": 0.2}, "outside"),
        ("trl", {"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 1,
                 "score_rejected": 2}, "score_chosen is below"),
        ("hh", {"chosen": "Hello", "rejected": HH.format("x")}, "does not begin with 'Human:'"),
        ("hh", {"chosen": 3, "rejected": HH.format("x")}, "chosen is int, not text"),
        ("ultrafeedback", {"instruction": "q", "completions": [{"response": 1}]}, "needs text in"),
        ("ultrafeedback", {"instruction": "q", "completions": [
            {"response": "r", "annotations": {"honesty": {"Rating": "high"}}}]},
         "rating of 'honesty' is 'high', not a number"),
    ],
)  # fmt: skip
def test_wrong_rows_name_file_and_line(
    tmp_path: Path, form: str, row: dict[str, Any], message: str
) -> None:
    sound = {"prompt": "q", "chosen": "a", "rejected": "b"}
    if form == "hh":
        sound = {"chosen": HH.format("a"), "rejected": HH.format("b")}
    source = write(tmp_path / "rows.jsonl", [FEEDBACK if form == "ultrafeedback" else sound, row])
    with pytest.raises(InputError, match=message) as caught:
        read(source, form)
    assert f"{source}:2: " in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_was_published_comes_back_row_by_row(tmp_path: Path) -> None:
    from datasets import Dataset

    from feedback.dataset_card import CardDetails, dataset_card
    from feedback.publish_schema import features, record_of

    source = [{"prompt": f"q{n}", "chosen": "good", "rejected": "bad"} for n in range(4)]
    out = read(write(tmp_path / "rows.jsonl", source), "trl")
    tree = tmp_path / "tree"
    candidates = list(read_rows(out / "candidates", Candidates))
    rows: dict[str, list[Any]] = {"preferences": preferences(out), "candidates": candidates}
    splits = {"preferences": {"train": 3, "test": 1}, "candidates": {"train": 4}}
    for config, sizes in splits.items():
        start = 0
        for split, size in sizes.items():
            part = rows[config][start : start + size]
            start += size
            (tree / config).mkdir(parents=True, exist_ok=True)
            records = [record_of(row, config, messages=False) for row in part]
            made = Dataset.from_list(records, features=features(config, messages=False))
            made.to_parquet(tree / config / f"{split}-00000.parquet")
    folders = [out / "preferences", out / "candidates"]
    details = CardDetails(license="mit")
    card = dataset_card(folders, repo=None, splits=splits, details=details)
    assert "| imported from | `rows.jsonl`, read as `trl` |" in card
    (tree / "README.md").write_text(card)
    back = tmp_path / "back"
    run(ImportOptions(source=tree, format="published", out=back))
    again = [*read_rows(back / "preferences/train", Preference),
             *read_rows(back / "preferences/test", Preference)]  # fmt: skip
    assert again == rows["preferences"]
    assert list(read_rows(back / "candidates", Candidates)) == rows["candidates"]
    with pytest.raises(InputError, match="already holds rows"):
        run(ImportOptions(source=tree, format="published", out=back))
    with pytest.raises(InputError, match="cannot be read as a published data set"):
        run(ImportOptions(source=tmp_path / "none", format="published", out=tmp_path / "o"))
