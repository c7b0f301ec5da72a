"""Recipes and engine options: typed dataclasses, TOML on disk, unknown keys are errors.

A recipe is one TOML file with a table per stage; ``rlaif STAGE --recipe FILE`` takes that table as
defaults, and options on the command line win. The string under each field is the help text.
"""

from __future__ import annotations

import dataclasses
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, Union
from urllib.parse import urlsplit, urlunsplit

from feedback.errors import RecipeError, nearest

__all__ = [
    "ENDPOINTS",
    "BackendName",
    "EngineOptions",
    "above",
    "at_least",
    "build_options",
    "load_recipe",
    "option_values",
    "recipe_of",
    "recipe_table",
    "required_fields",
]

Options = TypeVar("Options")


BackendName = Literal["transformers", "openai", "vllm", "batch", "replay"]
ENDPOINTS: tuple[BackendName, ...] = ("openai", "batch")
"""Engines that send requests to a server, which may cost money; the others run in this process."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which model runs, and on which engine."""

    backend: BackendName = "transformers"
    """Engine: transformers and vllm run in process; openai is any OpenAI-compatible endpoint; batch
    is the OpenAI Batch API; replay answers from recorded verdicts."""
    model: str = "pocket:judge"
    """Model name or folder, or the embedded pocket:policy, pocket:judge or pocket:second-judge."""
    revision: str | None = None
    """Model revision (commit or tag) on the Hub."""
    base_url: str | None = None
    """Endpoint of an OpenAI-compatible server; None: the provider's own."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; the key itself is never an option."""
    device: str = "auto"
    """Device of the transformers engine: auto, cpu, cuda, cuda:1."""
    dtype: str = "auto"
    """Weights' type: auto, float32, bfloat16, float16."""
    batch_tokens: int = 16384
    """Tokens per forward pass of the transformers engine; on a CPU judging takes at most 2048."""
    concurrency: int = 256
    """Most requests in flight to an endpoint; adapts downwards on errors and latency."""
    timeout_s: float = 120.0
    """Seconds before one request counts as failed and is tried again."""
    max_retries: int = 6
    """Tries after the first before a call counts as failed."""
    requests_per_minute: float | None = None
    """Request limit of the endpoint; None: no limit on our side."""
    tokens_per_minute: float | None = None
    """Token limit of the endpoint; None: no limit on our side."""
    tensor_parallel: int = 1
    """GPUs per model copy (vllm)."""
    gpu_memory: float = 0.85
    """Share of GPU memory that vllm may take."""
    max_model_len: int | None = None
    """Longest prompt plus reply in tokens; None: the model's own limit."""
    lora: str | None = None
    """Folder of a LoRA adapter to load over the model (vllm, transformers)."""
    enforce_eager: bool = False
    """Skip graph capture and compilation (vllm); starts faster, runs slower."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Off unless you trust its author."""
    replay_from: str | None = None
    """Verdict folder whose recorded replies the replay engine answers from."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further keyword arguments for the engine's constructor."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least(self, 1, "concurrency", "batch_tokens", "tensor_parallel", "max_model_len")
        at_least(self, 0, "max_retries")
        above(self, 0, "timeout_s", "requests_per_minute", "tokens_per_minute", "gpu_memory")
        if self.gpu_memory > 1:
            raise RecipeError(f"gpu_memory is {self.gpu_memory}; it is a share, at most 1")


def at_least(options: Any, least: float, *names: str) -> None:
    """Refuse numbers of an options dataclass that are below ``least``; None stands for no number.

    Raises:
        RecipeError: names the first.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value >= least:
            raise RecipeError(f"{name} is {value:g}; it must be at least {least:g}")


def above(options: Any, limit: float, *names: str) -> None:
    """Refuse numbers of an options dataclass that are not above ``limit``, as ``at_least`` does.

    Raises:
        RecipeError: names the first.
    """
    for name in names:
        value = getattr(options, name)
        if value is not None and not value > limit:
            raise RecipeError(f"{name} is {value:g}; it must be above {limit:g}")


def load_recipe(path: Path | str) -> dict[str, Any]:
    """Read a recipe file.

    Raises:
        RecipeError: the file is missing or not TOML.
    """
    path = Path(path)
    if not path.is_file():
        raise RecipeError("no such recipe", path=path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"not valid TOML: {error}", path=path) from error


