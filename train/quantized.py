"""Weights of 4 or 8 bits under adapters, by bitsandbytes."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch

from feedback.errors import InputError

__all__ = ["keep_as_stored", "quantization"]


def quantization(quantize: Literal["4bit", "8bit"]) -> Any:
    """Return the configuration with which transformers loads weights of so many bits.

    Raises:
        InputError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise InputError("quantize needs the package bitsandbytes: pip install 'rlaif[quantize]'")
    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def keep_as_stored(model: Any) -> None:
    """Keep bitsandbytes from packing weights of 4 bits anew for its products on a CPU.

    It does so the first time that a layer runs in evaluation mode, and its backward pass does not
    know: after a pass for the reference the gradients would be wrong (bitsandbytes 0.50).
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in vars(module):
            module.support_avx512bf16_for_cpu = False
