"""The card's main figures for each value of a ``meta`` field: where is this judge weak?"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from feedback.agreement import accuracy_halves
from feedback.bias import prefer_longer
from feedback.errors import InputError, nearest
from feedback.figures import CardTable
from feedback.intervals import Resampler
from feedback.observations import Pairs
from feedback.position import order_consistency

__all__ = ["slice_fields", "slice_table"]

_MOST_VALUES = 20


def slice_fields(pairs: Pairs) -> list[str]:
    """Return the fields with 2 to 20 different values that most pairs have."""
    values: dict[str, Counter[str]] = {}
    for meta in pairs.meta:
        for key, value in meta.items():
            if isinstance(value, str | int | bool):
                values.setdefault(key, Counter())[str(value)] += 1
    return [
        key
        for key, counts in values.items()
        if 2 <= len(counts) <= _MOST_VALUES and counts.total() >= len(pairs) / 2
    ]


def slice_table(pairs: Pairs, field: str, resampler: Resampler) -> CardTable:
    """Return figures per value of ``field``, largest slices first.

    Raises:
        InputError: no pair has that field.
    """
    values = np.array([_word(meta.get(field)) for meta in pairs.meta], object)
    counts = Counter(value for value in values if value is not None)
    if not counts:
        known = sorted({key for meta in pairs.meta for key in meta})
        raise InputError(
            f"no row has a meta field {field!r}{nearest(field, known)}"
            f" (there are: {', '.join(known) or 'none'})"
        )
    gold = np.isfinite(pairs.gold).any()
    texts = np.isfinite(pairs.lengths).all(axis=1).any()
    columns = [field, "Pairs", "Same verdict in both orders"]
    columns += ["Longer preferred"] if texts else []
    columns += ["Accuracy"] if gold else []
    rows: list[list[Any]] = []
    for value, count in counts.most_common(_MOST_VALUES):
        part = pairs.take(values == value)
        row: list[Any] = [value, count, order_consistency(part)]
        row += [prefer_longer(part)] if texts else []
        row += [accuracy_halves(part, resampler)] if gold else []
        rows.append(row)
    return CardTable(name=f"slice:{field}", caption=f"By {field}", columns=columns, rows=rows)


def _word(value: Any) -> str | None:
    return None if value is None else str(value)
