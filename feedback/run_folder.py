"""What a stage's folder was made with, and what happens when that changes.

``run.json`` in the folder records everything its rows depend on. Rows made with other settings are
never mixed in: the run is refused, or what is there is set aside or replaced first.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import filelock

from feedback.errors import BackendError, ShardError
from feedback.progress import say
from feedback.shards import read_manifest, write_json
from feedback.verdict_index import FAILED, RUN_RECORD

__all__ = [
    "OnChange",
    "changed_setting",
    "check_not_all_failed",
    "claim_folder",
    "make_way",
    "started",
]

OnChange = Literal["refuse", "set-aside", "replace"]


def changed_setting(
    folder: Path, record: dict[str, Any], *, leave_out: Sequence[str] = ()
) -> str | None:
    """Return the first key that differs from the folder's record, with both values, or None."""
    path = folder / RUN_RECORD
    if not path.is_file():
        return None
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ShardError("is damaged; use another --out", path=path) from error
    now = _plain(record)
    for key in sorted((set(now) | set(before)) - set(leave_out)):
        if now.get(key) != before.get(key):
            return f"{key} ({before.get(key)!r}, now {now.get(key)!r})"
    return None


def claim_folder(folder: Path, record: dict[str, Any], *, kept: str = "") -> None:
    """Write what the folder's rows depend on, or check that it is the same as before.

    Args:
        folder: the stage's.
        record: what its rows depend on.
        kept: what a changed run would not have to do again, for the error.

    Raises:
        ShardError: the folder was begun with other settings; names the first that differs.
    """
    changed = changed_setting(folder, record)
    if changed is not None:
        raise ShardError(
            f"was begun with another {changed}; give another --out, or say --on-change set-aside "
            f"(or replace){kept}",
            path=folder,
        )
    if not (folder / RUN_RECORD).is_file():
        write_json(folder / RUN_RECORD, _plain(record))


def check_not_all_failed(folder: Path) -> None:
    """Raise if a finished folder holds failures and nothing else.

    The folder stays as it is: the same command asks again.

    Raises:
        BackendError: names the last failure.
    """
    manifest = read_manifest(folder)
    if manifest["rows"] or not manifest["failed"]:
        return
    path, last = folder / FAILED, ""
    if path.is_file():
        *_, line = path.read_text(encoding="utf-8").splitlines()
        last = f"; the last one: {json.loads(line)['error']} (all: {path})"
    raise BackendError(
        f"everything that was asked failed, {manifest['failed']} of {manifest['failed']}{last}. "
        "Mend the cause and run the same command again"
    )


def started(folder: Path) -> str:
    """Return when the folder was begun (UTC), which resuming or repeating a run does not change."""
    begun = (folder / RUN_RECORD).stat().st_mtime
    return datetime.datetime.fromtimestamp(begun, datetime.UTC).isoformat(timespec="seconds")


def make_way(folder: Path, record: dict[str, Any], on_change: OnChange) -> None:
    """Clear the folder's place if it was made with other settings and ``on_change`` allows it.

    Raises:
        ShardError: another run is writing the folder.
    """
    changed = changed_setting(folder, record)
    if on_change == "refuse" or changed is None:
        return
    name = changed.split(" (")[0]
    with _locked(folder):
        if on_change == "replace":
            shutil.rmtree(folder)
            say(f"{folder} was made with another {name}: replaced")
            return
        number = 1
        while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(aside)
        say(f"{folder} was made with another {name}: set aside as {aside}")


def _locked(folder: Path) -> filelock.BaseFileLock:
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise ShardError("another run is writing this folder", path=folder) from None
    return lock


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record as it reads back from JSON."""
    plain: dict[str, Any] = json.loads(json.dumps(record))
    return plain
