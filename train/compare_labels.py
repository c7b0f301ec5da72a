"""Labels for a comparison's two experiments: by the gold check, and by a judge with a planted bias.

Both start from the run's own candidates and verdicts, so that prompts, completions and pairs are
the same and only the labels differ.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
import statistics
from pathlib import Path

from feedback.goldcheck import gold_score
from feedback.ordering import Orders
from feedback.records import Candidates, Preference, PromptText, Verdict, content_id
from feedback.shards import ShardWriter, read_manifest, read_rows, shard_paths

__all__ = ["bias_verdicts", "gold_preferences"]

# What a shard writer puts into a manifest by itself.
_WRITERS_OWN = {"schema_version", "kind", "rows", "counts", "shards", "versions"}


def _clear(folder: Path, kind: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for path in shard_paths(folder, kind):
        path.unlink()


def gold_preferences(candidates: Path, preferences: Path, out: Path) -> int:
    """Write the same pairs with the gold check's labels; return how many there are.

    The better score is preferred with probability 1, equal ones are a tie.
    """
    rows = {row.prompt_id: row for row in read_rows(candidates, Candidates)}
    _clear(out, "preferences")
    count = 0
    with ShardWriter[Preference](out, "preferences") as writer:
        for pair in read_rows(preferences, Preference):
            writer.append(_relabelled(pair, rows[pair.prompt_id]))
            count += 1
        writer.finish({"stage": "gold-labels"})
    return count


def _relabelled(pair: Preference, row: Candidates) -> Preference:
    scores = {
        entry.completion: gold_score(
            row.meta, entry.completion, ended=entry.finish_reason == "stop"
        )
        for entry in row.completions
    }
    first, second = scores[_text(pair.chosen)], scores[_text(pair.rejected)]
    changed = {"source": {"labels": "gold check"}, "p_raw": None}
    if first == second:
        return dataclasses.replace(pair, p_chosen=0.5, margin=0.0, tie=True, **changed)  # type: ignore[arg-type]
    pair = dataclasses.replace(pair, p_chosen=1.0, margin=1.0, tie=False, **changed)  # type: ignore[arg-type]
    if first > second:
        return pair
    return dataclasses.replace(pair, chosen=pair.rejected, rejected=pair.chosen)


def _text(completion: PromptText) -> str:
    return completion if isinstance(completion, str) else completion[-1]["content"]


def bias_verdicts(
    verdicts: Path, candidates: Path, out: Path, *, strength: float, orders: Orders = "both"
) -> None:
    """Copy a verdict folder with a preference for length planted into every pairwise verdict.

    ``logit P(first) += strength * (len(first) - len(second)) / deviation``, the deviation being
    that of all length differences, in characters.

    Args:
        verdicts: finished folder in which both orders were asked.
        candidates: what was judged.
        out: new folder; replaced.
        strength: log-odds per standard deviation of the difference in length.
        orders: ``one`` keeps one order of every pair, drawn by its ids, as a run that asked only
            one would have.
    """
    lengths = {
        (row.prompt_id, entry.completion_id): len(entry.completion)
        for row in read_rows(candidates, Candidates)
        for entry in row.completions
    }
    manifest = read_manifest(verdicts)
    info = {name: value for name, value in manifest.items() if name not in _WRITERS_OWN}
    rows = [row for row in read_rows(verdicts, Verdict) if row.outcome != "failed"]
    gaps = [_gap(row, lengths) for row in rows]
    deviation = statistics.pstdev(gaps) or 1.0
    shutil.rmtree(out, ignore_errors=True)
    with ShardWriter[Verdict](out, "verdicts") as writer:
        for row, gap in zip(rows, gaps, strict=True):
            if orders == "both" or _drawn(row):
                writer.append(_pulled(row, strength * gap / deviation))
        writer.finish(
            {**info, "orders": orders, "planted_length_bias": strength},
            count=lambda row: row.outcome,
        )


def _drawn(row: Verdict) -> bool:
    """Return whether this order of the pair is the one that is kept."""
    ids = sorted(row.shown)
    side = int(content_id("order", row.prompt_id, ids, length=8), 16) % 2
    return row.shown[0] == ids[side]


def _gap(row: Verdict, lengths: dict[tuple[str, str], int]) -> float:
    first, second = row.shown
    return float(lengths[row.prompt_id, first] - lengths[row.prompt_id, second])


def _pulled(row: Verdict, shift: float) -> Verdict:
    if row.probs is None or len(row.probs) != 2:
        return row
    p = min(max(row.probs[0], 1e-6), 1 - 1e-6)
    moved = 1 / (1 + math.exp(-(math.log(p / (1 - p)) + shift)))
    winner = row.shown[0] if moved > 0.5 else row.shown[1] if moved < 0.5 else None
    return dataclasses.replace(
        row,
        probs=[moved, 1 - moved],
        winner=winner,
        outcome="decided" if winner is not None else "tie",
        flags=[*row.flags, "planted length bias"],
    )
