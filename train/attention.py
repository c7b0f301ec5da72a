"""Attention over packed rows: one name registered with transformers, five kernels behind it.

``attention_inputs`` turns a packed row into keyword arguments for a model's backbone, which hands
them down to ``packed_attention``; a call without them (sampling, say) is plain SDPA, so one model
object can train and generate.

* ``triton``: the project's own kernel over tiles that lie within one run (CUDA); see
  ``train/triton_attention.py``.
* ``flex``: FlexAttention with a block mask that is built on the host from the row's runs (CUDA).
* ``varlen``: FlashAttention over all runs, and over completions against prompts, merged by their
  log-sum-exp (CUDA); see ``train/varlen.py``.
* ``blocks``: SDPA group by group; the quick one on a CPU.
* ``sdpa``: one dense mask; the plain one to compare with.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from feedback.errors import InputError
from train.packing import BlockLayout, GroupLayout, PackedBatch, Run
from train.tiles import TileLayout, tile_layout
from train.varlen import varlen_attention, varlen_layout

__all__ = [
    "NAME",
    "AttentionKind",
    "attention_inputs",
    "block_layout",
    "check_supported",
    "dense_mask",
    "packed_attention",
    "resolve_attention",
    "with_layout",
]

NAME = "packed"
"""What the implementation is called in ``config._attn_implementation``."""
BLOCK = 128
AttentionKind = Literal["triton", "flex", "varlen", "sdpa", "blocks"]
_CUDA_ONLY = ("triton", "flex", "varlen")
# Settings with which a model scales or caps its logits or attention scores; 1 does nothing.
_UNREAD = ("logit_scale", "logits_scaling", "final_logit_softcapping", "attn_logit_softcapping")

# Compiled once; within a compiled layer it is inlined.
_flex = torch.compile(flex_attention, dynamic=False)


def resolve_attention(kind: str, device: str) -> AttentionKind:
    """Return the kernel to use on ``device``.

    Raises:
        InputError: the kernel does not run there.
    """
    has_triton = importlib.util.find_spec("triton") is not None
    if kind == "auto":
        return ("triton" if has_triton else "flex") if device == "cuda" else "blocks"
    if kind in _CUDA_ONLY and device != "cuda":
        raise InputError(f"attention {kind!r} needs a CUDA device; use sdpa, blocks or auto")
    if kind not in get_args(AttentionKind):
        offered = ", ".join(get_args(AttentionKind))
        raise InputError(f"unknown attention {kind!r}: it is auto, {offered}")
    if kind == "triton" and not has_triton:
        raise InputError("attention 'triton' needs the package triton; use flex")
    return kind  # type: ignore[return-value]


def check_supported(config: Any) -> None:
    """Refuse models that do more than attend causally to the whole context and multiply by a head.

    Raises:
        InputError: sliding windows, chunked attention, layers that are not attention, scaled or
            capped logits.
    """
    values = config.to_dict()
    changed = [name for name in _UNREAD if values.get(name) not in (None, 1)]
    if changed:
        raise InputError(
            f"model type {config.model_type!r} has {', '.join(changed)}, which packed rows do not "
            "reproduce; use another model, or --engine trl where the command has it"
        )
    kinds = set(config.to_dict().get("layer_types") or [])
    windowed = bool(config.to_dict().get("sliding_window")) and config.to_dict().get(
        "use_sliding_window", True
    )
    if kinds and kinds <= {"full_attention"}:
        windowed = False
    if windowed or kinds - {"full_attention"}:
        what = ", ".join(sorted(kinds - {"full_attention"})) or "sliding_attention"
        raise InputError(
            f"model type {config.model_type!r} has {what} layers, which packed rows do not "
            "reproduce: use a model with full attention in all layers (sft, reward and dpo also "
            "run this one, with --engine trl)"
        )


def dense_mask(batch: PackedBatch) -> Tensor:
    """Return the row's mask, (1, 1, S, S) bool, True where a query (row) may read a key."""
    return _readable(batch.extents, 0)[None, None]


def _readable(extents: Tensor, start: int) -> Tensor:
    """Return which of its keys each query of a stretch may read, (L, L), from (3, L) extents."""
    own, prompt_start, prompt_end = (extent[:, None] - start for extent in extents)
    key = torch.arange(extents.shape[1], device=extents.device, dtype=extents.dtype)
    return (key <= key[:, None]) & ((key >= own) | ((key >= prompt_start) & (key < prompt_end)))


