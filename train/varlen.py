"""Packed attention from FlashAttention's variable-length kernels, merged by log-sum-exp.

A completion's softmax runs over two sets of keys: the shared prompt and itself. Each set is one
FlashAttention call; the two results are merged with weights exp(lse_i - lse), lse being the
log-sum-exp of both. Given the merged output and lse, each call's backward yields exactly its share
of the gradients, so no softmax is ever computed twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from train.packing import Run

__all__ = ["VarlenLayout", "varlen_attention", "varlen_layout"]


class VarlenLayout(NamedTuple):
    """Cumulative lengths for the two calls, and where their tokens lie in the row."""

    own: Tensor
    """(N + 1,) int32: bounds of the runs, which attend causally within themselves."""
    own_longest: int
    queries: Tensor
    """(Q,) positions of tokens that read a shared prompt."""
    query_bounds: Tensor
    """(M + 1,) int32: bounds of the M groups within ``queries``."""
    query_longest: int
    keys: Tensor
    """(P,) positions of the prompts' tokens."""
    key_bounds: Tensor
    """(M + 1,) int32: bounds of the M prompts within ``keys``."""
    key_longest: int


def varlen_layout(runs: Sequence[Run], size: int) -> VarlenLayout:
    """Return the layout of a row of ``size`` tokens; padding is a run of its own."""
    bounds = [run.start for run in runs]
    covered = runs[-1].end if runs else 0
    bounds += [covered, size] if covered < size else [size]
    groups: dict[tuple[int, int], list[Run]] = {}
    for run in runs:
        if run.prompt_end > run.prompt_start:
            groups.setdefault((run.prompt_start, run.prompt_end), []).append(run)
    queries = [torch.arange(run.start, run.end) for members in groups.values() for run in members]
    keys = [torch.arange(start, end) for start, end in groups]
    query_lengths = [sum(run.end - run.start for run in members) for members in groups.values()]
    key_lengths = [end - start for start, end in groups]
    own_lengths = [later - earlier for earlier, later in itertools.pairwise(bounds)]
    return VarlenLayout(
        own=torch.tensor(bounds, dtype=torch.int32),
        own_longest=max(own_lengths),
        queries=torch.cat(queries) if queries else torch.empty(0, dtype=torch.long),
        query_bounds=_cumulative(query_lengths),
        query_longest=max(query_lengths, default=0),
        keys=torch.cat(keys) if keys else torch.empty(0, dtype=torch.long),
        key_bounds=_cumulative(key_lengths),
        key_longest=max(key_lengths, default=0),
    )


def _cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


