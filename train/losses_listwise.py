"""Losses on ranked groups: Plackett-Luce with ties, and RRHF. Pure functions.

A batch of G groups is padded to the largest: scores and the like are (G, K), and ``mask`` (G, K) is
True where a completion stands (``pad_groups`` makes both from flat tensors). What is masked out has
no effect, whatever it holds. ``places`` (G, K) are the places of a ranking: 0 for the best, equal
numbers for tied completions; a gap in the numbers means nothing. No loss looks at a completion's
index: two completions with the same place are never ordered.

Inputs are never written to; half precision is lifted to float32. Losses on pairs: ``losses.py``.
"""

from __future__ import annotations

import math
from functools import lru_cache
from itertools import combinations
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "LARGEST_TIE",
    "PaddedGroups",
    "RankForm",
    "RrhfLoss",
    "SftForm",
    "TieForm",
    "pad_groups",
    "plackett_luce_loss",
    "rrhf_loss",
]

TieForm = Literal["average", "davidson"]
RankForm = Literal["hinge", "logistic"]
SftForm = Literal["sum", "token_mean", "row_mean"]

LARGEST_TIE = 12
"""Largest tied block (Davidson form: group); the exact sums run over its 2^n subsets."""


class PaddedGroups(NamedTuple):
    """Groups as a matrix: ``values`` (G, K), zero where ``mask`` (G, K) is False."""

    values: Tensor
    mask: Tensor


class RrhfLoss(NamedTuple):
    """RRHF per group, all (G,): ``losses`` = rank_weight * ``rank`` + ``sft``.

    ``accuracy`` is the share of ordered pairs whose length-normalised log-probabilities already
    stand in the judge's order, NaN for a group without an ordered pair.
    """

    losses: Tensor
    rank: Tensor
    sft: Tensor
    accuracy: Tensor


def pad_groups(flat: Tensor, counts: Tensor) -> PaddedGroups:
    """Return flat per-completion values (N,) as a padded matrix; ``counts`` (G,) sums to N."""
    mask = torch.arange(int(counts.max()), device=flat.device) < counts.unsqueeze(1)
    values = torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device)
    return PaddedGroups(values.masked_scatter(mask, flat), mask)


def plackett_luce_loss(
    scores: Tensor,
    places: Tensor,
    mask: Tensor,
    *,
    ties: TieForm = "average",
    tie_strength: float = 2.0,
) -> Tensor:
    """Return the negative log-likelihood of each group's ranking, shape (G,).

    Without ties: ``-sum_k [f(pi_k) - log sum_{j >= k} exp f(pi_j)]`` (Plackett-Luce; ListMLE); for
    K = 2 it is Bradley-Terry. With f = reward it trains a reward model; with
    ``f = beta * (s_policy - s_ref)`` it is listwise DPO (Rafailov et al., arXiv 2305.18290,
    appendix A.3).

    Args:
        scores: f, (G, K).
        places: places of the ranking, (G, K), 0 is best; equal places are a tied block.
        mask: completions that exist, (G, K).
        ties: ``average``: the mean over all orders of each tied block, which for a tied pair is the
            soft Bradley-Terry loss at p = 1/2. ``davidson``: a tie is an event of its own (Turner
            et al., arXiv 1810.12068): a set S is chosen with weight
            ``delta_|S| * exp(mean of f over S)``, delta_1 = 1; for K = 2 it is Davidson's model.
        tie_strength: delta of every set of two or more (Davidson's ``2 nu``).

    Raises:
        ValueError: a tied block (``davidson``: a group) is larger than ``LARGEST_TIE``.
    """
    scores = _lift(scores).masked_fill(~mask, 0.0)
    if ties == "davidson":
        return _davidson_luce(scores, places, mask, tie_strength)
    same = (places.unsqueeze(1) == places.unsqueeze(2)) & mask.unsqueeze(1) & mask.unsqueeze(2)
    worse = (places.unsqueeze(1) > places.unsqueeze(2)) & mask.unsqueeze(1)  # [g, i, j]: j below i
    below = torch.logsumexp(_hide(scores.unsqueeze(1), ~worse), dim=2)  # (G, K)
    size = same.sum(dim=2)
    _check_size(int(size.max()), "tied block")
    # One row per tied block: the completion that no equal one precedes stands for it.
    first = mask & ~torch.tril(same, diagonal=-1).any(dim=2)
    losses = -(scores * mask).sum(dim=1)
    for n in size[first].unique().tolist():
        group, item = (first & (size == n)).nonzero(as_tuple=True)
        members = same[group, item].nonzero(as_tuple=True)[1].view(-1, n)
        block = scores[group.unsqueeze(1), members]  # (blocks, n)
        denominators = _mean_denominators(block, below[group, item])
        losses = losses.index_add(0, group, denominators)
    return losses


