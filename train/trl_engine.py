"""``--engine trl``: the same recipe through TRL's own trainers, as the reference implementation.

TRL gets the rows that the packed engine would train on, token for token and batch for batch; its
own collator, forward pass, loss, gradient accumulation and optimiser do the rest. It has hard
labels, pairs and no weights: whatever of the recipe it cannot honour is an error that names the
option to change, never a knob that does nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler

from feedback.errors import RecipeError
from train.adapters import load_pretrained
from train.batches import StepDataset
from train.chat import DataReport
from train.config import DpoOptions, RewardOptions, SftOptions, TrainOptions
from train.data import Group, split_by_prompt
from train.documents import read_documents
from train.labels import label_pairs, with_ranked_pairs
from train.model_checks import require_context
from train.models import (
    add_adapters,
    base_model,
    load_tokenizer,
    resolve_device,
    resolve_model,
    resolve_precision,
)
from train.optimizer import Schedule
from train.progress import LossCurve, Progress
from train.results import announce, conclude, finished, run_identity
from train.reward_model import merge_adapters, start_reward_model
from train.trainer import packing_of
from train.training_data import read_training_data, warn_of_repeats

__all__ = ["run_dpo", "run_reward", "run_sft"]

# Options of the packed engine that TRL has nothing for.
_PACKED_ONLY = (
    "batch_size",
    "row_tokens",
    "share_prompt",
    "pack",
    "attention",
    "compile",
    "activation_budget",
    "logprob_chunk",
    "peak_tflops",
    "quantize",
    "save_every",
)
_DPO_LOSSES = {"sigmoid": "sigmoid", "robust": "robust", "ipo": "ipo"}
_MICRO_BATCH = 8  # rows per forward pass on a GPU, where the step is larger than that

Row = dict[str, Any]


class _Data(NamedTuple):
    """Tokenised groups, and what reading them found."""

    groups: list[Group]
    held_out: list[Group]
    report: DataReport


def run_sft(options: SftOptions) -> None:
    """Fine-tune with TRL's SFTTrainer.

    Raises:
        InputError: rows or options are wrong, or TRL cannot honour an option.
    """
    if _complete(options, "sft"):
        return
    _refuse_packed_only(options)
    _require(options.model != "scratch", "a model from scratch", "give a model folder")
    _require(options.min_learning_rate == 0, "min_learning_rate", "leave it at 0")
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.utils import disable_dropout_in_model

    tokenizer = load_tokenizer(options)
    read: dict[str, Any] = {
        "max_length": options.max_length,
        "overlong": options.overlong,
        "completion_only": options.completion_only,
    }
    groups, report = read_documents(options.data, tokenizer, **read)
    groups, held_out = split_by_prompt(groups, options.eval_share, seed=options.seed)
    if options.eval_data:
        held_out, _ = read_documents(options.eval_data, tokenizer, **read)
        warn_of_repeats(groups, held_out, report)
    settings = _arguments(options)
    model = _load(options, kind="causal")
    if settings.pop("disable_dropout"):  # the one trainer of the three without this option
        disable_dropout_in_model(model)
    arguments = SFTConfig(**settings, packing=False, max_length=None)
    model = add_adapters(model, options)
    data = _Data(groups, held_out, report)
    _train(options, "sft", SFTTrainer, arguments, model, tokenizer, data, _sft_rows)


def run_reward(options: RewardOptions) -> None:
    """Train a reward model with TRL's RewardTrainer.

    Raises:
        InputError: rows or options are wrong, or TRL cannot honour an option.
    """
    if _complete(options, "reward"):
        return
    _refuse_packed_only(options)
    _require(options.loss == "bradley-terry", f"loss {options.loss!r}", "set loss='bradley-terry'")
    _require(options.label_smoothing == 0, "label_smoothing", "leave it at 0")
    _require(options.length_decorrelation == 0, "length_decorrelation", "leave it at 0")
    _require(options.members == 1, "ensembles", "set members = 1")
    from trl import RewardConfig, RewardTrainer

    tokenizer = load_tokenizer(options)
    model = _load(options, kind="reward")
    warnings = start_reward_model(model, tokenizer, seed=options.seed)
    data = _pairs(options, tokenizer, soft_labels=options.soft_labels, ties=options.ties)
    data.report.warnings.extend(warnings)
    several = any(len(group.pairs) > 1 for group in data.groups)
    _require(
        not several or options.average == "pair",
        "average = 'prompt' over prompts with several pairs",
        "set average = 'pair'",
    )
    arguments = RewardConfig(
        **_arguments(options),
        max_length=None,
        center_rewards_coefficient=options.centring or None,
    )

    def rows(group: Group) -> list[Row]:
        found = _pair_rows(group)
        for row, pair in zip(found, group.pairs, strict=True):
            prompt = row.pop("prompt_ids")
            row["chosen_ids"], row["rejected_ids"] = (
                prompt + row["chosen_ids"],
                prompt + row["rejected_ids"],
            )
            if options.margin_scale:
                row["margin"] = options.margin_scale * pair.margin
        return found

    adapted = add_adapters(model, options, modules_to_save=("score",))
    _train(options, "reward", RewardTrainer, arguments, adapted, tokenizer, data, rows)
    if options.lora_rank:
        merge_adapters(adapted, tokenizer, options, groups=())


def run_dpo(options: DpoOptions) -> None:
    """Optimise preferences with TRL's DPOTrainer, the reference model in memory beside the policy.

    Raises:
        InputError: rows or options are wrong, or TRL cannot honour an option.
    """
    if _complete(options, "dpo"):
        return
    _refuse_packed_only(options)
    known = ", ".join(_DPO_LOSSES)
    _require(options.loss in _DPO_LOSSES, f"loss {options.loss!r}", f"set loss to one of {known}")
    _require(options.nll_weight == 0, "nll_weight", "leave it at 0")
    _require(
        options.drift_warning in (0, _default(options, "drift_warning")),
        "drift_warning",
        "leave it unset",
    )
    _require(options.reference_cache is None, "reference_cache", "leave it unset")
    _require(
        options.loss != "ipo" or options.ipo_averaged,
        "IPO on summed log-probabilities",
        "set ipo_averaged = true",
    )
    _require(
        options.label_smoothing == 0 or options.loss == "robust",
        "label_smoothing but as the fixed flip rate of loss 'robust'",
        "leave it at 0",
    )
    from trl import DPOConfig, DPOTrainer

    tokenizer = load_tokenizer(options)
    data = _pairs(options, tokenizer, soft_labels=options.soft_labels, ties=options.ties)
    data.report.warn("engine trl does not watch the chosen log-probability's drift")
    arguments = DPOConfig(
        **_arguments(options),
        max_length=None,
        beta=options.beta,
        loss_type=[_DPO_LOSSES[options.loss]],
        label_smoothing=options.label_smoothing,
        ld_alpha=options.ld_alpha if options.ld_alpha != 1 else None,
    )
    reference = None
    if options.reference_model is not None:
        reference = _load(options, kind="causal", name=options.reference_model)
    model = add_adapters(_load(options, kind="causal"), options)
    _train(
        options,
        "dpo",
        DPOTrainer,
        arguments,
        model,
        tokenizer,
        data,
        _pair_rows,
        ref_model=reference,
    )


def _require(holds: bool, what: str, way_out: str) -> None:
    if not holds:
        raise RecipeError(f"engine trl has no {what}: {way_out}, or set engine = 'packed'")


def _refuse_packed_only(options: TrainOptions) -> None:
    """Refuse options of the packed engine that would silently do nothing."""
    for name in _PACKED_ONLY:
        value = getattr(options, name)
        if name == "batch_size":
            _require(value > 0, "batch_size 0 (as many as fill a row)", "give a number")
        else:
            default = _default(options, name)
            _require(value == default, f"{name} = {value!r}", f"leave it at {default!r}")
    _require(
        options.precision != "bfloat16",
        "bfloat16 weights with float32 master copies",
        "set precision to autocast or float32",
    )


def _default(options: TrainOptions, name: str) -> Any:
    return next(entry.default for entry in dataclasses.fields(options) if entry.name == name)


def _complete(options: TrainOptions, command: str) -> bool:
    if (done := finished(options, command)) is None:
        return False
    announce(done)
    return True


def _load(options: TrainOptions, *, kind: str, name: str | None = None) -> Any:
    """Load a model as transformers has it, without our attention or forward pass."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    wanted = resolve_model(name or options.model)
    arguments: dict[str, Any] = {
        "dtype": torch.float32,
        "revision": options.revision if name is None else None,
        "trust_remote_code": options.trust_remote_code,
    }
    if kind == "causal":
        return load_pretrained(AutoModelForCausalLM, wanted, **arguments)
    return load_pretrained(AutoModelForSequenceClassification, wanted, num_labels=1, **arguments)


