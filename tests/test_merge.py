"""Merging keeps every vote and splits by prompt; comparing versions names what changed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from feedback.errors import GateRefused, RecipeError, ShardError
from feedback.gate import require_gate
from feedback.merge import MergeOptions, merge, split_of
from feedback.observations import load_gold
from feedback.records import (
    Candidates,
    Completion,
    GoldPair,
    JudgeIdentity,
    Preference,
    Ranking,
    Verdict,
)
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


def test_the_same_label_of_two_judges_is_two_votes(tmp_path: Path) -> None:
    """Hard labels agree to the last digit; who gave them must stay known all the same."""
    one = write(tmp_path / "one", [row(1, 1.0)])
    two = write(tmp_path / "two", [row(1, 1.0, source={"judge": "two"})])
    counts = merge(MergeOptions(sources=(one, two, one), out=tmp_path / "all"))
    (merged,) = read_rows(tmp_path / "all", Preference)
    assert [vote["judge"] for vote in merged.source["votes"]] == ["one", "two"]
    assert counts["agreeing labels, kept as votes"] == 1
    assert (merged.p_chosen, merged.tie) == (1.0, False)


def test_merging_in_two_steps_is_merging_in_one(tmp_path: Path) -> None:
    parts = [
        write(tmp_path / "a", [row(1, 0.8)]),
        write(tmp_path / "b", [flipped(1, 0.9)]),
        write(tmp_path / "c", [flipped(1, 0.7), row(2)]),
    ]
    merge(MergeOptions(sources=tuple(parts), out=tmp_path / "once"))
    merge(MergeOptions(sources=tuple(parts[:2]), out=tmp_path / "half"))
    merge(MergeOptions(sources=(tmp_path / "half", parts[2]), out=tmp_path / "twice"))
    once, twice = (list(read_rows(tmp_path / name, Preference)) for name in ("once", "twice"))
    # (0.2 + 0.9 + 0.7) / 3 for bad.
    assert once[0].chosen == "bad 1" and once[0].p_chosen == pytest.approx(0.6)
    assert twice[0].p_chosen == pytest.approx(0.6)
    for merged in (once[0], twice[0]):
        votes = {round(vote["p_chosen"], 6) for vote in merged.source["votes"]}
        assert votes == {0.2, 0.9, 0.7}, "a vote is about the side chosen in the end"
    # The sources of the sources are named.
    manifest = read_manifest(tmp_path / "twice")
    assert [source["folder"] for source in manifest["sources"]] == ["half", "c"]
    assert [source["folder"] for source in manifest["sources"][0]["sources"]] == ["a", "b"]


def ranking(order: list[str], ps: dict[tuple[int, int], float], **source: object) -> Ranking:
    return Ranking(
        prompt="q",
        completions=order,
        scores=[float(len(order) - place) for place in range(len(order))],
        ranking=[[place] for place in range(len(order))],
        prompt_id="p",
        comparisons=[(i, j, p) for (i, j), p in ps.items()],
        source=dict(source),
    )


def write_rankings(folder: Path, rows: list[Ranking]) -> Path:
    with ShardWriter[Ranking](folder, "rankings") as writer:
        for one in rows:
            writer.append(one)
        writer.finish({})
    return folder


def test_rankings_that_contradict_are_fitted_to_all_votes(tmp_path: Path) -> None:
    one = ranking(["a", "b", "c"], {(0, 1): 0.9, (1, 2): 0.8}, judge="one")
    # The same completions in another order: c over a over b.
    two = ranking(["c", "a", "b"], {(0, 1): 0.95, (1, 2): 0.7}, judge="two")
    folders = (write_rankings(tmp_path / "one", [one]), write_rankings(tmp_path / "two", [two]))
    counts = merge(MergeOptions(sources=(*folders, folders[0]), out=tmp_path / "all"))
    (merged,) = read_rows(tmp_path / "all", Ranking)
    assert merged.completions == ["a", "b", "c"]
    assert merged.comparisons == [
        (0, 1, pytest.approx(0.8)), (0, 2, pytest.approx(0.05)), (1, 2, pytest.approx(0.8))
    ]  # fmt: skip
    assert counts["conflicts, kept as votes"] == 1
    votes = merged.source["votes"]
    assert [vote["judge"] for vote in votes] == ["one", "two"]
    assert votes[1]["ranking"] == [[2], [0], [1]]
    best = max(range(3), key=lambda place: merged.scores[place] or 0.0)
    assert merged.ranking[0] == [best]


def test_ratings_are_averaged(tmp_path: Path) -> None:
    one = ranking(["a", "b"], {(0, 1): 1.0}, judge="one", method="rating")
    two = replace(one, scores=[4.0, 8.0], ranking=[[1], [0]], source={**one.source, "judge": "two"})
    folders = (write_rankings(tmp_path / "one", [one]), write_rankings(tmp_path / "two", [two]))
    merge(MergeOptions(sources=folders, out=tmp_path / "all"))
    (merged,) = read_rows(tmp_path / "all", Ranking)
    assert merged.scores == [3.0, 4.5] and merged.ranking == [[1], [0]]


def verdict(winner: str | None, outcome: str = "decided") -> Verdict:
    return Verdict(
        verdict_id="v", prompt_id="p", kind="pairwise", shown=["a", "b"],
        outcome=outcome, winner=winner, judge=JudgeIdentity(model="j"), template="t",  # type: ignore[arg-type]
        template_sha256="s",
    )  # fmt: skip


def test_a_call_that_was_answered_twice_keeps_both_answers(tmp_path: Path) -> None:
    folders = []
    for name, row_ in (("x", verdict(None, "failed")), ("y", verdict("a")), ("z", verdict("b"))):
        with ShardWriter[Verdict](tmp_path / name, "verdicts") as writer:
            writer.append(row_)
            writer.finish({})
        folders.append(tmp_path / name)
    counts = merge(MergeOptions(sources=tuple(folders), out=tmp_path / "all"))
    (merged,) = read_rows(tmp_path / "all", Verdict)
    assert merged.winner == "a" and merged.meta["votes"][0]["winner"] == "b"
    assert counts["conflicts, kept as votes"] == 1
    assert read_manifest(tmp_path / "all")["counts"] == {"decided": 1}


def gold(label: str, *, other_way: bool = False, **fields: Any) -> GoldPair:
    a, b = ("y", "x") if other_way else ("x", "y")
    return GoldPair(prompt_id="p", a=a, b=b, label=label, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rows", "label", "votes", "annotators"),
    [
        ([gold("a"), gold("b", other_way=True)], "a", [], []),
        ([gold("a"), gold("b")], "tie", ["a", "b"], []),
        (
            [
                gold("a", votes=["a"], annotators=["ann"]),
                gold("a", other_way=True, votes=["a"], annotators=["bob"]),
                gold("b", votes=["b", "a"], annotators=["cat", "ann"]),
            ],
            "b",
            ["a", "b", "b"],
            ["ann", "bob", "cat"],
        ),
        ([gold("tie"), gold("tie", votes=["tie", "a"])], "tie", ["tie", "tie", "a"], []),
    ],
)
def test_gold_of_several_people_becomes_votes(
    tmp_path: Path, rows: list[GoldPair], label: str, votes: list[str], annotators: list[str]
) -> None:
    folders = []
    for number, one in enumerate(rows):
        with ShardWriter[GoldPair](tmp_path / str(number), "gold") as writer:
            writer.append(one)
            writer.finish({})
        folders.append(tmp_path / str(number))
    merge(MergeOptions(sources=tuple(folders), out=tmp_path / "all"))
    ((key, merged),) = load_gold(tmp_path / "all").items()
    assert key == ("p", "x", "y") and (merged.a, merged.label) == ("x", label)
    assert (merged.votes, merged.annotators) == (votes, annotators)


def test_one_prompt_under_two_names_is_in_one_split(tmp_path: Path) -> None:
    rows = [row(n, chosen=f"good {k}", prompt_id=f"{k}-{n}") for n in range(60) for k in range(2)]
    source = write(tmp_path / "one", rows)
    options = MergeOptions(
        sources=(source,), out=tmp_path / "all", splits={"train": 0.5, "test": 0.5}
    )
    counts = merge(options)
    sides = {
        name: {one.prompt for one in read_rows(tmp_path / "all" / name, Preference)}
        for name in ("train", "test")
    }
    assert not sides["train"] & sides["test"] and all(sides.values())
    assert counts["rows whose prompt had another id"] == 60
    renamed = next(one for one in read_rows(tmp_path / "all" / "train", Preference)
                   if "prompt_id" in one.source)  # fmt: skip
    assert renamed.source["prompt_id"].startswith("1-") and renamed.prompt_id.startswith("0-")


def test_a_finished_folder_is_not_touched_and_a_killed_merge_starts_over(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [row(1)])
    full = write(tmp_path / "full", [row(9)])
    before = (full / "manifest.json").read_bytes()
    with pytest.raises(ShardError, match="already holds rows"):
        merge(MergeOptions(sources=(one,), out=full))
    assert (full / "manifest.json").read_bytes() == before
    # What a killed merge leaves: rows, its mark, no manifest.
    with ShardWriter[Preference](tmp_path / "all", "preferences") as writer:
        writer.append(row(7))
    (tmp_path / "all" / ".merging").touch()
    merge(MergeOptions(sources=(one,), out=tmp_path / "all"))
    assert [one.prompt_id for one in read_rows(tmp_path / "all", Preference)] == ["p1"]
    assert not (tmp_path / "all" / ".merging").exists()


def test_the_gate_of_the_whole_is_the_worst_of_its_parts(tmp_path: Path) -> None:
    fails = {"name": "length_bias.excess", "arm": "j", "state": "fail", "value": 0.4, "low": 0.3,
             "high": 0.5, "n": 90, "rule": "at most 0.15"}  # fmt: skip
    gates = [
        {"status": "passed", "accepted": [], "failed": []},
        {"status": "accepted", "accepted": ["length_bias"], "failed": [fails]},
        {"status": "refused", "accepted": [], "failed": [fails]},
    ]
    folders = [write(tmp_path / str(n), [row(n)], gate=gate) for n, gate in enumerate(gates)]
    merge(MergeOptions(sources=tuple(folders[:2]), out=tmp_path / "some"))
    assert require_gate(tmp_path / "some") is not None
    merge(MergeOptions(sources=tuple(folders), out=tmp_path / "all"))
    gate = read_manifest(tmp_path / "all")["gate"]
    assert gate["status"] == "refused" and gate["accepted"] == []
    with pytest.raises(GateRefused, match=r"length_bias\.excess"):
        require_gate(tmp_path / "all")
    assert require_gate(tmp_path / "all", accept=["length_bias"]) is not None


def test_completions_that_share_an_id_are_refused(tmp_path: Path) -> None:
    folders = []
    for name in ("one", "two"):
        with ShardWriter[Candidates](tmp_path / name, "candidates") as writer:
            made = Completion(completion_id="0", completion=name, model=name)
            writer.append(Candidates(prompt_id="p", prompt="q", completions=[made]))
            writer.finish({})
        folders.append(tmp_path / name)
    with pytest.raises(ShardError, match="two different completions with the id '0'"):
        merge(MergeOptions(sources=tuple(folders), out=tmp_path / "all"))
    with pytest.raises(RecipeError, match="candidates have no judge"):
        merge(MergeOptions(sources=tuple(folders), out=tmp_path / "b", most_per_judge=1))


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
    assert found.settings["judge.model"] == ("small", "large")
