"""From scores and log-probabilities to advantages: what PPO does between rollout and update.

Pure functions on right-padded (B, T) tensors, one column per completion token; True in a mask means
that the token counts. Column t of ``values`` is the value of the state *before* token t. Inputs are
never written to.

Sources: Ziegler et al., arXiv 1909.08593 (KL in the reward, adaptive KL, whitening); Schulman et
al., arXiv 1506.02438 (GAE); Schulman, "Approximating KL divergence" (k1, k3); Huang et al., arXiv
2403.17031 (the details that matter); Yuan et al., VAPO, arXiv 2504.05118 (a separate lambda for the
value target).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Advantages",
    "KlController",
    "KlEstimator",
    "RewardNormaliser",
    "gae",
    "kl_terms",
    "last_index",
    "masked_mean",
    "masked_whiten",
    "shape_rewards",
]

KlEstimator = Literal["k1", "k3"]


class Advantages(NamedTuple):
    """What GAE gives: both (B, T), 0 where the mask is False."""

    advantages: Tensor
    returns: Tensor


def _alone(total: Tensor) -> Tensor:
    """Sum over processes when there is one process."""
    return total


def kl_terms(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, *, estimator: KlEstimator = "k1"
) -> Tensor:
    """Return per-token estimates of KL(policy || reference) at sampled tokens, (B, T), 0 off mask.

    With ``l = log pi - log pi_ref``: k1 is ``l``, unbiased, of either sign; k3 is
    ``e^{-l} - 1 + l``, unbiased too and never negative.
    """
    k1 = (logprobs - ref_logprobs).masked_fill(~mask, 0.0)
    if estimator == "k1":
        return k1
    return torch.expm1(-k1) + k1


def last_index(mask: Tensor) -> Tensor:
    """Return the column of each row's last True, (B,); 0 for a row without any."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (columns * mask).amax(dim=1)


def shape_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float, terminal: Tensor | None = None
) -> Tensor:
    """Return per-token rewards ``-kl_coef * kl``, plus the score at the terminal token; (B, T).

    Args:
        scores: one score per completion, (B,).
        kl: per-token KL estimates, (B, T).
        mask: completion tokens, EOS included, (B, T).
        kl_coef: weight of the KL penalty.
        terminal: column that gets the score, (B,); None: the last token of the completion, which
            is the EOS where there is one.
    """
    rewards = (-kl_coef * kl).masked_fill(~mask, 0.0)
    columns = torch.arange(mask.shape[1], device=mask.device)
    end = last_index(mask) if terminal is None else terminal
    return rewards + scores[:, None] * (columns == end[:, None])


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    value_lam: float | None = None,
) -> Advantages:
    """Generalised advantage estimation over the True columns of each row.

    ``delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lam A_{t+1};  R_t = A_t + V_t``,
    where t+1 is the next True column, so that masked columns inside a row (a tool's words, say) are
    stepped over; behind the last one stands 0.

    Args:
        rewards: (B, T).
        values: (B, T), value before each token.
        mask: (B, T).
        gamma: discount per token.
        lam: GAE's lambda for the advantages.
        value_lam: lambda of the value target; None: ``lam``. 1 gives plain returns.
    """
    advantages = _accumulate(rewards, values, mask, gamma=gamma, lam=lam)
    if value_lam is None or value_lam == lam:
        errors = advantages
    else:
        errors = _accumulate(rewards, values, mask, gamma=gamma, lam=value_lam)
    return Advantages(advantages, (errors + values).masked_fill(~mask, 0.0))