def _pairs(options: Any, tokenizer: Any, *, soft_labels: bool, ties: Any) -> _Data:
    """Read pairs with hard labels, all weights 1, the preferred completion first."""
    groups, held_out, report = read_training_data(
        options, tokenizer, lambda groups, _: with_ranked_pairs(groups)
    )
    several = sum(len(group.pairs) > 1 for group in groups)
    if several:
        report.warn(f"{several} prompts have several pairs: TRL counts batch_size in pairs")

    def hard(rows: Sequence[Group], counts: DataReport) -> list[Group]:
        rows = label_pairs(rows, counts, soft_labels=soft_labels, ties=ties)
        return [dataclasses.replace(row, pairs=tuple(map(_hard, row.pairs))) for row in rows]

    return _Data(hard(groups, report), hard(held_out, DataReport()) if held_out else [], report)


def _hard(pair: Any) -> Any:
    _require(not pair.tie and pair.p != 0.5, "ties", "set ties = 'drop'")
    _require(pair.p in (0.0, 1.0), f"soft labels (p = {pair.p})", "set soft_labels = false")
    _require(pair.weight == 1.0, f"weights ({pair.weight})", "remove them from the rows")
    if pair.p == 1.0:
        return pair
    return pair._replace(chosen=pair.rejected, rejected=pair.chosen, p=1.0)


