"""Join shard folders of one kind: duplicates dropped, conflicts kept as votes, splits by prompt.

Rows are brought together by content through a temporary SQLite file, so that memory does not grow
with their number. Of preferences that name the same pair, those that agree on the winner are
duplicates, and those that do not are a conflict: both stay, as votes of one row whose probability
is their mean. Every merged row's ``source`` lists where each vote came from.

``rlaif merge --sources a/preferences b/preferences --out merged``
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from feedback.config import recipe_of
from feedback.content import content_key, pair_sides
from feedback.errors import RecipeError, ShardError
from feedback.filtering import row_filter
from feedback.gate import merged_gate
from feedback.records import Candidates, Preference, content_id, decode, encode, normalise_text
from feedback.shards import (
    KINDS,
    ShardWriter,
    folder_kind,
    manifest_sha256,
    read_manifest,
    read_rows,
)

__all__ = ["MergeOptions", "merge", "merge_preferences", "run", "split_of"]


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
    passes = row_filter(options.where, KINDS[kind])
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        # The writers come first: a folder that is in use or of another kind costs no work.
        names = list(options.splits) or [""]
        writers: dict[str, ShardWriter[Any]] = {
            name: stack.enter_context(ShardWriter(options.out / name, kind)) for name in names
        }
        for writer in writers.values():
            if any(True for _ in writer.existing()):
                raise ShardError("already holds rows; give an empty folder", path=writer.folder)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlaif-merge-"))
        store = sqlite3.connect(Path(folder) / "rows.sqlite")
        stack.callback(store.close)
        _collect(store, options, kind, passes, counts)
        for row in _merged_rows(store, kind, counts):
            name = split_of(row.prompt_id, options.splits, seed=options.seed)
            writers[name].append(row)
            counts["rows written" + (f" to {name}" if name else "")] += 1
        for name, writer in writers.items():
            writer.finish(_info(options, counts, name))
    return counts


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
    store.execute("CREATE TABLE rows (key TEXT, source INTEGER, judge TEXT, draw TEXT, row BLOB)")

    def rows() -> Iterator[tuple[str, int, str, str, bytes]]:
        row: Any
        for number, source in enumerate(options.sources):
            for place, row in enumerate(read_rows(source, KINDS[kind])):
                counts["rows read"] += 1
                if not passes(row):
                    counts["rows left out by --where"] += 1
                    continue
                key = content_key(row)
                draw = content_id(options.seed, key, number, place)
                yield key, number, _judge_of(row), draw, encode(row)

    store.executemany("INSERT INTO rows VALUES (?, ?, ?, ?, ?)", rows())
    for column, most in (("source", options.most_per_source), ("judge", options.most_per_judge)):
        if most is not None:
            removed = store.execute(
                f"DELETE FROM rows WHERE rowid IN (SELECT rowid FROM (SELECT rowid, row_number() "
                f"OVER (PARTITION BY {column} ORDER BY draw) AS place FROM rows) WHERE place > ?)",
                (most,),
            ).rowcount
            counts[f"rows left out by --most-per-{column}"] += removed
    store.execute("CREATE INDEX by_key ON rows (key)")
    store.commit()


def _judge_of(row: Any) -> str:
    if isinstance(row, Candidates) or not hasattr(row, "source"):
        return str(row.judge.model) if hasattr(row, "judge") else ""
    return str(row.source.get("judge", ""))


def _merged_rows(store: sqlite3.Connection, kind: str, counts: Counter[str]) -> Iterator[Any]:
    """Yield one row per content, in the order in which contents were first seen."""
    order = store.execute("SELECT key, count(*) FROM rows GROUP BY key ORDER BY min(rowid)")
    for key, number in order:
        found = store.execute("SELECT row FROM rows WHERE key = ? ORDER BY rowid", (key,))
        rows: list[Any] = [decode(line, KINDS[kind]) for (line,) in found]
        counts["duplicates"] += number - 1
        if kind == "preferences" and number > 1:
            yield merge_preferences(rows, counts)
        elif kind == "candidates" and number > 1:
            yield _merge_candidates(rows)
        else:
            yield rows[0]


def merge_preferences(rows: list[Preference], counts: Counter[str]) -> Preference:
    """Return one row for preferences of the same pair; contradictions become votes.

    The probability of the first row's chosen side is averaged over the rows, by weight; where the
    mean falls below one half the sides change places.
    """
    first = rows[0]
    sides = pair_sides(first)
    votes, total, mass = [], 0.0, 0.0
    for row in rows:
        p = row.p_chosen if pair_sides(row) == sides else 1 - row.p_chosen
        votes.append({"p_first_chosen": p, "tie": row.tie, "weight": row.weight, **row.source})
        total += p * row.weight
        mass += row.weight
    decided = {p > 0.5 for vote in votes if (p := float(vote["p_first_chosen"])) != 0.5}
    if len(decided) < 2 and len({round(float(vote["p_first_chosen"]), 12) for vote in votes}) == 1:
        return first
    counts["conflicts, kept as votes" if len(decided) > 1 else "agreeing labels, averaged"] += 1
    p = total / mass if mass else 0.5
    chosen, rejected = (
        (first.chosen, first.rejected) if p >= 0.5 else (first.rejected, first.chosen)
    )
    p = max(p, 1 - p)
    source = {**first.source, "votes": votes}
    return replace(
        first, chosen=chosen, rejected=rejected, p_chosen=p, margin=2 * p - 1, p_raw=None,
        tie=all(row.tie for row in rows), weight=max(row.weight for row in rows), source=source,
    )  # fmt: skip


def _merge_candidates(rows: list[Candidates]) -> Candidates:
    """Return one row with every completion of the prompt once."""
    seen: set[str] = set()
    completions = []
    for completion in (one for row in rows for one in row.completions):
        text = normalise_text(completion.completion)
        if text not in seen:
            seen.add(text)
            completions.append(completion)
    return replace(rows[0], completions=completions)


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
