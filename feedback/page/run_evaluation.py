"""What came of a run: the evaluation's figures, and replies before and after to read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup

from feedback.errors import InputError
from feedback.intervals import Estimate
from feedback.page.components import FigureRow, Section, figure_table, headline, side_by_side
from feedback.page.text import conversation

__all__ = ["load_json", "result_sections"]


class _Words(NamedTuple):
    label: str
    meaning: str
    percent: bool = False
    fair: float | None = None


# By the path's last words inside evaluation.json; {0} is the word before them (a judge's name).
_WORDS = {
    "win_rate": _Words(
        "Win rate by {0}",
        "Share of prompts on which this judge, asked in both orders, prefers the new policy; a "
        "level pair counts half.",
        percent=True,
        fair=0.5,
    ),
    "preference": _Words(
        "Mean probability by {0}", "Mean P(new policy preferred) over both orders.", True, 0.5
    ),
    "consistent_win_rate": _Words(
        "Win rate where {0} is consistent",
        "Of prompts on which both orders name the same policy.",
        percent=True,
        fair=0.5,
    ),
    "at_equal_length": _Words(
        "Win rate at equal length by {0}",
        "Predicted for replies of the same length: what is not won by writing more.",
        percent=True,
        fair=0.5,
    ),
    "preference_at_equal_length": _Words(
        "Mean probability at equal length by {0}",
        "The mean probability, predicted for replies of the same length.",
        percent=True,
        fair=0.5,
    ),
    "gold.before": _Words("Gold check before", "Mean score of the starting policy's replies."),
    "gold.after": _Words("Gold check after", "Mean score of the new policy's replies."),
    "gold.gain": _Words("Gold check, gain", "After less before, on the same prompts.", fair=0.0),
    "characters_before": _Words(
        "Characters before", "Mean length of the starting policy's replies."
    ),
    "characters_after": _Words("Characters after", "Mean length of the new policy's replies."),
    "ended_share_before": _Words("Ended by itself, before", "Replies that were not cut off.", True),
    "ended_share_after": _Words("Ended by itself, after", "Replies that were not cut off.", True),
    "per_token": _Words("KL per token", "Distance from the starting policy, in nats."),
    "per_completion": _Words("KL per reply", "The same over a whole reply, in nats."),
    "tokens_per_completion": _Words("Tokens per reply", "Mean length in tokens."),
}


def load_json(path: Path) -> dict[str, Any] | None:
    """Return a JSON object from a file, or None where there is no file.

    Raises:
        InputError: the file is not JSON.
    """
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", path=path) from error
    return value if isinstance(value, dict) else None


def result_sections(run_folder: Path, examples: int) -> list[Section]:
    """Return the evaluation's figures and examples; nothing where no evaluation ran."""
    evaluation = load_json(run_folder / "evaluation" / "evaluation.json")
    if evaluation is None:
        return []
    figures = list(_estimates(evaluation))
    if not figures:
        return []
    names = ("win_rate", "gain")
    top = [row for row in figures if row.name.split(".")[-1] in names][:4]
    blocks = [headline(top)] if top else []
    if rest := [row for row in figures if row not in top]:
        blocks.append(figure_table(rest))
    policies = [str(evaluation[key]) for key in ("policy", "start") if evaluation.get(key)]
    against = f"{policies[0]} against {policies[1]}. " if len(policies) == 2 else ""
    sections = [
        Section(
            "result",
            "What came of it",
            f"{against}The new policy against the one it started from, on prompts that training "
            "never saw, by judges and checks that labelled nothing.",
            blocks,
        )
    ]
    read = _examples(run_folder / "evaluation" / "rows.jsonl", examples)
    if read:
        sections.append(
            Section(
                "before-after",
                "Before and after, to read",
                "One prompt that the new policy wins most clearly, one in the middle, and one "
                "that it loses most clearly; nothing is picked by hand.",
                read,
            )
        )
    return sections


def _estimates(value: Any, words: tuple[str, ...] = ()) -> Iterator[FigureRow]:
    """Yield every number with an interval inside an evaluation, named by its path."""
    if not isinstance(value, dict):
        return
    if isinstance(value.get("value"), int | float) and "low" in value and "high" in value:
        yield _figure(value, words)
        return
    for key, inner in value.items():
        yield from _estimates(inner, (*words, str(key)))


def _figure(value: dict[str, Any], words: tuple[str, ...]) -> FigureRow:
    estimate = Estimate(
        float(value["value"]),
        value.get("low"),
        value.get("high"),
        int(value.get("n", 0)),
        int(value.get("prompts", value.get("n", 0))),
        str(value.get("method", "")),
    )
    known = _WORDS.get(words[-1]) or _WORDS.get(".".join(words[-2:]))
    before = words[-2] if len(words) > 1 else ""
    if known is None:
        label = " ".join(words).replace("_", " ")
        known = _Words(label[:1].upper() + label[1:], str(value.get("meaning", "")))
    bounds = [bound for bound in (estimate.value, estimate.low, estimate.high) if bound is not None]
    return FigureRow(
        label=known.label.format(before),
        estimate=estimate,
        meaning=known.meaning,
        scale=(0.0, 1.0) if known.percent else _scale(min(bounds), max(bounds)),
        fair=known.fair,
        percent=known.percent,
        name=".".join(words),
    )


def _scale(low: float, high: float) -> tuple[float, float]:
    reach = max(abs(low), abs(high)) * 1.25 or 1.0
    return (-reach, reach) if low < 0 else (0.0, reach)


def _examples(path: Path, count: int) -> list[Markup]:
    if not path.is_file() or not count:
        return []
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            known = [p for p in row["p_new"].values() if p is not None]
        except (ValueError, KeyError, AttributeError) as error:
            raise InputError("not an evaluation row", path=path, line=number) from error
        if known:
            rows.append((float(np.mean(known)), row))
    if not rows:
        return []
    rows.sort(key=lambda entry: -entry[0])
    places = sorted({int(place) for place in np.linspace(0, len(rows) - 1, count)})
    return [
        side_by_side(
            conversation(row["prompt"]),
            [("before", str(row["start"])), ("after", str(row["new"]))],
            remark=f"P(after preferred) = {p:.3f}, mean over judges and orders.",
            mark=1 if p > 0.5 else 0 if p < 0.5 else None,
        )
        for p, row in (rows[place] for place in places)
    ]
