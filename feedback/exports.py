"""Preference shards in the forms that other trainers and tools read.

One function per form, each from one ``Preference`` to one row of that form; ``rlaif export`` writes
the file and, where the other side wants one, the entry that registers it. Forms without a place for
soft labels lose them, which is counted and said: a tie or a probability cannot be passed on by
leaving it out.

* ``trl``: prompt, chosen, rejected, for TRL's DPOTrainer and RewardTrainer; JSONL or Parquet
* ``openrlhf``: the same columns as message lists (``--apply_chat_template``)
* ``llama-factory``: ShareGPT ranking rows and the ``dataset_info.json`` entry
* ``axolotl``: ``chat_template.default`` preference rows and the YAML that names their fields
* ``argilla``: records with the judge's label as a suggestion for people to review

``benchmarks/export_readers.py`` reads each form back by its project's own loader.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from feedback.errors import InputError
from feedback.records import Message, Preference, PromptText, content_id, prompt_messages
from feedback.shards import read_manifest, read_rows, write_json, write_text

__all__ = ["ExportOptions", "argilla_record", "axolotl_row", "export", "llama_factory_row",
           "message_row", "run"]  # fmt: skip

Form = Literal["trl", "openrlhf", "llama-factory", "axolotl", "argilla"]
_ASKS = ("user", "tool")
_SHAREGPT = {"user": "human", "assistant": "gpt", "system": "system", "tool": "observation"}


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Preferences in the form of another trainer or tool."""

    preferences: Path
    """Preference folder (from rlaif pair or rlaif merge)."""
    out: Path
    """Folder for the file, and for what registers it."""
    form: Form = "trl"
    """Who is to read it."""
    file: Literal["jsonl", "parquet"] = "jsonl"
    """Kind of file; parquet for trl only."""
    name: str = "preferences"
    """Name of the data set, which names the file."""
    ties: Literal["drop", "keep"] = "drop"
    """These forms have no ties; keep writes a tie as if its chosen side had won."""
    min_p: float = 0.5
    """Leave out rows whose p_chosen is below this: none of these forms carries the doubt on."""
    margin: bool = False
    """trl, openrlhf: write the margin column, which their reward trainers take off the reward
    difference."""


def run(options: ExportOptions) -> None:
    """Export, and say what was written and what was lost."""
    from rich import print as say

    path, counts = export(options)
    say(f"{counts['written']:,} rows: {path}")
    for name, count in counts.items():
        if name != "written":
            say(f"  {name}: {count:,}")


def message_row(row: Preference, *, margin: bool = False) -> dict[str, Any]:
    """Return a row of TRL's conversational (or plain, where all is text) preference form."""
    exported: dict[str, Any] = {
        "prompt": row.prompt,
        "chosen": row.chosen,
        "rejected": row.rejected,
    }
    return exported | ({"margin": row.margin} if margin else {})


def openrlhf_row(row: Preference, *, margin: bool = False) -> dict[str, Any]:
    """Return a row with message lists throughout."""
    exported: dict[str, Any] = {
        "prompt": prompt_messages(row.prompt),
        "chosen": [_answer(row.chosen)],
        "rejected": [_answer(row.rejected)],
    }
    return exported | ({"margin": row.margin} if margin else {})


def llama_factory_row(row: Preference) -> dict[str, Any]:
    """Return a ShareGPT ranking row; a leading system message has a column of its own.

    Raises:
        InputError: user and assistant do not take turns, beginning and ending with the user;
            LLaMA-Factory would skip such a row.
    """
    messages = prompt_messages(row.prompt)
    system = messages[0]["content"] if messages[0]["role"] == "system" else ""
    turns = messages[1:] if messages[0]["role"] == "system" else messages
    if not turns or turns[-1]["role"] not in _ASKS:
        raise InputError(f"prompt {row.prompt_id!r} does not end with a user turn")
    if any((turn["role"] in _ASKS) != (place % 2 == 0) for place, turn in enumerate(turns)):
        raise InputError(
            f"in prompt {row.prompt_id!r} user and assistant do not take turns, which this form "
            "demands; leave it out with rlaif merge --where"
        )
    return {
        "conversations": [_sharegpt(turn) for turn in turns],
        "chosen": _sharegpt(_answer(row.chosen)),
        "rejected": _sharegpt(_answer(row.rejected)),
        "system": system,
    }


def axolotl_row(row: Preference) -> dict[str, Any]:
    """Return a row for axolotl's ``chat_template.default`` preference strategy."""
    return {
        "messages": prompt_messages(row.prompt),
        "chosen": _answer(row.chosen),
        "rejected": _answer(row.rejected),
    }


