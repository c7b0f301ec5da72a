"""What leaves and what does not: gate, terms, scan, evaluation sets, splits; and the same twice."""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from published_rows import PLAIN, ROWS

from feedback.errors import GateRefused, InputError, RecipeError, ShardError
from feedback.merge import MergeOptions, merge, split_of
from feedback.publish import PublishOptions, publish
from feedback.publish_manifest import public_manifest
from feedback.publish_scan import rewrite, texts_of
from feedback.records import Preference
from feedback.shards import ShardWriter
from train.cli import main

# Put together at run time, so that no scanner takes this file for a leak.
KEY = "hf_" + "AbCdEfGh" * 4 + "Xy"
GATE = {
    "status": "refused",
    "accepted": [],
    "failed": [
        {
            "name": "position_bias.order_consistency", "arm": "judge", "state": "fail",
            "value": 0.4, "low": 0.3, "high": 0.5, "n": 90, "rule": "at least 0.6",
        }
    ],
}  # fmt: skip


def pair(number: int, **changes: Any) -> Preference:
    return replace(PLAIN, **{"prompt": f"Ask {number}.", "prompt_id": f"p{number}", **changes})


def shards(folder: Path, rows: list[Any], kind: str = "preferences", **info: object) -> Path:
    with ShardWriter[Any](folder, kind) as writer:
        for row in rows:
            writer.append(row)
        writer.finish(info)
    return folder


def to(tmp_path: Path, *folders: Path, **more: Any) -> Path:
    """Publish to a folder and return it."""
    out: Path = more.setdefault("to", None if "repo" in more else tmp_path / "out")
    publish(PublishOptions(folders=folders, **{"license": "mit", **more}))
    return out


def loaded(out: Path, config: str = "preferences") -> dict[str, list[dict[str, Any]]]:
    from datasets import load_dataset

    found = load_dataset(str(out), config, cache_dir=str(out.parent / "cache"))
    return {name: list(split) for name, split in found.items()}


