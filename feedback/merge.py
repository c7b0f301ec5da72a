"""Join shard folders of one kind: duplicates dropped, conflicts kept as votes, splits by prompt.

Rows are brought together by content through a temporary SQLite file, so that memory does not grow
with their number; ``merge_rows`` makes one row of those with the same content. A prompt has one id
in the whole, however its sources called it, so that a split by prompt holds. The manifest keeps
each source's own.

``rlaif merge a/preferences b/preferences --out merged``
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from feedback.config import recipe_of
from feedback.content import content_key, prompt_key
from feedback.errors import RecipeError, ShardError
from feedback.filtering import row_filter
from feedback.gate import merged_gate
from feedback.merge_rows import (
    merge_candidates,
    merge_gold,
    merge_preferences,
    merge_rankings,
    merge_verdicts,
)
from feedback.records import Preference, Ranking, Verdict, content_id, decode, encode
from feedback.shards import (
    KINDS,
    ShardWriter,
    folder_kind,
    manifest_sha256,
    read_manifest,
    read_rows,
    shard_paths,
)

__all__ = ["MergeOptions", "merge", "run", "split_of"]

# In a folder while it is being merged into; a killed merge leaves it behind, and starts over.
_UNFINISHED = ".merging"


@dataclass(frozen=True, kw_only=True)
class MergeOptions:
    """Join shard folders of one kind."""

    sources: tuple[Path, ...]
    """Finished shard folders, all of the same kind."""
    out: Path
    """Folder for the merged shards; with --splits, each split is a folder inside."""
    where: str = ""
    """Only rows for which this expression over their fields holds, such as 'p_chosen > 0.7'."""
    splits: dict[str, float] = field(default_factory=dict)
    """Shares by split name, such as train 0.9 test 0.1; a prompt is in one split only."""
    most_per_source: int | None = None
    """At most so many rows from each folder, drawn by seed."""
    most_per_judge: int | None = None
    """At most so many rows of each judge, drawn by seed."""
    seed: int = 0
    """Seed of splits and draws."""

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if self.splits and abs(sum(self.splits.values()) - 1) > 1e-6:
            raise RecipeError(f"the shares of --splits sum to {sum(self.splits.values()):g}, not 1")
        if not self.sources:
            raise RecipeError("--sources names no folder")


def run(options: MergeOptions) -> None:
    """Merge, and say what became of the rows."""
    from rich import print as say

    counts = merge(options)
    for name, count in sorted(counts.items()):
        say(f"{name}: {count:,}")


def merge(options: MergeOptions) -> Counter[str]:
    """Write the merged folder (or one folder per split); return counts of what was done.

    Raises:
        ShardError: a source is missing, unfinished, or of another kind than the first.
        RecipeError: the filter expression is wrong.
    """
    kind = _common_kind(options.sources)
    if options.most_per_judge is not None and kind not in ("preferences", "rankings", "verdicts"):
        raise RecipeError(f"--most-per-judge: {kind} have no judge; use --most-per-source")
    passes = row_filter(options.where, KINDS[kind])
    counts: Counter[str] = Counter()
    names = list(options.splits) or [""]
    with ExitStack() as stack:
        # The writers come first: a folder that is in use or of another kind costs no work.
        writers = {
            name: stack.enter_context(_fresh_writer(options.out / name, kind)) for name in names
        }
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlaif-merge-"))
        store = sqlite3.connect(Path(folder) / "rows.sqlite")
        stack.callback(store.close)
        _collect(store, options, kind, passes, counts)
        for row in _merged_rows(store, kind, counts):
            name = split_of(row.prompt_id, options.splits, seed=options.seed)
            writers[name].append(row)
            counts["rows written" + (f" to {name}" if name else "")] += 1
        for name, writer in writers.items():
            writer.finish(_info(options, counts, name), count=_bucket(kind))
            (writer.folder / _UNFINISHED).unlink()
    return counts


def _fresh_writer(folder: Path, kind: str) -> ShardWriter[Any]:
    """Return the writer of an empty folder; what a killed merge has left in it goes.

    Raises:
        ShardError: the folder holds rows that no merge has left.
    """
    mark = folder / _UNFINISHED
    if any(shard_paths(folder, other) for other in KINDS) and not mark.is_file():
        raise ShardError("already holds rows; give an empty folder", path=folder)
    writer = ShardWriter[Any](folder, kind)
    mark.touch()
    writer.close()
    for path in shard_paths(folder, kind):
        path.unlink()
    return ShardWriter[Any](folder, kind)


def _bucket(kind: str) -> Callable[[Any], str] | None:
    """Return what names a row's bucket in the manifest's counts, as the kind's own stage does."""
    if kind == "preferences":
        return lambda row: "tie" if row.tie else "decided"
    return (lambda row: str(row.outcome)) if kind == "verdicts" else None


