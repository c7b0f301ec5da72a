"""Training curves as trainers leave them behind: one JSON object a line, or a Trainer's state.

Reads ``loss.jsonl`` or ``metrics.jsonl`` (``{"step": 10, "loss": ..., ...}``), or the
``log_history`` of the newest ``trainer_state.json`` under the folder.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from feedback.errors import InputError

__all__ = ["Curve", "read_curves"]

Curve = tuple[list[float], list[float]]
"""Steps and values."""


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return every logged number of a training run as a curve over steps; empty if none is there.

    Raises:
        InputError: a log file is damaged.
    """
    curves: dict[str, Curve] = {}
    for row in _rows(folder):
        step = row.get("step", row.get("global_step"))
        if not isinstance(step, int | float):
            continue
        for key, value in row.items():
            if key in ("step", "global_step", "epoch") or not _is_number(value):
                continue
            steps, values = curves.setdefault(key, ([], []))
            steps.append(float(step))
            values.append(float(value))
    return curves


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _rows(folder: Path) -> list[dict[str, Any]]:
    logs = [folder / name for name in ("loss.jsonl", "metrics.jsonl")]
    for metrics in (path for path in logs if path.is_file()):
        rows = []
        for number, line in enumerate(metrics.read_text(encoding="utf-8").splitlines(), start=1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except ValueError as error:
                    raise InputError("not a JSON line", path=metrics, line=number) from error
        return rows
    states = sorted(folder.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    if not states:
        return []
    try:
        history = json.loads(states[-1].read_text(encoding="utf-8"))["log_history"]
    except (ValueError, KeyError) as error:
        raise InputError("not a trainer's state", path=states[-1]) from error
    return list(history)
