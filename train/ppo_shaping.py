"""From a rollout to what an update learns from: rewards per token, advantages, returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from train.advantages import gae, kl_terms, masked_whiten, shape_rewards
from train.ppo_losses import truncated_weights
from train.ppo_setup import Run
from train.rollout import Rollout

__all__ = ["Shaped", "shape"]


class Shaped(NamedTuple):
    """A rollout with its advantages, on the training device; (N, T) but for the scores."""

    mask: Tensor
    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    weights: Tensor
    """Truncated importance weights between sampler and trainer."""
    kl: Tensor
    non_score: Tensor
    """The KL penalty's part of the rewards."""
    scores: Tensor
    """(N,) what the last token was rewarded with; 0 where there is no score."""


def shape(this: Run, rollout: Rollout) -> Shaped:
    """Turn a rollout's scores and log-probabilities into advantages and returns."""
    options = this.options
    scores = this.normaliser.normalise(rollout.scores)
    if options.missing_eos_score is not None:
        cut = torch.full_like(scores, options.missing_eos_score)
        scores = torch.where(rollout.ended, scores, cut)
    elif options.missing_eos_penalty is not None:
        scores = scores - options.missing_eos_penalty * (~rollout.ended).float()
    scores = torch.where(rollout.scores.isnan(), 0.0, scores)
    mask = rollout.mask
    kl = kl_terms(rollout.logprobs, rollout.ref_logprobs, mask, estimator=options.kl_estimator)
    rewards = shape_rewards(scores, kl, mask, kl_coef=this.controller.kl_coef)
    if options.whiten_rewards:
        rewards = masked_whiten(rewards, mask, shift_mean=False, reduce=this.sum)
    advantages, returns = gae(
        rewards,
        rollout.values,
        mask,
        gamma=options.gamma,
        lam=options.lam,
        value_lam=options.value_lam,
    )
    if options.whiten_advantages:
        advantages = masked_whiten(advantages, mask, reduce=this.sum)
    weights = torch.ones_like(advantages)
    if options.importance_cap > 0:
        weights = truncated_weights(
            rollout.logprobs, rollout.sampler_logprobs, cap=options.importance_cap
        )
    shaped = Shaped(
        mask=mask,
        logprobs=rollout.logprobs,
        values=rollout.values,
        advantages=advantages,
        returns=returns,
        weights=weights,
        kl=kl,
        non_score=-this.controller.kl_coef * kl,
        scores=scores,
    )
    return Shaped(*(tensor.to(this.accelerator.device) for tensor in shaped))
