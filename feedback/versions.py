"""What changed between two versions of a data set: rows, labels, and the judge's figures.

``rlaif diff --old v1/preferences --new v2/preferences``
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from feedback.content import content_key, pair_sides
from feedback.errors import ShardError
from feedback.records import Preference, Ranking
from feedback.shards import KINDS, folder_kind, manifest_sha256, read_manifest, read_rows

__all__ = ["DiffOptions", "Difference", "compare_versions", "run"]


@dataclass(frozen=True, kw_only=True)
class DiffOptions:
    """What changed between two versions of a shard folder."""

    old: Path
    """Shard folder of the older version."""
    new: Path
    """Shard folder of the newer version."""
    examples: int = 5
    """Rows to name for each kind of change."""
    json: bool = False
    """Print JSON instead of words."""


@dataclass(slots=True)
class Difference:
    """Counts of changes, a few rows of each, and figures that differ."""

    kind: str
    rows_old: int = 0
    rows_new: int = 0
    same: int = 0
    added: int = 0
    removed: int = 0
    flipped: int = 0
    """Preferences whose winner changed."""
    moved: int = 0
    """Rows of the same winner (or of no winner) whose label, scores or order changed."""
    mean_change: float = 0.0
    """Mean absolute change of P(first chosen preferred) over pairs in both versions."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    manifests: dict[str, str] = field(default_factory=dict)
    figures: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """Manifest entries that differ, as (old, new): judge, template, gate, counts, recipe."""


def run(options: DiffOptions) -> None:
    """Print the difference."""
    from rich import print as say
    from rich.markup import escape

    found = compare_versions(options.old, options.new, examples=options.examples)
    if options.json:
        say(escape(json.dumps(asdict(found), indent=2, ensure_ascii=False)))
        return
    say(f"{found.kind}: {found.rows_old:,} rows -> {found.rows_new:,} rows")
    for name in ("same", "added", "removed", "flipped", "moved"):
        rows = ", ".join(found.examples.get(name, []))
        say(f"  {name}: {getattr(found, name):,}" + (f" ({escape(rows)} ...)" if rows else ""))
    if found.kind == "preferences":
        say(f"  mean change of the probability: {found.mean_change:.4f}")
    for name, (old, new) in found.figures.items():
        say(f"  {name}: {escape(str(old))} -> {escape(str(new))}")


def compare_versions(old: Path, new: Path, *, examples: int = 5) -> Difference:
    """Compare two finished shard folders by content.

    Raises:
        ShardError: one is unfinished, or they hold different kinds of rows.
    """
    kind = folder_kind(old)
    if folder_kind(new) != kind:
        raise ShardError(f"holds {folder_kind(new)}, while {old} holds {kind}", path=new)
    found = Difference(kind=kind)
    found.manifests = {"old": manifest_sha256(old), "new": manifest_sha256(new)}
    found.figures = _figures(read_manifest(old), read_manifest(new))
    with tempfile.TemporaryDirectory(prefix="rlaif-diff-") as folder:
        store = sqlite3.connect(Path(folder) / "rows.sqlite")
        store.execute("CREATE TABLE old (key TEXT PRIMARY KEY, id TEXT, label TEXT, seen INTEGER)")
        row: Any
        for row in read_rows(old, KINDS[kind]):
            found.rows_old += 1
            values = (content_key(row), row.prompt_id, json.dumps(_label(row)))
            store.execute("INSERT OR REPLACE INTO old VALUES (?, ?, ?, 0)", values)
        _compare_rows(store, new, found, examples)
        gone = store.execute("SELECT id FROM old WHERE seen = 0")
        for (prompt_id,) in gone:
            _note(found, "removed", prompt_id, examples)
        store.close()
    return found


def _compare_rows(store: sqlite3.Connection, new: Path, found: Difference, examples: int) -> None:
    total, pairs = 0.0, 0
    row: Any
    for row in read_rows(new, KINDS[found.kind]):
        found.rows_new += 1
        key = content_key(row)
        before = store.execute("SELECT label FROM old WHERE key = ?", (key,)).fetchone()
        if before is None:
            _note(found, "added", row.prompt_id, examples)
            continue
        store.execute("UPDATE old SET seen = 1 WHERE key = ?", (key,))
        was, now = json.loads(before[0]), _label(row)
        if isinstance(row, Preference):
            total += abs(was["p"] - now["p"])
            pairs += 1
        if was == now:
            found.same += 1
        elif isinstance(row, Preference) and (was["p"] - 0.5) * (now["p"] - 0.5) < 0:
            _note(found, "flipped", row.prompt_id, examples)
        else:
            _note(found, "moved", row.prompt_id, examples)
    found.mean_change = total / pairs if pairs else 0.0


def _label(row: Any) -> dict[str, Any]:
    """Return what a row says about its content, in a form that does not depend on the row's order.

    A preference's ``p`` is P(the side that sorts first is preferred).
    """
    if isinstance(row, Preference):
        chosen, rejected = pair_sides(row)
        p = row.p_chosen if chosen <= rejected else 1 - row.p_chosen
        return {"p": p, "tie": row.tie, "weight": row.weight}
    if isinstance(row, Ranking):
        order = [sorted(row.completions[index] for index in group) for group in row.ranking]
        scores = dict(zip(row.completions, row.scores, strict=True))
        return {"ranking": order, "scores": sorted(scores.items())}
    outcome = getattr(row, "outcome", None)
    return {"outcome": outcome, "winner": getattr(row, "winner", None)}


def _note(found: Difference, name: str, row_id: str, examples: int) -> None:
    setattr(found, name, getattr(found, name) + 1)
    shown = found.examples.setdefault(name, [])
    if len(shown) < examples:
        shown.append(row_id)


def _figures(old: dict[str, Any], new: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the manifest entries that differ, nested ones by dotted name."""
    left, right = _flat(old), _flat(new)
    skipped = ("shards", "versions", "recipe.out", "recipe.verdicts", "recipe.candidates")
    return {
        name: (left.get(name), right.get(name))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name) and not name.startswith(skipped)
    }


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
