"""``rlaif reward``: a reward model from judged pairs or whole rankings, soft labels and ties too.

    L = 1 / W * sum over pairs of c_ij * [ -p log sigma(r_i - r_j) - (1 - p) log sigma(r_j - r_i) ]

with c_ij = w_ij / (pairs of the prompt), so that a prompt with K completions counts once and all of
its pairs are in one step (InstructGPT), and W their sum. The tie models and Plackett-Luce replace
the bracket (a ranking counts by the mean weight of its pairs); see ``losses.py`` and
``losses_listwise.py``. A completion's reward is read at its last token by place.

The run ends with a report (``report.json``, ``reliability.svg``) on held-out prompts: accuracy by
margin and by judge confidence, calibration, what length explains, and whether scores depend on
padding or company.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor

from feedback.errors import RecipeError
from feedback.shards import write_json
from train.batches import Counts, StepDataset
from train.chat import DataReport
from train.config import RewardOptions
from train.data import Group
from train.labels import (
    label_pairs,
    mean_weight,
    ranked_from_labels,
    require_small_ties,
    with_ranked_pairs,
)
from train.losses import (
    bradley_terry_loss,
    centring_loss,
    davidson_log_probs,
    length_correlation_loss,
    rao_kupper_log_probs,
    tie_loss,
    tie_targets,
    weighted_mean,
)
from train.losses_listwise import pad_groups, plackett_luce_loss
from train.model_card import write_ensemble_card, write_model_card
from train.models import add_adapters, load_model, load_tokenizer, packed_rewards
from train.packing import PackedBatch
from train.results import Trained, announce, finished, fit
from train.reward_evaluation import evaluate_reward_models
from train.reward_model import (
    ENSEMBLE,
    RewardModel,
    merge_adapters,
    save_ensemble,
    start_reward_model,
)
from train.trainer import Metrics, StepLoss, packing_of
from train.training_data import read_training_data

__all__ = ["RewardObjective", "run"]

REPORT = "report.json"
_COMPARED = 32  # prompts on which a merged model is compared with the trained one


class RewardObjective:
    """The reward model's loss over packed groups."""

    name = "reward"

    def __init__(self, options: RewardOptions):
        self.options = options

    def counts(self, groups: Sequence[Group]) -> Counts:
        """Return W: the sum of all coefficients."""
        if self.options.loss == "plackett-luce":
            return {"weight": sum(mean_weight(group) for group in groups if group.ranking)}
        return {"weight": sum(_coefficients(group, self.options.average) for group in groups)}

    def loss(self, model: Any, batch: PackedBatch, counts: Mapping[str, float]) -> StepLoss:
        """Return the row's share of the step's mean loss."""
        rewards = packed_rewards(model, batch)
        if self.options.loss == "plackett-luce":
            loss = self._listwise(rewards, batch, counts["weight"])
        else:
            loss = self._pairwise(rewards, batch, counts["weight"])
        return StepLoss(loss, _metrics(rewards.detach(), batch))

    def _pairwise(self, rewards: Tensor, batch: PackedBatch, total: float) -> Tensor:
        options = self.options
        chosen, rejected = rewards[batch.pairs].unbind(1)
        d = chosen - rejected
        weights = _pair_coefficients(batch, self.options.average)
        if options.loss == "bradley-terry":
            margin = options.margin_scale * batch.pair_margins if options.margin_scale else None
            losses = bradley_terry_loss(d, p_chosen=batch.pair_p, margin=margin)
        else:
            model = rao_kupper_log_probs if options.loss == "rao-kupper" else davidson_log_probs
            targets = tie_targets(batch.pair_p, batch.pair_ties)
            losses = tie_loss(model(d, nu=options.nu), targets=targets)
        if options.centring:
            losses = losses + options.centring * centring_loss(chosen, rejected)
        loss = weighted_mean(losses, weights, total=total)
        if options.length_decorrelation:
            lengths = batch.lengths[batch.pairs]
            correlation = length_correlation_loss(d, lengths[:, 0] - lengths[:, 1], weights=weights)
            # A statistic of the row, not a sum over it: it counts by the row's share of the step.
            loss = loss + options.length_decorrelation * correlation * weights.sum() / total
        return loss

    def _listwise(self, rewards: Tensor, batch: PackedBatch, total: float) -> Tensor:
        counts = torch.bincount(batch.completion_groups, minlength=len(batch.groups))
        scores, mask = pad_groups(rewards, counts)
        ranks, _ = pad_groups(batch.ranks, counts)
        mask = mask & (ranks >= 0)
        losses = plackett_luce_loss(scores, ranks, mask, ties=self.options.listwise_ties)
        if self.options.centring:
            mean = (scores * mask).sum(1) / mask.sum(1).clamp(min=1)
            losses = losses + self.options.centring * centring_loss(mean, mean)
        group = batch.completion_groups[batch.pairs[:, 0]]
        weights = torch.zeros_like(losses).index_add(
            0, group, _pair_coefficients(batch, "prompt").to(losses.dtype)
        )
        return weighted_mean(losses, weights * mask.any(1), total=total)


