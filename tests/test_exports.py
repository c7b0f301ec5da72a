"""Exports are read back by their readers, and what a form cannot hold is counted."""

from __future__ import annotations

import importlib.util
import json
import warnings
from dataclasses import replace
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


def test_argilla_reads_its_own_records(preferences: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        # argilla 2.8 has class-based pydantic settings.
        warnings.simplefilter("ignore", DeprecationWarning)
        import argilla

    path, counts = export(
        ExportOptions(preferences=preferences, out=tmp_path / "out", form="argilla")
    )
    assert counts == {"written": 6}
    for row, line in zip(ROWS, path.read_text().splitlines(), strict=True):
        # The schema that the server is sent; both refuse fields that they do not know.
        record = argilla.Record.from_dict(json.loads(line)).api_model()
        turns = [{"role": turn.role, "content": turn.content} for turn in record.fields["prompt"]]
        assert turns == row.prompt
        (suggestion,) = record.suggestions
        assert suggestion.value in ("response_1", "response_2", "tie")
        assert (suggestion.score, suggestion.agent) == (row.p_chosen, "some-judge")
        assert {entry.name for entry in record.metadata} == {"prompt_id", "p_chosen", "weight"}


@pytest.fixture(scope="module")
def export_readers(root: Path) -> Any:
    """The benchmark that installs the other trainers and lets them read."""
    path = root / "benchmarks" / "export_readers.py"
    spec = importlib.util.spec_from_file_location("export_readers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("reader", ["openrlhf", "llamafactory", "axolotl"])
def test_other_trainers_read_theirs(reader: str, tmp_path: Path, export_readers: Any) -> None:
    """benchmarks/export_readers.py does the same on any machine, and keeps the result."""
    reason = f"{reader} pins other releases than ours; benchmarks/export_readers.py installs it"
    pytest.importorskip(reader, reason=reason)
    folder = export_readers.write_exports(tmp_path, export_readers.PEERS[reader].form)
    read = export_readers.READERS[reader](folder)
    assert len(read) == len(export_readers.sample_rows())
    assert all(map(export_readers.same, export_readers.sample_rows(), read))


def test_the_comparison_of_reader_and_rows_can_fail(export_readers: Any) -> None:
    row, same, read = export_readers.sample_rows()[0], export_readers.same, export_readers.Read
    sound = read("user: Question 0?", "A good answer, 0.\nEnd<eos>", "No <b>0</b>")
    assert same(row, sound)
    assert not same(row, sound._replace(prompt="user: Question"))
    assert not same(row, read(sound.prompt, sound.rejected, sound.chosen))


def test_margins_for_openrlhf(preferences: Path, tmp_path: Path) -> None:
    options = ExportOptions(preferences=preferences, out=tmp_path, form="openrlhf", margin=True)
    assert load(export(options)[0])[0]["margin"] == 0.6


def write(folder: Path, rows: list[Preference]) -> Path:
    with ShardWriter[Preference](folder, "preferences") as writer:
        for row in rows:
            writer.append(row)
        writer.finish({})
    return folder


def test_rows_that_another_loader_would_skip_are_refused(tmp_path: Path) -> None:
    """LLaMA-Factory leaves out, with a warning, rows whose turns do not alternate."""
    twice = replace(ROWS[0], prompt=[{"role": "user", "content": text} for text in "ab"])
    source = write(tmp_path / "p", [replace(twice, prompt_id="odd", prompt=twice.prompt * 2)])
    options = ExportOptions(preferences=source, out=tmp_path / "out", form="llama-factory")
    with pytest.raises(InputError, match="'odd' user and assistant do not take turns"):
        export(options)
    assert not list((tmp_path / "out").iterdir()), "half a file was left behind"


@pytest.mark.parametrize("file", ["jsonl", "parquet"])
def test_text_and_messages_do_not_share_a_column(tmp_path: Path, file: Any) -> None:
    text = replace(ROWS[0], prompt="q", chosen="a", rejected="b", prompt_id="plain")
    source = write(tmp_path / "p", [ROWS[1], text])
    with pytest.raises(InputError, match="'plain' is text while others are messages"):
        export(ExportOptions(preferences=source, out=tmp_path / "out", file=file))
    with pytest.raises(InputError, match="no row is left"):
        export(ExportOptions(preferences=source, out=tmp_path / "out", file=file, min_p=1.0))


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