def _mean_denominators(block: Tensor, below: Tensor) -> Tensor:
    """Return the sum of log-denominators of one tied block, averaged over its orders; (blocks,).

    When s of the block's n members are still to be placed, each subset of size s is what is left
    in the same share of the orders: the average over n! orders is a mean over subsets of each size.
    """
    n = block.shape[1]
    subsets, sizes = _subsets(n)
    inside = subsets.to(block.device)
    left = torch.logsumexp(_hide(block.unsqueeze(1), ~inside), dim=2)  # (blocks, 2^n - 1)
    share = torch.tensor([1 / math.comb(n, s) for s in sizes], dtype=block.dtype)
    return (torch.logaddexp(left, below.unsqueeze(1)) * share.to(block.device)).sum(dim=1)


def _davidson_luce(scores: Tensor, places: Tensor, mask: Tensor, tie_strength: float) -> Tensor:
    if tie_strength <= 0:
        raise ValueError(f"tie_strength must be positive, got {tie_strength}")
    k = scores.shape[1]
    _check_size(k, "group")
    subsets, sizes = _subsets(k)
    inside = subsets.to(scores.device)  # (S, K)
    bonus = torch.tensor([0.0 if s == 1 else math.log(tie_strength) for s in sizes])
    bonus = bonus.to(scores)
    # log weight of choosing the set S: log delta_|S| + mean of f over S
    weight = scores @ (inside.to(scores.dtype) / inside.sum(dim=1, keepdim=True)).T + bonus
    losses = torch.zeros_like(scores[:, 0])
    same = (places.unsqueeze(1) == places.unsqueeze(2)) & mask.unsqueeze(1) & mask.unsqueeze(2)
    first = mask & ~torch.tril(same, diagonal=-1).any(dim=2)
    for item in range(k):
        # The stage at which this completion's block is chosen from all that are not better.
        available = mask & (places >= places[:, item : item + 1])
        possible = ~(inside.unsqueeze(0) & ~available.unsqueeze(1)).any(dim=2)  # (G, S)
        picked = (inside.unsqueeze(0) == same[:, item].unsqueeze(1)).all(dim=2)
        chosen = torch.where(picked, weight, torch.zeros_like(weight)).sum(dim=1)
        stage = torch.logsumexp(_hide(weight, ~possible), dim=1) - chosen
        losses = losses + torch.where(first[:, item], stage, torch.zeros_like(stage))
    return losses


