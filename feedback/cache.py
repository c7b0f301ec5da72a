"""Replies of earlier runs, found again by what was asked: an embedded, content-addressed cache.

The key is the judge, the messages as sent, the sampling settings and the offered choices; the value
is the engine's reply. A changed pairing, a second run or a widened set of candidates never pays
twice for the same call. Failures are not kept. Several processes may share one file: each reply is
a transaction of its own, so that the file is never locked for longer, and a killed process leaves
every reply behind that it had put in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from feedback.backends import JudgeCall, JudgeReply
from feedback.errors import InputError
from feedback.records import JudgeIdentity, content_id

__all__ = ["ReplyCache"]

_WAIT_S = 60.0
"""Longest wait for another process's transaction."""


class ReplyCache:
    """Replies on disk in one SQLite file.

    Args:
        path: of the file; made if missing.
        identity: the judge whose replies are kept.

    Raises:
        InputError: the file is not a cache of ours, or cannot be made there; later, that it can no
            longer be used.
    """

    def __init__(self, path: Path, identity: JudgeIdentity):
        self.identity = identity
        self.hits = 0
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(JudgeReply)
        self._lock = threading.Lock()
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = _open(path)
        except (OSError, sqlite3.OperationalError) as error:
            raise InputError(
                "the reply cache cannot be created here; name a writable file with --cache, or "
                f"--cache none ({error})",
                path=path,
            ) from error
        except sqlite3.DatabaseError as error:
            raise InputError(f"not a reply cache: {error}; name another file", path=path) from error

    def _key(self, call: JudgeCall, repeat: int) -> bytes:
        judge = self.identity
        text = content_id(
            [judge.model, judge.revision, judge.endpoint, judge.setup],
            call.messages,
            [call.choices, call.max_tokens, call.temperature, call.seed, call.schema, repeat],
            length=40,
        )
        return bytes.fromhex(text)

    def get(self, call: JudgeCall, *, repeat: int = 0) -> JudgeReply | None:
        """Return the reply to the same call in an earlier run, under this call's id."""
        with self._lock, self._working():
            found = self._database.execute(
                "SELECT value FROM reply WHERE key = ?", (self._key(call, repeat),)
            ).fetchone()
        if found is None:
            return None
        self.hits += 1
        reply: JudgeReply = self._decoder.decode(found[0])
        return dataclasses.replace(reply, call_id=call.call_id)

    def put(self, call: JudgeCall, reply: JudgeReply, *, repeat: int = 0) -> None:
        """Keep a reply; one that failed is not kept."""
        if reply.error is not None:
            return
        value = self._encoder.encode(reply)
        with self._lock, self._working():
            self._database.execute(
                "INSERT OR REPLACE INTO reply VALUES (?, ?)", (self._key(call, repeat), value)
            )

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise InputError(
                f"the reply cache cannot be used: {error}. Everything finished so far is kept; "
                "make room, or name another file with --cache (none: no cache), and run the same "
                "command again to continue",
                path=self._path,
            ) from error

    def close(self) -> None:
        """Close the file."""
        with self._lock:
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


def _open(path: Path) -> sqlite3.Connection:
    """Open the file, made if missing, for many processes at once."""
    until = time.monotonic() + _WAIT_S
    while True:
        # Without transactions of the module's own: each statement is committed at once.
        database = sqlite3.connect(
            path, check_same_thread=False, timeout=_WAIT_S, isolation_level=None
        )
        try:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = NORMAL")
            database.execute(
                "CREATE TABLE IF NOT EXISTS reply (key BLOB PRIMARY KEY, value BLOB) WITHOUT ROWID"
            )
        except sqlite3.DatabaseError as error:
            database.close()
            # SQLite does not wait for a lock where two processes make the file at the same time.
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
            time.sleep(0.01)
            continue
        return database
