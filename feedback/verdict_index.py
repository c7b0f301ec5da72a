"""Finding verdicts by prompt without holding them: an index on disk over a verdict folder.

Rows of one prompt may stand far apart (engines answer in any order, failed calls are asked again
later). One pass notes where each row is; memory stays flat however many rows there are.
"""

from __future__ import annotations

import hashlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec

from feedback.errors import InputError, ShardError
from feedback.records import Verdict, decode
from feedback.shards import shard_paths

__all__ = ["FAILED", "RUN_RECORD", "SeenIds", "VerdictIndex"]

FAILED = "failed.jsonl"
RUN_RECORD = "run.json"
_ROWS_PER_INSERT = 20_000


class _Head(msgspec.Struct):
    verdict_id: str
    prompt_id: str
    outcome: str


def _key(text: str) -> int:
    """Return a 63-bit hash; rows are compared by their full ids after the look-up."""
    head = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(head) >> 1


class VerdictIndex:
    """Where the verdicts of each prompt stand in a folder.

    Args:
        folder: verdict folder, finished or not, or one file of verdicts; nothing is written to it.
        failed: also index the calls that failed.
    """

    def __init__(self, folder: Path, *, failed: bool = False):
        self.rows = 0
        # A nameless database lives in a temporary file that vanishes with the connection.
        self._database = sqlite3.connect("", check_same_thread=False)
        self._database.execute(
            "CREATE TABLE place "
            "(prompt INTEGER, file INTEGER, start INTEGER, size INTEGER, id BLOB)"
        )
        self._paths = [folder] if folder.is_file() else shard_paths(folder, "verdicts")
        if failed and (folder / FAILED).is_file():
            self._paths.append(folder / FAILED)
        self._files: dict[int, BinaryIO] = {}
        for number, path in enumerate(self._paths):
            self._scan(number, path)
        self._database.execute("CREATE INDEX by_prompt ON place (prompt)")

    def _scan(self, number: int, path: Path) -> None:
        decoder = msgspec.json.Decoder(_Head)
        rows: list[tuple[int, int, int, int, bytes]] = []
        insert = "INSERT INTO place VALUES (?, ?, ?, ?, ?)"
        start = 0
        with path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break  # a torn last line of a run in progress
                try:
                    head = decoder.decode(line)
                except msgspec.DecodeError as error:
                    raise InputError(
                        f"not a verdict row: {error}", path=path, line=line_number
                    ) from error
                key = _key(head.prompt_id)
                rows.append((key, number, start, len(line), head.verdict_id.encode()))
                start += len(line)
                self.rows += 1
                if len(rows) >= _ROWS_PER_INSERT:
                    self._database.executemany(insert, rows)
                    rows.clear()
        self._database.executemany(insert, rows)

    def ids(self, prompt_id: str) -> set[str]:
        """Return the ids of a prompt's verdicts."""
        found = self._database.execute("SELECT id FROM place WHERE prompt = ?", (_key(prompt_id),))
        return {value.decode() for (value,) in found}

    def verdicts(self, prompt_id: str) -> list[Verdict]:
        """Return a prompt's verdicts, in the order of the file.

        Raises:
            ShardError: one verdict stands there twice.
        """
        found = self._database.execute(
            "SELECT file, start, size FROM place WHERE prompt = ? ORDER BY file, start",
            (_key(prompt_id),),
        ).fetchall()
        rows = [self._read(*place) for place in found]
        rows = [row for row in rows if row.prompt_id == prompt_id]
        ids = {row.verdict_id for row in rows}
        if len(ids) < len(rows):
            raise ShardError(
                f"prompt {prompt_id!r} has a verdict twice", path=self._paths[0].parent
            )
        return rows

    def prompts(self) -> Iterator[str]:
        """Yield the prompt ids, in the order in which they first appear."""
        firsts = self._database.execute(
            "SELECT file, start, size FROM (SELECT file, start, size, ROW_NUMBER() OVER "
            "(PARTITION BY prompt ORDER BY file, start) AS place FROM place) WHERE place = 1 "
            "ORDER BY file, start"
        )
        for file, start, size in firsts:
            yield self._read(file, start, size).prompt_id

    def _read(self, number: int, start: int, size: int) -> Verdict:
        if number not in self._files:
            self._files[number] = self._paths[number].open("rb")
        file = self._files[number]
        if file.tell() != start:
            file.seek(start)
        return decode(file.read(size), Verdict)

    def close(self) -> None:
        """Close the files and drop the index."""
        for file in self._files.values():
            file.close()
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class SeenIds:
    """Ids met so far, kept on disk; ``add`` tells where an id was met before."""

    def __init__(self) -> None:
        self._database = sqlite3.connect("", check_same_thread=False)
        self._database.execute(
            "CREATE TABLE seen (id BLOB PRIMARY KEY, place INTEGER) WITHOUT ROWID"
        )

    def add(self, name: str, place: int) -> int | None:
        """Note an id; return the place at which it was met before, or None."""
        done = self._database.execute(
            "INSERT OR IGNORE INTO seen VALUES (?, ?)", (name.encode(), place)
        )
        if done.rowcount:
            return None
        found = self._database.execute("SELECT place FROM seen WHERE id = ?", (name.encode(),))
        before: int = found.fetchone()[0]
        return before

    def __contains__(self, name: str) -> bool:
        found = self._database.execute("SELECT 1 FROM seen WHERE id = ?", (name.encode(),))
        return found.fetchone() is not None

    def close(self) -> None:
        """Drop the ids."""
        self._database.close()
