"""Calls that failed in earlier runs of a folder, remembered until the folder is complete.

A run asks them again and starts ``failed.jsonl`` anew. A ranking that chooses its pairs by the
answers must know all the same which pairs it had begun: else it would leave them and ask others.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from feedback.records import Verdict
from feedback.shards import whole_lines, writing
from feedback.verdict_index import FAILED, SeenIds, VerdictIndex

__all__ = ["BegunCalls"]

_BEGUN = ".begun.jsonl"


class _Id(msgspec.Struct):
    verdict_id: str


class BegunCalls:
    """The failed calls of a folder; open it before ``failed.jsonl`` is written anew."""

    def __init__(self, folder: Path):
        self._path = folder / _BEGUN
        _gather(folder / FAILED, self._path)
        self._index = VerdictIndex(self._path)

    def verdicts(self, prompt_id: str) -> list[Verdict]:
        """Return the failed calls about a prompt; some may have been answered since."""
        return self._index.verdicts(prompt_id)

    def forget(self) -> None:
        """Remove the record: the folder is complete, and its ``failed.jsonl`` says what is left."""
        self._index.close()
        self._path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file; the record stays for the next run."""
        self._index.close()


def _gather(failed: Path, begun: Path) -> None:
    """Add what ``failed`` holds to ``begun``, each call once; a kill leaves the old or the new."""
    if not failed.is_file() or not failed.stat().st_size:
        return
    decoder = msgspec.json.Decoder(_Id)
    seen = SeenIds()
    temporary = begun.with_name(f"{begun.name}.{os.getpid()}.tmp")
    with writing(begun), temporary.open("wb") as gathered:
        for path in (begun, failed):
            # A torn last line is of a call that no answer came to: it is open in any case.
            for line in whole_lines(path):
                if seen.add(decoder.decode(line).verdict_id, 0) is None:
                    gathered.write(line)
        gathered.flush()
        os.fsync(gathered.fileno())
    seen.close()
    temporary.replace(begun)
