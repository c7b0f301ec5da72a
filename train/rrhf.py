"""``rlaif rrhf``: rank responses to align human feedback (Yuan et al., arXiv 2304.05302).

    p_i = s(y_i) / |y_i|                                     s: sum of log-probabilities
    L   = rank_weight * sum over (i worse than j) of c_ij * max(0, p_i - p_j)  -  s(y_best)

per prompt, averaged over prompts; any number of completions each, any batch size. Tied completions
give no term. c_ij is the pair's weight: 1 in a ranking; in preferences the mean weight of the rows
that compare the two, and 0 for two completions that the judge never compared. Only one model is in
memory: no reference, no reward model, no value head.

Candidates may come from sampling, from data, or both: every shard given in ``data`` is read, and
what was judged together makes one group. ``iterate`` trains in rounds, each on candidates that a
caller samples from the policy of the round before (docs/rounds.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from feedback.errors import InputError
from train.batches import Counts
from train.chat import DataReport
from train.config import RrhfOptions
from train.data import Group, Pair
from train.labels import mean_weight, ranked_from_labels
from train.losses import weighted_mean
from train.losses_listwise import pad_groups, rrhf_loss
from train.models import add_adapters, completion_logps, load_model, load_tokenizer
from train.packing import PackedBatch
from train.results import announce, finished, fit
from train.trainer import Metrics, StepLoss
from train.training_data import read_training_data

__all__ = ["Resample", "RrhfObjective", "iterate", "rank_candidates", "run"]


class RrhfObjective:
    """RRHF over packed groups."""

    name = "rrhf"

    def __init__(self, options: RrhfOptions):
        self.options = options

    def counts(self, groups: Sequence[Group]) -> Counts:
        """Return the sum of the groups' weights."""
        return {"weight": sum(map(mean_weight, groups))}

    def loss(self, model: Any, batch: PackedBatch, counts: Mapping[str, float]) -> StepLoss:
        """Return the row's share of the step's mean loss."""
        options = self.options
        policy = completion_logps(model, batch, chunk=options.logprob_chunk)
        sizes = torch.bincount(batch.completion_groups, minlength=len(batch.groups))
        logps, mask = pad_groups(policy.logps, sizes)
        ranks = pad_groups(batch.ranks, sizes).values
        weights = _weights(batch, sizes, ranks, confidence=options.confidence_weights)
        parts = rrhf_loss(
            logps,
            pad_groups(batch.lengths, sizes).values,
            -ranks,
            mask & (ranks >= 0),
            rank_weight=options.rank_weight,
            length_penalty=options.length_penalty,
            margin=options.margin,
            rank_form=options.rank_form,
            pair_weights=weights.pairs,
            sft_form=options.sft_form,
            row_widths=_row_widths(batch) if options.sft_form == "row_mean" else None,
        )
        loss = weighted_mean(parts.losses, weights.groups, total=counts["weight"])
        ordered = ~parts.accuracy.isnan()
        count = float(len(batch.groups))
        metrics: Metrics = {
            "loss/rank": (parts.rank.sum(), count),
            "loss/sft": (parts.sft.sum(), count),
            "rewards/accuracies": (parts.accuracy[ordered].sum(), ordered.sum()),
            "logps/mean": ((policy.logps / policy.lengths).detach().sum(), float(len(batch))),
        }
        return StepLoss(loss, metrics)


@dataclasses.dataclass(frozen=True, slots=True)
class _Weights:
    pairs: Tensor
    """(G, K, K), symmetric, relative to the group's weight."""
    groups: Tensor
    """(G,)"""


def _weights(batch: PackedBatch, sizes: Tensor, ranks: Tensor, *, confidence: bool) -> _Weights:
    """Return what each pair and each group counts, from the pairs that the judge compared.

    With ``confidence`` a pair counts by 2p - 1, p being the probability of the order that the
    ranking has it in: a comparison that speaks against the ranking counts nothing. Two completions
    that several rows compare count by the mean of these.
    """
    group = batch.completion_groups[batch.pairs[:, 0]]
    first = (sizes.cumsum(0) - sizes)[group]
    i, j = (batch.pairs - first[:, None]).unbind(1)
    value = batch.pair_weights
    counted = (value > 0).to(value.dtype)
    if confidence:
        sign = torch.sign(ranks[group, j] - ranks[group, i])
        value = value * sign * (2 * batch.pair_p - 1)

    def both_ways(values: Tensor) -> Tensor:
        grid = values.new_zeros((*ranks.shape, ranks.shape[1]))
        grid = grid.index_put((group, i, j), values, accumulate=True)
        return grid + grid.transpose(1, 2)

    grid = both_ways(value).clamp(min=0) / both_ways(counted).clamp(min=1)
    total = value.new_zeros(len(sizes))
    listed = total.index_add(0, group, counted).clamp(min=1)
    mean = total.index_add(0, group, batch.pair_weights) / listed
    relative = grid / torch.where(mean > 0, mean, torch.ones_like(mean))[:, None, None]
    return _Weights(relative, mean)


