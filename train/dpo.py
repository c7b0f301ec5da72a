"""``rlaif dpo``: direct preference optimisation with the judge's probability in the loss.

    h = beta * [(s - s_ref)(chosen) - (s - s_ref)(rejected)]        s: sum of log-probabilities
    L = sum over pairs of weight * loss(h, p) / sum of weights      over the whole optimiser step

With ``loss = sigmoid`` and soft labels the optimum of a pair is h = logit(p): a label is never
more certain than its judge. Other forms of ``loss`` are in ``train/losses.py``, equation by
equation; this file reads the pairs out of a packed row, and says what to log.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from feedback.errors import InputError
from train.batches import Counts
from train.chat import DataReport
from train.config import DpoOptions
from train.data import Group
from train.labels import require_small_ties, with_ranked_pairs
from train.losses import (
    PairLogps,
    bradley_terry_loss,
    davidson_log_probs,
    gdpo_loss,
    implicit_rewards,
    ipo_loss,
    nll_loss,
    rao_kupper_log_probs,
    robust_loss,
    rpo_loss,
    simpo_loss,
    tie_loss,
    tie_targets,
    weighted_mean,
)
from train.losses_listwise import pad_groups, plackett_luce_loss
from train.models import (
    CompletionLogps,
    add_adapters,
    compile_layers,
    completion_logps,
    load_model,
    load_tokenizer,
)
from train.packing import PackedBatch
from train.reference import attach_reference
from train.results import announce, finished, fit
from train.trainer import Metrics, StepLoss, packing_of
from train.training_data import read_training_data

__all__ = ["DpoObjective", "DriftMonitor", "run"]

logger = logging.getLogger(__name__)


class DpoObjective:
    """The DPO family on packed rows.

    Args:
        options: loss, beta, labels and the rest.
    """

    name = "dpo"

    def __init__(self, options: DpoOptions):
        self.options = options

    def counts(self, groups: Sequence[Group]) -> Counts:
        """Return the total weight of the step's pairs, and its number of rankings."""
        return {
            "weight": float(sum(pair.weight for group in groups for pair in group.pairs)),
            "rankings": float(sum(bool(group.ranking) for group in groups)),
        }

    def loss(self, model: Any, batch: PackedBatch, counts: Mapping[str, float]) -> StepLoss:
        """Return the row's share of the step's loss, and what to log."""
        options = self.options
        policy = completion_logps(model, batch, chunk=options.logprob_chunk)
        if options.loss == "listwise":
            return self._listwise(policy, batch, counts)
        pair = pair_logps(
            policy, batch, reference=options.loss != "simpo", ld_alpha=options.ld_alpha
        )
        losses = self._pair_losses(pair, batch)
        if options.nll_weight:
            chosen = policy.logps[batch.pairs[:, 0]]
            losses = losses + options.nll_weight * nll_loss(chosen, pair.chosen_lengths)
        loss = weighted_mean(losses, batch.pair_weights, total=counts["weight"])
        return StepLoss(loss, self._metrics(pair, policy, batch))

    def _labels(self, batch: PackedBatch) -> Tensor:
        """Return P(chosen preferred) as the options want it, (P,)."""
        options, p = self.options, torch.where(batch.pair_ties, 0.5, batch.pair_p)
        if not options.soft_labels:
            p = (torch.sign(p - 0.5) + 1) / 2  # a coin flip stays one
        if options.label_smoothing and options.loss != "robust":
            p = p * (1 - options.label_smoothing) + (1 - p) * options.label_smoothing
        return p

    def _pair_losses(self, pair: PairLogps, batch: PackedBatch) -> Tensor:
        options, p = self.options, self._labels(batch)
        beta = options.beta
        if options.loss == "ipo":
            return ipo_loss(pair, beta=beta, p_chosen=p, averaged=options.ipo_averaged)
        if options.loss == "simpo":
            return simpo_loss(pair, beta=beta, gamma=options.simpo_gamma, p_chosen=p)
        h = implicit_rewards(pair, beta=beta).differences
        if options.loss == "sigmoid":
            return bradley_terry_loss(h, p_chosen=p)
        if options.loss == "gdpo":
            return gdpo_loss(h, p_chosen=p)
        if options.loss == "robust":
            # rDPO knows hard labels and one flip rate: were the judge's doubt the rate, the least
            # certain pairs would pull the most. A tie has no side, so h = 0 and no gradient.
            return robust_loss(torch.sign(p - 0.5) * h, flip=options.label_smoothing)
        if options.loss == "rpo":
            target = options.rpo_eta * batch.pair_margins
            return rpo_loss(h, target=target, form=options.rpo_form)
        model = rao_kupper_log_probs if options.loss == "rao-kupper" else davidson_log_probs
        return tie_loss(model(h, nu=options.nu), targets=tie_targets(p, batch.pair_ties))

    def _listwise(
        self, policy: CompletionLogps, batch: PackedBatch, counts: Mapping[str, float]
    ) -> StepLoss:
        ranked = batch.ranks >= 0
        rewards = self.options.beta * (policy.logps - batch.ref_logps)[ranked]
        sizes = torch.bincount(batch.completion_groups[ranked], minlength=len(batch.groups))
        sizes = sizes[sizes > 0]
        scores = pad_groups(rewards, sizes)
        ranks = pad_groups(batch.ranks[ranked], sizes).values
        losses = plackett_luce_loss(scores.values, ranks, scores.mask)
        detached = scores.values.detach()
        best = (ranks == 0) & scores.mask
        top = detached.masked_fill(~best, -torch.inf).amax(1)
        rest = detached.masked_fill(best | ~scores.mask, -torch.inf).amax(1)
        count = float(len(sizes))
        first = batch.ranks == 0
        drift = (policy.logps - batch.ref_logps).detach() / batch.lengths.clamp(min=1)
        metrics: Metrics = {
            "logps/chosen_drift": (drift[first].sum(), first.sum()),
            "rewards/best": (detached[best].sum(), float(best.sum())),
            "rewards/accuracies": ((top > rest).sum(), count),
        }
        return StepLoss(weighted_mean(losses, total=counts["rankings"]), metrics)

    @torch.no_grad()
    def _metrics(self, pair: PairLogps, policy: CompletionLogps, batch: PackedBatch) -> Metrics:
        rewards = implicit_rewards(pair, beta=self.options.beta)
        count = float(len(batch.pairs))
        ordered = ~batch.pair_ties
        metrics: Metrics = {
            "rewards/chosen": (rewards.chosen.sum(), count),
            "rewards/rejected": (rewards.rejected.sum(), count),
            "rewards/margins": (rewards.differences.sum(), count),
            "rewards/accuracies": (((rewards.differences > 0) & ordered).sum(), ordered.sum()),
            "logps/chosen": (policy.logps[batch.pairs[:, 0]].sum(), count),
            "logps/rejected": (policy.logps[batch.pairs[:, 1]].sum(), count),
        }
        if pair.ref_chosen is not None:
            drift = (policy.logps - batch.ref_logps) / batch.lengths.clamp(min=1)
            metrics["logps/chosen_drift"] = (drift[batch.pairs[:, 0]].sum(), count)
        return metrics


