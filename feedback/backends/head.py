"""Logits in float32 from models whose weights are 16 bits wide.

A bfloat16 number keeps eight binary digits: between 16 and 32, where logits of language models lie,
neighbours are 0.125 apart. A label read from rounded logits is one of a few values (0.500, 0.531,
0.562, ...), and pairs that differ tie. The product is summed up in float32 anyway; here it is kept.
"""

from __future__ import annotations

from functools import partial
from typing import Any

__all__ = ["float32_head", "vllm_overrides"]


def float32_head(model: Any) -> bool:
    """Make a 16-bit model's head return float32 logits; return whether that was needed and done.

    Left alone: heads that are no plain linear layer (quantised, say), and those that another
    library has wrapped.
    """
    import torch

    head = model.get_output_embeddings()
    plain = type(head) is torch.nn.Linear and "forward" not in vars(head)
    if not plain or head.weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    head.forward = partial(_product, head)
    return True


def _product(head: Any, hidden: Any) -> Any:
    import torch

    if hidden.is_cuda and hidden.dtype == head.weight.dtype:
        rows = hidden.reshape(-1, hidden.shape[-1])
        logits = torch.mm(rows, head.weight.t(), out_dtype=torch.float32)
        logits = logits.reshape(*hidden.shape[:-1], -1)
    else:
        logits = hidden.float() @ head.weight.t().float()
    return logits if head.bias is None else logits + head.bias.float()


def vllm_overrides(
    path: str, settings: dict[str, Any], *, revision: str | None, trust_remote_code: bool
) -> dict[str, Any]:
    """Return ``vllm.LLM``'s ``hf_overrides`` with a float32 head, where vLLM can have one.

    It refuses one over a quantised head, and whether the head is quantised only the loaded model
    tells: quantised models stay as they are. Releases that do not know the setting ignore it.

    Args:
        path: folder or Hub name.
        settings: other arguments of ``vllm.LLM``; overrides among them are kept.
        revision: of the model on the Hub.
        trust_remote_code: whether the model's own configuration class may run.
    """
    given = settings.get("hf_overrides")
    plain = settings.get("quantization") is None and not callable(given)
    if plain and _is_unquantised(path, revision, trust_remote_code):
        given = {"head_dtype": "float32", **(given or {})}
    return {} if given is None else {"hf_overrides": given}


def _is_unquantised(path: str, revision: str | None, trust_remote_code: bool) -> bool:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError):
        return False  # the engine says what is wrong with it
    return getattr(config, "quantization_config", None) is None
