"""A recipe that makes a folder's rows again, as TOML, from what its manifests recorded.

Only what differs from the defaults is written, folders are left to the wiring of ``rlaif run``, and
nothing of the machine that ran it is: a local path keeps its last part, an address is left out.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import Any

from feedback.provenance import Origin

__all__ = ["recipe_table", "recipe_text"]

# Where things lay, where they were asked, and how fast: not what the rows depend on.
_LEFT_OUT = {
    "out", "candidates", "verdicts", "base_url", "api_key_env", "cache", "on_change", "dry_run",
    "concurrency", "timeout_s", "max_retries", "requests_per_minute", "tokens_per_minute",
    "headers", "max_cost", "max_calls", "replay_from", "prices", "gpu_memory", "output",
    "save_every", "keep_checkpoints", "report_to", "workers", "resume", "reference_cache",
    "peak_tflops",
}  # fmt: skip
# Said even where it is the default: a reader should not have to know it.
_ALWAYS = ("model", "template")
_PATHS = ("/", "./", "../", "~", "\\")


def recipe_text(origin: Origin) -> str:
    """Return [run] and the tables of the stages recorded; empty where none is."""
    from feedback.judge_options import JudgeOptions
    from feedback.pairing import PairOptions
    from feedback.sampling import SampleOptions

    stages = (
        ("sample", origin.sampling, SampleOptions),
        ("judge", origin.judging, JudgeOptions),
        ("pair", origin.pairing, PairOptions),
    )
    known = {
        stage: recipe_table(stage, record["recipe"], kind)
        for stage, record, kind in stages
        if record.get("stage") == stage and "recipe" in record
    }
    if not known:
        return ""
    names = [name for name in ("sample", "judge", "report", "pair") if name in (*known, "report")]
    run = list(_table("run", {"folder": "runs/again", "stages": names}))
    return "\n".join("\n".join([*lines, ""]) for lines in (run, *known.values()))


def recipe_table(stage: str, recipe: Mapping[str, Any], kind: type[Any]) -> list[str]:
    """Return the lines of one stage's table: what differs from the defaults of ``kind``."""
    return list(_table(stage, _changed(recipe, kind)))


def _changed(recipe: Mapping[str, Any], kind: type[Any], instance: Any = None) -> dict[str, Any]:
    """Return the entries of a recipe that differ from the defaults.

    Args:
        recipe: as recorded.
        kind: the options class.
        instance: what the class around it has by default; then an entry must equal both that and
            the class's own default to be left out, for either may fill a gap.
    """
    kept: dict[str, Any] = {}
    for entry in dataclasses.fields(kind):
        value = recipe.get(entry.name)
        if entry.name in _LEFT_OUT or value is None:
            continue
        default = _default(entry)
        around = default if instance is None else getattr(instance, entry.name)
        if dataclasses.is_dataclass(default) and isinstance(value, Mapping):
            value = _changed(value, type(default), around)
            same = not value
        else:
            same = value == _plain(default) == _plain(around)
        if not same or entry.name in _ALWAYS:
            kept[entry.name] = value
    return kept


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default is not dataclasses.MISSING:
        return entry.default
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return None


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _table(name: str, values: Mapping[str, Any]) -> Iterator[str]:
    yield f"[{name}]"
    for key, value in values.items():
        if not isinstance(value, Mapping) and not _tables(value):
            yield f"{key} = {_value(value)}"
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _table(f"{name}.{key}", value)
        for item in _tables(value):
            yield f"[[{name}.{key}]]"
            yield from list(_table("", item))[1:]


def _tables(value: Any) -> list[Mapping[str, Any]]:
    """Return the tables of a list of tables; of anything else, none."""
    if not isinstance(value, list):
        return []
    return [
        {key: inner for key, inner in item.items() if inner is not None and key not in _LEFT_OUT}
        for item in value
        if isinstance(item, Mapping)
    ]


def _value(value: Any) -> str:
    """Return a TOML value: JSON's own form, which TOML reads for all that a recipe holds."""
    if isinstance(value, str) and value.startswith(_PATHS):
        value = value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
