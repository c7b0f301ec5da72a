"""What is known of submitted batches, on disk before anything is waited for.

One batch is three or four files named by the hash of its requests: ``KEY.jsonl`` (the requests as
uploaded), ``KEY.json`` (ids and status, rewritten atomically at every step), and, once it has
ended, ``KEY.output.jsonl`` and ``KEY.errors.jsonl`` as downloaded. A run that starts again finds
every call that is under way or answered, and submits only the others.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import filelock
import msgspec

from feedback.errors import BackendError
from feedback.shards import write_text

__all__ = ["BatchFile", "BatchStore", "RequestFile", "ResultLine", "body_hash"]

Step = Literal["written", "uploaded", "submitted", "ended"]


class _RequestLine(msgspec.Struct):
    custom_id: str
    body: msgspec.Raw


class _Response(msgspec.Struct):
    status_code: int = 0
    body: msgspec.Raw = msgspec.Raw(b"null")


class _Problem(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class ResultLine(msgspec.Struct):
    """One line of an output or error file."""

    custom_id: str
    response: _Response | None = None
    error: _Problem | None = None


_request = msgspec.json.Decoder(_RequestLine)
_result = msgspec.json.Decoder(ResultLine)


@dataclass(slots=True, kw_only=True)
class BatchFile:
    """Where one batch stands."""

    key: str
    """Hash of the requests; also stored with the provider, so that a batch whose id was never
    written down can be found again."""
    endpoint: str
    requests: int
    step: Step = "written"
    file_id: str | None = None
    batch_id: str | None = None
    status: str = ""
    """The provider's word for it."""
    bad: list[str] = field(default_factory=list)
    """Calls whose reply turned out to be unusable: to be asked again."""


class BatchStore:
    """The folder of batches of one endpoint and model; one process uses it at a time.

    Raises:
        BackendError: another run uses the folder.
    """

    def __init__(self, folder: Path, endpoint: str):
        self.folder = folder
        self.endpoint = endpoint
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = filelock.FileLock(folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise BackendError(
                f"another run uses the batches in {folder}; wait for it, or name another folder "
                "with extra.folder"
            ) from None

    def close(self) -> None:
        """Let other runs use the folder."""
        self._lock.release()

    def path(self, batch: BatchFile, suffix: str) -> Path:
        """Return the path of one of a batch's files."""
        return self.folder / f"{batch.key}{suffix}"

    def save(self, batch: BatchFile) -> None:
        """Write down where a batch stands; on disk when this returns."""
        text = msgspec.json.format(msgspec.json.encode(dataclasses.asdict(batch)), indent=2)
        write_text(self.path(batch, ".json"), text.decode() + "\n")

    def forget(self, batch: BatchFile) -> None:
        """Remove a batch of which nothing was answered."""
        for suffix in (".json", ".jsonl"):
            self.path(batch, suffix).unlink(missing_ok=True)

    def batches(self) -> Iterator[BatchFile]:
        """Yield the batches of this endpoint and model."""
        for path in sorted(self.folder.glob("*.json")):
            batch = msgspec.json.decode(path.read_bytes(), type=BatchFile)
            if batch.endpoint == self.endpoint:
                yield batch

    def known_calls(self) -> dict[tuple[str, bytes], BatchFile]:
        """Return the batch of every call that is under way or answered, by id and body hash."""
        known: dict[tuple[str, bytes], BatchFile] = {}
        for batch in self.batches():
            usable = self._answered(batch) if batch.step == "ended" else None
            for line in self._lines(batch, ".jsonl"):
                request = _request.decode(line)
                if usable is None or request.custom_id in usable:
                    known[(request.custom_id, body_hash(bytes(request.body)))] = batch
        return known

    def _answered(self, batch: BatchFile) -> set[str]:
        done = {
            result.custom_id
            for result in self.results(batch)
            if result.response is not None and result.response.status_code == 200
        }
        return done - set(batch.bad)

    def results(self, batch: BatchFile) -> Iterator[ResultLine]:
        """Yield the results that were downloaded; a line that cannot be read is left out."""
        for suffix in (".output.jsonl", ".errors.jsonl"):
            for line in self._lines(batch, suffix):
                try:
                    yield _result.decode(line)
                except msgspec.DecodeError:
                    continue

    def _lines(self, batch: BatchFile, suffix: str) -> Iterator[bytes]:
        path = self.path(batch, suffix)
        if path.is_file():
            with path.open("rb") as file:
                yield from (line for line in file if line.strip())


class RequestFile:
    """A file of requests as it grows, up to the provider's limits."""

    def __init__(self, store: BatchStore, *, most_requests: int, most_bytes: int):
        self._store = store
        self._most_requests = most_requests
        self._most_bytes = most_bytes
        self._path = store.folder / f".new.{os.getpid()}.tmp"
        self._begin()

    def _begin(self) -> None:
        self._file = self._path.open("wb")
        self._hash = hashlib.sha256()
        self._size = 0
        self.requests = 0

    def fits(self, line: bytes) -> bool:
        """Whether one more line stays within the limits."""
        return (
            self.requests < self._most_requests and self._size + len(line) + 1 <= self._most_bytes
        )

    def add(self, line: bytes) -> None:
        """Append one request."""
        self._file.write(line + b"\n")
        self._hash.update(line)
        self._size += len(line) + 1
        self.requests += 1

    def finish(self) -> BatchFile:
        """Give the file its name, note it as written, and begin an empty one."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        batch = BatchFile(
            key=self._hash.hexdigest()[:24], endpoint=self._store.endpoint, requests=self.requests
        )
        self._path.replace(self._store.path(batch, ".jsonl"))
        self._store.save(batch)
        self._begin()
        return batch

    def close(self) -> None:
        """Drop what was not finished."""
        self._file.close()
        self._path.unlink(missing_ok=True)


def body_hash(body: bytes) -> bytes:
    """Return what identifies a request body."""
    return hashlib.blake2b(body, digest_size=16).digest()