# Lengths differ from row to row: compiled, every one of them would be another graph.
@torch.compiler.disable
def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scaling: float | None
) -> Tensor:
    """Attend over a packed row; query (1, heads, S, D), key and value (1, key heads, S, D).

    Returns:
        (1, S, heads, D).
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = (tensor[0].transpose(0, 1).contiguous() for tensor in (query, key, value))
    return _MergedAttention.apply(*rows, layout, scale)[None]


class _Call(NamedTuple):
    output: Tensor
    """(tokens, heads, D)."""
    lse: Tensor
    """(heads, tokens) float32."""
    extra: tuple[Tensor, Tensor]


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor, int, int],
    causal: bool,
    scale: float,
) -> _Call:
    if not query.is_cuda:
        return _plain_forward(query, key, value, bounds, causal, scale)
    output, lse, state, unused, _ = torch.ops.aten._flash_attention_forward(
        query, key, value, *bounds, 0.0, causal, False, scale=scale
    )
    return _Call(output, lse, (state, unused))


def _backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: _Call,
    bounds: tuple[Tensor, Tensor, int, int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if not query.is_cuda:
        return _plain_backward(grad, query, key, value, call, bounds, causal, scale)
    return torch.ops.aten._flash_attention_backward(
        grad,
        query,
        key,
        value,
        call.output,
        call.lse,
        *bounds,
        0.0,
        causal,
        *call.extra,
        scale=scale,
    )


class _MergedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: VarlenLayout, scale: float
    ) -> Tensor:
        own = (layout.own, layout.own, layout.own_longest, layout.own_longest)
        first = _forward(query, key, value, own, True, scale)
        output, lse = first.output, first.lse
        extra: tuple[Tensor, ...] = ()
        if len(layout.queries):
            second = _forward(
                query[layout.queries],
                key[layout.keys],
                value[layout.keys],
                _cross(layout),
                False,
                scale,
            )
            mine = lse[:, layout.queries]
            merged = torch.logaddexp(mine, second.lse)
            weights = (torch.exp(part - merged).t()[..., None] for part in (mine, second.lse))
            mixed = next(weights) * output[layout.queries] + next(weights) * second.output
            output[layout.queries] = mixed.to(output.dtype)
            lse[:, layout.queries] = merged
            extra = second.extra
        ctx.save_for_backward(query, key, value, output, lse, *first.extra, *extra)
        ctx.layout, ctx.scale = layout, scale
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        query, key, value, output, lse, *extra = ctx.saved_tensors
        layout, grad = ctx.layout, grad.contiguous()
        own = (layout.own, layout.own, layout.own_longest, layout.own_longest)
        call = _Call(output, lse, tuple(extra[:2]))
        grads = _backward(grad, query, key, value, call, own, True, ctx.scale)
        if len(layout.queries):
            at, of = layout.queries, layout.keys
            call = _Call(output[at], lse[:, at].contiguous(), tuple(extra[2:]))
            second = _backward(
                grad[at], query[at], key[of], value[of], call, _cross(layout), False, ctx.scale
            )
            for total, part, place in zip(grads, second, (at, of, of), strict=True):
                total[place] += part  # every position occurs once
        return (*grads, None, None)


def _cross(layout: VarlenLayout) -> tuple[Tensor, Tensor, int, int]:
    return (layout.query_bounds, layout.key_bounds, layout.query_longest, layout.key_longest)


def _plain_scores(
    query: Tensor, key: Tensor, bounds: tuple[Tensor, Tensor, int, int], causal: bool, scale: float
) -> Tensor:
    """Return masked scores of all queries and keys, (heads, queries, keys); for CPUs and tests."""
    repeats = query.shape[1] // key.shape[1]
    scores = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(repeats, 1)) * scale
    places = [
        torch.bucketize(torch.arange(len(tensor)), bound[1:], right=True)
        for tensor, bound in zip((query, key), bounds[:2], strict=True)
    ]
    allowed = places[0][:, None] == places[1]
    if causal:
        allowed &= torch.ones_like(allowed).tril()
    return scores.masked_fill(~allowed, float("-inf"))


def _plain_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bounds: tuple[Tensor, Tensor, int, int],
    causal: bool,
    scale: float,
) -> _Call:
    scores = _plain_scores(query, key, bounds, causal, scale)
    lse = torch.logsumexp(scores, dim=-1)
    repeats = query.shape[1] // key.shape[1]
    output = torch.einsum(
        "hqk,khd->qhd", torch.exp(scores - lse[..., None]), value.repeat_interleave(repeats, 1)
    )
    return _Call(output, lse, (query.new_empty(0), query.new_empty(0)))


def _plain_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: _Call,
    bounds: tuple[Tensor, Tensor, int, int],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """FlashAttention's backward: p from the given lse, and delta from the given output."""
    repeats, key_heads = query.shape[1] // key.shape[1], key.shape[1]
    share = torch.exp(_plain_scores(query, key, bounds, causal, scale) - call.lse[..., None])
    wide_key, wide_value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    delta = (grad * call.output).sum(-1).t()[..., None]  # (heads, queries, 1)
    slope = share * (torch.einsum("qhd,khd->hqk", grad, wide_value) - delta) * scale
    grad_query = torch.einsum("hqk,khd->qhd", slope, wide_key)
    grad_key = torch.einsum("hqk,qhd->khd", slope, query)
    grad_value = torch.einsum("hqk,qhd->khd", share, grad)
    shape = (len(key), key_heads, repeats, -1)
    return grad_query, grad_key.reshape(shape).sum(2), grad_value.reshape(shape).sum(2)