def rrhf_loss(
    logps: Tensor,
    lengths: Tensor,
    scores: Tensor,
    mask: Tensor,
    *,
    rank_weight: float = 1.0,
    length_penalty: float = 1.0,
    margin: float = 0.0,
    rank_form: RankForm = "hinge",
    pair_weights: Tensor | None = None,
    sft_form: SftForm = "sum",
    row_widths: Tensor | None = None,
) -> RrhfLoss:
    """Return RRHF's loss per group (Yuan et al., arXiv 2304.05302, eqs. 1-5).

    ``p_i = s(y_i) / |y_i|`` (eq. 1); ``L_rank = sum_{r_i < r_j} max(0, p_i - p_j)`` (eq. 2);
    ``L_ft = -s(y_best)`` (eqs. 3, 4); ``L = rank_weight * L_rank + L_ft`` (eq. 5, weight 1).
    Equal scores give no rank term. Where several completions tie for best, L_ft is their mean.

    Args:
        logps: s, sum of log-probabilities of each completion's tokens, (G, K).
        lengths: |y|, number of those tokens, (G, K).
        scores: r, judge's scores, higher is better, (G, K); only their order matters.
        mask: completions that exist, (G, K).
        rank_weight: weight of the ranking term.
        length_penalty: exponent of the length in eq. 1.
        margin: added inside the hinge: ``max(0, p_i - p_j + margin)``; without it the gradient ends
            as soon as a pair is ordered.
        rank_form: ``logistic`` replaces the hinge by ``softplus(p_i - p_j + margin)``.
        pair_weights: confidence in each pair's order, (G, K, K), symmetric; None: all 1.
        sft_form: ``sum`` over tokens (the paper); ``token_mean``; ``row_mean``: the authors' code,
            which divides by the width of the padded row, prompt and padding included, and takes the
            first of the tied best.
        row_widths: those widths, (G,), for ``row_mean``.
    """
    logps, lengths = _lift(logps).masked_fill(~mask, 0.0), lengths.masked_fill(~mask, 1)
    p = logps / lengths.clamp(min=1) ** length_penalty  # eq. 1
    gap = p.unsqueeze(2) - p.unsqueeze(1)  # [g, i, j] = p_i - p_j
    valid = mask.unsqueeze(1) & mask.unsqueeze(2)
    ordered = valid & (scores.unsqueeze(2) < scores.unsqueeze(1))  # r_i < r_j; ties drop out
    term = F.relu(gap + margin) if rank_form == "hinge" else F.softplus(gap + margin)
    if pair_weights is not None:
        term = term * pair_weights.to(term.dtype)
    rank = torch.where(ordered, term, torch.zeros_like(term)).sum(dim=(1, 2))  # eq. 2
    sft = _sft_on_best(logps, lengths, scores, mask, sft_form, row_widths)  # eqs. 3, 4
    right = (ordered & (gap < 0)).sum(dim=(1, 2)) / ordered.sum(dim=(1, 2))
    return RrhfLoss(rank_weight * rank + sft, rank.detach(), sft.detach(), right.detach())  # eq. 5


def _sft_on_best(
    logps: Tensor,
    lengths: Tensor,
    scores: Tensor,
    mask: Tensor,
    form: SftForm,
    row_widths: Tensor | None,
) -> Tensor:
    ranked = scores.to(logps.dtype).masked_fill(~mask, -math.inf)
    best = (ranked == ranked.max(dim=1, keepdim=True).values) & mask
    if form == "row_mean":
        if row_widths is None:
            raise ValueError("sft_form='row_mean' needs row_widths: the padded width of each group")
        first = best & (best.cumsum(dim=1) == 1)
        return -torch.where(first, logps, torch.zeros_like(logps)).sum(dim=1) / row_widths
    nll = -logps if form == "sum" else -logps / lengths.clamp(min=1)
    return torch.where(best, nll, torch.zeros_like(nll)).sum(dim=1) / best.sum(dim=1).clamp(min=1)


def _lift(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def _hide(values: Tensor, hidden: Tensor) -> Tensor:
    """Return ``values`` with ``hidden`` ones out of any logsumexp.

    A large negative number, not -inf: a logsumexp over nothing but -inf has NaN gradients.
    """
    return values.masked_fill(hidden, -1e30)


def _check_size(size: int, what: str) -> None:
    if size > LARGEST_TIE:
        raise ValueError(
            f"a {what} of {size} completions is more than {LARGEST_TIE}, the most that exact "
            "Plackett-Luce with ties can take; use all pairs instead, or drop completions"
        )


@lru_cache(maxsize=LARGEST_TIE)
def _subsets(n: int) -> tuple[Tensor, tuple[int, ...]]:
    """Return the non-empty subsets of n items as a mask (2^n - 1, n), and their sizes."""
    chosen = [c for s in range(1, n + 1) for c in combinations(range(n), s)]
    mask = torch.zeros(len(chosen), n, dtype=torch.bool)
    for row, items in enumerate(chosen):
        mask[row, list(items)] = True
    return mask, tuple(len(items) for items in chosen)
