"""What people said: an append-only journal, and the gold pairs that follow from it.

``labels.jsonl`` takes one line per answer, on disk before the next pair is shown. Nothing in it is
ever changed: an undo is a line of its own. ``gold-00000.jsonl`` is derived from it and replaced as
a whole after every answer, so it can be read at any time; the manifest is written at the end.
"""

from __future__ import annotations

import datetime
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import filelock
import msgspec

from feedback.annotate_sample import Item, PairKey
from feedback.errors import InputError, ShardError
from feedback.records import GoldPair, encode
from feedback.shards import (
    MANIFEST,
    SCHEMA_VERSION,
    file_sha256,
    shard_paths,
    write_json,
    write_text,
    writing,
)

__all__ = ["LABELS", "AnnotationLog", "Answer", "Entry", "gold_of"]

LABELS = "labels.jsonl"
Answer = Literal["a", "b", "tie", "skip"]
Vote = Literal["a", "b", "tie"]


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the journal. ``a`` and ``b`` are completion ids in sorted order."""

    time: str
    annotator: str
    prompt_id: str
    a: str
    b: str
    label: Literal["a", "b", "tie", "skip", "undo"]
    """``undo`` takes back the annotator's last answer, which was about this pair."""
    left: Literal["a", "b"]
    """Which of the two stood left (on a phone: first)."""
    seconds: float | None = None
    """From showing the pair to the answer."""

    @property
    def key(self) -> PairKey:
        """Return the pair."""
        return self.prompt_id, self.a, self.b


class AnnotationLog:
    """The journal of one folder, locked while it is open.

    Args:
        folder: created if missing.
        items: the pairs of this sitting; their strata and weights go into the gold rows.

    Raises:
        ShardError: another process writes the folder, or it holds gold that was not made here.
        InputError: a line of the journal is damaged.
    """

    def __init__(self, folder: Path, items: Sequence[Item]) -> None:
        self.folder = folder
        self._path = folder / LABELS
        self._items = {item.key: item for item in items}
        self._stacks: dict[str, list[Entry]] = {}
        self._voters: dict[PairKey, set[str]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if shard_paths(folder, "gold") and not self._path.is_file():
            raise ShardError(
                "holds gold pairs that were not labelled here; choose another folder with --out",
                path=folder,
            )
        self._lock = filelock.FileLock(folder / ".lock", timeout=0)
        try:
            self._lock.acquire()
        except filelock.Timeout:
            raise ShardError("another run is writing this folder", path=folder) from None
        try:
            for entry in _read(self._path):
                self._take(entry)
            (folder / MANIFEST).unlink(missing_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        except BaseException:
            self._lock.release()
            raise

    def _take(self, entry: Entry) -> None:
        stack = self._stacks.setdefault(entry.annotator, [])
        voters = self._voters.setdefault(entry.key, set())
        if entry.label != "undo":
            stack.append(entry)
        elif stack:
            stack.pop()
        if entry.label in ("a", "b", "tie"):
            voters.add(entry.annotator)
        else:
            voters.discard(entry.annotator)

    def answers(self, annotator: str) -> dict[PairKey, Entry]:
        """Return the annotator's standing answers, skips included."""
        return {entry.key: entry for entry in self._stacks.get(annotator, [])}

    def votes(self, key: PairKey, *, but: str) -> int:
        """Return how many others have labelled a pair; a skip is no label."""
        return len(self._voters.get(key, set()) - {but})

    def last(self, annotator: str) -> Entry | None:
        """Return the answer that an undo would take back."""
        stack = self._stacks.get(annotator)
        return stack[-1] if stack else None

    def append(self, entry: Entry) -> None:
        """Write one line, wait until it is on disk, and bring the gold up to date.

        Raises:
            ShardError: the disk refused; the answer does not count.
        """
        line = msgspec.json.encode(entry) + b"\n"
        with writing(self._path):
            before = os.fstat(self._file).st_size
            try:
                if os.write(self._file, line) < len(line):
                    raise OSError(28, "only a part was written")
                os.fsync(self._file)
            except OSError:
                os.ftruncate(self._file, before)
                raise
        self._take(entry)
        self._write_gold()

    def gold(self) -> list[GoldPair]:
        """Return the gold pairs as they stand."""
        return gold_of(self._stacks, self._items)

    def _write_gold(self) -> None:
        path = self.folder / "gold-00000.jsonl"
        with writing(path):
            write_text(path, "".join(encode(row).decode() + "\n" for row in self.gold()))

    def close(self, **info: Any) -> None:
        """Write the manifest and release the folder."""
        try:
            rows = self.gold()
            self._write_gold()
            path = self.folder / "gold-00000.jsonl"
            write_json(
                self.folder / MANIFEST,
                {
                    "schema_version": SCHEMA_VERSION,
                    "kind": "gold",
                    "stage": "annotate",
                    "rows": len(rows),
                    "counts": dict(Counter(row.label for row in rows)),
                    "shards": [
                        {
                            "file": path.name,
                            "rows": len(rows),
                            "bytes": path.stat().st_size,
                            "sha256": file_sha256(path),
                        }
                    ],
                    "annotators": {name: self.summary(name) for name in sorted(self._stacks)},
                    **info,
                },
            )
        finally:
            os.close(self._file)
            self._lock.release()

    def summary(self, annotator: str) -> dict[str, Any]:
        """Return one person's counts: labels, skips, and how often the left text was chosen."""
        stack = self._stacks.get(annotator, [])
        counts = Counter(entry.label for entry in stack)
        chosen = [entry.label == entry.left for entry in stack if entry.label in ("a", "b")]
        return {
            "labels": len(stack) - counts["skip"],
            "ties": counts["tie"],
            "skips": counts["skip"],
            "left_chosen": round(sum(chosen) / len(chosen), 4) if chosen else None,
        }


def _read(path: Path) -> Iterable[Entry]:
    """Return the journal's whole lines; a torn last one, which only a crash leaves, is cut off."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    whole = content.rpartition(b"\n")[0] + b"\n" if b"\n" in content else b""
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    decoder = msgspec.json.Decoder(Entry)
    entries = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            entries.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise InputError(f"not a label: {error}", path=path, line=number) from error
    return entries


def gold_of(stacks: dict[str, list[Entry]], items: dict[PairKey, Item]) -> list[GoldPair]:
    """Return one gold row per labelled pair: the label most people gave, and everybody's vote.

    Where two labels are equally frequent the row's label is a tie. The gap is the share of votes
    for one side less that for the other, where several people voted.
    """
    voted: dict[PairKey, list[tuple[str, Vote]]] = {}
    for name in sorted(stacks):
        for entry in stacks[name]:
            if entry.label in ("a", "b", "tie"):
                voted.setdefault(entry.key, []).append((name, entry.label))
    rows = []
    for key, votes in sorted(voted.items()):
        labels = [label for _, label in votes]
        item = items.get(key)
        rows.append(
            GoldPair(
                prompt_id=key[0],
                a=key[1],
                b=key[2],
                label=_majority(labels),
                votes=labels,
                annotators=[name for name, _ in votes],
                gap=abs(labels.count("a") - labels.count("b")) / len(labels)
                if len(labels) > 1
                else None,
                meta={} if item is None else {"stratum": item.stratum, "weight": item.weight},
            )
        )
    return rows


def _majority(labels: Sequence[Vote]) -> Vote:
    tally = Counter(labels).most_common()
    return "tie" if len(tally) > 1 and tally[0][1] == tally[1][1] else tally[0][0]


def now() -> str:
    """Return the time as the journal writes it (UTC, seconds)."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
