"""The training loop that every packed algorithm shares, on transformers.Trainer and accelerate.

An algorithm is an ``Objective``: how much a group counts, and the loss of a packed row. This module
does the rest: one loader item is one optimiser step, its rows run as micro-batches, and the loss is
normalised by counts over all rows of all processes, so that how a step was cut does not matter.
Checkpoints, resuming, loggers, FSDP and DeepSpeed are transformers' own.

An algorithm file reads: load, tokenise, make an objective, ``fit``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from feedback.errors import InputError, RlaifError
from train.attention import resolve_attention
from train.batches import Counts, Packing, Step, StepDataset, step_loader
from train.config import TrainOptions
from train.data import Group
from train.models import compile_layers, resolve_device, resolve_precision
from train.optimizer import MasterAdamW, Schedule, parameter_groups
from train.packing import PackedBatch
from train.progress import LossCurve, Progress, Throughput

__all__ = [
    "Metrics",
    "Objective",
    "PackedTrainer",
    "StepLoss",
    "newest_checkpoint",
    "packing_of",
    "row_tokens_of",
    "training_arguments",
]

Metrics = dict[str, tuple[Tensor, Tensor | float]]
"""Name to (sum, count); the mean over rows, steps and processes is what gets logged."""


class StepLoss(NamedTuple):
    """What an objective makes of one row."""

    loss: Tensor
    """Scalar, already divided by the step's counts: the rows' losses add up to the step's."""
    metrics: Metrics


class Objective(Protocol):
    """An algorithm, as the trainer sees it."""

    name: str

    def counts(self, groups: Sequence[Group]) -> Counts:
        """Return the totals that the loss divides by, over all of a step's groups (on the host)."""
        ...

    def loss(self, model: nn.Module, batch: PackedBatch, counts: Mapping[str, float]) -> StepLoss:
        """Return the loss of one row and what to log of it; metrics carry no gradient."""
        ...


def packing_of(options: TrainOptions, *, shuffle: bool = True) -> Packing:
    """Return how the options pack groups, for this process."""
    from accelerate import PartialState

    state = PartialState(cpu=resolve_device(options.device) == "cpu")
    device = resolve_device(options.device)
    return Packing(
        batch_size=options.batch_size,
        row_tokens=row_tokens_of(options),
        attention=resolve_attention(options.attention, device),
        share_prompt=options.share_prompt,
        pack=options.pack,
        seed=options.seed,
        shuffle=shuffle,
        processes=state.num_processes,
        process=state.process_index,
    )


def row_tokens_of(options: TrainOptions) -> int:
    """Return the token budget of a row: what was asked for, or the device's default."""
    default = 32768 if resolve_device(options.device) == "cuda" else 2048
    return options.row_tokens or max(default, options.max_length)


def training_arguments(options: TrainOptions) -> TrainingArguments:
    """Return the options as transformers names them."""
    device = resolve_device(options.device)
    extra: dict[str, Any] = {}
    if options.gradient_checkpointing:
        extra["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return TrainingArguments(
        output_dir=str(options.output / "checkpoints"),
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        # One loader item is a whole step: transformers' own accumulation stays out of it.
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        learning_rate=options.learning_rate,
        max_grad_norm=options.max_grad_norm,
        bf16=resolve_precision(options.precision, device) == "autocast",
        gradient_checkpointing=options.gradient_checkpointing,
        logging_steps=options.log_every,
        logging_first_step=True,
        # The default reads the loss back from the device at every step.
        logging_nan_inf_filter=False,
        save_strategy="steps" if options.save_every else "no",
        save_steps=options.save_every or 500,
        save_total_limit=options.keep_checkpoints,
        eval_strategy="steps" if options.eval_every else "no",
        eval_steps=options.eval_every or None,
        seed=options.seed,
        report_to=list(options.report_to) or "none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=device == "cpu",
        **extra,
    )


