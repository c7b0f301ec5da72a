"""Adapters that were trained on an adapter, saved as the whole model that they make.

Their start is an adapter merged into its base, which exists in memory only: adapters of it would be
read as adapters of something else.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from train.adapters import adapter_config, apply_adapter
from train.config import TrainOptions
from train.models import load_model, resolve_device, resolve_model, resolve_precision

__all__ = ["make_whole"]


def make_whole(options: TrainOptions, folder: Path) -> bool:
    """Replace the adapters in ``folder`` by the model they make, where they began on an adapter.

    Args:
        options: that the model was loaded with.
        folder: where its adapters are saved.

    Returns:
        Whether they were replaced.
    """
    if not options.lora_rank or options.model == "scratch":
        return False
    if adapter_config(resolve_model(options.model), revision=options.revision) is None:
        return False
    precision = resolve_precision(options.precision, resolve_device(options.device))
    exact: Any = "bfloat16" if precision == "bfloat16" else "float32"
    start = load_model(dataclasses.replace(options, device="cpu", precision=exact), tokenizer=None)
    apply_adapter(start, folder).save_pretrained(folder)
    for stale in folder.glob("adapter_*"):
        stale.unlink()
    return True
