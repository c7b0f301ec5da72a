"""What tells one judge or policy from another of the same name: everything that shapes its replies.

Two servers on one host, two adapters over one model and two sets of request fields answer
differently under one model name. All of it goes, as a fingerprint, into the identity that verdict
ids, cached replies and ``run.json`` are made of. Known before an engine is opened. What only makes
an engine faster (concurrency, memory, devices) is left out, so that a run can go on with less.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import SplitResult

from feedback.backends.http import OPENAI_URL, split_url
from feedback.backends.opening import local_revision, resolve_model
from feedback.config import ENDPOINTS, EngineOptions
from feedback.records import JudgeIdentity, content_id

__all__ = ["endpoint_name", "engine_record", "identity_of", "reply_settings"]

# Arguments of the in-process engines that set speed and memory, not what is said.
_SPEED = frozenset(
    {
        "async_scheduling",
        "cpu_offload_gb",
        "device_map",
        "disable_log_stats",
        "enable_chunked_prefill",
        "enable_prefix_caching",
        "kv_cache_memory_bytes",
        "low_cpu_mem_usage",
        "max_num_batched_tokens",
        "max_num_seqs",
        "swap_space",
    }
)


def identity_of(options: EngineOptions, *, revision: str | None = None) -> JudgeIdentity:
    """Return who answers, as verdicts record it.

    Args:
        options: of the engine.
        revision: what the engine found the model to be; None: what the options say.
    """
    settings = reply_settings(options)
    return JudgeIdentity(
        model=options.model,
        revision=revision or options.revision,
        endpoint=endpoint_name(options),
        setup=content_id(settings, length=16) if settings else None,
    )


def endpoint_name(options: EngineOptions) -> str | None:
    """Return the name of an endpoint's server: its host, or what ``extra.server`` says."""
    if options.backend not in ENDPOINTS:
        return None
    return options.extra.get("server") or _url(options).hostname or ""


def engine_record(options: EngineOptions) -> dict[str, Any]:
    """Return whose completions a folder holds, as ``run.json`` says it.

    Raises:
        BackendError: ``base_url`` is no http(s) URL, or there is no embedded model of that name.
    """
    found = {
        "model": options.model,
        "revision": options.revision,
        "files": local_revision(resolve_model(options.model)),
        "endpoint": endpoint_name(options),
        **reply_settings(options),
    }
    return {key: value for key, value in found.items() if value}


def reply_settings(options: EngineOptions) -> dict[str, Any]:
    """Return what shapes the replies beside model, revision and host; empty where nothing does.

    Recorded verdicts (``replay``) say themselves whose they are.
    """
    if options.backend == "replay":
        return {}
    found = _of_endpoint(options) if options.backend in ENDPOINTS else _of_process(options)
    return {key: value for key, value in found.items() if value}


def _of_endpoint(options: EngineOptions) -> dict[str, Any]:
    # One judge, asked now or in a batch: openai and batch are not told apart.
    url = _url(options)
    return {
        "port": None if options.extra.get("server") else url.port,
        "path": None if url.path.rstrip("/") in ("", "/v1") else url.path.rstrip("/"),
        "body": _plain(options.extra.get("body")),
    }


def _of_process(options: EngineOptions) -> dict[str, Any]:
    extra = {key: value for key, value in options.extra.items() if key not in _SPEED}
    return {
        "backend": options.backend,
        "dtype": options.dtype,
        "adapter": options.lora and (local_revision(options.lora) or options.lora),
        "extra": _plain(extra),
    }


def _url(options: EngineOptions) -> SplitResult:
    return split_url(options.base_url or OPENAI_URL)


def _plain(value: Any) -> Any:
    """Return a value as JSON holds it; a script may hand over objects, which have their repr."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, str | int | float) else repr(value)
