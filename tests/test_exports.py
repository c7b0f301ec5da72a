"""Exports are read back by their readers, and what a form cannot hold is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from feedback.errors import InputError
from feedback.exports import ExportOptions, argilla_record, export
from feedback.records import Preference
from feedback.shards import ShardWriter

ROWS = [
    Preference(
        prompt=[
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": f"Question {number}?"},
        ],
        chosen=[{"role": "assistant", "content": f"good {number}"}],
        rejected=[{"role": "assistant", "content": f"bad {number}"}],
        margin=0.6,
        p_chosen=0.5 if number == 3 else 0.8,
        tie=number == 3,
        prompt_id=f"p{number}",
        source={"judge": "some-judge"},
    )
    for number in range(6)
]


@pytest.fixture
def preferences(tmp_path: Path) -> Path:
    with ShardWriter[Preference](tmp_path / "preferences", "preferences") as writer:
        for row in ROWS:
            writer.append(row)
        writer.finish({})
    return tmp_path / "preferences"


def load(path: Path, form: str = "json") -> Any:
    from datasets import load_dataset

    return load_dataset(form, data_files=str(path), cache_dir=str(path.parent / "cache"))["train"]


@pytest.mark.parametrize("file", ["jsonl", "parquet"])
def test_trl_reads_its_own_form(preferences: Path, tmp_path: Path, file: Any) -> None:
    from trl.data_utils import is_conversational

    options = ExportOptions(preferences=preferences, out=tmp_path / "out", file=file, margin=True)
    path, counts = export(options)
    loaded = load(path, "parquet" if file == "parquet" else "json")
    assert loaded.column_names == ["prompt", "chosen", "rejected", "margin"]
    assert is_conversational(loaded[0])
    assert counts == {"written": 5, "ties left out": 1, "soft labels written as hard ones": 5,
                      "weights lost": 0}  # fmt: skip


def test_llama_factory_form_and_entry(preferences: Path, tmp_path: Path) -> None:
    options = ExportOptions(preferences=preferences, out=tmp_path / "out", form="llama-factory")
    path, _ = export(options)
    row = load(path)[0]
    entry = json.loads((path.parent / "dataset_info.json").read_text())["preferences"]
    assert (path.parent / entry["file_name"]).is_file() and entry["ranking"]
    assert set(entry["columns"].values()) == set(row)
    assert row["conversations"] == [{"from": "human", "value": "Question 0?"}]
    assert row["chosen"] == {"from": "gpt", "value": "good 0"}
    assert row["system"] == "Be brief."


def test_a_second_set_keeps_the_first_entry(preferences: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        export(
            ExportOptions(
                preferences=preferences, out=tmp_path / "out", form="llama-factory", name=name
            )
        )
    entries = json.loads((tmp_path / "out" / "dataset_info.json").read_text())
    assert list(entries) == ["one", "two"]


def test_openrlhf_and_axolotl_forms(preferences: Path, tmp_path: Path) -> None:
    path, _ = export(ExportOptions(preferences=preferences, out=tmp_path / "o", form="openrlhf"))
    row = load(path)[0]
    assert [turn["role"] for turn in row["prompt"] + row["chosen"]] == [
        "system", "user", "assistant"
    ]  # fmt: skip
    path, _ = export(ExportOptions(preferences=preferences, out=tmp_path / "a", form="axolotl"))
    assert load(path)[0]["chosen"] == {"role": "assistant", "content": "good 0"}
    import yaml

    config = yaml.safe_load((tmp_path / "a" / "preferences.axolotl.yaml").read_text())
    fields = config["datasets"][0]
    assert {fields["field_messages"], fields["field_chosen"], fields["field_rejected"]} == set(
        load(path).column_names
    )


def test_argilla_records_hide_the_label_in_the_order() -> None:
    records = [argilla_record(row) for row in ROWS]
    assert len({record["id"] for record in records}) == len(ROWS)
    values = [record["suggestions"]["preference"]["value"] for record in records]
    assert values[3] == "tie"
    assert {"response_1", "response_2"} <= set(values)
    for row, record, value in zip(ROWS, records, values, strict=True):
        if value != "tie":
            chosen = row.chosen[0]["content"]  # type: ignore[index]
            assert record["fields"][value] == chosen


def test_what_a_form_cannot_hold_is_an_error(preferences: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="parquet is for form 'trl'"):
        export(
            ExportOptions(
                preferences=preferences, out=tmp_path / "out", form="axolotl", file="parquet"
            )
        )
    with ShardWriter[Preference](tmp_path / "odd", "preferences") as writer:
        said = {"role": "assistant", "content": "said"}
        writer.append(
            Preference(
                prompt=[said],  # type: ignore[list-item]
                chosen="a",
                rejected="b",
                margin=0.1,
                p_chosen=0.55,
                prompt_id="odd",
            )
        )
        writer.finish({})
    with pytest.raises(InputError, match="'odd' does not end with a user turn"):
        export(
            ExportOptions(preferences=tmp_path / "odd", out=tmp_path / "x", form="llama-factory")
        )
