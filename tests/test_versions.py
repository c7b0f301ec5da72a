"""What changed between two versions: rows, flipped labels, card figures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from feedback.errors import BackendError, InputError, ShardError
from feedback.publish import PublishOptions, publish
from feedback.records import JudgeIdentity, Preference, Ranking, Verdict
from feedback.shards import ShardWriter
from feedback.versions import DiffOptions, compare_versions, run


def row(number: int, p: float = 0.8, **changes: Any) -> Preference:
    made = Preference(
        prompt=f"Is {number} a prime number, and why?",
        chosen=f"good {number}",
        rejected=f"bad {number}",
        margin=2 * p - 1,
        p_chosen=p,
        prompt_id=f"p{number}",
        source={"judge": "one"},
    )
    return replace(made, **changes)


def other_way(number: int) -> Preference:
    return row(number, chosen=f"bad {number}", rejected=f"good {number}")


def gate(value: float, n: int = 90) -> dict[str, Any]:
    figure = {"value": value, "low": value - 0.1, "high": value + 0.1, "n": n}
    steady = {"value": 0.9, "low": 0.8, "high": 1.0, "n": 90}
    summary = {"judge": {"agreement.accuracy": figure, "outcomes.parse_rate": steady}}
    return {"status": "passed", "accepted": [], "failed": [], "card": {"summary": summary}}


def write(folder: Path, rows: list[Any], kind: str = "preferences", **info: Any) -> Path:
    with ShardWriter[Any](folder, kind) as writer:
        for one in rows:
            writer.append(one)
        writer.finish(info)
    return folder


@pytest.fixture
def shards(tmp_path: Path) -> tuple[Path, Path]:
    """Two versions: one row stays, one is flipped, one goes, one comes; the judge changed."""
    old = write(
        tmp_path / "old/preferences",
        [row(1), row(2), row(3)],
        gate=gate(0.7),
        judge={"model": "small"},
        provenance={"judging": {"manifest_sha256": "a", "started": "then", "orders": "one"}},
    )
    new = write(
        tmp_path / "new/preferences",
        [row(1), other_way(2), row(4)],
        gate=gate(0.8),
        judge={"model": "large"},
        provenance={"judging": {"manifest_sha256": "b", "started": "now", "orders": "both"}},
    )
    return old, new


def published(folder: Path, to: Path) -> Path:
    publish(PublishOptions(folders=(folder,), to=to, license="mit", judge_terms="none"))
    return to


def test_rows_labels_figures_and_settings(shards: tuple[Path, Path]) -> None:
    found = compare_versions(*shards)
    assert (found.rows_old, found.rows_new) == (3, 3)
    assert (found.same, found.flipped, found.added, found.removed, found.moved) == (1, 1, 1, 1, 0)
    assert found.examples == {"flipped": ["p2"], "added": ["p4"], "removed": ["p3"]}
    assert list(found.card) == ["judge: agreement.accuracy"], "what is equal is not listed"
    assert found.card["judge: agreement.accuracy"][1]["value"] == 0.8
    assert found.settings == {
        "judge.model": ("small", "large"),
        "provenance.judging.orders": ("one", "both"),
    }


def test_published_versions_compare_as_their_shards_do(
    shards: tuple[Path, Path], tmp_path: Path
) -> None:
    trees = [published(folder, tmp_path / f"tree-{n}") for n, folder in enumerate(shards)]
    found, of_shards = compare_versions(*trees), compare_versions(*shards)
    for name in ("rows_old", "rows_new", "same", "flipped", "added", "removed", "card", "settings"):
        assert getattr(found, name) == getattr(of_shards, name), name
    assert found.versions["old"].startswith("manifest-")
    mixed = compare_versions(shards[0], trees[0])
    assert (mixed.same, mixed.card, mixed.settings) == (3, {}, {})
    with pytest.raises(InputError, match="holds no 'rankings'"):
        compare_versions(*trees, config="rankings")


def test_what_is_printed(shards: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    run(DiffOptions(old=shards[0], new=shards[1], examples=1))
    said = capsys.readouterr().out
    assert "preferences: 3 rows -> 3 rows" in said
    assert "flipped: 1 (p2)" in said
    assert "judge: agreement.accuracy: 0.700 [0.600, 0.800] -> 0.800 [0.700, 0.900]" in said
    assert "judge.model: small -> large" in said
    run(DiffOptions(old=shards[0], new=shards[1], json=True))
    assert '"flipped": 1' in capsys.readouterr().out


def test_rankings_and_verdicts_flip_with_their_winner(tmp_path: Path) -> None:
    def ranking(*order: list[int]) -> Ranking:
        return Ranking(
            prompt="q", completions=["a", "b", "c"], scores=[1.0, 2.0, 3.0],
            ranking=list(order), prompt_id="p",
        )  # fmt: skip

    best = write(tmp_path / "a", [ranking([2], [1], [0])], "rankings")
    moved = write(tmp_path / "b", [ranking([2], [0], [1])], "rankings")
    other = write(tmp_path / "c", [ranking([1], [2], [0])], "rankings")
    assert compare_versions(best, moved).moved == 1
    assert compare_versions(best, other).flipped == 1

    def verdict(winner: str | None) -> Verdict:
        return Verdict(
            verdict_id="v", prompt_id="p", kind="pairwise", shown=["a", "b"],
            outcome="decided" if winner else "tie", winner=winner,
            judge=JudgeIdentity(model="j"), template="t", template_sha256="s",
        )  # fmt: skip

    for number, winner in enumerate(("a", "b", None)):
        write(tmp_path / f"v{number}", [verdict(winner)], "verdicts")
    assert compare_versions(tmp_path / "v0", tmp_path / "v1").flipped == 1
    assert compare_versions(tmp_path / "v0", tmp_path / "v2").moved == 1
    with pytest.raises(ShardError, match="holds verdicts, while"):
        compare_versions(best, tmp_path / "v0")


def test_versions_that_are_not_there(tmp_path: Path, shards: tuple[Path, Path]) -> None:
    with pytest.raises(InputError, match=r"no such folder, nor user/name\[@TAG\]"):
        compare_versions(shards[0], tmp_path / "none")
    with pytest.raises(BackendError, match="me/set@v1 is no folder here, and cannot be fetched"):
        compare_versions(shards[0], Path("me/set@v1"))
