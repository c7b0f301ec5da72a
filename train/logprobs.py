"""Log-probabilities of completion tokens, without ever holding the full logits.

This module owns the label shift: the hidden state at one position predicts the token at the next,
and a completion's first token is predicted by its prompt's last. Everything is a pure function.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "TokenLogprobs",
    "chunk_size",
    "predictor_positions",
    "sum_per_completion",
    "token_logprobs",
]

# Logits that exist at one time, in elements: 0.8 GB of float32.
_CHUNK_ELEMENTS = 200_000_000


class TokenLogprobs(NamedTuple):
    """Log-probabilities of T tokens and, where asked for, their entropies; both (T,) float32."""

    logprobs: Tensor
    entropies: Tensor | None


def predictor_positions(tokens: Tensor, *, firsts: Tensor, prompt_lasts: Tensor) -> Tensor:
    """Return the position whose hidden state predicts each token; (T,).

    Args:
        tokens: positions of completion tokens in the row, (T,).
        firsts: where the token's completion starts, (T,).
        prompt_lasts: position of the last prompt token of the token's completion, (T,); with a
            shared prompt that is not the position before the completion.
    """
    return torch.where(tokens == firsts, prompt_lasts, tokens - 1)


def chunk_size(vocabulary: int) -> int:
    """Return how many tokens' logits are held at one time by default."""
    return max(256, min(16384, _CHUNK_ELEMENTS // vocabulary // 256 * 256))


def token_logprobs(
    hidden: Tensor,
    head_weight: Tensor,
    *,
    targets: Tensor,
    head_bias: Tensor | None = None,
    temperature: float = 1.0,
    chunk: int = 0,
    entropy: bool = False,
) -> TokenLogprobs:
    """Return log softmax(hidden @ head_weight.T / temperature)[target], in chunks of tokens.

    Forward keeps one number per token; backward computes each chunk's logits again. Sums run in
    float32. Entropies carry no gradient.

    Args:
        hidden: hidden states of the predicting positions, (T, H).
        head_weight: output embedding, (V, H).
        targets: token ids, (T,).
        head_bias: (V,), or None.
        temperature: divides the logits.
        chunk: tokens per chunk; 0: ``chunk_size``.
        entropy: also return the entropy of each distribution, in nats.
    """
    chunk = chunk or chunk_size(head_weight.shape[0])
    logprobs, entropies = _ChunkedLogprobs.apply(
        hidden, head_weight, head_bias, targets, 1.0 / temperature, chunk, entropy
    )
    return TokenLogprobs(logprobs, entropies if entropy else None)


def sum_per_completion(values: Tensor, owners: Tensor, *, completions: int) -> Tensor:
    """Return the sum of the tokens' values for each completion, (C,); 0 for one without tokens."""
    return torch.zeros(completions, dtype=values.dtype, device=values.device).index_add(
        0, owners, values
    )


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return the logits of a chunk in float32, (t, V)."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:
        logits = (hidden @ weight.t()).float()
    if bias is not None:
        logits += bias.float()
    return logits.mul_(scale) if scale != 1.0 else logits


def _read(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probability of the target, log-normaliser and entropy (or 0) of each row."""
    normaliser = torch.logsumexp(logits, dim=-1)
    logprob = logits.gather(1, targets[:, None])[:, 0] - normaliser
    if not entropy:
        return logprob, normaliser, torch.zeros_like(normaliser)
    # H = log Z - sum p z
    mean = ((logits - normaliser[:, None]).exp() * logits).sum(-1)
    return logprob, normaliser, normaliser - mean


def _slope(logits: Tensor, normaliser: Tensor, targets: Tensor, grad: Tensor) -> Tensor:
    """Return d(grad . logprob) / d logits = grad * (onehot(target) - softmax), (t, V) float32."""
    place = torch.arange(logits.shape[1], device=logits.device)
    chosen = (place == targets[:, None]).to(logits.dtype)
    return grad[:, None] * (chosen - (logits - normaliser[:, None]).exp())


@torch.compile
def _read_compiled(logits: Tensor, targets: Tensor, entropy: bool) -> tuple[Tensor, Tensor, Tensor]:
    return _read(logits, targets, entropy)


@torch.compile
def _slope_compiled(
    logits: Tensor, normaliser: Tensor, targets: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    return _slope(logits, normaliser, targets, grad).to(dtype)


def _slope_in_place(
    logits: Tensor, normaliser: Tensor, targets: Tensor, grad: Tensor, dtype: torch.dtype
) -> Tensor:
    """Return ``_slope`` in the logits' own memory: without a compiler each step is a pass."""
    slope = logits.sub_(normaliser[:, None]).exp_().neg_()
    slope.scatter_add_(1, targets[:, None], torch.ones_like(slope[:, :1]))
    return slope.mul_(grad[:, None]).to(dtype)


class _ChunkedLogprobs(torch.autograd.Function):
    """d logprob_t / d logits_t = onehot(target_t) - softmax_t, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, scale, chunk, entropy):  # type: ignore[no-untyped-def]
        tokens = hidden.shape[0]
        parts = torch.empty(3, tokens, dtype=torch.float32, device=hidden.device)
        read = _read_compiled if hidden.is_cuda else _read
        for start in range(0, tokens, chunk):
            part = slice(start, min(start + chunk, tokens))
            logits = _logits(hidden[part], weight, bias, scale)
            for row, value in zip(parts, read(logits, targets[part], entropy), strict=True):
                row[part] = value
            del logits
        logprobs, normalisers, entropies = parts.unbind()
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.scale, ctx.chunk = scale, chunk
        ctx.mark_non_differentiable(entropies)
        return logprobs.clone(), entropies.clone()

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[no-untyped-def]
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        slope_of = _slope_compiled if hidden.is_cuda else _slope_in_place
        grad = grad * ctx.scale
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, min(start + ctx.chunk, hidden.shape[0]))
            logits = _logits(hidden[part], weight, bias, ctx.scale)
            slope = slope_of(logits, normalisers[part], targets[part], grad[part], hidden.dtype)
            del logits
            if grad_hidden is not None:
                grad_hidden[part] = slope @ weight
            if grad_weight is not None:
                grad_weight += slope.t() @ hidden[part]
            if grad_bias is not None:
                grad_bias += slope.float().sum(0)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None
