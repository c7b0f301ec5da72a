"""Rows as typed Parquet records, and back: what a published config's columns are.

One config per kind of row, one column per field of the row type. Free-form fields (``source``,
``meta``, ``sampling``) are JSON columns, which `datasets` decodes to objects. Texts that are chat
messages in any row of a config are messages in all of them, since a column has one type.

``row_of(record_of(row, ...), config)`` gives the row back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import msgspec

from feedback.records import Preference, Verdict, prompt_messages
from feedback.shards import KINDS

__all__ = ["CONFIGS", "features", "holds_messages", "record_of", "row_of"]

CONFIGS = ("preferences", "rankings", "verdicts", "candidates")
"""What can be published; a config has the name of its kind of rows."""

_TEXTS = {"preferences": ("prompt", "chosen", "rejected"), "rankings": ("prompt",),
          "candidates": ("prompt",), "verdicts": ()}  # fmt: skip
_JSON = {"preferences": ("source",), "rankings": ("source",), "candidates": ("meta",),
         "verdicts": ("sampling", "meta")}  # fmt: skip
_encode = msgspec.json.Encoder()


def features(config: str, *, messages: bool) -> Any:
    """Return the ``datasets.Features`` of a config.

    Args:
        config: one of ``CONFIGS``.
        messages: prompts (and a pair's completions) are chat messages, not plain text.
    """
    from datasets import Features, Json, List, Value

    string, real, whole = Value("string"), Value("float64"), Value("int64")
    text = List({"role": string, "content": string}) if messages else string
    completion = {
        "completion_id": string,
        "completion": string,
        "model": string,
        "sampling": Json(),
        "finish_reason": string,
        "logp": real,
    }
    columns: dict[str, dict[str, Any]] = {
        "preferences": {
            "prompt": text,
            "chosen": text,
            "rejected": text,
            "margin": real,
            "p_chosen": real,
            "prompt_id": string,
            "tie": Value("bool"),
            "weight": real,
            "p_raw": real,
            "source": Json(),
        },
        "rankings": {
            "prompt": text,
            "completions": List(string),
            "scores": List(real),
            "ranking": List(List(whole)),
            "prompt_id": string,
            "comparisons": List({"i": whole, "j": whole, "p": real}),
            "source": Json(),
        },
        "candidates": {
            "prompt_id": string,
            "prompt": text,
            "completions": List(completion),
            "gold": string,
            "meta": Json(),
        },
        "verdicts": {
            "verdict_id": string,
            "prompt_id": string,
            "kind": string,
            "shown": List(string),
            "outcome": string,
            "judge": dict.fromkeys(("model", "revision", "endpoint", "setup"), string),
            "template": string,
            "template_sha256": string,
            "probs": List(real),
            "mass": real,
            "winner": string,
            "ranking": List(List(string)),
            "scores": List(real),
            "rationale": string,
            "reply": string,
            "sampling": Json(),
            "seed": whole,
            "repeat": whole,
            "usage": {"prompt_tokens": whole, "cached_tokens": whole, "completion_tokens": whole},
            "cost": real,
            "latency_s": real,
            "attempts": whole,
            "cached": Value("bool"),
            "flags": List(string),
            "principle": string,
            "error": string,
            "meta": Json(),
        },
    }
    return Features(columns[config])


def holds_messages(row: Any) -> bool:
    """Return whether any text of a row is a list of chat messages."""
    if isinstance(row, Preference):
        return not (
            isinstance(row.prompt, str)
            and isinstance(row.chosen, str)
            and isinstance(row.rejected, str)
        )
    return not isinstance(row, Verdict) and not isinstance(row.prompt, str)


def record_of(row: Any, config: str, *, messages: bool) -> dict[str, Any]:
    """Return a row as its config's record; JSON columns are encoded text.

    Args:
        row: of the kind that ``config`` names.
        config: one of ``CONFIGS``.
        messages: write texts as chat messages (a plain completion is one assistant turn).
    """
    record: dict[str, Any] = {
        entry.name: getattr(row, entry.name) for entry in dataclasses.fields(row)
    }
    if messages:
        for name in _TEXTS[config]:
            record[name] = _as_messages(record[name], "user" if name == "prompt" else "assistant")
    for name in _JSON[config]:
        record[name] = _encode.encode(record[name]).decode()
    if config == "rankings":
        record["comparisons"] = [{"i": i, "j": j, "p": p} for i, j, p in row.comparisons]
    elif config == "candidates":
        record["completions"] = [
            {**msgspec.to_builtins(entry), "sampling": _encode.encode(entry.sampling).decode()}
            for entry in row.completions
        ]
    elif config == "verdicts":
        record["judge"] = msgspec.to_builtins(row.judge)
        record["usage"] = msgspec.to_builtins(row.usage)
    return record


def _as_messages(text: Any, role: str) -> list[dict[str, str]]:
    if isinstance(text, str):
        return [{"role": role, "content": text}]
    return [{"role": turn["role"], "content": turn["content"]} for turn in prompt_messages(text)]


def row_of(record: Mapping[str, Any], config: str) -> Any:
    """Return the row of a published record; JSON columns may be decoded or not.

    Raises:
        ValueError: the record lacks a column, or one has the wrong type.
    """
    kind = KINDS[config]
    known = {entry.name for entry in dataclasses.fields(kind)}
    values = {name: value for name, value in record.items() if name in known}
    for name in _JSON[config]:
        values[name] = _decoded(values.get(name))
    if config == "rankings":
        found = values.get("comparisons") or []
        values["comparisons"] = [(entry["i"], entry["j"], entry["p"]) for entry in found]
    elif config == "candidates":
        values["completions"] = [
            {**entry, "sampling": _decoded(entry["sampling"])} for entry in values["completions"]
        ]
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        raise ValueError(str(error)) from error


def _decoded(value: Any) -> Any:
    return msgspec.json.decode(value) if isinstance(value, str | bytes) else value or {}