def argilla_record(row: Preference) -> dict[str, Any]:
    """Return a record with both responses in an order that does not give the label away."""
    key = content_id("argilla", row.prompt_id, _plain(row.chosen), _plain(row.rejected))
    first_is_chosen = int(key[0], 16) % 2 == 0
    sides = (row.chosen, row.rejected) if first_is_chosen else (row.rejected, row.chosen)
    value = "tie" if row.tie else "response_1" if first_is_chosen else "response_2"
    return {
        "id": key,
        "fields": {
            "prompt": prompt_messages(row.prompt),
            "response_1": _plain(sides[0]),
            "response_2": _plain(sides[1]),
        },
        "metadata": {"prompt_id": row.prompt_id, "p_chosen": row.p_chosen, "weight": row.weight},
        "suggestions": {
            "preference": {
                "value": value,
                "score": row.p_chosen,
                "agent": str(row.source.get("judge", "judge")),
            }
        },
    }


def _answer(text: PromptText) -> Message:
    if isinstance(text, str):
        return Message(role="assistant", content=text)
    if len(text) != 1:
        raise InputError("a completion of several turns has no place in this form")
    return text[0]


def _plain(text: PromptText) -> str:
    return text if isinstance(text, str) else "\n\n".join(turn["content"] for turn in text)


def _sharegpt(turn: Message) -> dict[str, str]:
    return {"from": _SHAREGPT.get(turn["role"], turn["role"]), "value": turn["content"]}


_FORMS: dict[type, str] = {str: "text", list: "messages"}
_ROWS: dict[str, Callable[[Preference], dict[str, Any]]] = {
    "llama-factory": llama_factory_row,
    "axolotl": axolotl_row,
    "argilla": argilla_record,
}


def export(options: ExportOptions) -> tuple[Path, Counter[str]]:
    """Write the file; return its path and counts of rows written, left out, and labels lost.

    Raises:
        InputError: the form cannot hold a row, or parquet was asked for another form than trl.
    """
    if options.file == "parquet" and options.form != "trl":
        raise InputError(f"form {options.form!r} is JSON; parquet is for form 'trl'")
    read_manifest(options.preferences)
    counts: Counter[str] = Counter()
    rows = _rows(options, counts)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.file == "parquet":
        path = options.out / f"{options.name}.parquet"
        _write_parquet(path, rows)
    else:
        path = options.out / f"{options.name}.jsonl"
        _write_lines(path, rows)
    _register(options)
    return path, counts


def _rows(options: ExportOptions, counts: Counter[str]) -> Iterator[dict[str, Any]]:
    form: type | None = None
    for row in read_rows(options.preferences, Preference):
        if row.tie and options.ties == "drop" and options.form != "argilla":
            counts["ties left out"] += 1
            continue
        if row.p_chosen < options.min_p:
            counts["left out by --min-p"] += 1
            continue
        if options.form != "argilla":
            counts["soft labels written as hard ones"] += row.p_chosen < 1
            counts["weights lost"] += row.weight != 1
        counts["written"] += 1
        if options.form == "trl":
            form = form or type(row.prompt)
            if not isinstance(row.prompt, form):
                raise InputError(
                    f"prompt {row.prompt_id!r} is {_FORMS[type(row.prompt)]} while others are "
                    f"{_FORMS[form]}, and a column has one type; use --form openrlhf, which writes "
                    "messages throughout"
                )
            yield message_row(row, margin=options.margin)
        elif options.form == "openrlhf":
            yield openrlhf_row(row, margin=options.margin)
        else:
            yield _ROWS[options.form](row)


def _write_lines(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    """Write JSONL so that the file is there whole or not at all."""
    with _whole(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not file.tell():
            raise InputError("no row is left to write", path=path)


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Yield where to write; the file takes its name at the end, and is gone after a failure."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], batch: int = 10_000) -> None:
    import itertools

    import pyarrow as pa
    from pyarrow import parquet

    with _whole(path) as temporary, contextlib.ExitStack() as stack:
        writer: Any = None
        while block := list(itertools.islice(rows, batch)):
            table = pa.Table.from_pylist(block, schema=None if writer is None else writer.schema)
            if writer is None:
                writer = parquet.ParquetWriter(temporary, table.schema, compression="zstd")
                stack.enter_context(writer)
            writer.write_table(table)
        if writer is None:
            raise InputError("no row is left to write", path=path)


def _register(options: ExportOptions) -> None:
    """Write what the other side needs to find the file."""
    if options.form == "llama-factory":
        entry = {
            "file_name": f"{options.name}.jsonl",
            "formatting": "sharegpt",
            "ranking": True,
            "columns": {
                "messages": "conversations",
                "chosen": "chosen",
                "rejected": "rejected",
                "system": "system",
            },
        }
        path = options.out / "dataset_info.json"
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_json(path, {**known, options.name: entry})
    if options.form == "axolotl":
        write_text(
            options.out / f"{options.name}.axolotl.yaml",
            "rl: dpo\ndatasets:\n"
            f"  - path: {options.name}.jsonl\n    ds_type: json\n    split: train\n"
            "    type: chat_template.default\n    field_messages: messages\n"
            "    field_chosen: chosen\n    field_rejected: rejected\n"
            "    message_property_mappings:\n      role: role\n      content: content\n",
        )
