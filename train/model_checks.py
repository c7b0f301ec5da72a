"""Does a model compute on packed rows what it computes by itself? Asked once, at load.

Packed rows bring their own attention and their own path through the head. A model whose attention
does not go through transformers' interface, or does more than scale, mask and softmax, or whose
head does more than multiply, would train on wrong numbers without a word. So one short row is
computed both ways, and what differs is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from feedback.errors import InputError
from train.attention import AttentionKind, with_layout
from train.data import Group
from train.packing import PackedBatch, pack_groups

__all__ = ["own_values", "require_context", "require_same_values"]

_SIZES = ((6, (9, 5)), (3, (7,)))  # tokens of the prompts and of their completions
# In float32 the order of sums is all that may differ. Half precision rounds in every layer, by how
# much depends on the model: there only attention or a head of another kind is caught.
_LIMITS = {True: 1e-3, False: 0.2}


def require_context(config: Any, groups: Iterable[Group]) -> None:
    """Refuse groups longer than the model's context: past it, positions mean nothing to it.

    Raises:
        InputError: names the prompt.
    """
    limit = config.get_text_config().to_dict().get("max_position_embeddings")
    for group in groups:
        longest = len(group.prompt_ids) + max(map(len, group.completions))
        if limit and longest > limit:
            raise InputError(
                f"prompt {group.prompt_id!r} with a completion has {longest} tokens, the model's "
                f"context {limit}: set max_length to {limit} at most, or use a model with more"
            )


def own_values(model: Any, kind: Literal["causal", "reward"]) -> list[Tensor]:
    """Return what the model computes by its own attention and head, one sequence at a time.

    Hidden states before each completion token, (T, H): in them wrong attention shows best. With a
    language-model head also those tokens' log-probabilities, (T,).
    """
    device = next(model.parameters()).device
    stack = getattr(model, model.base_model_prefix)
    states, logprobs = [], []
    for group in _groups(model):
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt_ids, *completion]], device=device)
            start = len(group.prompt_ids)
            states.append(stack(input_ids=ids).last_hidden_state[0, start - 1 : -1])
            if kind == "causal":
                rows = model(input_ids=ids).logits[0, start - 1 : -1].float().log_softmax(-1)
                logprobs.append(rows.gather(1, ids[0, start:, None])[:, 0])
    return [torch.cat(parts).float() for parts in (states, logprobs) if parts]


def require_same_values(
    compute: Callable[[PackedBatch], list[Tensor]],
    model: Any,
    kernel: AttentionKind,
    expected: list[Tensor],
) -> None:
    """Compute the row of ``own_values`` packed, and compare.

    Args:
        compute: makes the same values of a packed row.
        model: ready for packed rows.
        kernel: that the run will use.
        expected: from ``own_values``.

    Raises:
        InputError: the two differ, or the packed row fails.
    """
    if kernel == "flex":
        kernel = "sdpa"  # the same mask, without a compilation of half a minute
    batch = pack_groups(_groups(model), multiple=128 if kernel in ("triton", "varlen") else 1)
    device = next(model.parameters()).device
    batch = with_layout(batch, kernel).to(device)
    refusal = (
        f"model type {model.config.model_type!r} cannot be trained on packed rows with attention "
        f"{kernel!r}: {{}}; use another model, another attention, or --engine trl where the "
        "command has it"
    )
    try:
        found = compute(batch)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(refusal.format(f"it fails on one ({error})")) from error
    difference = max(
        float((one.float() - other).norm() / other.norm().clamp(min=1e-12))
        for one, other in zip(found, expected, strict=True)
    )
    exact = all(weight.dtype == torch.float32 for weight in model.parameters())
    exact = exact and not torch.is_autocast_enabled(device.type)
    if not difference <= _LIMITS[exact]:
        raise InputError(
            refusal.format(
                f"its own attention or head computes something else ({difference:.1%} apart, "
                f"{_LIMITS[exact]:.2%} allowed for rounding)"
            )
        )


def _groups(model: Any) -> list[Group]:
    """Return two short groups of tokens drawn from the vocabulary, the same each time."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size

    def tokens(count: int) -> list[int]:
        return torch.randint(size, (count,), generator=generator).tolist()

    return [
        Group(
            prompt_id=str(number),
            prompt_ids=tokens(prompt),
            completions=[tokens(count) for count in counts],
        )
        for number, (prompt, counts) in enumerate(_SIZES)
    ]