def _accumulate(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> Tensor:
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running)
    columns = []
    for t in reversed(range(rewards.shape[1])):
        counts = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = torch.where(counts, delta + gamma * lam * running, running)
        next_value = torch.where(counts, values[:, t], next_value)
        columns.append(running.masked_fill(~counts, 0.0))
    return torch.stack(columns[::-1], dim=1)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over True entries, a scalar; 0 where there are none."""
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def masked_whiten(
    values: Tensor,
    mask: Tensor,
    *,
    shift_mean: bool = True,
    reduce: Callable[[Tensor], Tensor] = _alone,
) -> Tensor:
    """Return values scaled to variance 1 (and mean 0) over True entries; 0 elsewhere, (B, T).

    The variance is the unbiased one. With fewer than two entries only the mean is shifted.

    Args:
        values: (B, T).
        mask: (B, T).
        shift_mean: off keeps the mean, as rewards want it.
        reduce: sums a tensor over all processes, so that every process whitens alike.
    """
    kept = values.masked_fill(~mask, 0.0)
    count = reduce(mask.sum().to(values.dtype))
    mean = reduce(kept.sum()) / count.clamp(min=1)
    centred = (values - mean).masked_fill(~mask, 0.0)
    variance = reduce(centred.square().sum()) / (count - 1).clamp(min=1)
    whitened = centred * torch.rsqrt(variance + 1e-8) if count > 1 else centred
    return whitened if shift_mean else (whitened + mean).masked_fill(~mask, 0.0)


class KlController:
    """The KL penalty's weight: fixed, or steered towards a target KL per completion.

    Adaptive (Ziegler et al., section 2.2): ``e = clip(KL / target - 1, -0.2, 0.2)`` and
    ``kl_coef *= 1 + e * n / horizon`` after ``n`` completions.
    """

    def __init__(self, kl_coef: float, *, target: float | None = None, horizon: int = 10_000):
        self.kl_coef = kl_coef
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, completions: int) -> None:
        """Steer after ``completions`` more completions whose mean summed KL (nats) was ``kl``."""
        if self.target is None or not math.isfinite(kl):
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.kl_coef *= 1.0 + error * completions / self.horizon

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.kl_coef = float(state["kl_coef"])


class RewardNormaliser:
    """Brings scores to mean 0 and standard deviation 1, by running moments or by fixed ones.

    ``fixed`` freezes the moments after the first batch: with the starting policy's completions in
    it, that is the normalisation of Stiennon et al. (arXiv 2009.01325), under which the reference
    policy has mean reward 0. Batches without any spread (a sparse reward that nothing has met yet)
    are pooled until there is some: divided by none, the first reward would be without bound.
    ``running`` keeps pooling every batch since the start (MOSS-RLHF's
    PPO-max), which follows a drifting score scale.
    """

    def __init__(self, mode: Literal["none", "fixed", "running"] = "none", *, clip: float = 0.0):
        self.mode = mode
        self.clip = clip
        self.count = 0.0
        self.mean = 0.0
        self.square = 0.0  # sum of squared deviations from the mean

    def update(self, scores: Tensor, reduce: Callable[[Tensor], Tensor] = _alone) -> None:
        """Pool a batch of scores, (B,), into the moments; NaN (no score) is left out."""
        if self.mode == "none" or (self.mode == "fixed" and self._deviation()):
            return
        known = scores[~scores.isnan()].double()
        count = float(reduce(torch.tensor(float(known.numel()), dtype=torch.float64)))
        if not count:
            return
        mean = float(reduce(known.sum().cpu())) / count
        square = float(reduce((known - mean).square().sum().cpu()))
        # Chan et al. 1979: moments of two pooled samples.
        shift, total = mean - self.mean, self.count + count
        self.square += square + shift * shift * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    def normalise(self, scores: Tensor) -> Tensor:
        """Return scores in units of the moments, clipped to ``clip`` where that is above 0."""
        if self.mode != "none" and self.count > 1:
            scores = (scores - self.mean) / (self._deviation() or 1.0)
        return scores.clamp(-self.clip, self.clip) if self.clip > 0 else scores

    def _deviation(self) -> float:
        """Return the standard deviation so far, 0 where it is no more than rounding."""
        if self.count < 2:
            return 0.0
        deviation = math.sqrt(self.square / (self.count - 1))
        return deviation if deviation > 1e-6 * max(1.0, abs(self.mean)) else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"count": self.count, "mean": self.mean, "square": self.square}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state."""
        self.count, self.mean, self.square = state["count"], state["mean"], state["square"]
