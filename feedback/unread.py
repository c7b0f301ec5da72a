"""Options that would do nothing are errors: here stands who reads which.

An option that is silently left unread misleads: ``--engine.base-url`` without a backend would judge
with the embedded model. A table names, for each option that not everybody reads, who does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from feedback.config import ENDPOINTS, BackendName, EngineOptions
from feedback.errors import RecipeError

__all__ = [
    "BY_ANSWER",
    "BY_BACKEND",
    "BY_KIND",
    "BY_MODE",
    "ENGINE",
    "Reads",
    "check_engine",
    "engine_on",
    "refuse_unread",
]

_IN_PROCESS = ("transformers", "vllm")


class Reads(NamedTuple):
    """Who reads some options, by one property of a run."""

    property: str
    """Its name in messages."""
    change: str
    """What a user could change instead of leaving the option out."""
    options: Mapping[str, tuple[str, ...]]
    """Option to the values of the property under which it is read."""


ENGINE = Reads(
    "backend",
    "engine.backend",
    {
        "revision": (*_IN_PROCESS, *ENDPOINTS),
        "base_url": ENDPOINTS,
        "api_key_env": ENDPOINTS,
        "timeout_s": ENDPOINTS,
        "max_retries": ENDPOINTS,
        "concurrency": ("openai",),
        "requests_per_minute": ("openai",),
        "tokens_per_minute": ("openai",),
        "device": ("transformers",),
        "batch_tokens": ("transformers",),
        "dtype": _IN_PROCESS,
        "max_model_len": _IN_PROCESS,
        "lora": _IN_PROCESS,
        "trust_remote_code": _IN_PROCESS,
        "tensor_parallel": ("vllm",),
        "gpu_memory": ("vllm",),
        "enforce_eager": ("vllm",),
        "replay_from": ("replay",),
        "extra": (*_IN_PROCESS, *ENDPOINTS),
    },
)
BY_BACKEND = Reads("backend", "engine.backend", {"max_cost": ENDPOINTS, "prices": ENDPOINTS})
BY_KIND = Reads(
    "a template of kind",
    "the template",
    {
        "pairs": ("pairwise",),
        "pairs_per_prompt": ("pairwise",),
        "orders": ("pairwise", "listwise"),
    },
)
BY_MODE = Reads("a template of mode", "the template", {"min_mass": ("label",), "read": ("label",)})
BY_ANSWER = Reads(
    "answers that are",
    "temperature and template",
    {"repeats": ("sampled text", "an endpoint's")},
)


def refuse_unread(options: Any, reads: Reads, values: Collection[str], *, prefix: str = "") -> None:
    """Refuse options that differ from their defaults and that nobody reads.

    Args:
        options: an options dataclass.
        reads: who reads which of them.
        values: what the property is in this run; of several judges, each one's.
        prefix: put before an option's name.

    Raises:
        RecipeError: names the option, and what would read it.
    """
    defaults = _defaults(options)
    for name, readers in reads.options.items():
        if getattr(options, name) == defaults[name] or set(values) & set(readers):
            continue
        raise RecipeError(
            f"{prefix}{name} does nothing with {reads.property} {' and '.join(sorted(set(values)))}"
            f": it is for {' and '.join(readers)}. Leave it out, or change {reads.change}"
        )


def check_engine(options: EngineOptions, *, prefix: str = "engine.") -> None:
    """Refuse engine options that the engine does not read.

    Raises:
        RecipeError: names the option, and the engines that read it.
    """
    refuse_unread(options, ENGINE, [options.backend], prefix=prefix)


def engine_on(options: EngineOptions, backend: BackendName) -> EngineOptions:
    """Return the same model on another engine, without what only its own engine reads."""
    if options.backend == backend:
        return options
    defaults = _defaults(options)
    unread = [name for name, readers in ENGINE.options.items() if backend not in readers]
    kept = {
        name: options.extra[name] for name in ("chat_template_kwargs",) if name in options.extra
    }
    reset = {name: defaults[name] for name in unread}
    return dataclasses.replace(options, backend=backend, **{"extra": kept, **reset})


def _defaults(options: Any) -> dict[str, Any]:
    return {
        entry.name: entry.default
        if entry.default_factory is dataclasses.MISSING
        else entry.default_factory()
        for entry in dataclasses.fields(options)
    }
