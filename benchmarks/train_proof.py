"""Proof that both sides of the training benchmarks do the same work; raises AssertionError."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from train_work import MIXES, build_model, clean, make_groups

from train.attention import with_layout
from train.config import DpoOptions
from train.data import Group
from train.dpo import DpoObjective
from train.models import completion_logps, enable_packing
from train.packing import pack_groups
from train.reference import attach_reference
from train.trainer import packing_of

__all__ = ["prove"]


def prove(device: str, scratch: Path) -> dict[str, float]:
    """Check equal work; return the largest differences found. Raises AssertionError."""
    figures: dict[str, float] = {}
    groups = make_groups(MIXES["tiny"], 12, completions=3, seed=7)
    for label, dtype, limit in (("fp32", torch.float32, 1e-5), ("bf16", torch.bfloat16, 1e-2)):
        clean(device)
        model = build_model("tiny", dtype=dtype, device=device)
        plain = torch.stack([padded_logps(model, group) for group in groups]).flatten()
        weights = torch.linspace(-1, 1, len(plain), device=device)
        (plain * weights).sum().backward()
        expected = [p.grad.float().clone() for p in model.parameters()]
        enable_packing(model)
        kernels = ["sdpa", "blocks", *(("triton", "flex") if device == "cuda" else ())]
        if device == "cuda" and dtype == torch.bfloat16:
            kernels.append("varlen")
        for kernel in kernels:
            model.zero_grad()
            batch = with_layout(pack_groups(groups, multiple=128), kernel).to(device)
            logps = completion_logps(model, batch).logps
            (logps * weights).sum().backward()
            slopes = [p.grad.float() for p in model.parameters()]
            figures[f"{kernel}_{label}_values"] = difference([logps], [plain])
            figures[f"{kernel}_{label}_gradients"] = difference(slopes, expected)
            values, slope = (figures[f"{kernel}_{label}_{of}"] for of in ("values", "gradients"))
            print(
                f"  {kernel:7s} {label}: values {values:.1e}, gradients {slope:.1e} off", flush=True
            )
            assert values <= limit and slope <= limit, f"{kernel} {label}"
    figures["step0_loss_error"] = abs(first_loss(device, scratch) - math.log(2))
    print(f"  DPO loss at step 0 minus log 2: {figures['step0_loss_error']:.1e}")
    assert figures["step0_loss_error"] < 1e-3
    return figures


def padded_logps(model: Any, group: Group) -> torch.Tensor:
    """Return the completions' log-probabilities from a padded batch without packing."""
    device = next(model.parameters()).device
    rows = [[*map(int, group.prompt_ids), *map(int, ids)] for ids in group.completions]
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    logprobs = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)[:, :-1]
    picked = logprobs.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    return picked[:, len(group.prompt_ids) - 1 :].sum(1)


def difference(values: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return the norm of the difference over the norm of what was expected, over all tensors."""
    flat, wanted = (
        torch.cat([t.detach().double().flatten() for t in ts]) for ts in (values, expected)
    )
    return float((flat - wanted).norm() / wanted.norm())


def first_loss(device: str, scratch: Path) -> float:
    """Return the DPO loss before the first step, the reference being the policy."""
    clean(device)
    options = DpoOptions(data=(), output=scratch, device=device, row_tokens=2048, compile="none")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = build_model("tiny", dtype=dtype, device=device)
    enable_packing(model)
    packing = packing_of(options)
    groups = attach_reference(
        make_groups(MIXES["tiny"], 20),
        model,
        packing=packing,
        folder=scratch / "reference",
    )
    batch = with_layout(pack_groups(groups, multiple=packing.multiple), packing.attention)
    objective = DpoObjective(options)
    loss = objective.loss(model, batch.to(device), objective.counts(groups)).loss
    return float(loss.detach())
