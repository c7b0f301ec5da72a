"""Losses on pairs: reward modelling and the DPO family. Pure functions, tensors in, tensors out.

Every function returns one loss per pair, shape (B,), before any reduction: ``weighted_mean``
applies the rows' weights and divides by a total that may span several micro-batches or processes.
Inputs are never written to. Losses on ranked groups are in ``losses_listwise.py``.

Two levels. A *difference* is what the loss sees of a pair: ``d = r(chosen) - r(rejected)`` for a
reward model, ``h = beta * [log-ratio(chosen) - log-ratio(rejected)]`` for DPO
(``implicit_rewards``). Bradley-Terry, GDPO, rDPO, RPO and the tie models take differences and so
serve both.

``p_chosen`` is the judge's P(chosen preferred); None means a hard label, p = 1.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ImplicitRewards",
    "PairLogps",
    "RpoForm",
    "bradley_terry_loss",
    "centring_loss",
    "davidson_log_probs",
    "gdpo_loss",
    "implicit_rewards",
    "ipo_loss",
    "length_correlation_loss",
    "nll_loss",
    "rao_kupper_log_probs",
    "robust_loss",
    "rpo_loss",
    "simpo_loss",
    "tie_loss",
    "tie_targets",
    "weighted_mean",
]

RpoForm = Literal["target_to_policy", "policy_to_target", "squared"]


class PairLogps(NamedTuple):
    """What the DPO family needs of a batch of pairs; every field has shape (B,).

    The log-probabilities are sums over completion tokens (EOS included) in nats; lengths are the
    numbers of tokens summed. The reference is None for reference-free losses.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None


class ImplicitRewards(NamedTuple):
    """DPO's ``beta * (s_policy - s_ref)`` of chosen and rejected, and their difference h; (B,)."""

    chosen: Tensor
    rejected: Tensor
    differences: Tensor


def weighted_mean(
    losses: Tensor, weights: Tensor | None = None, *, total: Tensor | float | None = None
) -> Tensor:
    """Return ``sum(weights * losses) / total``, a scalar.

    Args:
        losses: one loss per pair or group, (B,).
        weights: one weight per loss, (B,); None: all 1.
        total: what to divide by; None: the sum of these weights. With gradient accumulation or
            several processes pass the sum over all of them, so that the split does not matter.

    An all-zero weight vector gives 0, not NaN.
    """
    if weights is None:
        weights = torch.ones_like(losses)
    weights = weights.to(losses.dtype)
    if total is None:
        total = weights.sum()
    total = torch.as_tensor(total, dtype=losses.dtype, device=losses.device)
    return (weights * losses).sum() / torch.where(total == 0, torch.ones_like(total), total)


def bradley_terry_loss(
    differences: Tensor, *, p_chosen: Tensor | None = None, margin: Tensor | None = None
) -> Tensor:
    """Return ``-p log sigma(d - m) - (1 - p) log sigma(-d - m)``, shape (B,).

    The expectation of the hard loss when the label is right with chance p. With rewards it is the
    reward model's loss; with d = h it is DPO (hard) or cDPO (soft). Without a margin the minimum
    lies at ``d = logit(p)``; at p = 1/2 it lies at 0 whatever the margin. Sources: Bradley & Terry
    1952; Lee et al., RLAIF (arXiv 2309.00267) for soft labels; Touvron et al., Llama 2 (arXiv
    2307.09288) eq. 2 for the margin; Rafailov et al., DPO (arXiv 2305.18290) eq. 7; Mitchell's cDPO
    note, eq. 3.

    Args:
        differences: d or h, (B,).
        p_chosen: P(chosen preferred) in [0, 1], (B,); None: 1.
        margin: m >= 0, (B,); None: 0.
    """
    m = 0.0 if margin is None else margin
    if p_chosen is None:
        return -F.logsigmoid(differences - m)  # -log sigma(d - m)
    right = -F.logsigmoid(differences - m)
    wrong = -F.logsigmoid(-differences - m)
    return p_chosen * right + (1 - p_chosen) * wrong


def gdpo_loss(differences: Tensor, *, p_chosen: Tensor) -> Tensor:
    """Return the geometric-averaging loss ``-log sigma((2p - 1) h)``, shape (B,).

    A coin-flip label (p = 1/2) gives no gradient, and nothing pulls h back once it is ordered,
    unlike the soft Bradley-Terry form. Source: Furuta et al., arXiv 2409.06691.
    """
    return -F.logsigmoid((2 * p_chosen - 1) * differences)


