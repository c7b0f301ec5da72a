"""What a run is made of, by content: data files, weights, code and templates.

A finished run is taken for complete, and a checkpoint is continued, only where these are the same;
a name or a size says nothing about a model that was trained again or a prompt that was edited.
Models on the Hub are known by name and revision, which the options hold.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feedback.records import content_id
from feedback.shards import MANIFEST, file_sha256, manifest_sha256
from train.models import resolve_model
from train.reward_model import ENSEMBLE

__all__ = ["code_identity", "file_identity", "model_identity", "source_identity"]

# Training changes all of a network's matrices, so pieces of a large file tell its versions apart;
# reading it all would take longer than starting the run.
_WHOLE = 256 * 2**20
_PIECES, _PIECE = 64, 2**20
_PARTS = ("config.json", "adapter_config.json", "generation_config.json", ENSEMBLE)
_TOKENIZER = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "*.jinja")
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "adapter_model.bin")


def source_identity(source: Path) -> str:
    """Return the hash of a data source: of a finished folder's manifest, else of its files."""
    if source.is_dir() and (source / MANIFEST).is_file():
        return manifest_sha256(source)
    files = sorted(source.iterdir()) if source.is_dir() else [source]
    return content_id([(file.name, file_sha256(file)) for file in files if file.is_file()])


def file_identity(path: Path) -> str | None:
    """Return a file's hash; None where there is none.

    Up to 256 MiB it is of the whole content, else of the size and 64 pieces of 1 MiB, the first and
    the last among them.
    """
    if not path.is_file():
        return None
    size = path.stat().st_size
    if size <= _WHOLE:
        return file_sha256(path)
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(_PIECES):
            file.seek((size - _PIECE) * number // (_PIECES - 1))
            digest.update(file.read(_PIECE))
    return digest.hexdigest()


def model_identity(name: str | None) -> str | None:
    """Return the hash of a model folder's weights, configuration and tokenizer.

    None for no model and for one on the Hub.
    """
    if name is None or not Path(resolve_model(name)).is_dir():
        return None
    folder = Path(resolve_model(name))
    found = [(file.name, file_identity(file)) for file in _model_files(folder)]
    if (folder / ENSEMBLE).is_file():
        members = json.loads((folder / ENSEMBLE).read_text(encoding="utf-8"))["members"]
        found += [(member, model_identity(str(folder / member))) for member in members]
    return content_id(found)


def _model_files(folder: Path) -> Iterator[Path]:
    """Yield what a model is loaded from; not checkpoints, curves or cards beside it."""
    patterns = (*_PARTS, *_TOKENIZER, *_WEIGHTS)
    yield from sorted({path for pattern in patterns for path in folder.glob(pattern)})


def code_identity(target: str) -> str | None:
    """Return the hash of the file that ``package.module:function`` lives in; None if not found.

    What that file imports is not looked at.
    """
    try:
        spec: Any = importlib.util.find_spec(target.partition(":")[0])
    except (ImportError, ValueError):
        return None
    return None if spec is None or spec.origin is None else file_identity(Path(spec.origin))