def _row_widths(batch: PackedBatch) -> Tensor:
    """Return the width of each group's padded row: its prompt and its longest completion, (G,)."""
    completions = [run for run in batch.runs if run.prompt_end > run.prompt_start]
    widths = [0] * len(batch.groups)
    for run, group in zip(completions, batch.completion_groups.tolist(), strict=True):
        width = run.prompt_end - run.prompt_start + run.end - run.start
        widths[group] = max(widths[group], width)
    return torch.tensor(widths, device=batch.lengths.device)


def rank_candidates(
    groups: Sequence[Group], report: DataReport, options: RrhfOptions
) -> list[Group]:
    """Return the groups with a ranking, and with every pair that the rank term may use.

    A ranking's pairs are all there are, those the judge compared with its probability. Preferences
    keep their own pairs; their completions are placed by how often they were preferred.

    Raises:
        InputError: nothing is left.
    """
    kept = []
    for group, ranked in zip(groups, ranked_from_labels(groups, mixed=True), strict=True):
        if options.ties == "drop" and len(ranked.ranking) < 2:
            continue
        own = bool(group.ranking)
        kept.append(dataclasses.replace(ranked, pairs=_complete(ranked)) if own else ranked)
    if len(kept) < len(groups):
        report.warn(
            f"{len(groups) - len(kept)} prompts left out: all of their completions are tied; "
            "ties = 'use' trains on them by the SFT term"
        )
    if not kept:
        raise InputError("every prompt's completions are all tied: there is nothing to rank")
    return kept


def _complete(group: Group) -> tuple[Pair, ...]:
    compared = {frozenset(pair[:2]) for pair in group.pairs}
    place = {member: rank for rank, tied in enumerate(group.ranking) for member in tied}
    implied = [
        Pair(i, j, 0.5, 1.0, True) if place[i] == place[j] else Pair(i, j)
        for i, j in combinations(chain(*group.ranking), 2)
        if frozenset((i, j)) not in compared
    ]
    ranked = [pair for pair in group.pairs if pair.chosen in place and pair.rejected in place]
    return (*ranked, *implied)


def run(options: RrhfOptions) -> None:
    """Train as the options say and print the result's line.

    Raises:
        InputError: rows or options are wrong.
    """
    if (done := finished(options, "rrhf")) is not None:
        announce(done)
        return
    tokenizer = load_tokenizer(options)
    data = read_training_data(
        options, tokenizer, lambda groups, report: rank_candidates(groups, report, options)
    )
    model = load_model(options, tokenizer=tokenizer)
    trained = fit(
        options,
        command="rrhf",
        model=add_adapters(model, options),
        tokenizer=tokenizer,
        objective=RrhfObjective(options),
        groups=data.groups,
        eval_groups=data.held_out,
        report=data.report,
    )
    announce(trained)


class Resample(Protocol):
    """Makes the data of a round: sample with the policy, have the candidates judged, pair them."""

    def __call__(self, policy: Path, round_number: int) -> Sequence[str]:
        """Return the shard folders or files to train on.

        Args:
            policy: folder of the policy after the round before.
            round_number: from 2; the first round trains on the data in the options.
        """
        ...


def iterate(
    options: RrhfOptions, *, rounds: int, resample: Resample, keep_data: bool = False
) -> Path:
    """Train in rounds (the paper's IP-n) and return the folder of the last policy.

    Round n writes to ``round-n`` in the output folder and starts from the policy of round n - 1; a
    finished round is not trained again.

    Args:
        options: of every round; ``data`` is the first round's.
        rounds: how many.
        resample: called between rounds.
        keep_data: train each round on the data of all rounds so far.
    """
    policy = Path(options.model)
    data: tuple[str, ...] = ()
    for number in range(1, rounds + 1):
        new = options.data if number == 1 else tuple(resample(policy, number))
        data = (*data, *new) if keep_data else new
        folder = options.output / f"round-{number}"
        model = options.model if number == 1 else str(policy)
        run(dataclasses.replace(options, data=data, model=model, output=folder))
        policy = folder
    return policy
