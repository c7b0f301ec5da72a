"""Shard folders: append-only JSONL files and one manifest, safe against kill -9.

A folder holds rows of one kind in ``<kind>-00000.jsonl``, ``<kind>-00001.jsonl`` ... and a
``manifest.json`` that appears only when the stage has finished. A row counts once its newline is on
disk: a torn last line, which only a crash leaves behind, is cut off when the folder is reopened.
One process writes a folder at a time (a lock file that dies with its process).

This module knows nothing of judges or training; it moves records.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import filelock
import jsonlines

from feedback.errors import InputError, ShardError
from feedback.installed import package_versions
from feedback.records import (
    Candidates,
    Comparison,
    GoldPair,
    Preference,
    Prompt,
    Ranking,
    Verdict,
    decode,
    encode,
)
from feedback.row_hints import row_hint

__all__ = [
    "KINDS",
    "MANIFEST",
    "SCHEMA_VERSION",
    "ShardWriter",
    "file_sha256",
    "folder_kind",
    "make_folder",
    "manifest_sha256",
    "read_jsonl",
    "read_manifest",
    "read_numbered",
    "read_rows",
    "shard_paths",
    "whole_lines",
    "write_json",
    "write_text",
    "writing",
]

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
KINDS: dict[str, type] = {
    "prompts": Prompt,
    "candidates": Candidates,
    "verdicts": Verdict,
    "comparisons": Comparison,
    "preferences": Preference,
    "rankings": Ranking,
    "gold": GoldPair,
}
Record = TypeVar("Record")


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failure to write (a full disk, say) into an error that says what is safe.

    Raises:
        ShardError: the system refused to write.
    """
    try:
        yield
    except OSError as error:
        raise ShardError(
            f"cannot be written: {error.strerror}. All whole rows so far are kept; make room and "
            "run the same command again to continue",
            path=path,
        ) from error


