"""PPO's two losses. Pure functions: tensors in, named tuples out; nothing of ours is imported.

All (B, T) tensors are right-padded completions; any shape works as long as all agree, so a flat
list of completion tokens does too. ``total`` is the divisor of the token sum: give it the number of
tokens of the whole minibatch (over all processes) when a micro-batch is only part of it, so that
the split does not change the gradient.

Source: Schulman et al., arXiv 1707.06347, with the value clipping of its authors' code; Yu et al.,
DAPO, arXiv 2503.14476 (separate upper clip); Ye et al., arXiv 1912.09729 (dual clip); Yao et al.
2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncated importance
weights between sampler and trainer).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["PolicyLoss", "ValueLoss", "policy_loss", "truncated_weights", "value_loss"]


class PolicyLoss(NamedTuple):
    """The clipped loss, and sums over tokens (divide by ``total``); all scalars."""

    loss: Tensor
    clipfrac: Tensor
    """Share of tokens at which the clipped term decides."""
    approxkl: Tensor
    """Mean of ``(log pi - log pi_old)^2 / 2``."""
    ratio: Tensor
    """Mean of ``pi / pi_old``."""


class ValueLoss(NamedTuple):
    """The clipped squared error, and the share of tokens at which the clip decides; scalars."""

    loss: Tensor
    clipfrac: Tensor


def truncated_weights(logprobs: Tensor, sampler_logprobs: Tensor, *, cap: float) -> Tensor:
    """Return ``min(pi / pi_sampler, cap)`` per token, without gradient; same shape.

    The sampler (vLLM) computes the same policy with other kernels, so its samples come from a
    slightly different distribution; the truncated ratio corrects for that with bounded variance.

    Args:
        logprobs: the trainer's log-probabilities of the sampled tokens, before any update.
        sampler_logprobs: what the sampler reported for them.
        cap: the largest weight.
    """
    return (logprobs - sampler_logprobs).detach().exp().clamp(max=cap)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float = 0.0,
    weights: Tensor | None = None,
    total: Tensor | float | None = None,
) -> PolicyLoss:
    """Return ``sum max(-A rho, -A clip(rho, 1 - e, 1 + e')) / total`` with ``rho = pi / pi_old``.

    Args:
        logprobs: of the policy being trained.
        old_logprobs: of the policy that stood when the rollout was scored.
        advantages: A.
        mask: tokens that count.
        cliprange: e.
        cliprange_high: e'; None: e.
        dual_clip: c > 1 bounds the loss by ``-c A`` where A < 0; 0: no bound.
        weights: truncated importance weights of the sampler; None: 1.
        total: divisor; None: the number of True entries in ``mask``.
    """
    high = cliprange if cliprange_high is None else cliprange_high
    divisor = mask.sum().clamp(min=1) if total is None else total
    difference = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    ratio = difference.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - cliprange, 1.0 + high)
    losses = torch.maximum(plain, clipped)
    if dual_clip > 0:
        losses = torch.where(advantages < 0, torch.minimum(losses, -dual_clip * advantages), losses)
    if weights is not None:
        losses = losses * weights
    return PolicyLoss(
        loss=losses.masked_fill(~mask, 0.0).sum() / divisor,
        clipfrac=((clipped > plain) & mask).sum().detach() / divisor,
        approxkl=(0.5 * difference.detach().square()).sum() / divisor,
        ratio=(ratio.detach() * mask).sum() / divisor,
    )


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange: float = 0.2,
    total: Tensor | float | None = None,
) -> ValueLoss:
    """Return ``sum max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2) / (2 total)``.

    Args:
        values: V of the value head being trained.
        old_values: V when the rollout was scored.
        returns: R.
        mask: states that count.
        cliprange: e; 0 turns clipping off.
        total: divisor; None: the number of True entries in ``mask``.
    """
    divisor = mask.sum().clamp(min=1) if total is None else total
    plain = (values - returns).square()
    losses, clips = plain, torch.zeros_like(mask)
    if cliprange > 0:
        near = torch.maximum(torch.minimum(values, old_values + cliprange), old_values - cliprange)
        clipped = (near - returns).square()
        losses, clips = torch.maximum(plain, clipped), clipped > plain
    return ValueLoss(
        loss=0.5 * losses.masked_fill(~mask, 0.0).sum() / divisor,
        clipfrac=(clips & mask).sum().detach() / divisor,
    )
