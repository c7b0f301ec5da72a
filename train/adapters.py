"""Checkpoints that are LoRA adapters: to start from one is to start from the model it makes.

transformers loads an adapter beside frozen weights of its base; adapters added to that would take
the place of the first without a word. Here the adapter is merged into its base on loading. A result
of adapters on such a start is saved whole, since no folder holds the base of its adapters.
"""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from feedback.errors import InputError

__all__ = ["adapter_config", "apply_adapter", "load_pretrained"]

logger = logging.getLogger(__name__)


def adapter_config(name: str, *, revision: str | None = None) -> dict[str, Any] | None:
    """Return the adapter configuration of a folder or Hub name, None where it is a whole model.

    Raises:
        InputError: it is no folder and cannot be a Hub name.
    """
    from transformers.utils import find_adapter_config_file

    try:
        path = find_adapter_config_file(name, revision=revision)
    except OSError as error:
        raise InputError(f"cannot load model {name!r}: {error}") from error
    if path is None:
        return None
    config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return config


def load_pretrained(loader: Any, name: str, **arguments: Any) -> Any:
    """Return ``loader.from_pretrained(name)``, an adapter merged into its base.

    Args:
        loader: an Auto class of transformers.
        name: folder or Hub name.
        arguments: of ``from_pretrained``.

    Raises:
        InputError: it cannot be loaded, or is an adapter to be loaded quantised.
    """
    revision = arguments.get("revision")
    adapter = adapter_config(name, revision=revision)
    if adapter is None:
        try:
            return loader.from_pretrained(name, **arguments)
        except (OSError, ValueError) as error:
            raise InputError(f"cannot load model {name!r}: {error}") from error
    base = adapter["base_model_name_or_path"]
    if "quantization_config" in arguments:
        raise InputError(
            f"{name} is a LoRA adapter of {base}, which quantised weights would round away; start "
            "without quantize, or from a whole model"
        )
    model = load_pretrained(loader, base, **arguments | {"revision": adapter.get("revision")})
    merged = apply_adapter(model, name, revision=revision)
    logger.warning("%s is a LoRA adapter of %s: training starts from the two merged", name, base)
    # PEFT writes this name into the adapters it saves: theirs is not the first adapter's base.
    merged.name_or_path = name
    # On saving it looks there for a model's config, to see whether the vocabulary grew. Where ours
    # grows (reward models), the result is saved whole.
    warnings.filterwarnings("ignore", "Could not find a config file in", UserWarning)
    return merged


def apply_adapter(model: Any, name: str | Path, *, revision: str | None = None) -> Any:
    """Return ``model`` with a saved adapter merged into its weights, all of them trainable.

    Raises:
        InputError: the adapter cannot be loaded, or does not fit the model.
    """
    from peft import PeftConfig, PeftModel

    try:
        config = PeftConfig.from_pretrained(str(name), revision=revision)
        # An adapter of a causal model goes on one with a score head too: they share the layers.
        config.task_type = None
        adapted = PeftModel.from_pretrained(model, str(name), config=config, revision=revision)
        merged = adapted.merge_and_unload()
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(f"cannot load the adapter {str(name)!r}: {error}") from error
    return merged.requires_grad_(True)