def manifest(out: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    return read


def test_a_prompt_is_in_one_split_in_every_config(tmp_path: Path) -> None:
    pairs = [replace(PLAIN, prompt_id=f"p{n // 3}", chosen=f"good {n}") for n in range(120)]
    lists = [replace(ROWS["rankings"][1], prompt_id=f"p{n}") for n in range(40)]
    shards(tmp_path / "run" / "preferences", pairs)
    shards(tmp_path / "run" / "rankings", lists, "rankings")
    out = to(tmp_path, tmp_path / "run", splits={"train": 0.5, "test": 0.5})
    found = loaded(out)
    assert sum(map(len, found.values())) == 120 and len(found) == 2
    ids = {name: {row["prompt_id"] for row in rows} for name, rows in found.items()}
    assert not ids["train"] & ids["test"]
    for name, rows in loaded(out, "rankings").items():
        assert {row["prompt_id"] for row in rows} == ids[name]
    assert manifest(out)["rows"]["preferences"] == {n: len(rows) for n, rows in found.items()}


def test_only_labels_leave_unless_others_are_named(tmp_path: Path) -> None:
    for kind, rows in ROWS.items():
        shards(tmp_path / "run" / kind, rows, kind)
    (tmp_path / "run" / "notes.jsonl").write_text("{}\n", encoding="utf-8")
    out = to(tmp_path, tmp_path / "run")
    assert sorted(manifest(out)["rows"]) == ["preferences", "rankings"]
    named = to(tmp_path, tmp_path / "run" / "candidates", to=tmp_path / "named")
    assert list(manifest(named)["rows"]) == ["candidates"]
    (row,) = loaded(named, "candidates")["train"]
    assert row["completions"][0]["sampling"] == {"temperature": 1.0, "stop": ["\n"]}


def test_merged_splits_are_kept(tmp_path: Path) -> None:
    source = shards(tmp_path / "one", [pair(n) for n in range(60)])
    shares = {"train": 0.6, "held-out": 0.4}
    merge(MergeOptions(sources=(source,), out=tmp_path / "merged", splits=shares))
    out = to(tmp_path, tmp_path / "merged")
    found = loaded_splits(out)
    assert found == {f"p{n}": split_of(f"p{n}", shares) for n in range(60)}


def loaded_splits(out: Path) -> dict[str, str]:
    from pyarrow import parquet

    return {
        prompt_id: path.name[: -len("-00000.parquet")]
        for path in sorted((out / "preferences").glob("*.parquet"))
        for prompt_id in parquet.read_table(path, columns=["prompt_id"])["prompt_id"].to_pylist()
    }


def test_the_same_twice_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shards(tmp_path / "preferences", [pair(n) for n in range(5)])
    out = to(tmp_path, source)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    to(tmp_path, source)
    assert "nothing has changed" in capsys.readouterr().out
    after = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert {path for path in after if after[path] != before[path]} <= {out / ".lock"}


def test_a_damaged_or_unfinished_folder_is_written_again(tmp_path: Path) -> None:
    source = shards(tmp_path / "preferences", [pair(n) for n in range(5)])
    out = to(tmp_path, source)
    (path,) = (out / "preferences").glob("*.parquet")
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    to(tmp_path, source)
    assert path.read_bytes() == whole
    (out / "manifest.json").unlink()
    path.unlink()
    (path.parent / ".train-00000.parquet.tmp").write_bytes(b"torn")
    (path.parent / "train-00001.parquet").write_bytes(whole)  # of a larger version, cut off
    to(tmp_path, source)
    assert path.read_bytes() == whole
    assert [one.name for one in path.parent.iterdir()] == [path.name]


def test_a_later_version_replaces_the_files_of_the_last(tmp_path: Path) -> None:
    both = shards(tmp_path / "run" / "preferences", [pair(1)])
    shards(tmp_path / "run" / "rankings", ROWS["rankings"], "rankings")
    out = to(tmp_path, tmp_path / "run")
    assert (out / "rankings").is_dir()
    to(tmp_path, both)
    assert not list((out / "rankings").glob("*"))
    assert sorted(path.name for path in (out / "manifests").iterdir()) == ["preferences.json"]


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(InputError, match="holds other files"):
        to(tmp_path, shards(tmp_path / "preferences", [pair(1)]))


LEAKS = {
    "secret": f"my token is {KEY}",
    "email": "write to jane@example.org",
    "phone": "call (415) 555-2671",
    "iban": "pay DE89 3704 0044 0532 0130 00",
    "card": "use 4111 1111 1111 1111",
    "path": "see /home/jane/notes.txt",
    "endpoint": "at https://user:hunter2@db.example.org/x",
}


@pytest.mark.parametrize("kind", LEAKS)
def test_what_must_not_leave_stops_is_allowed_or_goes(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = LEAKS[kind]
    source = shards(tmp_path / "preferences", [pair(1), pair(2, chosen=f"Sure: {text}, done.")])
    with pytest.raises(InputError, match=f"{kind} .*--redact True.*--allow") as caught:
        to(tmp_path, source)
    seen = capsys.readouterr().out
    assert f"{kind}: 1 in 1 rows (p2 chosen: " in seen
    assert text.split()[-1] not in seen + str(caught.value)
    out = to(tmp_path, source, redact=True)
    texts = [row["chosen"] for rows in loaded(out).values() for row in rows]
    assert f"[{kind.upper()}]" in " ".join(texts)
    kept = to(tmp_path, source, allow=(kind,), to=tmp_path / "kept")
    assert text in " ".join(row["chosen"] for rows in loaded(kept).values() for row in rows)
    with pytest.raises(InputError, match="nothing was published"):
        to(tmp_path, source, to=tmp_path / "kept")


def test_what_redaction_makes_equal_is_left_out(tmp_path: Path) -> None:
    row = pair(1, chosen="ask ann@example.org", rejected="ask bob@example.org")
    source = shards(tmp_path / "preferences", [row, pair(2)])
    out = to(tmp_path, source, redact=True)
    assert manifest(out)["left_out"] == {"pairs left out that redaction made equal": 1}
    assert sum(manifest(out)["rows"]["preferences"].values()) == 1


def test_prompts_of_evaluation_sets_stop_or_are_left_out(tmp_path: Path) -> None:
    words = "describe in a few words how a heat pump warms a house when it is freezing outside"
    known = tmp_path / "my-bench.jsonl"
    known.write_text(json.dumps({"prompt": f"{words}?"}) + "\n", encoding="utf-8")
    rows = [pair(1), pair(2, prompt=f"{words.upper()}!"), pair(3, prompt=f"So, {words}, please.")]
    source = shards(tmp_path / "preferences", rows)
    with pytest.raises(InputError, match=r"evaluation \(2\)"):
        to(tmp_path, source, eval_set=(known,))
    out = to(tmp_path, source, eval_set=(known,), redact=True)
    assert [row["prompt_id"] for rows in loaded(out).values() for row in rows] == ["p1"]
    assert manifest(out)["overlap"] == {"my-bench": 2}
    kept = to(tmp_path, source, eval_set=(known,), allow=("evaluation",), to=tmp_path / "kept")
    assert sum(manifest(kept)["rows"]["preferences"].values()) == 3
    with pytest.raises(InputError, match="no such evaluation set"):
        to(tmp_path, source, eval_set=(tmp_path / "none.jsonl",))


def test_the_gate_applies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = shards(tmp_path / "preferences", [pair(1)], gate=GATE)
    out = ["--to", str(tmp_path / "out"), "--license", "mit"]
    assert main(["publish", str(source), *out]) == 4
    assert "position_bias.order_consistency" in capsys.readouterr().err
    with pytest.raises(GateRefused):
        to(tmp_path, source, accept_bias=("length_bias",))
    to(tmp_path, source, accept_bias=("position_bias",))


@pytest.mark.parametrize(
    ("endpoint", "hosted"),
    [
        ("api.openai.com", True),
        ("https://api.example.com:8443/v1", True),
        ("8.8.8.8:8000", True),
        ("localhost:8000", False),
        ("127.0.0.1:8000", False),
        ("10.1.2.3", False),
        ("[::1]:8000", False),
        ("judge", False),
        ("gpu7.local", False),
        (None, False),
    ],
)
def test_a_hosted_judge_needs_its_terms(endpoint: str | None, hosted: bool, tmp_path: Path) -> None:
    judge = {"model": "big-judge", "revision": None, "endpoint": endpoint}
    judging = {"judge": judge, "manifest_sha256": "0" * 64, "template": {"name": "pairwise"}}
    panel = {"judges": [{"model": "small-judge"}, judge]}
    recorded = {"provenance": {"judging": judging}, "sources": None, **({} if hosted else panel)}
    source = shards(tmp_path / "preferences", [pair(1)], **recorded)
    merged = {"sources": [{"folder": "x", "manifest_sha256": "0" * 64, **panel}]}
    with pytest.raises(InputError) if hosted else contextlib.nullcontext():
        to(tmp_path, shards(tmp_path / "merged", [pair(1)], **merged), to=tmp_path / "merged-out")
    if not hosted:
        to(tmp_path, source)
        return
    with pytest.raises(InputError, match=r"big-judge was asked at .*--judge-terms"):
        to(tmp_path, source)
    out = to(tmp_path, source, judge_terms="No training of competing models.")
    assert "No training of competing models." in (out / "README.md").read_text(encoding="utf-8")


def test_nothing_of_this_machine_is_in_the_manifests(tmp_path: Path) -> None:
    recipe = {"out": "/work/x/preferences", "win": "C:\\Users\\ann\\x", "note": f"token {KEY}"}
    source = shards(tmp_path / "preferences", [pair(1)], recipe=recipe, models=["org/model"])
    out = to(tmp_path, source)
    text = (out / "manifests" / "preferences.json").read_text(encoding="utf-8")
    assert json.loads(text)["recipe"] == {
        "out": "preferences",
        "win": "x",
        "note": "token [SECRET]",
    }
    assert json.loads(text)["models"] == ["org/model"]
    everything = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert KEY.encode() not in everything
    assert str(tmp_path).encode() not in everything
    assert public_manifest({"a": 1, "b": None}) == {"a": 1, "b": None}


def test_folders_that_cannot_be_published_together(tmp_path: Path) -> None:
    one, two = (shards(tmp_path / name, [pair(1)]) for name in ("one", "two"))
    with pytest.raises(ShardError, match="join them with rlaif merge"):
        to(tmp_path, one, two)
    with pytest.raises(ShardError, match="no such folder"):
        to(tmp_path, tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ShardError, match="holds no preferences or rankings"):
        to(tmp_path, tmp_path / "empty")
    with pytest.raises(RecipeError, match="either --repo NAME"):
        to(tmp_path, one, repo="also/this", to=tmp_path)
    with pytest.raises(RecipeError, match="--license"):
        to(tmp_path, one, license=None)
    with pytest.raises(RecipeError, match=r"sum to 0\.5"):
        PublishOptions(folders=(one,), splits={"train": 0.5})


@pytest.mark.parametrize("kind", ROWS)
@given(st.data())
def test_every_text_is_scanned_and_can_be_replaced(kind: str, data: st.DataObject) -> None:
    row = data.draw(st.sampled_from(ROWS[kind]))
    seen = [text for _, text in texts_of(row)]
    changed = rewrite(row, lambda name, text: f"<{text}>")
    assert [text for _, text in texts_of(changed)] == [f"<{text}>" for text in seen]
    assert rewrite(row, lambda name, text: text) == row