def block_layout(runs: Sequence[Run], size: int) -> BlockLayout:
    """Return which blocks of 128 keys each block of 128 queries must look at, both ways round.

    Blocks allowed as a whole need no mask; the others are masked element by element. Building this
    from the runs costs a millisecond on the host; evaluating the mask everywhere on the device
    costs S * S steps.
    """
    count = -(-size // BLOCK)
    some = np.zeros((count, count), dtype=bool)
    whole = np.zeros((count, count), dtype=bool)
    # Every query of a block must be able to read a key block as a whole: what all runs share.
    seen = np.zeros(count, dtype=bool)
    for run in runs:
        for block in range(run.start // BLOCK, (run.end - 1) // BLOCK + 1):
            some[
                block, run.start // BLOCK : (min(run.end, (block + 1) * BLOCK) - 1) // BLOCK + 1
            ] = True
            if run.prompt_end > run.prompt_start:
                some[block, run.prompt_start // BLOCK : (run.prompt_end - 1) // BLOCK + 1] = True
            readable = _whole_blocks(run, block, count)
            whole[block] = whole[block] & readable if seen[block] else readable
            seen[block] = True
    # Padding reads itself, so that no softmax is over nothing.
    covered = runs[-1].end if runs else 0
    for block in range(covered // BLOCK, count):
        some[block, block] = True
        whole[block] = False
    partial = some & ~whole
    return BlockLayout(
        *_block_lists(partial),
        *_block_lists(whole),
        *_block_lists(partial.T),
        *_block_lists(whole.T),
    )


def _whole_blocks(run: Run, block: int, count: int) -> np.ndarray:
    """Return which key blocks all of the run's queries in a block of queries may read entirely."""
    readable = np.zeros(count, dtype=bool)
    low = block * BLOCK
    own = run.start if run.start <= low else low
    prompt_end = run.prompt_end
    if run.prompt_end == own < low:  # the prompt's end and the run's start may share a block
        prompt_end = low
    readable[-(-run.prompt_start // BLOCK) : prompt_end // BLOCK] = True
    readable[-(-own // BLOCK) : block] = True
    return readable


def _block_lists(chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row of ``chosen`` has, and their indices first in each row."""
    order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
    counts = chosen.sum(axis=1, dtype=np.int32)
    return torch.from_numpy(counts)[None, None], torch.from_numpy(order)[None, None]


def _block_mask(batch: PackedBatch, layout: BlockLayout) -> BlockMask:
    own, prompt_start, prompt_end = batch.extents

    def readable(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        shared = (key >= prompt_start[query]) & (key < prompt_end[query])
        return (key <= query) & ((key >= own[query]) | shared)

    size = batch.input_ids.shape[0]
    return BlockMask(
        seq_lengths=(size, size), BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=readable, **layout._asdict()
    )


def _group_layout(batch: PackedBatch) -> GroupLayout:
    """Return sizes and masks of the stretches that attend within themselves only."""
    starts = [run.start for run in batch.runs if run.prompt_end == run.prompt_start]
    covered, size = batch.runs[-1].end, batch.input_ids.shape[0]
    bounds = [*starts, covered, size] if covered < size else [*starts, size]
    shared = {run.prompt_start for run in batch.runs if run.prompt_end > run.prompt_start}
    masks = [
        _readable(batch.extents[:, start:end], start) if start in shared else None
        for start, end in itertools.pairwise(bounds)
    ]
    sizes = tuple(end - start for start, end in itertools.pairwise(bounds))
    return GroupLayout(sizes, tuple(masks))


def with_layout(batch: PackedBatch, kind: AttentionKind) -> PackedBatch:
    """Return the batch with what its kernel needs, made on the host before the batch is moved."""
    if kind == "flex":
        return batch.with_layout(block_layout(batch.runs, batch.input_ids.shape[0]))
    if kind == "triton":
        return batch.with_layout(tile_layout(batch.runs, batch.input_ids.shape[0]))
    if kind == "varlen":
        return batch.with_layout(varlen_layout(batch.runs, batch.input_ids.shape[0]))
    if kind == "blocks":
        return batch.with_layout(_group_layout(batch))
    return batch


def attention_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Return the keyword arguments that make a backbone read ``batch`` as packed."""
    if isinstance(batch.layout, BlockLayout):
        return {"attention_mask": _block_mask(batch, batch.layout)}
    if batch.layout is None:
        return {"attention_mask": dense_mask(batch)}
    # transformers passes any four-dimensional mask through as it is: here a stand-in, so that it
    # builds none of its own.
    stand_in = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch.input_ids.device)
    return {"attention_mask": stand_in, "packed_layout": batch.layout}


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    packed_layout: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend as the row's layout says; without one, as SDPA does.

    Args:
        module: the attention layer that calls.
        query: (1, heads, S, D).
        key: (1, key heads, S, D).
        value: (1, key heads, S, D).
        attention_mask: a block mask, a dense mask, or a stand-in.
        dropout: must be 0 on packed rows with ``triton``, ``flex`` and ``varlen``.
        scaling: of the scores; None: 1 / sqrt(D).
        packed_layout: for ``triton``, ``blocks`` and ``varlen``.
        kwargs: what else the model passes on.
    """
    if isinstance(attention_mask, BlockMask):
        grouped = query.shape[1] != key.shape[1]
        output = _flex(
            query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped
        )
        return output.transpose(1, 2).contiguous(), None
    if packed_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if isinstance(packed_layout, GroupLayout):
        return _by_group(query, key, value, packed_layout, scaling, dropout), None
    if isinstance(packed_layout, TileLayout):
        from train.triton_attention import tile_attention

        return tile_attention(query, key, value, packed_layout, scaling), None
    return varlen_attention(query, key, value, packed_layout, scaling), None


def _by_group(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: GroupLayout,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    parts = zip(*(tensor.split(layout.sizes, dim=2) for tensor in (query, key, value)), strict=True)
    outputs = [
        F.scaled_dot_product_attention(
            *part, attn_mask=mask, is_causal=mask is None, dropout_p=dropout, scale=scaling
        ).transpose(1, 2)
        for part, mask in zip(parts, layout.masks, strict=True)
    ]
    return torch.cat(outputs, dim=1)


AttentionInterface.register(NAME, packed_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
