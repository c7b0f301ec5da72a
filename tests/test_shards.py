"""Shard folders survive crashes, refuse a second writer, and name file and line of a bad row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feedback.errors import InputError, ShardError
from feedback.records import Prompt, decode, encode
from feedback.shards import ShardWriter, read_jsonl, read_manifest, read_rows


def prompts(count: int) -> list[Prompt]:
    return [Prompt(prompt_id=f"p{number}", prompt=f"Question {number}?") for number in range(count)]


def write(folder: Path, rows: list[Prompt], **options: int) -> None:
    with ShardWriter[Prompt](folder, "prompts", **options) as writer:
        for row in rows:
            writer.append(row)
        writer.finish({"seed": 1}, count=lambda row: row.prompt_id[:1])


def test_round_trip_with_manifest(tmp_path: Path) -> None:
    write(tmp_path / "set", prompts(25), rows_per_shard=10)
    assert list(read_rows(tmp_path / "set", Prompt)) == prompts(25)
    manifest = read_manifest(tmp_path / "set")
    assert [shard["rows"] for shard in manifest["shards"]] == [10, 10, 5]
    assert manifest["counts"] == {"p": 25}
    assert manifest["seed"] == 1


def test_a_torn_last_line_is_cut_off_and_work_goes_on(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with ShardWriter[Prompt](folder, "prompts") as writer:
        for row in prompts(3):
            writer.append(row)
    shard = folder / "prompts-00000.jsonl"
    shard.write_bytes(shard.read_bytes() + b'{"prompt_id": "p3", "pro')
    with ShardWriter[Prompt](folder, "prompts") as writer:
        assert [row.prompt_id for row in writer.existing()] == ["p0", "p1", "p2"]
        writer.append(prompts(4)[3])
        writer.finish({})
    assert list(read_rows(folder, Prompt)) == prompts(4)


def test_second_writer_is_refused(tmp_path: Path) -> None:
    first = ShardWriter[Prompt](tmp_path / "set", "prompts")
    with pytest.raises(ShardError, match="another run is writing"):
        ShardWriter[Prompt](tmp_path / "set", "prompts")
    first.close()
    ShardWriter[Prompt](tmp_path / "set", "prompts").close()


def test_unfinished_folder_has_no_manifest(tmp_path: Path) -> None:
    write(tmp_path / "set", prompts(2))
    ShardWriter[Prompt](tmp_path / "set", "prompts").close()
    with pytest.raises(ShardError, match="has not finished"):
        read_manifest(tmp_path / "set")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt_id": "a", "prompt": ', "truncated"),
        ('{"prompt_id": "a"}', "prompt"),
        ('{"prompt_id": 7, "prompt": "x"}', "prompt_id"),
    ],
)
def test_bad_line_names_file_and_line(tmp_path: Path, line: str, reason: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt_id": "ok", "prompt": "fine"}) + "\n" + line + "\n")
    with pytest.raises(InputError, match=reason) as caught:
        list(read_jsonl(path, Prompt))
    assert f"{path}:2:" in str(caught.value)


def test_folder_of_another_kind_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "set", prompts(1))
    with pytest.raises(ShardError, match="holds prompts, not verdicts"):
        ShardWriter(tmp_path / "set", "verdicts")


def test_messages_survive_the_round_trip() -> None:
    row = Prompt(prompt_id="m", prompt=[{"role": "user", "content": "line\u2028break \x1b[31m"}])
    assert decode(encode(row), Prompt) == row
    assert b"\n" not in encode(row)