def _coefficients(group: Group, average: str) -> float:
    if average == "prompt":
        return mean_weight(group)
    return float(sum(pair.weight for pair in group.pairs))


def _pair_coefficients(batch: PackedBatch, average: str) -> Tensor:
    """Return each pair's coefficient, (P,); a group's sum to ``_coefficients``."""
    if average == "pair":
        return batch.pair_weights
    group = batch.completion_groups[batch.pairs[:, 0]]
    size = torch.bincount(group[batch.pair_weights > 0], minlength=len(batch.groups))
    return batch.pair_weights / size[group].clamp(min=1)


def _metrics(rewards: Tensor, batch: PackedBatch) -> Metrics:
    """Return accuracy over decided pairs, and the mean rewards of either side."""
    chosen, rejected = rewards[batch.pairs].unbind(1)
    d = torch.where(batch.pair_p >= 0.5, chosen - rejected, rejected - chosen)
    decided = ~batch.pair_ties & (batch.pair_p != 0.5)
    right = (decided & (d > 0)).float() + 0.5 * (decided & (d == 0)).float()
    return {
        "rewards/accuracies": (right.sum(), decided.sum()),
        "rewards/margins": ((d * decided).sum(), decided.sum()),
        "rewards/chosen": (chosen.sum(), float(len(chosen))),
        "rewards/rejected": (rejected.sum(), float(len(rejected))),
    }


def _with_pairs(groups: list[Group], options: RewardOptions, report: DataReport) -> list[Group]:
    """Return groups with pairs (and, for plackett-luce, a ranking), labels as judged."""
    groups = with_ranked_pairs(groups)
    if options.loss == "plackett-luce":
        groups = ranked_from_labels(groups)
        require_small_ties(groups, options.listwise_ties)
        soft = sum(pair.p not in (0.0, 0.5, 1.0) for group in groups for pair in group.pairs)
        if soft:
            report.warn(
                f"plackett-luce reads the order only: {soft} probabilities are not used; loss "
                "'bradley-terry' uses them"
            )
    return groups


def run(options: RewardOptions) -> None:
    """Train as the options say, report on held-out prompts, and print the result's line.

    Raises:
        InputError: rows or options are wrong.
    """
    if options.engine == "trl":
        from train.trl_engine import run_reward

        run_reward(options)
        return
    tokenizer = load_tokenizer(options)
    groups, held_out, report = read_training_data(
        options, tokenizer, lambda groups, report: _with_pairs(groups, options, report)
    )
    folders = _folders(options)
    for number, folder in enumerate(folders):
        member = dataclasses.replace(options, output=folder, seed=options.seed + number)
        announce(_train_member(member, groups, held_out, report))
    if not PartialState().is_main_process:
        return  # one process writes what follows
    if options.members > 1:
        _combine(options, [folder.name for folder in folders])
    if not (options.resume and (options.output / REPORT).is_file()):
        _report(options, folders, groups, held_out)