class PackedTrainer(Trainer):
    """transformers' Trainer over packed steps.

    Args:
        model: from ``train.models.load_model`` (adapters added, if any).
        options: the algorithm's options.
        objective: the algorithm.
        groups: to train on.
        eval_groups: to evaluate on; may be empty.
        tokenizer: saved with every checkpoint.
        curve: file that gets one JSON line per log, evaluation included.
        callbacks: transformers callbacks of the algorithm.
    """

    def __init__(
        self,
        *,
        model: Any,
        options: TrainOptions,
        objective: Objective,
        groups: Sequence[Group],
        eval_groups: Sequence[Group] = (),
        tokenizer: Any = None,
        curve: Path | None = None,
        callbacks: Sequence[Any] = (),
    ):
        # transformers' Trainer is untyped here; these it sets itself.
        self.optimizer: Any
        self.lr_scheduler: Any
        self.control: Any
        self.options = options
        self.objective = objective
        self.packing = packing_of(options)
        self.steps = StepDataset(groups, self.packing, objective.counts)
        whole = dataclasses.replace(self.packing, shuffle=False)
        self.eval_steps = StepDataset(eval_groups, whole, objective.counts)
        self.throughput = Throughput(model, peak_tflops=options.peak_tflops)
        self._sums: dict[str, list[Tensor]] = {}
        super().__init__(
            model=model,
            args=training_arguments(options),
            train_dataset=self.steps,
            eval_dataset=self.eval_steps if eval_groups else None,
            processing_class=tokenizer,
            callbacks=[Progress(), LossCurve(curve), *callbacks],
        )
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        compile_layers(model, options.compile, activation_budget=options.activation_budget)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as transformers' Trainer does, and let the process that packs rows end after it."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.callback_handler.train_dataloader = None

    # --- data

    def get_train_dataloader(self) -> Any:
        """Return the loader of whole steps; it needs no wrapping, each process knows its rows."""
        cuda = self.args.device.type == "cuda"
        workers = self.options.workers if self.options.workers >= 0 else int(cuda)
        return step_loader(self.steps, workers=workers, pin_memory=cuda)

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: Any
    ) -> tuple[list[Step], None]:
        """Return the next steps; they carry their own counts."""
        return list(itertools.islice(epoch_iterator, num_batches)), None

    def num_examples(self, dataloader: Any) -> int:
        """Return the number of groups."""
        return len(dataloader.dataset)

    # --- optimiser

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return fused AdamW, over float32 copies where the weights are bfloat16."""
        if self.optimizer is None:
            options = self.options
            trained = self.model if model is None else model
            groups = parameter_groups(trained, options.weight_decay)
            if not groups:
                raise InputError("nothing to train: the model has no trainable parameters")
            # Any of them: adapters are float32 beside a score head in bfloat16.
            rounded = any(p.dtype == torch.bfloat16 for group in groups for p in group["params"])
            if rounded and self.packing.processes > 1:
                raise InputError(
                    "precision bfloat16 keeps its float32 copies on one process; use autocast with "
                    "several"
                )
            self.optimizer = (MasterAdamW if rounded else torch.optim.AdamW)(
                groups,
                lr=options.learning_rate,
                betas=tuple(options.adam_betas),
                eps=options.adam_epsilon,
                fused=True,
            )
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the learning-rate schedule of the options."""
        if self.lr_scheduler is None:
            floor = vars(self.options).get("min_learning_rate", 0.0)
            schedule = Schedule(
                self.options.schedule,
                steps=num_training_steps,
                warmup=self.options.warmup,
                floor=floor,
            )
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                self.optimizer if optimizer is None else optimizer, schedule
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _master_optimizer(self) -> MasterAdamW | None:
        inner = vars(self.optimizer).get("optimizer", self.optimizer)
        return inner if isinstance(inner, MasterAdamW) else None

    def _clip_grad_norm(self, model: Any) -> Any:
        masters = self._master_optimizer()
        if masters is None:
            return super()._clip_grad_norm(model)
        return masters.clip(self.args.max_grad_norm)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        masters = self._master_optimizer()
        if masters is None or grad_norm is not None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return masters.clip(0.0)

    # --- one step

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Run the rows of one optimiser step, forward and backward."""
        step: Step = inputs
        model.train()
        self.throughput.begin(self.state.global_step)
        total = torch.zeros((), device=self.args.device)
        for place, batch in enumerate(step.batches):
            last = place == len(step.batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(last)
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                loss = self._row_loss(model, batch, step.counts)
                self.accelerator.backward(loss)
            total += loss.detach()
        self.throughput.add(step)
        return total

    def _row_loss(self, model: Any, batch: PackedBatch, counts: Counts) -> Tensor:
        batch = batch.to(self.args.device, non_blocking=True)
        outcome = self.objective.loss(model, batch, counts)
        self._collect(outcome.metrics, counts=batch.counts)
        if not batch.counts:
            return outcome.loss * 0.0
        # Wrappers average gradients over processes; counts are totals, so undo that.
        return outcome.loss * self.packing.processes

    def _collect(self, metrics: Metrics, *, counts: bool = True) -> None:
        """Keep sums and counts; a filler's count as zero, so that all processes have all names."""
        for name, (total, count) in metrics.items():
            pair = torch.stack([total.detach().float().to(self.args.device), _scalar(count, total)])
            self._sums.setdefault(name, []).append(pair if counts else torch.zeros_like(pair))

    def _drain(self) -> dict[str, float]:
        """Return the means of what was collected since the last call, over all processes."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        sums = torch.stack([torch.stack(self._sums[name]).sum(0) for name in names])
        self._sums = {}
        sums = self.accelerator.reduce(sums, "sum").tolist()
        return {
            name: total / count for name, (total, count) in zip(names, sums, strict=True) if count
        }

    # --- logs, evaluation

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the objective's metrics beside the loss.

        Raises:
            RlaifError: the loss is not a finite number.
        """
        if "loss" in logs:
            logs = logs | self._drain() | self.throughput.recent()
            if not math.isfinite(logs["loss"]):
                raise RlaifError(
                    f"the loss is {logs['loss']} at step {self.state.global_step}: lower the "
                    "learning rate, or look for rows with extreme lengths; the last checkpoint is "
                    "intact"
                )
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Return the mean loss and metrics over the evaluation groups, and log them."""
        dataset: StepDataset = self.eval_steps if eval_dataset is None else eval_dataset
        # Counts of all groups: with means of steps, what a row weighs would follow the batch size.
        counts = dataset.count(dataset.groups)
        kept, self._sums = self._sums, {}
        model = self.model
        model.eval()
        started = time.perf_counter()
        with torch.no_grad(), self.compute_loss_context_manager():
            for number in range(len(dataset.plan(0))):
                for batch in dataset[0, number].batches:
                    moved = batch.to(self.args.device)
                    outcome = self.objective.loss(model, moved, counts)
                    self._collect(outcome.metrics, counts=moved.counts)
                    self._collect({"loss": (outcome.loss, 0.0)}, counts=moved.counts)
        one = torch.ones((), device=self.args.device) / self.packing.processes
        self._collect({"loss": (one * 0, one)})
        means = {f"{metric_key_prefix}_{name}": value for name, value in self._drain().items()}
        means[f"{metric_key_prefix}_seconds"] = time.perf_counter() - started
        self._sums = kept
        model.train()
        self.log(means)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, means)
        return means

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: ``Throughput`` counts operations, from the rows' real sizes."""
        return 0


def _scalar(value: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32, device=like.device)


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the last whole checkpoint in a folder, or None.

    transformers writes ``trainer_state.json`` last: a checkpoint without a readable one was cut off
    by a crash.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.split("-")[1]))
    for checkpoint in found:
        try:
            json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        return checkpoint
    return None