def robust_loss(
    differences: Tensor, *, flip: Tensor | float, cap: float = 0.4, limit: float = 10.0
) -> Tensor:
    """Return rDPO, unbiased when a label is flipped with chance ``flip``; shape (B,).

    ``[-(1 - e) log sigma(h) + e log sigma(-h)] / (1 - 2e)``. Source: Chowdhury et al., arXiv
    2403.00409. It falls without bound as h grows, at a slope of e / (1 - 2e), so two guards are
    built in: e is capped (the slope explodes at 1/2), and beyond ``limit`` h counts as ``limit``.

    Args:
        differences: h, (B,).
        flip: chance e that the label is wrong, (B,) or a number, in [0, 0.5].
        cap: largest e used, below 0.5.
        limit: largest h used; ``math.inf`` turns the guard off.
    """
    if not 0 <= cap < 0.5:
        raise ValueError(f"cap must lie in [0, 0.5), got {cap}")
    e = torch.as_tensor(flip, dtype=differences.dtype, device=differences.device).clamp(max=cap)
    h = differences.clamp(max=limit) if limit < math.inf else differences
    return (-(1 - e) * F.logsigmoid(h) + e * F.logsigmoid(-h)) / (1 - 2 * e)


def rpo_loss(differences: Tensor, *, target: Tensor, form: RpoForm = "target_to_policy") -> Tensor:
    """Return a reward-aware loss that is zero exactly where h equals the target; shape (B,).

    Source: Adler et al., Nemotron-4 340B (arXiv 2406.11704), reward-aware preference optimisation.

    Args:
        differences: h, (B,).
        target: ``eta * (reward(chosen) - reward(rejected))``, (B,), in the units of h.
        form: ``target_to_policy`` is KL(Bernoulli(sigma(target)) || Bernoulli(sigma(h))),
            ``policy_to_target`` the same with sides changed, ``squared`` is (h - target)^2.
    """
    if form == "squared":
        return (differences - target) ** 2
    q, p = (target, differences) if form == "target_to_policy" else (differences, target)
    # KL(q || p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p))
    won = F.sigmoid(q) * (F.logsigmoid(q) - F.logsigmoid(p))
    lost = F.sigmoid(-q) * (F.logsigmoid(-q) - F.logsigmoid(-p))
    return won + lost


def rao_kupper_log_probs(differences: Tensor, *, nu: Tensor | float = 3.0) -> Tensor:
    """Return log P of (chosen wins, tie, rejected wins) under Rao and Kupper's model, (B, 3).

    P(win) = sigma(d - a), P(loss) = sigma(-d - a), P(tie) = (e^{2a} - 1) sigma(d - a) sigma(-d - a)
    with a = log nu. ``nu`` > 1 is the threshold; 3 gives a tie one chance in two at d = 0.
    Source: Rao & Kupper 1967; in DPO: Chen et al., arXiv 2409.17431.
    """
    nu = torch.as_tensor(nu, dtype=differences.dtype, device=differences.device)
    if bool((nu <= 1).any()):
        raise ValueError("Rao-Kupper's nu must be greater than 1 (at 1 a tie is impossible)")
    a = nu.log()
    won = F.logsigmoid(differences - a)
    lost = F.logsigmoid(-differences - a)
    tied = torch.expm1(2 * a).log() + won + lost
    return torch.stack([won, tied, lost], dim=-1)


def davidson_log_probs(differences: Tensor, *, nu: Tensor | float = 1.0) -> Tensor:
    """Return log P of (chosen wins, tie, rejected wins) under Davidson's model, (B, 3).

    P(win) = e^{d/2} / Z, P(tie) = 2 nu / Z, P(loss) = e^{-d/2} / Z. ``nu`` > 0; 1 gives a tie one
    chance in two at d = 0. Source: Davidson 1970; in DPO: Chen et al., arXiv 2409.17431.
    """
    nu = torch.as_tensor(nu, dtype=differences.dtype, device=differences.device)
    if bool((nu <= 0).any()):
        raise ValueError("Davidson's nu must be positive (at 0 a tie is impossible)")
    tied = (2 * nu).log().expand_as(differences)
    return F.log_softmax(torch.stack([differences / 2, tied, -differences / 2], dim=-1), dim=-1)


def tie_targets(p_chosen: Tensor, tie: Tensor) -> Tensor:
    """Return the judge's distribution over (chosen wins, tie, rejected wins), (B, 3).

    A row marked ``tie`` puts everything on the tie; any other row is ``(p, 0, 1 - p)``.
    """
    decided = torch.stack([p_chosen, torch.zeros_like(p_chosen), 1 - p_chosen], dim=-1)
    tied = torch.zeros_like(decided)
    tied[..., 1] = 1
    return torch.where(tie.bool().unsqueeze(-1), tied, decided)


def tie_loss(log_probs: Tensor, *, targets: Tensor) -> Tensor:
    """Return the cross-entropy of tie ``log_probs`` (B, 3) to ``targets`` (B, 3), shape (B,)."""
    return -(targets * log_probs).sum(dim=-1)