def _pair_rows(group: Group) -> list[Row]:
    ids = [[int(token) for token in completion] for completion in group.completions]
    prompt = [int(token) for token in group.prompt_ids]
    return [
        {"prompt_ids": prompt, "chosen_ids": ids[pair.chosen], "rejected_ids": ids[pair.rejected]}
        for pair in group.pairs
    ]


def _sft_rows(group: Group) -> list[Row]:
    prompt = [int(token) for token in group.prompt_ids]
    masks = group.loss_masks or (None,) * len(group.completions)
    rows = []
    for completion, mask in zip(group.completions, masks, strict=True):
        ids = [int(token) for token in completion]
        counted = [True] * len(ids) if mask is None else mask
        labels = [token if keep else -100 for token, keep in zip(ids, counted, strict=True)]
        rows.append({"input_ids": prompt + ids, "labels": [-100] * len(prompt) + labels})
    return rows


def _arguments(options: TrainOptions) -> dict[str, Any]:
    """Return the options as TRL's configurations name them."""
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    micro = options.batch_size
    if device == "cuda":
        micro = max(n for n in range(1, _MICRO_BATCH + 1) if options.batch_size % n == 0)
    return {
        "output_dir": str(options.output / "checkpoints"),
        "num_train_epochs": options.epochs,
        "max_steps": options.max_steps or -1,
        "per_device_train_batch_size": micro,
        "per_device_eval_batch_size": micro,
        "gradient_accumulation_steps": options.batch_size // micro,
        "learning_rate": options.learning_rate,
        "weight_decay": options.weight_decay,
        "adam_beta1": options.adam_betas[0],
        "adam_beta2": options.adam_betas[1],
        "adam_epsilon": options.adam_epsilon,
        "max_grad_norm": options.max_grad_norm,
        "bf16": precision != "float32",
        "gradient_checkpointing": options.gradient_checkpointing,
        "logging_steps": options.log_every,
        "logging_first_step": True,
        "eval_strategy": "steps" if options.eval_every else "no",
        "eval_steps": options.eval_every or None,
        "save_strategy": "no",
        "seed": options.seed,
        "report_to": list(options.report_to) or "none",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        "disable_dropout": not options.dropout,
        "dataloader_num_workers": max(options.workers, 0),
    }


class _Order(Sampler[int]):
    """Rows in the order in which the packed engine's steps would take their groups."""

    def __init__(self, steps: StepDataset, places: Sequence[Sequence[int]]):
        self.steps = steps
        self.places = places
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return sum(map(len, self.places))

    def __iter__(self) -> Iterator[int]:
        for step in self.steps.plan(self.epoch):
            for row in step.rows:
                for group in row:
                    yield from self.places[group]


def _same_rows(trainer_class: Any, order: _Order, options: TrainOptions) -> Any:
    """Return TRL's trainer class, taking rows as they come and in a given order."""

    class SameRows(trainer_class):
        """TRL's trainer on rows that are tokenised already, in a given order."""

        lr_scheduler: Any

        def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
            return dataset

        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return order

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if self.lr_scheduler is None:
                schedule = Schedule(
                    options.schedule, steps=num_training_steps, warmup=options.warmup
                )
                self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                    self.optimizer if optimizer is None else optimizer, schedule
                )
                self._created_lr_scheduler = True
            return self.lr_scheduler

    return SameRows


def _train(
    options: TrainOptions,
    command: str,
    trainer_class: Any,
    arguments: Any,
    model: Any,
    tokenizer: Any,
    data: _Data,
    rows: Callable[[Group], list[Row]],
    **extra: Any,
) -> None:
    """Run TRL's trainer on the groups' rows, in the packed engine's order; save and record."""
    from datasets import Dataset
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    started = time.perf_counter()
    require_context(base_model(model).config, [*data.groups, *data.held_out])
    identity = run_identity(options)
    options.output.mkdir(parents=True, exist_ok=True)
    made = [rows(group) for group in data.groups]
    ends = list(itertools.accumulate(map(len, made)))
    places = [range(end - len(part), end) for end, part in zip(ends, made, strict=True)]
    order = _Order(StepDataset(data.groups, packing_of(options), lambda groups: {}), places)

    held_out = [row for group in data.held_out for row in rows(group)]
    trainer = _same_rows(trainer_class, order, options)(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list([row for part in made for row in part]),
        eval_dataset=Dataset.from_list(held_out) if held_out else None,
        processing_class=tokenizer,
        callbacks=[Progress(), LossCurve(options.output / "loss.jsonl")],
        **extra,
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    figures = trainer.evaluate() if held_out else {}
    figures = {name: value for name, value in figures.items() if name != "epoch"}
    seconds = time.perf_counter() - started
    trained = conclude(
        options,
        command=command,
        identity=identity,
        trainer=trainer,
        figures=figures,
        seconds=seconds,
        report=data.report,
        extra={"engine": "trl"},
    )
    announce(trained)
