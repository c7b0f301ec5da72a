"""Recorded verdicts answer again, so that every label can be recomputed without a call.

A question is known by its id, a hash of what is asked: with the same candidates, template and
settings the same verdicts are found. How they are read (``min_mass``, a newer parser) may differ.
A question that was not recorded gets an error that names it.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from feedback.backends import Capabilities, JudgeCall, JudgeReply, SampleCall, SampleReply
from feedback.config import EngineOptions
from feedback.errors import InputError, ShardError
from feedback.records import JudgeIdentity, Verdict, decode
from feedback.shards import MANIFEST, shard_paths
from feedback.verdict_index import FAILED

__all__ = ["ReplayBackend", "open_engine"]


class _Head(msgspec.Struct):
    verdict_id: str
    judge: JudgeIdentity


class ReplayBackend:
    """The verdicts of one folder as a judge; its identity is that of the recorded judge.

    Args:
        folder: of the verdicts.
        model: whose verdicts, where the folder holds those of several judges.

    Raises:
        ShardError: the folder holds no verdicts, or those of several judges.
        InputError: a row is damaged.
    """

    def __init__(self, folder: Path, *, model: str = ""):
        self.folder = folder
        self._paths = shard_paths(folder, "verdicts")
        # Of a run at work, or killed: its last row may be torn.
        self._growing = not (folder / MANIFEST).is_file()
        if (folder / FAILED).is_file():
            self._paths.append(folder / FAILED)
        self._files: dict[int, BinaryIO] = {}
        self._database = sqlite3.connect("")
        self._database.execute(
            "CREATE TABLE place (id BLOB PRIMARY KEY, file INTEGER, start INTEGER, size INTEGER)"
            " WITHOUT ROWID"
        )
        judges = {judge for number in range(len(self._paths)) for judge in self._scan(number)}
        if len(judges) > 1:
            judges = {judge for judge in judges if judge.model == model} or judges
        if len(judges) != 1:
            self._database.close()
            names = ", ".join(sorted(judge.model for judge in judges))
            raise ShardError(
                f"holds verdicts of several judges ({names}); name one as the model"
                if judges
                else "holds no verdicts to replay",
                path=folder,
            )
        self.identity = judges.pop()

    def _scan(self, number: int) -> set[JudgeIdentity]:
        decoder = msgspec.json.Decoder(_Head)
        path = self._paths[number]
        judges, rows, start = set(), [], 0
        with path.open("rb") as file:
            for line_number, line in enumerate(file, start=1):
                try:
                    head = decoder.decode(line)
                except msgspec.DecodeError as error:
                    if self._growing and not line.endswith(b"\n"):
                        break
                    raise InputError(
                        f"not a verdict row: {error}", path=path, line=line_number
                    ) from error
                judges.add(head.judge)
                rows.append((head.verdict_id.encode(), number, start, len(line)))
                start += len(line)
                if len(rows) >= 20_000:
                    self._database.executemany("INSERT OR IGNORE INTO place VALUES (?,?,?,?)", rows)
                    rows.clear()
        self._database.executemany("INSERT OR IGNORE INTO place VALUES (?, ?, ?, ?)", rows)
        return judges

    def prepare(self, labels: tuple[str, ...]) -> Capabilities:
        """Say what the recording can do; labels are checked reply by reply."""
        return Capabilities(logprobs=True, note=f"replies recorded in {self.folder}")

    def judge(self, calls: Iterable[JudgeCall]) -> Iterator[JudgeReply]:
        """Yield the recorded reply to each call."""
        for call in calls:
            found = self._database.execute(
                "SELECT file, start, size FROM place WHERE id = ?", (call.call_id.encode(),)
            ).fetchone()
            if found is None:
                error = f"question {call.call_id} is not recorded in {self.folder}"
                yield JudgeReply(call_id=call.call_id, error=error, attempts=0)
            else:
                yield _reply(call, self._read(*found))

    def _read(self, number: int, start: int, size: int) -> Verdict:
        if number not in self._files:
            self._files[number] = self._paths[number].open("rb")
        file = self._files[number]
        file.seek(start)
        return decode(file.read(size), Verdict)

    def sample(self, calls: Iterable[SampleCall]) -> Iterator[SampleReply]:
        """Refuse: verdicts hold no completions."""
        for call in calls:
            yield SampleReply(call_id=call.call_id, error="recorded verdicts cannot be sampled")

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()
        self._database.close()


def _reply(call: JudgeCall, verdict: Verdict) -> JudgeReply:
    """Return the reply that ``verdict`` was read from."""
    if verdict.outcome == "failed":
        return JudgeReply(
            call_id=call.call_id, text=verdict.reply, error=verdict.error or "failed when recorded"
        )
    logprobs = None
    if call.choices is not None and verdict.mass is not None:
        probs = verdict.probs or [0.0] * len(call.choices)
        if len(probs) != len(call.choices):
            error = f"recorded for {len(probs)} labels, asked for {len(call.choices)}"
            return JudgeReply(call_id=call.call_id, error=error)
        left_out = "missing_labels" in verdict.flags
        logprobs = {
            label: math.log(p * verdict.mass) if p * verdict.mass > 0 else -math.inf
            for label, p in zip(call.choices, probs, strict=True)
            if p > 0 or not left_out
        }
    refused = verdict.outcome == "refused" and verdict.error == "stopped by a content filter"
    reason = "content_filter" if refused else verdict.meta.get("finish_reason")
    return JudgeReply(
        call_id=call.call_id,
        text=verdict.reply,
        finish_reason=reason,
        choice_logprobs=logprobs,
        usage=verdict.usage,
        latency_s=verdict.latency_s,
        attempts=verdict.attempts,
    )


def check_options(options: EngineOptions) -> Path:
    """Return the folder that ``options.replay_from`` names.

    Raises:
        InputError: it is not named, or is no folder.
    """
    if options.replay_from is None:
        raise InputError("backend 'replay' needs replay_from: the verdict folder to answer from")
    folder = Path(options.replay_from)
    if not folder.is_dir():
        raise InputError("no such folder", path=folder)
    return folder


def open_engine(options: EngineOptions, path: str) -> ReplayBackend:
    """Open the folder that ``options.replay_from`` names.

    Raises:
        InputError: it is not named, or is no folder.
    """
    return ReplayBackend(check_options(options), model=options.model)