def pair_logps(
    policy: CompletionLogps, batch: PackedBatch, *, reference: bool = True, ld_alpha: float = 1.0
) -> PairLogps:
    """Return the pairs' log-probabilities from those of a row's completions.

    Args:
        policy: of the row.
        batch: the row; its reference log-probabilities must be known if ``reference``.
        reference: False leaves the reference out.
        ld_alpha: weight of tokens beyond the shorter completion's length (LD-DPO): each side
            becomes alpha * s + (1 - alpha) * s_shared.
    """
    chosen, rejected = batch.pairs[:, 0], batch.pairs[:, 1]
    lengths = batch.lengths[chosen], batch.lengths[rejected]
    shared = torch.minimum(*lengths)

    def sides(logps: Tensor, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        if ld_alpha == 1.0:
            return logps[chosen], logps[rejected]
        head = _heads(logprobs, batch.lengths)
        mixed = [
            ld_alpha * logps[side] + (1 - ld_alpha) * head(side, shared)
            for side in (chosen, rejected)
        ]
        return mixed[0], mixed[1]

    ref: tuple[Tensor | None, Tensor | None] = (None, None)
    if reference:
        ref = sides(batch.ref_logps, batch.ref_logprobs)
    return PairLogps(*sides(policy.logps, policy.logprobs), *lengths, *ref)


def _heads(logprobs: Tensor, lengths: Tensor) -> Any:
    """Return a function (completions, n) -> sum of each completion's first n tokens."""
    sums = torch.cat([logprobs.new_zeros(1), logprobs]).double().cumsum(0)
    starts = lengths.cumsum(0) - lengths

    def head(completions: Tensor, count: Tensor) -> Tensor:
        start = starts[completions]
        return (sums[start + count] - sums[start]).to(logprobs.dtype)

    return head


class DriftMonitor(TrainerCallback):
    """Warns once when the chosen completions become much less likely than under the reference.

    DPO widens a margin also by making both sides less likely, and then the policy says neither
    (likelihood displacement: Razin et al., arXiv 2410.08847).
    """

    def __init__(self, limit: float, report: DataReport):
        self.limit = limit
        self.report = report
        self.warned = False

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Look at the newest drift."""
        drift = (logs or {}).get("logps/chosen_drift")
        if drift is None or not self.limit or self.warned or drift >= -self.limit:
            return
        self.warned = True
        self.report.warn(
            f"step {state.global_step}: chosen completions have lost {-drift:.2f} nats per token "
            f"against the reference (limit {self.limit}): the margin grows by making both sides "
            "unlikely. Set nll_weight (0.1, say), raise beta, or lower the learning rate"
        )


def _usable(groups: Sequence[Group], options: DpoOptions, report: DataReport) -> list[Group]:
    if options.loss == "listwise":
        kept = [group for group in groups if sum(map(len, group.ranking)) >= 2]
        if not kept:
            raise InputError(
                "loss listwise reads rankings, and the data holds none; give a rankings folder, "
                "or use loss sigmoid"
            )
        require_small_ties(kept)
        if len(kept) < len(groups):
            report.warn(f"{len(groups) - len(kept)} groups without a ranking are left out")
        return kept
    groups = with_ranked_pairs(groups)
    if options.loss == "rpo" and not any(p.margin for group in groups for p in group.pairs):
        raise InputError("loss rpo needs margins (score gaps), and every row's margin is 0")
    if options.loss in ("gdpo", "robust") and all(p.tie for g in groups for p in g.pairs):
        raise InputError(f"every pair is a tie, from which loss {options.loss} learns nothing")
    if options.ties == "use":
        return list(groups)
    decided = [
        dataclasses.replace(group, pairs=tuple(pair for pair in group.pairs if not pair.tie))
        for group in groups
    ]
    report.warn(f"{sum(p.tie for g in groups for p in g.pairs)} ties left out (ties = 'drop')")
    kept = [group for group in decided if group.pairs]
    if not kept:
        raise InputError("every pair is a tie, and ties = 'drop' leaves none; set ties = 'use'")
    return kept


def run(options: DpoOptions) -> None:
    """Train as the options say and print the result's line.

    Raises:
        InputError: rows or options are wrong.
    """
    if options.engine == "trl":
        from train.trl_engine import run_dpo

        run_dpo(options)
        return
    if (done := finished(options, "dpo")) is not None:
        announce(done)
        return
    tokenizer = load_tokenizer(options)
    data = read_training_data(options, tokenizer, lambda g, report: _usable(g, options, report))
    model = load_model(options, tokenizer=tokenizer)
    groups, held_out = data.groups, data.held_out
    if options.loss != "simpo":
        reference = model
        if options.reference_model:
            reference = load_model(options, tokenizer=tokenizer, name=options.reference_model)
        compile_layers(reference, options.compile)
        cache = options.reference_cache or options.output.parent / "reference-cache"
        both = attach_reference(
            [*groups, *held_out],
            reference,
            packing=packing_of(options),
            folder=cache,
            chunk=options.logprob_chunk,
        )
        groups, held_out = both[: len(groups)], both[len(groups) :]
        del reference
    trained = fit(
        options,
        command="dpo",
        model=add_adapters(model, options),
        tokenizer=tokenizer,
        objective=DpoObjective(options),
        groups=groups,
        eval_groups=held_out,
        report=data.report,
        callbacks=[DriftMonitor(options.drift_warning, data.report)],
    )
    announce(trained)
