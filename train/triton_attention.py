"""Attention over packed rows as a Triton kernel, for CUDA; imported only where it is used.

Forward and backward of softmax(q k' * scale) v over the tiles of ``train/tiles.py``. Queries of one
run read the shared prompt without a mask and their own run causally; gradients of a prompt's keys
gather all completions in one program, so nothing is added atomically and results are repeatable.
Grouped queries are native: each key head serves ``groups`` query heads.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from train.tiles import TileLayout

__all__ = ["tile_attention"]

_LOG2_E = 1.4426950408889634


@triton.jit
def _load(base, row, stride, alive, D: tl.constexpr, WIDTH: tl.constexpr):
    """Load rows of D numbers as (rows, WIDTH), zero where not alive."""
    dim = tl.arange(0, WIDTH)
    mask = alive[:, None]
    if WIDTH != D:
        mask = mask & (dim < D)[None, :]
    return tl.load(base + row[:, None] * stride + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _store(base, row, stride, alive, rows, D: tl.constexpr, WIDTH: tl.constexpr):
    """Store (rows, WIDTH) as rows of D numbers."""
    dim = tl.arange(0, WIDTH)
    mask = alive[:, None] & (dim < D)[None, :]
    tl.store(base + row[:, None] * stride + dim[None, :], rows.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _absorb(query, key, value, readable, top, total, result, scale, EXACT: tl.constexpr):
    """Take a block of keys into the running softmax: maximum, sum and weighted values."""
    score = tl.dot(query, tl.trans(key), input_precision=EXACT) * scale
    score = tl.where(readable, score, float("-inf"))
    newest = tl.maximum(top, tl.max(score, 1))
    share = tl.exp2(score - newest[:, None])
    fade = tl.exp2(top - newest)
    result = result * fade[:, None]
    result += tl.dot(share.to(value.dtype), value, input_precision=EXACT)
    return newest, total * fade + tl.sum(share, 1), result


@triton.jit
def _forward_kernel(
    Q, K, V, OUT, LSE, TILES, q_head, q_row, k_head, k_row, v_head, v_row, rows, scale,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(TILES + tile * 5), tl.load(TILES + tile * 5 + 1)
    own = tl.load(TILES + tile * 5 + 2)
    prompt_start, prompt_end = tl.load(TILES + tile * 5 + 3), tl.load(TILES + tile * 5 + 4)
    if start >= end:
        return
    row = start + tl.arange(0, TILE)
    query = _load(Q + head * q_head, row, q_row, row < end, D, WIDTH)
    k_base, v_base = K + (head // GROUPS) * k_head, V + (head // GROUPS) * v_head
    top = tl.full([TILE], float("-inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    result = tl.zeros([TILE, WIDTH], tl.float32)
    for first in range(prompt_start, prompt_end, STEP):
        column = first + tl.arange(0, STEP)
        inside = column < prompt_end
        key = _load(k_base, column, k_row, inside, D, WIDTH)
        value = _load(v_base, column, v_row, inside, D, WIDTH)
        top, total, result = _absorb(
            query, key, value, inside[None, :], top, total, result, scale, EXACT
        )
    last = tl.minimum(start + TILE, end)
    for first in range(own, last, STEP):
        column = first + tl.arange(0, STEP)
        inside = column < last
        key = _load(k_base, column, k_row, inside, D, WIDTH)
        value = _load(v_base, column, v_row, inside, D, WIDTH)
        readable = (column[None, :] <= row[:, None]) & inside[None, :]
        top, total, result = _absorb(query, key, value, readable, top, total, result, scale, EXACT)
    result = result / total[:, None]
    _store(OUT + head * D, row, HEADS * D, row < end, result, D, WIDTH)
    tl.store(LSE + head * rows + row, top + tl.log2(total), mask=row < end)


@triton.jit
def _query_slope(query, grad, key, value, readable, lse, delta, scale, EXACT: tl.constexpr):
    """Return a block's share of the queries' gradient, before the plain scale."""
    score = tl.dot(query, tl.trans(key), input_precision=EXACT) * scale
    share = tl.exp2(score - lse[:, None])
    slope = share * (tl.dot(grad, tl.trans(value), input_precision=EXACT) - delta[:, None])
    slope = tl.where(readable, slope, 0.0)
    return tl.dot(slope.to(key.dtype), key, input_precision=EXACT)


@triton.jit
def _query_kernel(
    Q, K, V, OUT, GRAD, DQ, LSE, DELTA, TILES,
    q_head, q_row, k_head, k_row, v_head, v_row, g_head, g_row, rows, scale, plain_scale,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(TILES + tile * 5), tl.load(TILES + tile * 5 + 1)
    own = tl.load(TILES + tile * 5 + 2)
    prompt_start, prompt_end = tl.load(TILES + tile * 5 + 3), tl.load(TILES + tile * 5 + 4)
    if start >= end:
        return
    row = start + tl.arange(0, TILE)
    there = row < end
    query = _load(Q + head * q_head, row, q_row, there, D, WIDTH)
    output = _load(OUT + head * D, row, HEADS * D, there, D, WIDTH)
    grad = _load(GRAD + head * g_head, row, g_row, there, D, WIDTH)
    delta = tl.sum(output.to(tl.float32) * grad.to(tl.float32), 1)
    tl.store(DELTA + head * rows + row, delta, mask=there)
    lse = tl.load(LSE + head * rows + row, mask=there, other=0.0)
    k_base, v_base = K + (head // GROUPS) * k_head, V + (head // GROUPS) * v_head
    result = tl.zeros([TILE, WIDTH], tl.float32)
    for first in range(prompt_start, prompt_end, STEP):
        column = first + tl.arange(0, STEP)
        inside = column < prompt_end
        key = _load(k_base, column, k_row, inside, D, WIDTH)
        value = _load(v_base, column, v_row, inside, D, WIDTH)
        result += _query_slope(query, grad, key, value, inside[None, :], lse, delta, scale, EXACT)
    last = tl.minimum(start + TILE, end)
    for first in range(own, last, STEP):
        column = first + tl.arange(0, STEP)
        inside = column < last
        key = _load(k_base, column, k_row, inside, D, WIDTH)
        value = _load(v_base, column, v_row, inside, D, WIDTH)
        readable = (column[None, :] <= row[:, None]) & inside[None, :]
        result += _query_slope(query, grad, key, value, readable, lse, delta, scale, EXACT)
    _store(DQ + head * D, row, HEADS * D, there, result * plain_scale, D, WIDTH)


@triton.jit
def _key_kernel(
    Q, K, V, GRAD, DK, DV, LSE, DELTA, TILES,
    q_head, q_row, k_head, k_row, v_head, v_row, g_head, g_row, rows, scale, plain_scale,
    GROUPS: tl.constexpr, HEADS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    tile, key_head = tl.program_id(0), tl.program_id(1)
    start, end = tl.load(TILES + tile * 3), tl.load(TILES + tile * 3 + 1)
    readers = tl.load(TILES + tile * 3 + 2)
    if start >= end:
        return
    column = start + tl.arange(0, TILE)
    alive = column < end
    key = _load(K + key_head * k_head, column, k_row, alive, D, WIDTH)
    value = _load(V + key_head * v_head, column, v_row, alive, D, WIDTH)
    grad_key = tl.zeros([TILE, WIDTH], tl.float32)
    grad_value = tl.zeros([TILE, WIDTH], tl.float32)
    for member in range(GROUPS):
        head = key_head * GROUPS + member
        for first in range(start, readers, STEP):
            row = first + tl.arange(0, STEP)
            there = row < readers
            query = _load(Q + head * q_head, row, q_row, there, D, WIDTH)
            grad = _load(GRAD + head * g_head, row, g_row, there, D, WIDTH)
            lse = tl.load(LSE + head * rows + row, mask=there, other=0.0)
            delta = tl.load(DELTA + head * rows + row, mask=there, other=0.0)
            score = tl.dot(key, tl.trans(query), input_precision=EXACT) * scale
            readable = (column[:, None] <= row[None, :]) & there[None, :]
            share = tl.where(readable, tl.exp2(score - lse[None, :]), 0.0)
            grad_value += tl.dot(share.to(grad.dtype), grad, input_precision=EXACT)
            slope = share * (tl.dot(value, tl.trans(grad), input_precision=EXACT) - delta[None, :])
            grad_key += tl.dot(slope.to(query.dtype), query, input_precision=EXACT)
    wide = (HEADS // GROUPS) * D
    _store(DK + key_head * D, column, wide, alive, grad_key * plain_scale, D, WIDTH)
    _store(DV + key_head * D, column, wide, alive, grad_value, D, WIDTH)


# Keys (or queries) per step, warps, pipeline stages; by kernel and rows per tile.
_CONFIGS = {
    ("forward", 64): (64, 4, 2),
    ("query", 64): (64, 4, 2),
    ("keys", 64): (64, 4, 2),
    ("forward", 128): (64, 8, 2),
    ("query", 128): (64, 8, 2),
    ("keys", 128): (64, 8, 2),
}


def _settings(kernel: str, query: Tensor, key: Tensor, tile: int) -> dict[str, Any]:
    step, warps, stages = _CONFIGS[kernel, tile]
    width = max(16, triton.next_power_of_2(query.shape[-1]))
    return {
        "GROUPS": query.shape[1] // key.shape[1],
        "HEADS": query.shape[1],
        "D": query.shape[-1],
        "WIDTH": width,
        "TILE": tile,
        "STEP": step if width <= 128 else 32,
        # TF32 would cost float32 inputs their precision.
        "EXACT": "ieee" if query.dtype == torch.float32 else "tf32",
        "num_warps": warps,
        "num_stages": stages,
    }


def _strides(*tensors: Tensor) -> list[int]:
    """Return head and row strides of (S, heads, D) tensors, whose last dimension is dense."""
    return [stride for tensor in tensors for stride in (tensor.stride(1), tensor.stride(0))]


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@torch.library.custom_op("rlaif::tile_attention", mutates_args=())
def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    tile: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    query, key, value = _dense(query), _dense(key), _dense(value)
    rows, heads, dim = query.shape
    output = torch.empty(rows, heads, dim, dtype=query.dtype, device=query.device)
    lse = torch.empty(heads, rows, dtype=torch.float32, device=query.device)
    _forward_kernel[(len(queries), heads)](
        query, key, value, output, lse, queries, *_strides(query, key, value), rows,
        scale * _LOG2_E, **_settings("forward", query, key, tile),
    )  # fmt: skip
    return output, lse


@_attend.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    keys: Tensor,
    tile: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    rows, heads, dim = query.shape
    return query.new_empty(rows, heads, dim), query.new_empty(heads, rows, dtype=torch.float32)


@torch.library.custom_op("rlaif::tile_attention_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    queries: Tensor,
    keys: Tensor,
    tile: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value, grad = _dense(query), _dense(key), _dense(value), _dense(grad)
    rows, heads, _ = query.shape
    # Dense, whatever the inputs' strides: the kernels write (S, heads, D) in order.
    grads = [
        torch.empty(part.shape, dtype=part.dtype, device=part.device)
        for part in (query, key, value)
    ]
    delta = torch.empty_like(lse)
    numbers = (*_strides(query, key, value, grad), rows, scale * _LOG2_E, scale)
    _query_kernel[(len(queries), heads)](
        query,
        key,
        value,
        output,
        grad,
        grads[0],
        lse,
        delta,
        queries,
        *numbers,
        **_settings("query", query, key, tile),
    )
    # After the queries' kernel, which leaves delta behind.
    _key_kernel[(len(keys), key.shape[1])](
        query,
        key,
        value,
        grad,
        grads[1],
        grads[2],
        lse,
        delta,
        keys,
        *numbers,
        **_settings("keys", query, key, tile),
    )
    return grads[0], grads[1], grads[2]


@_attend_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    queries: Tensor,
    keys: Tensor,
    tile: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, queries, keys, ctx.tile, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, *output, queries, keys)


def _backward(ctx: Any, grad: Tensor, _lse: Tensor) -> tuple[Any, ...]:
    query, key, value, output, lse, queries, keys = ctx.saved_tensors
    grads = torch.ops.rlaif.tile_attention_backward(
        grad, query, key, value, output, lse, queries, keys, ctx.tile, ctx.scale
    )
    return (*grads, None, None, None, None)


_attend.register_autograd(_backward, setup_context=_remember)


def tile_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: TileLayout, scaling: float | None
) -> Tensor:
    """Attend over a packed row; query (1, heads, S, D), key and value (1, key heads, S, D).

    Returns:
        (1, S, heads, D).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    output, _ = torch.ops.rlaif.tile_attention(
        *parts, layout.queries, layout.keys, layout.tile, scale
    )
    return output[None]
