"""AdamW with float32 master copies of bfloat16 weights, and the learning-rate schedules.

Why not autocast: it keeps the residual stream in float32 and casts every weight in every layer.
Here the model itself is bfloat16; gradients are added up in float32 as backward produces them, the
update happens on float32 weights, and the model gets their rounded copy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["MasterAdamW", "Schedule", "parameter_groups"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return the trainable parameters in two groups: matrices decay, norms and biases do not."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class Schedule:
    """Learning rate as a share of its peak: it rises, then stays or falls in a line or a cosine."""

    def __init__(self, kind: str, *, steps: int, warmup: float, floor: float = 0.0):
        self.kind = kind
        self.steps = steps
        self.warmup_steps = math.ceil(steps * warmup)
        self.floor = floor

    def __call__(self, step: int) -> float:
        """Return the share for the update after ``step`` finished ones."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        if self.kind == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps))
        share = 1 - done if self.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
        return self.floor + (1 - self.floor) * share


class MasterAdamW(torch.optim.AdamW):
    """AdamW over float32 copies of the given parameters, for one process.

    The parameters' own gradients never persist: as soon as backward has one, it is added to the
    copy's float32 gradient, so accumulating micro-batches loses nothing to rounding.

    Args:
        groups: as for AdamW, with the model's parameters.
        options: AdamW's other arguments.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], **options: Any):
        self.weights: list[nn.Parameter] = []
        self.masters: list[Tensor] = []
        copies = []
        for group in groups:
            masters = [_copy(parameter) for parameter in group["params"]]
            self.weights += group["params"]
            self.masters += masters
            copies.append(group | {"params": masters})
        super().__init__(copies, **options)
        for weight, master in zip(self.weights, self.masters, strict=True):
            weight.register_post_accumulate_grad_hook(_collector(master))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the float32 copies, round them into the model, forget the gradients."""
        loss = super().step(closure)
        torch._foreach_copy_(self.weights, self.masters)
        self.zero_grad(set_to_none=True)
        return loss

    def clip(self, max_norm: float) -> Tensor:
        """Scale the gradients down to ``max_norm`` (0: never) and return their norm before."""
        return nn.utils.clip_grad_norm_(self.masters, max_norm or math.inf)

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's state with the float32 copies."""
        return super().state_dict() | {"masters": [master.detach() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state, the copies, and the model's rounded weights."""
        state = dict(state_dict)
        saved: Sequence[Tensor] = state.pop("masters")
        super().load_state_dict(state)
        for master, weight, value in zip(self.masters, self.weights, saved, strict=True):
            master.copy_(value)
            weight.copy_(master)


def _copy(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().float().clone().requires_grad_()


def _collector(master: Tensor) -> Callable[[Tensor], None]:
    def collect(weight: Tensor) -> None:
        gradient = weight.grad
        if gradient is None:
            return
        if master.grad is None:
            master.grad = gradient.float()
        else:
            master.grad.add_(gradient)
        weight.grad = None

    return collect