def make_folder(folder: Path) -> None:
    """Make a folder for rows, unless it is there.

    Raises:
        ShardError: a file stands there, or the system refuses.
    """
    if folder.is_file():
        raise ShardError("is a file; name a folder", path=folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ShardError(
            f"cannot be made: {error.strerror}; name another folder", path=folder
        ) from error


def write_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old content or the new, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_jsonl(path: Path, kind: type[Record], *, growing: bool = False) -> Iterator[Record]:
    """Stream the records of one JSONL file, in order.

    Args:
        path: of the file.
        kind: of its rows.
        growing: a run may still write to it, or was killed: a torn last line is passed over.

    Raises:
        InputError: the file is missing, or a line is not a row of this kind; names file and line.
    """
    for _, record in read_numbered(path, kind, growing=growing):
        yield record


def read_numbered(
    path: Path, kind: type[Record], *, growing: bool = False
) -> Iterator[tuple[int, Record]]:
    """Stream the records of one JSONL file with their line numbers, from 1.

    Args:
        path: of the file.
        kind: of its rows.
        growing: as ``read_jsonl``'s.

    Raises:
        InputError: the file is missing, or a line is not a row of this kind; names file and line.
    """
    if not path.is_file():
        raise InputError("no such file", path=path)
    number = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = decode(line, kind)
            except ValueError as error:
                if growing and not line.endswith(b"\n"):
                    return
                raise InputError(
                    f"not a {kind.__name__.lower()} row: {error}{row_hint(line, kind)}",
                    path=path,
                    line=number,
                ) from error
            yield number, record


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield a file's lines, but for a last one that was torn by a crash or is being written."""
    if path.is_file():
        with path.open("rb") as file:
            yield from (line for line in file if line.endswith(b"\n"))


def shard_paths(folder: Path, kind: str) -> list[Path]:
    """Return the shard files of ``kind`` in ``folder``, in order."""
    return sorted(folder.glob(f"{kind}-[0-9][0-9][0-9][0-9][0-9].jsonl"))


def folder_kind(folder: Path) -> str:
    """Return which kind of rows a shard folder holds.

    Raises:
        ShardError: the folder is missing, or holds no shards.
    """
    if not folder.is_dir():
        raise ShardError("no such folder", path=folder)
    for kind in KINDS:
        if shard_paths(folder, kind):
            return kind
    if (folder / MANIFEST).is_file():
        return str(read_manifest(folder)["kind"])
    raise ShardError(f"holds no shards (looked for {', '.join(KINDS)})", path=folder)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a finished shard folder.

    Raises:
        ShardError: there is none (the stage has not finished), or it is of another schema version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ShardError("no manifest.json: the stage that writes it has not finished", path=folder)
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ShardError("is damaged; run the stage that writes it again", path=path) from error
    if manifest.get("schema_version") != SCHEMA_VERSION:
        raise ShardError(
            f"schema version {manifest.get('schema_version')!r}, not {SCHEMA_VERSION}",
            path=path,
        )
    return manifest


def manifest_sha256(folder: Path) -> str:
    """Return the hash that names a finished folder's exact content."""
    return file_sha256(folder / MANIFEST)


def read_rows(source: Path | str, kind: type[Record]) -> Iterator[Record]:
    """Stream all records of a shard folder, or of one JSONL file.

    A folder without a manifest is one of a run at work, or killed: its whole rows are read.
    """
    path = Path(source)
    if path.is_file() or path.suffix == ".jsonl":
        yield from read_jsonl(path, kind)
        return
    name = next(name for name, known in KINDS.items() if known is kind)
    found = folder_kind(path)
    if not shard_paths(path, name) and found != name:
        raise ShardError(f"holds {found}, not {name}", path=path)
    growing = not (path / MANIFEST).is_file()
    shards = shard_paths(path, name)
    for shard in shards:
        yield from read_jsonl(shard, kind, growing=growing and shard == shards[-1])
    failed = path / "failed.jsonl"
    if kind is Verdict and failed.is_file():
        yield from read_jsonl(failed, kind, growing=growing)


class ShardWriter(Generic[Record]):
    """Appends records of one kind to a folder; reopening it continues where it stopped.

    Args:
        folder: created if missing; locked until ``close``.
        kind: one of ``KINDS``.
        rows_per_shard: a new file is begun after this many rows.
        sync_every: rows between fsync calls; a crash of the machine (not of the process) can lose
            at most that many.
        claim: called when the folder is locked and nothing in it was touched yet; raises if its
            rows are of another run, which then stay as they are, finished or not.

    Raises:
        ShardError: another process writes this folder, or it holds another kind of rows.
    """

    def __init__(
        self,
        folder: Path,
        kind: str,
        *,
        rows_per_shard: int = 100_000,
        sync_every: int = 1000,
        claim: Callable[[], None] = lambda: None,
    ):
        self.folder = folder
        self.kind = kind
        self.rows_per_shard = rows_per_shard
        self.sync_every = sync_every
        make_folder(folder)
        self._lock = filelock.FileLock(folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise ShardError("another run is writing this folder", path=folder) from None
        try:
            self._check_kind()
            claim()
            self._open_last()
        except BaseException:
            self._lock.release()
            raise

    def _check_kind(self) -> None:
        for other in KINDS:
            if other != self.kind and shard_paths(self.folder, other):
                raise ShardError(f"holds {other}, not {self.kind}", path=self.folder)

    def _open_last(self) -> None:
        (self.folder / MANIFEST).unlink(missing_ok=True)
        existing = shard_paths(self.folder, self.kind)
        self._index = max(len(existing) - 1, 0)
        self._rows = _cut_torn_line(existing[-1]) if existing else 0
        self._unsynced = 0
        self._open_file()

    def _open_file(self) -> None:
        self._path = self.folder / f"{self.kind}-{self._index:05d}.jsonl"
        self._file = self._path.open("ab")
        # Flushed after every row: a killed process leaves whole rows behind.
        self._writer = jsonlines.Writer(self._file, dumps=encode, flush=True)

    def existing(self) -> Iterator[Record]:
        """Stream the rows already in the folder."""
        for path in shard_paths(self.folder, self.kind):
            yield from read_jsonl(path, KINDS[self.kind])

    def append(self, record: Record) -> None:
        """Write one row."""
        if self._rows >= self.rows_per_shard:
            self._next_file()
        with writing(self._path):
            self._writer.write(record)
            self._rows += 1
            self._unsynced += 1
            if self._unsynced >= self.sync_every:
                os.fsync(self._file.fileno())
                self._unsynced = 0

    def _next_file(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
        self._index += 1
        self._rows = 0
        self._open_file()

    def drop(self, unwanted: Callable[[Record], bool], *, into: Path) -> int:
        """Move rows out of the folder's shards, into a JSONL file that only grows; count them.

        Each shard is replaced as a whole, after its rows stand in ``into``: a crash leaves a row in
        one of the two, or in both.
        """
        self._file.close()
        moved = 0
        for path in shard_paths(self.folder, self.kind):
            rows: Iterator[Record] = read_jsonl(path, KINDS[self.kind])
            gone = [row for row in rows if unwanted(row)]
            if not gone:
                continue
            moved += len(gone)
            with writing(into), into.open("ab") as file:
                file.writelines(encode(row) + b"\n" for row in gone)
                file.flush()
                os.fsync(file.fileno())
            rows = read_jsonl(path, KINDS[self.kind])
            _replace_rows(path, (row for row in rows if not unwanted(row)))
        self._open_last()
        return moved

    def finish(self, info: dict[str, Any], *, count: Callable[[Record], str] | None = None) -> Path:
        """Write the manifest, which makes the folder complete, and close it.

        Args:
            info: what the stage adds (recipe, seeds, identities, totals); must hold no secret.
            count: names the bucket of a row (its outcome, say) for the manifest's row counts.
        """
        os.fsync(self._file.fileno())
        shards: list[dict[str, Any]] = []
        counts: dict[str, int] = {}
        total = 0
        for path in shard_paths(self.folder, self.kind):
            rows = 0
            row: Any
            for row in read_jsonl(path, KINDS[self.kind]):
                rows += 1
                if count is not None:
                    bucket = count(row)
                    counts[bucket] = counts.get(bucket, 0) + 1
            total += rows
            shards.append(
                {
                    "file": path.name,
                    "rows": rows,
                    "bytes": path.stat().st_size,
                    "sha256": file_sha256(path),
                }
            )
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "rows": total,
            "counts": counts,
            "shards": shards,
            "versions": package_versions(),
            **info,
        }
        with writing(self.folder / MANIFEST):
            write_json(self.folder / MANIFEST, manifest)
        self.close()
        return self.folder / MANIFEST

    def close(self) -> None:
        """Close the file and release the folder; without ``finish`` it stays resumable."""
        try:
            if not self._file.closed:
                with writing(self._path):
                    try:
                        self._file.flush()
                        os.fsync(self._file.fileno())
                    finally:
                        self._file.close()
        finally:
            self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _replace_rows(path: Path, rows: Iterable[object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path), temporary.open("wb") as file:
        file.writelines(encode(row) + b"\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _cut_torn_line(path: Path) -> int:
    """Drop a last line without newline; return the number of whole rows."""
    rows = 0
    end = 0
    with path.open("rb+") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            rows += 1
            end += len(line)
        file.truncate(end)
    return rows
