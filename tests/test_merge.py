"""Merging keeps every vote and splits by prompt; comparing versions names what changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from feedback.errors import RecipeError, ShardError
from feedback.merge import MergeOptions, merge, split_of
from feedback.records import Candidates, Completion, Preference
from feedback.shards import ShardWriter, read_manifest, read_rows
from feedback.versions import compare_versions


def row(number: int, p: float = 0.8, **changes: object) -> Preference:
    base = Preference(
        prompt=f"Question {number}?",
        chosen=f"good {number}",
        rejected=f"bad {number}",
        margin=2 * p - 1,
        p_chosen=p,
        prompt_id=f"p{number}",
        source={"judge": "one"},
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def flipped(number: int, p: float) -> Preference:
    return row(
        number, p, chosen=f"bad {number}", rejected=f"good {number}", source={"judge": "two"}
    )


def write(folder: Path, rows: list[Preference], **info: object) -> Path:
    with ShardWriter[Preference](folder, "preferences") as writer:
        for one in rows:
            writer.append(one)
        writer.finish(info)
    return folder


def test_duplicates_go_and_conflicts_become_votes(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [row(1), row(2), row(3)])
    two = write(tmp_path / "two", [row(2), flipped(3, 0.9), row(4)])
    counts = merge(MergeOptions(sources=(one, two), out=tmp_path / "all"))
    merged = list(read_rows(tmp_path / "all", Preference))
    assert [one.prompt_id for one in merged] == ["p1", "p2", "p3", "p4"]
    assert counts["duplicates"] == 2
    assert counts["conflicts, kept as votes"] == 1
    conflict = merged[2]
    # 0.8 for good and 0.9 for bad: P(bad) = (0.2 + 0.9) / 2 = 0.55.
    assert (conflict.chosen, conflict.p_chosen) == ("bad 3", pytest.approx(0.55))
    assert conflict.margin == pytest.approx(0.1)
    assert [vote["judge"] for vote in conflict.source["votes"]] == ["one", "two"]
    assert merged[1] == row(2)


def test_manifest_names_every_source(tmp_path: Path) -> None:
    gates = [{"status": "passed", "accepted": []}, {"status": "accepted", "accepted": ["length"]}]
    folders = [
        write(tmp_path / str(number), [row(number)], gate=gate, judge={"model": "j"})
        for number, gate in enumerate(gates)
    ]
    merge(MergeOptions(sources=tuple(folders), out=tmp_path / "all"))
    manifest = read_manifest(tmp_path / "all")
    assert [source["rows"] for source in manifest["sources"]] == [1, 1]
    assert manifest["gate"]["accepted"] == ["length"]
    assert manifest["gate"]["status"] == "accepted"


def test_splits_are_by_prompt_and_stable(tmp_path: Path) -> None:
    rows = [row(number, chosen=f"good {k}") for number in range(200) for k in range(3)]
    source = write(tmp_path / "one", rows)
    splits = {"train": 0.8, "test": 0.2}
    merge(MergeOptions(sources=(source,), out=tmp_path / "all", splits=splits))
    train = {one.prompt_id for one in read_rows(tmp_path / "all" / "train", Preference)}
    test = {one.prompt_id for one in read_rows(tmp_path / "all" / "test", Preference)}
    assert not train & test
    assert len(train | test) == 200
    assert 20 <= len(test) <= 60
    assert all(split_of(name, splits) == "test" for name in test)


def test_filter_and_caps(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [row(number, 0.5 + number / 100) for number in range(40)])
    options = MergeOptions(
        sources=(one,), out=tmp_path / "all", where="p_chosen > 0.7 and source['judge'] == 'one'"
    )
    assert merge(options)["rows written"] == 19
    capped = MergeOptions(sources=(one,), out=tmp_path / "capped", most_per_judge=5)
    assert merge(capped)["rows written"] == 5


@pytest.mark.parametrize("where", ["p_chosn > 0.7", "p_chosen >", "__import__('os')"])
def test_wrong_filters_are_one_clear_error(tmp_path: Path, where: str) -> None:
    one = write(tmp_path / "one", [row(1)])
    with pytest.raises(RecipeError, match="--where"):
        merge(MergeOptions(sources=(one,), out=tmp_path / "all", where=where))


def test_other_kinds_unfinished_and_used_folders_are_refused(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [row(1)])
    with ShardWriter[Candidates](tmp_path / "two", "candidates") as writer:
        made = Completion(completion_id="c", completion="x", model="m")
        writer.append(Candidates(prompt_id="p", prompt="q", completions=[made]))
        writer.finish({})
    with pytest.raises(ShardError, match="holds candidates"):
        merge(MergeOptions(sources=(one, tmp_path / "two"), out=tmp_path / "all"))
    ShardWriter(tmp_path / "three", "preferences").close()
    with pytest.raises(ShardError, match="has not finished"):
        merge(MergeOptions(sources=(tmp_path / "three",), out=tmp_path / "all"))
    with pytest.raises(ShardError, match="already holds rows"):
        merge(MergeOptions(sources=(one,), out=write(tmp_path / "full", [row(9)])))
    with pytest.raises(RecipeError, match="not 1"):
        MergeOptions(sources=(one,), out=tmp_path, splits={"train": 0.5})


def test_candidates_of_one_prompt_are_joined(tmp_path: Path) -> None:
    folders = []
    for name, texts in (("one", ["a", "b"]), ("two", ["B ", "c"])):
        with ShardWriter[Candidates](tmp_path / name, "candidates") as writer:
            made = [
                Completion(completion_id=f"{name}{place}", completion=text, model=name)
                for place, text in enumerate(texts)
            ]
            writer.append(Candidates(prompt_id="p", prompt="q", completions=made))
            writer.finish({})
        folders.append(tmp_path / name)
    merge(MergeOptions(sources=tuple(folders), out=tmp_path / "all"))
    (joined,) = read_rows(tmp_path / "all", Candidates)
    assert [one.completion for one in joined.completions] == ["a", "b", "c"]


def test_versions_are_compared_by_content(tmp_path: Path) -> None:
    old = write(tmp_path / "old", [row(1), row(2), row(3), row(4)], judge={"model": "small"})
    new = write(
        tmp_path / "new",
        [row(1), row(2, 0.9), flipped(3, 0.6), row(5)],
        judge={"model": "large"},
    )
    found = compare_versions(old, new)
    assert (found.same, found.moved, found.flipped, found.added, found.removed) == (1, 1, 1, 1, 1)
    assert found.mean_change == pytest.approx((0 + 0.1 + 0.4) / 3)
    assert found.examples["removed"] == ["p4"]
    assert found.figures["judge.model"] == ("small", "large")