def recipe_table(path: Path | str, stage: str) -> dict[str, Any]:
    """Return the table of one stage, or an empty one where the recipe has none."""
    table = load_recipe(path).get(stage, {})
    if not isinstance(table, dict):
        raise RecipeError(f"[{stage}] is not a table", path=path)
    return table


def build_options(
    kind: type[Options], table: dict[str, Any], *, path: Path | str | None = None
) -> Options:
    """Build an options dataclass from a TOML table, nested tables included.

    Raises:
        RecipeError: a key is unknown (names the nearest), missing, or of the wrong type.
    """
    values = option_values(kind, table, path=path)
    for name in required_fields(kind):
        if name not in values:
            raise RecipeError(f"key {name!r} is missing", path=path)
    return kind(**values)


def recipe_of(options: Any) -> dict[str, Any]:
    """Return options as a manifest records them: plain JSON values, nothing secret in them.

    Request headers become their names, and addresses lose user, password and query.
    """

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {
                entry.name: public(entry.name, getattr(value, entry.name))
                for entry in dataclasses.fields(value)
            }
        if isinstance(value, dict):
            return {key: public(key, inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [plain(inner) for inner in value]
        return str(value) if isinstance(value, Path) else value

    def public(name: str, value: Any) -> Any:
        if name == "headers" and isinstance(value, dict):
            return sorted(value)
        if name == "base_url" and isinstance(value, str):
            parts = urlsplit(value)
            host = parts.netloc.rpartition("@")[2]
            return urlunsplit((parts.scheme, host, parts.path, "", ""))
        return plain(value)

    result: dict[str, Any] = plain(options)
    return result


def required_fields(kind: type[Any]) -> list[str]:
    """Return the names of the fields without a default."""
    return [
        entry.name
        for entry in dataclasses.fields(kind)
        if entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
    ]


def option_values(
    kind: type[Any], table: dict[str, Any], *, path: Path | str | None = None, prefix: str = ""
) -> dict[str, Any]:
    """Return the table's values as the fields of ``kind`` want them.

    Raises:
        RecipeError: as ``build_options``.
    """
    hints = typing.get_type_hints(kind)
    known = {entry.name for entry in dataclasses.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            raise RecipeError(f"unknown key {prefix + key!r}{nearest(name, known)}", path=path)
        values[name] = _convert(hints[name], value, path=path, prefix=f"{prefix}{key}")
    return values


def _convert(hint: Any, value: Any, *, path: Path | str | None, prefix: str) -> Any:
    """Return a TOML value as ``hint`` wants it, or raise RecipeError naming the key."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        return _convert_union(arguments, value, path=path, prefix=prefix)
    if origin is Literal:
        if value not in arguments:
            offered = ", ".join(map(repr, arguments))
            close = nearest(str(value), [str(known) for known in arguments])
            raise RecipeError(
                f"{prefix} is {value!r}; it must be one of {offered}{close}", path=path
            )
        return value
    if origin in (tuple, list) and isinstance(value, list):
        inner = arguments[0] if arguments else Any
        items = [
            _convert(inner, item, path=path, prefix=f"{prefix}[{index}]")
            for index, item in enumerate(value)
        ]
        return tuple(items) if origin is tuple else items
    if origin is dict and isinstance(value, dict):
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return hint(**option_values(hint, value, path=path, prefix=f"{prefix}."))
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (
        isinstance(hint, type)
        and isinstance(value, hint)
        and not (hint is int and isinstance(value, bool))
    ):
        return value
    wanted = hint.__name__ if isinstance(hint, type) else str(hint)
    raise RecipeError(f"{prefix} is {value!r}; a value of type {wanted} was expected", path=path)


def _convert_union(
    arguments: tuple[Any, ...], value: Any, *, path: Path | str | None, prefix: str
) -> Any:
    if value is None and type(None) in arguments:
        return None
    problem: RecipeError | None = None
    for option in arguments:
        if option is type(None):
            continue
        try:
            return _convert(option, value, path=path, prefix=prefix)
        except RecipeError as error:
            problem = error
    raise problem or RecipeError(f"{prefix} is {value!r}", path=path)
