"""Plain pairs: JSON lines with a prompt, two completions and what a judge said, columns by name.

A row is ``a`` shown before ``b`` with a verdict; the other order is another row, or another column.
Rows may have texts, or only the names of who wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from feedback.errors import InputError
from feedback.import_sources import rows_of
from feedback.importing import ImportOptions, Judged, completion_of, verdict_of
from feedback.records import Completion, GoldPair, Outcome, PromptText, Verdict, content_id

__all__ = ["read_pairs"]

Label = Literal["a", "b", "tie"]


class _Row(NamedTuple):
    """A row as its columns are named."""

    values: dict[str, Any]
    options: ImportOptions
    number: int

    @property
    def path(self) -> Path:
        return self.options.source

    def column(self, name: str) -> Any:
        """Return the value of the column that ``--column-NAME`` names; None where it is absent."""
        return self.values.get(getattr(self.options, f"column_{name}"))


def read_pairs(options: ImportOptions) -> Iterator[Judged]:
    """Yield the rows of a plain file.

    Raises:
        InputError: a row has no completions, no judge or no verdict at all; names file and line.
    """
    for number, values in rows_of(options):
        yield _judged(_Row(values, options, number))


def _judged(row: _Row) -> Judged:
    prompt: PromptText = row.column("prompt") or ""
    name = row.column("id")
    prompt_id = str(name) if name is not None else content_id(prompt)
    sides = [_side(row, "a"), _side(row, "b")]
    ids = (sides[0].completion_id, sides[1].completion_id)
    if ids[0] == ids[1]:
        raise InputError("both completions are the same", path=row.path, line=row.number)
    gold = _gold(row, prompt_id, ids)
    verdicts = [
        verdict
        for suffix, swapped in (("", False), ("_swapped", True))
        if (verdict := _verdict(row, suffix, prompt_id, ids, swapped=swapped)) is not None
    ]
    if not verdicts and not gold:
        raise InputError(
            f"no column {row.options.column_verdict!r}, {row.options.column_probability!r} or "
            f"{row.options.column_gold!r} (name yours with --column-verdict and so on)",
            path=row.path,
            line=row.number,
        )
    meta = row.values.get("meta")
    return Judged(
        prompt_id=prompt_id,
        prompt=prompt,
        completions=[side for side in sides if side.completion],
        verdicts=verdicts,
        gold=gold,
        meta=meta if isinstance(meta, dict) else {},
    )


def _side(row: _Row, side: str) -> Completion:
    text, model = row.column(side), row.column(f"model_{side}")
    if isinstance(text, str):
        return completion_of(text, str(model) if model is not None else "unknown")
    if model is None:
        column = getattr(row.options, f"column_{side}")
        raise InputError(
            f"no text in column {column!r} and no model in "
            f"{getattr(row.options, f'column_model_{side}')!r} (name yours with --column-{side})",
            path=row.path,
            line=row.number,
        )
    return Completion(completion_id=str(model), completion="", model=str(model))


def _place(row: _Row, word: Any) -> Literal["first", "second", "tie"] | None:
    """Return which of the words a value is; None: none of them."""
    text = str(word).strip()
    options = row.options
    if text in options.words_first:
        return "first"
    if text in options.words_second:
        return "second"
    return "tie" if text in options.words_tie else None


def _verdict(
    row: _Row, suffix: str, prompt_id: str, ids: tuple[str, str], *, swapped: bool
) -> Verdict | None:
    word, p = row.column(f"verdict{suffix}"), row.column(f"probability{suffix}")
    if word is None and p is None:
        return None
    judge = row.column("judge") or row.options.judge
    if not judge:
        raise InputError(
            f"no column {row.options.column_judge!r}: say who judged with --judge",
            path=row.path,
            line=row.number,
        )
    shown = (ids[1], ids[0]) if swapped else ids
    p_a = _probability(row, p)
    winner, outcome = _winner(row, word, p_a, ids, shown)
    return verdict_of(
        judge=str(judge),
        template=row.options.template or "imported",
        prompt_id=prompt_id,
        shown=shown,
        winner=winner,
        outcome=outcome,
        p_first=None if p_a is None else 1 - p_a if swapped else p_a,
        reply="" if word is None else str(word),
    )


def _probability(row: _Row, value: Any) -> float | None:
    if value is None:
        return None
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise InputError(f"{value!r} is not a probability of a", path=row.path, line=row.number)
    return float(value)


def _winner(
    row: _Row, word: Any, p_a: float | None, ids: tuple[str, str], shown: tuple[str, str]
) -> tuple[str | None, Outcome | None]:
    if word is None:
        assert p_a is not None
        return (None, "tie") if p_a == 0.5 else (ids[0] if p_a > 0.5 else ids[1], None)
    place = _place(row, word)
    if place is None:
        return None, "unparsed"
    if place == "tie":
        return None, "tie"
    named = shown if row.options.verdict_names == "slot" else ids
    return named[0 if place == "first" else 1], None


def _gold(row: _Row, prompt_id: str, ids: tuple[str, str]) -> list[GoldPair]:
    word, votes = row.column("gold"), row.column("votes")
    if word is None:
        return []
    label = _label(row, word)
    return [
        GoldPair(
            prompt_id=prompt_id,
            a=ids[0],
            b=ids[1],
            label=label,
            votes=[_label(row, vote) for vote in votes or []],
        )
    ]


def _label(row: _Row, word: Any) -> Label:
    place = _place(row, word)
    if place is None:
        raise InputError(
            f"gold label {word!r} is none of the words for first, second or tie "
            "(--words-first and so on)",
            path=row.path,
            line=row.number,
        )
    labels: dict[str, Label] = {"first": "a", "second": "b", "tie": "tie"}
    return labels[place]