def _common_kind(sources: tuple[Path, ...]) -> str:
    kinds = {source: folder_kind(source) for source in sources}
    first = kinds[sources[0]]
    for source, kind in kinds.items():
        read_manifest(source)
        if kind != first:
            raise ShardError(f"holds {kind}, while {sources[0]} holds {first}", path=source)
    return first


def _collect(
    store: sqlite3.Connection,
    options: MergeOptions,
    kind: str,
    passes: Any,
    counts: Counter[str],
) -> None:
    """Put every row that passes into the store, with its key and a seeded place in the draw."""
    store.execute(
        "CREATE TABLE rows (key TEXT, prompt TEXT, source INTEGER, judge TEXT, draw TEXT, row BLOB)"
    )

    def rows() -> Iterator[tuple[str, str, int, str, str, bytes]]:
        row: Any
        for number, source in enumerate(options.sources):
            for place, row in enumerate(read_rows(source, KINDS[kind])):
                counts["rows read"] += 1
                if not passes(row):
                    counts["rows left out by --where"] += 1
                    continue
                key = content_key(row)
                draw = content_id(options.seed, key, number, place)
                yield key, _prompt_key(row), number, _judge_of(row), draw, encode(row)

    store.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)", rows())
    for column, most in (("source", options.most_per_source), ("judge", options.most_per_judge)):
        if most is not None:
            removed = store.execute(
                f"DELETE FROM rows WHERE rowid IN (SELECT rowid FROM (SELECT rowid, row_number() "
                f"OVER (PARTITION BY {column} ORDER BY draw) AS place FROM rows) WHERE place > ?)",
                (most,),
            ).rowcount
            counts[f"rows left out by --most-per-{column}"] += removed
    store.execute("CREATE INDEX by_key ON rows (key)")
    store.execute("CREATE INDEX by_prompt ON rows (prompt)")
    store.commit()


def _prompt_key(row: Any) -> str:
    """Return what names a row's prompt by content; a verdict knows only its prompt's id."""
    return prompt_key(row.prompt) if hasattr(row, "prompt") else str(row.prompt_id)


def _judge_of(row: Any) -> str:
    """Return the judge that ``--most-per-judge`` counts; empty where a row has none."""
    if isinstance(row, Verdict):
        return row.judge.model
    return str(row.source.get("judge", "")) if isinstance(row, Preference | Ranking) else ""


def _merged_rows(store: sqlite3.Connection, kind: str, counts: Counter[str]) -> Iterator[Any]:
    """Yield one row per content, in the order in which contents were first seen."""
    order = store.execute("SELECT key, prompt FROM rows GROUP BY key ORDER BY min(rowid)")
    for key, prompt in order:
        found = store.execute("SELECT row FROM rows WHERE key = ? ORDER BY rowid", (key,))
        rows: list[Any] = [decode(line, KINDS[kind]) for (line,) in found]
        if len(rows) > 1 and kind in _MERGERS:
            row = _MERGERS[kind](rows, counts)
        else:
            counts["duplicates"] += len(rows) - 1
            row = rows[0]
        yield _with_one_name(store, row, prompt, counts)


_MERGERS: dict[str, Callable[[list[Any], Counter[str]], Any]] = {
    "preferences": merge_preferences,
    "rankings": merge_rankings,
    "candidates": merge_candidates,
    "verdicts": merge_verdicts,
    "gold": merge_gold,
}


def _with_one_name(store: sqlite3.Connection, row: Any, prompt: str, counts: Counter[str]) -> Any:
    """Return the row under the id that its prompt has in the first row that holds it."""
    if not isinstance(row, Preference | Ranking):
        return row
    (line,) = store.execute(
        "SELECT row FROM rows WHERE prompt = ? ORDER BY rowid LIMIT 1", (prompt,)
    ).fetchone()
    name = decode(line, type(row)).prompt_id
    if name == row.prompt_id:
        return row
    counts["rows whose prompt had another id"] += 1
    return replace(row, prompt_id=name, source={**row.source, "prompt_id": row.prompt_id})


def split_of(prompt_id: str, splits: dict[str, float], *, seed: int = 0) -> str:
    """Return the split of a prompt: always the same one for the same id, seed and shares."""
    if not splits:
        return ""
    place = int(content_id("split", seed, prompt_id, length=12), 16) / 16**12
    name, total = "", 0.0
    for name, share in splits.items():
        total += share
        if place < total:
            return name
    return name


def _info(options: MergeOptions, counts: Counter[str], split: str) -> dict[str, Any]:
    """Return what the manifest records: all that each source's own manifest says but its files."""
    sources = []
    for source in options.sources:
        manifest = read_manifest(source)
        kept = {key: value for key, value in manifest.items() if key != "shards"}
        sources.append({"folder": source.name, "manifest_sha256": manifest_sha256(source), **kept})
    return {
        "stage": "merge",
        "split": split or None,
        "sources": sources,
        "merged": dict(counts),
        "gate": merged_gate([source.get("gate") for source in sources]),
        "recipe": recipe_of(options),
    }
