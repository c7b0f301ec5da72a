"""Opening an engine by its options; the engine's module loads only then.

Each engine module has a function ``open_engine(options, path)``: ``options`` as the user gave them
(``options.model`` is the name that verdicts record), ``path`` what the engine should load.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from feedback.backends import Backend
from feedback.config import EngineOptions
from feedback.errors import BackendError
from feedback.unread import check_engine

__all__ = [
    "adapter_config",
    "check_openable",
    "local_revision",
    "open_backend",
    "resolve_model",
]

_BLOCK = 1 << 16
_BLOCKS_PER_FILE = 64
# Package of the engine and what installs it.
_NEEDS = {
    "transformers": ("transformers", "pip install 'rlaif[train]'"),
    "vllm": ("vllm", "pip install 'rlaif[vllm]'"),
}


def open_backend(options: EngineOptions) -> Backend:
    """Return the engine that ``options`` name, ready to judge and sample.

    Raises:
        RecipeError: an option does nothing with this engine.
        BackendError: the engine is not installed, or cannot load the model.
    """
    check_engine(options)
    path = resolve_model(options.model)
    try:
        module = importlib.import_module(f"feedback.backends.{options.backend}")
        backend: Backend = module.open_engine(options, path)
    except ModuleNotFoundError as error:
        package, command = _NEEDS.get(options.backend, (options.backend, "pip install rlaif"))
        raise BackendError(
            f"backend {options.backend!r} needs the package {error.name or package!r}: {command}"
        ) from error
    return backend


def check_openable(options: EngineOptions) -> None:
    """Check what can be checked of an engine without opening it.

    Several judges take turns, so that one is in memory at a time. What is wrong with a later one
    must not show only after the first one's calls were paid for.

    Raises:
        BackendError: its package, key, folder, adapter or embedded model is missing, or its URL is
            wrong.
        InputError: ``extra`` or ``replay_from`` is wrong.
    """
    resolve_model(options.model)
    if options.backend in _NEEDS:
        package, command = _NEEDS[options.backend]
        if importlib.util.find_spec(package) is None:
            raise BackendError(f"backend {options.backend!r} needs {package!r}: {command}")
        _check_folders(options)
        return
    importlib.import_module(f"feedback.backends.{options.backend}").check_options(options)


def _check_folders(options: EngineOptions) -> None:
    """Look whether what is named as a folder is one; other names may be the Hub's."""
    path = Path(options.model)
    if (path.is_absolute() or options.model.startswith(".")) and not path.exists():
        raise BackendError(f"cannot load {options.model!r}: there is no such file or folder")
    if options.lora is None:
        return
    if options.backend == "vllm" or Path(options.lora).is_dir():  # vLLM reads folders only
        adapter_config(options.lora)


def adapter_config(folder: str) -> dict[str, Any]:
    """Return what an adapter's folder says of it.

    Raises:
        BackendError: the folder holds no adapter.
    """
    path = Path(folder) / "adapter_config.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise BackendError(f"{folder} holds no LoRA adapter: {path.name}: {error}") from error


def resolve_model(name: str) -> str:
    """Return what to load for a model name: the folder of an embedded model, or the name itself.

    Raises:
        BackendError: there is no embedded model of that name.
    """
    if not name.startswith("pocket:"):
        return name
    from feedback.pocket import model_path

    return str(model_path(name))


def local_revision(path: str | Path) -> str | None:
    """Return a fingerprint of a model folder's files, or None if ``path`` is not a folder.

    Names, sizes and 64 blocks spread over each file are hashed: cheap for any size, and two
    checkpoints of one run differ in it.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".safetensors", ".bin", ".json", ".jinja", ".model", ".gguf"):
            continue
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}\n".encode())
        step = max(size // _BLOCKS_PER_FILE, _BLOCK)
        with file.open("rb") as stream:
            for start in range(0, size, step):
                stream.seek(start)
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:16]
