"""A folder made with other settings: refused, set aside or replaced, never mixed."""

from __future__ import annotations

from pathlib import Path

import filelock
import pytest

from feedback.errors import ShardError
from feedback.run_folder import claim_folder, make_way


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "verdicts"
    path.mkdir()
    claim_folder(path, {"seed": 1, "orders": ("both",)})
    (path / "row").write_text("old")
    return path


def test_the_same_settings_go_on(folder: Path) -> None:
    for on_change in ("refuse", "set-aside", "replace"):
        make_way(folder, {"seed": 1, "orders": ["both"]}, on_change)
        claim_folder(folder, {"seed": 1, "orders": ["both"]})
    assert (folder / "row").read_text() == "old"


def test_other_settings_are_refused_by_name(folder: Path) -> None:
    make_way(folder, {"seed": 2, "orders": ["both"]}, "refuse")
    with pytest.raises(ShardError, match=r"another seed \(1, now 2\)"):
        claim_folder(folder, {"seed": 2, "orders": ["both"]})
    with pytest.raises(ShardError, match="another template"):
        claim_folder(folder, {"seed": 1, "orders": ["both"], "template": "new"})


def test_a_damaged_record_is_said(folder: Path) -> None:
    (folder / "run.json").write_text('{"seed": 1, "ord')
    with pytest.raises(ShardError, match=r"run\.json: is damaged; use another --out"):
        claim_folder(folder, {"seed": 1})
    with pytest.raises(ShardError, match="is damaged"):
        make_way(folder, {"seed": 1}, "replace")


def test_set_aside_loses_nothing(folder: Path) -> None:
    make_way(folder, {"seed": 2}, "set-aside")
    assert not folder.exists()
    assert (folder.with_name("verdicts.1") / "row").read_text() == "old"
    folder.mkdir()
    claim_folder(folder, {"seed": 2})
    make_way(folder, {"seed": 3}, "set-aside")
    assert folder.with_name("verdicts.2").is_dir()


def test_replace_removes(folder: Path) -> None:
    make_way(folder, {"seed": 2}, "replace")
    assert not folder.exists()


@pytest.mark.parametrize("on_change", ["set-aside", "replace"])
def test_a_folder_at_work_is_left_alone(folder: Path, on_change: str) -> None:
    with (
        filelock.FileLock(folder / ".lock"),
        pytest.raises(ShardError, match="another run is writing"),
    ):
        make_way(folder, {"seed": 2}, on_change)
    assert (folder / "row").read_text() == "old"


def test_a_folder_without_record_is_claimed(tmp_path: Path) -> None:
    make_way(tmp_path / "none", {"seed": 1}, "set-aside")
    (tmp_path / "plain").mkdir()
    claim_folder(tmp_path / "plain", {"seed": 1})
    with pytest.raises(ShardError):
        claim_folder(tmp_path / "plain", {"seed": 2})
