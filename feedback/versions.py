"""What changed between two versions of a data set: rows, labels, and the judge's figures.

``rlaif diff v1/preferences v2/preferences``, or two publications:
``rlaif diff me/set@manifest-1234 me/set``
"""

from __future__ import annotations

import json
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from feedback.content import content_key, pair_sides
from feedback.errors import ShardError
from feedback.records import Preference, Ranking
from feedback.version_sources import Version, open_version

__all__ = ["DiffOptions", "Difference", "compare_versions", "run"]

# What differs between any two runs, and says nothing of their rows.
_NOISE = (
    "shards", "versions", "provenance.judging.versions", "provenance.sampling.versions", "rows",
    "gate.card", "gate.failed", "sources",
)  # fmt: skip
_NOISY_KEYS = (
    "manifest_sha256", "verdicts_manifest_sha256", "started", "out", "verdicts", "candidates",
    "candidates_sha256", "folder", "source",
)  # fmt: skip
_LONGEST = 60
Pair = tuple[Any, Any]


@dataclass(frozen=True, kw_only=True)
class DiffOptions:
    """What changed between two versions of a data set."""

    old: Path
    """The older version: a shard folder, a published folder, or user/name@TAG on the Hub."""
    new: Path
    """The newer version, likewise; without a TAG the Hub's latest."""
    config: str = "preferences"
    """Published versions: which rows to compare."""
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
    """Rows whose winner changed: of a pair, of a ranking, of a call."""
    moved: int = 0
    """Rows of the same winner (or of no winner) whose label, scores or order changed."""
    mean_change: float = 0.0
    """Mean absolute change of P(first chosen preferred) over pairs in both versions."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    """Manifest hash or tag of either side."""
    card: dict[str, Pair] = field(default_factory=dict)
    """Figures of the report cards that differ, as (old, new); each value, low, high, n."""
    settings: dict[str, Pair] = field(default_factory=dict)
    """Manifest entries that differ, as (old, new): judge, template, gate, counts, recipe."""


def run(options: DiffOptions) -> None:
    """Print the difference."""
    from rich import print as say
    from rich.markup import escape

    found = compare_versions(
        options.old, options.new, config=options.config, examples=options.examples
    )
    if options.json:
        say(escape(json.dumps(asdict(found), indent=2, ensure_ascii=False)))
        return
    for line in _lines(found):
        say(escape(line))


def _lines(found: Difference) -> Iterator[str]:
    yield f"{found.kind}: {found.rows_old:,} rows -> {found.rows_new:,} rows"
    for name in ("same", "added", "removed", "flipped", "moved"):
        rows = found.examples.get(name, [])
        count = getattr(found, name)
        more = ", ..." if count > len(rows) else ""
        yield f"  {name}: {count:,}" + (f" ({', '.join(rows)}{more})" if rows else "")
    if found.kind == "preferences":
        yield f"  mean change of the probability: {found.mean_change:.4f}"
    if found.card:
        yield "report card:"
    for name, (old, new) in found.card.items():
        yield f"  {name}: {_estimate(old)} -> {_estimate(new)}"
    if found.settings:
        yield "made with:"
    for name, (old, new) in found.settings.items():
        yield f"  {name}: {_short(old)} -> {_short(new)}"


def _estimate(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "not measured"
    known = figure["low"] is not None and figure["high"] is not None
    span = f" [{figure['low']:.3f}, {figure['high']:.3f}]" if known else ""
    return f"{figure['value']:.3f}{span}"


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def compare_versions(
    old: Path, new: Path, *, config: str = "preferences", examples: int = 5
) -> Difference:
    """Compare two finished versions by content.

    Args:
        old: a shard folder, a published folder, or ``user/name[@TAG]`` on the Hub.
        new: likewise.
        config: which rows of published versions.
        examples: rows to name for each kind of change.

    Raises:
        InputError: one is missing, unfinished, or they hold different kinds of rows.
        BackendError: the Hub cannot be reached.
    """
    with tempfile.TemporaryDirectory(prefix="rlaif-diff-") as scratch:
        before = open_version(old, config=config, scratch=Path(scratch) / "old")
        after = open_version(new, config=config, scratch=Path(scratch) / "new")
        if before.kind != after.kind:
            raise ShardError(f"holds {after.kind}, while {old} holds {before.kind}", path=new)
        found = Difference(kind=before.kind)
        found.versions = {"old": before.identity, "new": after.identity}
        found.card = _changed(_figures(before), _figures(after))
        found.settings = _changed(_settings(before), _settings(after))
        store = sqlite3.connect(Path(scratch) / "rows.sqlite")
        try:
            _compare(store, before, after, found, examples)
        finally:
            store.close()
    return found


def _compare(
    store: sqlite3.Connection, before: Version, after: Version, found: Difference, examples: int
) -> None:
    store.execute("CREATE TABLE old (key TEXT PRIMARY KEY, id TEXT, label TEXT, seen INTEGER)")
    for row in before.rows():
        found.rows_old += 1
        values = (content_key(row), row.prompt_id, json.dumps(_label(row)))
        store.execute("INSERT OR REPLACE INTO old VALUES (?, ?, ?, 0)", values)
    total, pairs = 0.0, 0
    for row in after.rows():
        found.rows_new += 1
        key = content_key(row)
        known = store.execute("SELECT label FROM old WHERE key = ?", (key,)).fetchone()
        if known is None:
            _note(found, "added", row.prompt_id, examples)
            continue
        store.execute("UPDATE old SET seen = 1 WHERE key = ?", (key,))
        was, now = json.loads(known[0]), json.loads(json.dumps(_label(row)))
        if isinstance(row, Preference):
            total += abs(was["p"] - now["p"])
            pairs += 1
        if was == now:
            found.same += 1
        else:
            _note(found, "flipped" if _flipped(was, now) else "moved", row.prompt_id, examples)
    found.mean_change = total / pairs if pairs else 0.0
    for (prompt_id,) in store.execute("SELECT id FROM old WHERE seen = 0 ORDER BY rowid"):
        _note(found, "removed", prompt_id, examples)


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
        scores = sorted(zip(row.completions, row.scores, strict=True), key=lambda one: one[0])
        return {"ranking": order, "scores": scores}
    if hasattr(row, "completions"):
        return {"completions": sorted(one.completion for one in row.completions)}
    names = ("outcome", "winner", "ranking", "scores")
    return {name: getattr(row, name, None) for name in names}


def _flipped(was: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Return whether the winner changed: neither side a tie, and not the same."""
    if "p" in was:
        return bool((was["p"] - 0.5) * (now["p"] - 0.5) < 0)
    if "winner" in was:
        return was["winner"] != now["winner"] and None not in (was["winner"], now["winner"])
    before, after = was.get("ranking") or [[]], now.get("ranking") or [[]]
    return not set(before[0]) & set(after[0])


