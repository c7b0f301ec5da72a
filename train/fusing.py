"""Projections that read the same input as one matrix product: q, k and v; gate and up.

The weights stay separate parameters, so checkpoints, optimisers and names do not change; they are
concatenated in the forward pass, which costs a copy of the weights and saves, per layer, three
products, their launches, and the additions that sum their input gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["fuse_projections"]

_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class _First(nn.Linear):
    """Computes its own output and those of the layers that will be asked next."""

    def forward(self, input: Tensor) -> Tensor:
        """Return this layer's output and lay the others' aside."""
        layers: list[Any] = self.fused
        weight = torch.cat([layer.weight for layer in layers])
        bias = None if self.bias is None else torch.cat([layer.bias for layer in layers])
        outputs = F.linear(input, weight, bias).split([x.out_features for x in layers], dim=-1)
        for layer, output in zip(layers[1:], outputs[1:], strict=True):
            layer.waiting = output
        return outputs[0]


class _Later(nn.Linear):
    """Hands out what the first layer computed for it."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the output that is waiting."""
        output, self.waiting = self.waiting, None
        return output


def fuse_projections(model: nn.Module) -> int:
    """Fuse the projections of every layer of ``model`` in place; return how many groups were fused.

    Only plain linear layers of one type are fused, which leaves out adapters and quantised weights.
    The architecture must ask q before k before v, and gate before up, as all of the Llama and Qwen
    families do.
    """
    fused = 0
    for module in list(model.modules()):
        children = dict(module.named_children())
        for names in _TOGETHER:
            layers = [children.get(name) for name in names]
            if all(type(layer) is nn.Linear for layer in layers) and _alike(layers):
                _fuse(layers)
                fused += 1
    return fused


def _alike(layers: list[Any]) -> bool:
    return len({(layer.in_features, layer.bias is None) for layer in layers}) == 1


def _fuse(layers: list[Any]) -> None:
    for layer in layers:
        layer.__class__ = _First if layer is layers[0] else _Later
        layer.waiting = None
    # A plain list: registered as submodules, the siblings would be in the state dict twice.
    layers[0].fused = list(layers)