def implicit_rewards(pair: PairLogps, *, beta: float) -> ImplicitRewards:
    """Return DPO's implicit rewards and their difference h (DPO, eq. 7).

    ``h = beta * [(s - s_ref)(chosen) - (s - s_ref)(rejected)]``. Without a reference (None) the
    rewards are ``beta * s``, as under a uniform one.
    """
    chosen, rejected = pair.policy_chosen, pair.policy_rejected
    if pair.ref_chosen is not None and pair.ref_rejected is not None:
        chosen, rejected = chosen - pair.ref_chosen, rejected - pair.ref_rejected
    return ImplicitRewards(beta * chosen, beta * rejected, beta * (chosen - rejected))


def ipo_loss(
    pair: PairLogps, *, beta: float, p_chosen: Tensor | None = None, averaged: bool = False
) -> Tensor:
    """Return IPO's ``(log-ratio difference - 1 / (2 beta))^2``, shape (B,).

    Source: Azar et al., arXiv 2310.12036, eq. 17, on summed log-probabilities. A soft label is the
    expectation of the paper's own sampled loss, ``p (x - t)^2 + (1 - p) (x + t)^2``, least at
    ``(2p - 1) t``.

    Args:
        pair: log-probabilities; the reference is required.
        beta: the paper's tau.
        p_chosen: P(chosen preferred), (B,); None: 1.
        averaged: divide each log-ratio by its completion's length first, as TRL does: another loss,
            for which the same beta means another strength.
    """
    if pair.ref_chosen is None or pair.ref_rejected is None:
        raise ValueError("IPO needs the reference's log-probabilities")
    chosen = pair.policy_chosen - pair.ref_chosen
    rejected = pair.policy_rejected - pair.ref_rejected
    if averaged:
        chosen = chosen / pair.chosen_lengths.clamp(min=1)
        rejected = rejected / pair.rejected_lengths.clamp(min=1)
    x, target = chosen - rejected, 1 / (2 * beta)
    if p_chosen is None:
        return (x - target) ** 2
    return p_chosen * (x - target) ** 2 + (1 - p_chosen) * (x + target) ** 2


def simpo_loss(
    pair: PairLogps, *, beta: float, gamma: float, p_chosen: Tensor | None = None
) -> Tensor:
    """Return SimPO's ``-log sigma(beta (s_w / |y_w| - s_l / |y_l|) - gamma)``, shape (B,).

    It uses no reference. A soft label weighs it against its mirror image. Source: Meng et al.,
    arXiv 2405.14734, eq. 6.
    """
    chosen = pair.policy_chosen / pair.chosen_lengths.clamp(min=1)
    rejected = pair.policy_rejected / pair.rejected_lengths.clamp(min=1)
    x = beta * (chosen - rejected)
    if p_chosen is None:
        return -F.logsigmoid(x - gamma)
    return -p_chosen * F.logsigmoid(x - gamma) - (1 - p_chosen) * F.logsigmoid(-x - gamma)


def nll_loss(logps: Tensor, lengths: Tensor) -> Tensor:
    """Return the per-token negative log-likelihood ``-s(y) / |y|`` of each completion, shape (B,).

    Added to DPO with a weight it counters a falling chosen likelihood: Pang et al., arXiv
    2404.19733.
    """
    return -logps / lengths.clamp(min=1)


def centring_loss(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """Return ``(r_1 + r_2)^2``, shape (B,): it fixes the free constant of rewards near zero.

    Source: Eisenstein et al., arXiv 2312.09244; a coefficient of 0.01 is usual.
    """
    return (chosen_rewards + rejected_rewards) ** 2


def length_correlation_loss(
    differences: Tensor, length_differences: Tensor, *, weights: Tensor | None = None
) -> Tensor:
    """Return the squared correlation of reward and length differences over the batch, a scalar.

    Differences within pairs, taken about zero (a pair may be written either way round, so the sign
    carries no mean): ``(sum w d l)^2 / (sum w d^2 * sum w l^2)``, in [0, 1]. The idea of penalising
    this correlation is ODIN's: Chen et al., arXiv 2402.07319. It is a batch statistic: it wants
    batches of dozens of pairs and cannot be averaged exactly over micro-batches.

    Args:
        differences: rewards of chosen minus rejected, (B,).
        length_differences: tokens of chosen minus rejected, (B,).
        weights: (B,); None: all 1.
    """
    lengths = length_differences.to(differences.dtype)
    w = torch.ones_like(differences) if weights is None else weights.to(differences.dtype)
    covariance = (w * differences * lengths).sum()
    scale = (w * differences**2).sum() * (w * lengths**2).sum()
    # All lengths equal, or all rewards equal: no correlation to speak of, and no 0 / 0 (the
    # covariance is 0 then, and so is its gradient).
    return covariance**2 / torch.where(scale > 0, scale, torch.ones_like(scale))