def _combine(options: RewardOptions, members: Sequence[str]) -> None:
    """Say in the output folder how the members are combined; a report by another rule goes."""
    index = options.output / ENSEMBLE
    before = index.read_bytes() if index.is_file() else None
    save_ensemble(options.output, members, rule=options.rule, uwo_lambda=options.uwo_lambda)
    if index.read_bytes() != before:
        (options.output / REPORT).unlink(missing_ok=True)


def _folders(options: RewardOptions) -> list[Path]:
    if options.members == 1:
        return [options.output]
    return [options.output / f"member-{number}" for number in range(options.members)]


def _check_decorrelation(options: RewardOptions, groups: Sequence[Group]) -> None:
    """Refuse length_decorrelation over rows of one pair: their correlation is 1 at any rewards.

    Raises:
        RecipeError: no packed row holds two pairs.
    """
    plan = StepDataset(groups, packing_of(options), lambda groups: {}).plan(0)
    most = max(sum(len(groups[i].pairs) for i in row) for step in plan for row in step.rows)
    if most < 2:
        raise RecipeError(
            "length_decorrelation does nothing: it compares the pairs of a packed row, and each "
            "row holds one; raise row_tokens or batch_size, keep pack on, or leave it at 0.0"
        )


def _train_member(
    options: RewardOptions,
    groups: Sequence[Group],
    held_out: Sequence[Group],
    report: DataReport,
) -> Trained:
    if (done := finished(options, "reward")) is not None:
        return done
    (options.output / REPORT).unlink(missing_ok=True)
    if options.members > 1:
        (options.output.parent / REPORT).unlink(missing_ok=True)
    tokenizer = load_tokenizer(options)
    model = load_model(options, tokenizer=tokenizer, kind="reward")
    report = dataclasses.replace(report, warnings=list(report.warnings))
    for warning in start_reward_model(model, tokenizer, seed=options.seed):
        report.warn(warning)
    labels: dict[str, Any] = {
        "soft_labels": options.soft_labels,
        "ties": options.ties,
        "label_smoothing": options.label_smoothing,
    }
    labelled = label_pairs(groups, report, **labels)
    if options.length_decorrelation:
        _check_decorrelation(options, labelled)
    model = add_adapters(model, options, modules_to_save=("score",))
    trained = fit(
        options,
        command="reward",
        model=model,
        tokenizer=tokenizer,
        objective=RewardObjective(options),
        groups=labelled,
        eval_groups=label_pairs(held_out, DataReport(), **labels) if held_out else (),
        report=report,
    )
    if options.lora_rank and PartialState().is_main_process:
        merge_adapters(model, tokenizer, options, groups=groups[:_COMPARED])
    return trained


def _report(
    options: RewardOptions,
    folders: Sequence[Path],
    groups: Sequence[Group],
    held_out: Sequence[Group],
) -> None:
    """Load what was saved, score the held-out prompts, write report and plot."""
    members = [
        RewardModel.load(folder, device=options.device, precision=options.precision)
        for folder in folders
    ]
    figures = evaluate_reward_models(
        members,
        held_out or groups,
        rule=options.rule,
        uwo_lambda=options.uwo_lambda,
        plot=options.output / "reliability.svg",
    )
    figures["data"] = "held-out prompts" if held_out else "training prompts: set eval_share"
    write_json(options.output / REPORT, figures)
    if options.members == 1:
        write_model_card(options.output)
    else:
        names = [folder.name for folder in folders]
        write_ensemble_card(options.output, names, rule=options.rule)
    accuracy = figures["accuracy"]
    if accuracy["value"] is not None:
        interval = f"[{accuracy['low']:.3f}, {accuracy['high']:.3f}]"
        line = (
            f"reward: accuracy {accuracy['value']:.3f} {interval} over {figures['pairs']} pairs, "
            f"ECE {figures['calibration']['ece']:.3f}, on {figures['data']}; "
            f"{json.dumps(str(options.output / REPORT))}"
        )
        announce(Trained(options.output, figures, line))