def _note(found: Difference, name: str, row_id: str, examples: int) -> None:
    setattr(found, name, getattr(found, name) + 1)
    shown = found.examples.setdefault(name, [])
    if len(shown) < examples:
        shown.append(row_id)


def _changed(left: Mapping[str, Any], right: Mapping[str, Any]) -> dict[str, Pair]:
    """Return the entries that differ, as (left, right); what one side lacks is None."""
    return {
        name: (left.get(name), right.get(name))
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name)
    }


def _figures(version: Version) -> dict[str, Any]:
    """Return the report card's figures by ``judge: figure``, of every source of a merged set."""
    figures: dict[str, Any] = {}
    for manifest in _with_sources(version.manifests):
        summary = ((manifest.get("gate") or {}).get("card") or {}).get("summary") or {}
        for arm, known in summary.items():
            figures |= {f"{arm}: {name}": figure for name, figure in known.items()}
    return figures


def _with_sources(manifests: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for manifest in manifests:
        yield manifest
        yield from _with_sources(manifest.get("sources") or [])


def _settings(version: Version) -> dict[str, Any]:
    """Return how the rows were made, nested entries by dotted name."""
    flat: dict[str, Any] = {}
    for number, manifest in enumerate(version.manifests):
        prefix = f"source {number + 1}: " if len(version.manifests) > 1 else ""
        for name, value in _flat(manifest).items():
            if not name.startswith(_NOISE) and name.rpartition(".")[2] not in _NOISY_KEYS:
                flat[prefix + name] = value
        flat |= {
            f"{prefix}sources: {source['folder']}": source["manifest_sha256"]
            for source in manifest.get("sources") or []
        }
    return flat


def _flat(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
