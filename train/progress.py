"""What a training run shows and records while it runs: progress, loss curve, throughput."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import TrainerCallback

from train.batches import Step
from train.models import backbone, base_model

__all__ = ["LossCurve", "Progress", "Throughput", "peak_tflops"]

# Dense bfloat16 matrix-product rates from the vendors' data sheets, in TFLOP/s.
_PEAKS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "4090": 165.0}
_WARM = 3  # steps that compile and fill caches, left out of the throughput


def peak_tflops(name: str) -> float:
    """Return the dense bfloat16 peak of a GPU by its name, in TFLOP/s; 0 where it is not known."""
    return next((peak for part, peak in _PEAKS.items() if part in name), 0.0)


class Throughput:
    """Counts tokens and operations of the rows that run, and divides them by time."""

    def __init__(self, model: Any, *, peak_tflops: float = 0.0):
        stack = backbone(model)
        embedding = base_model(model).get_input_embeddings().weight.numel()
        self.body = sum(p.numel() for p in stack.parameters()) - embedding
        self.head = embedding
        self.device = next(stack.parameters()).device
        self.peak = peak_tflops or _known_peak(self.device)
        self.totals = _Totals()
        self.window = _Totals()
        self.peak_bytes = 0

    def begin(self, step: int) -> None:
        """Mark the start of an optimiser step."""
        now = time.perf_counter()
        self.totals.steps += 1
        if self.totals.steps == _WARM + 1:
            _synchronise(self.device)
            now = time.perf_counter()
            self.totals = _Totals(steps=self.totals.steps, started=now)
        if not self.window.started:
            self.window.started = now
        if not self.totals.started:
            self.totals.started = now

    def add(self, step: Step) -> None:
        """Count a finished step of this process."""
        for batch in step.batches:
            if batch.counts:
                for totals in (self.totals, self.window):
                    totals.add(batch, self.body, self.head)

    def recent(self) -> dict[str, float]:
        """Return the figures since the last call, for the log line."""
        figures = self._figures(self.window)
        self.window = _Totals()
        return {f"speed/{name}": value for name, value in figures.items()}

    def summary(self) -> dict[str, float]:
        """Return the figures of the whole run, warm-up left out where it was long enough."""
        _synchronise(self.device)
        figures = self._figures(self.totals)
        if self.device.type == "cuda":
            figures["peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        return figures

    def _figures(self, totals: _Totals) -> dict[str, float]:
        seconds = time.perf_counter() - totals.started
        if not totals.started or seconds <= 0:
            return {}
        figures = {
            "groups_per_s": totals.groups / seconds,
            "real_tokens_per_s": totals.real_tokens / seconds,
            "processed_tokens_per_s": totals.processed_tokens / seconds,
        }
        if self.peak:
            figures["mfu"] = totals.operations / seconds / self.peak / 1e12
        return figures


class _Totals:
    def __init__(self, *, steps: int = 0, started: float = 0.0):
        self.steps = steps
        self.started = started
        self.groups = self.real_tokens = self.processed_tokens = 0
        self.operations = 0.0

    def add(self, batch: Any, body: int, head: int) -> None:
        self.groups += len(batch.groups)
        self.real_tokens += batch.real_tokens
        self.processed_tokens += batch.processed_tokens
        # Forward and backward: 6 per weight and token; the head sees counted tokens only.
        self.operations += 6.0 * (body * batch.processed_tokens + head * len(batch.targets))


def _known_peak(device: torch.device) -> float:
    return peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Progress(TrainerCallback):
    """A progress bar on stderr with the newest loss."""

    def __init__(self) -> None:
        self.bar: Bar | None = None
        self.task: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar on the first process."""
        if state.is_world_process_zero:
            self.bar = Bar(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self.bar.start()
            self.task = self.bar.add_task(
                "", total=state.max_steps, completed=state.global_step, note=""
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest figures."""
        if self.bar is not None and logs and "loss" in logs:
            parts = [f"loss {logs['loss']:.4f}"]
            if "rewards/accuracies" in logs:
                parts.append(f"accuracy {logs['rewards/accuracies']:.3f}")
            self.bar.update(self.task, note=", ".join(parts))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class LossCurve(TrainerCallback):
    """One JSON line per log in ``loss.jsonl``; lines past the resumed step are cut off first."""

    def __init__(self, path: Path | None):
        self.path = path

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the lines up to the step that training starts from."""
        if self.path is None or not state.is_world_process_zero:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [
            line for line in lines if _line_step(line) <= state.global_step and state.global_step
        ]
        self.path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log at every checkpoint, so that a resumed run has the same windows, and at the end."""
        if control.should_save or state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Append the line."""
        if self.path is None or not state.is_world_process_zero or not logs:
            return
        values = {k: v for k, v in logs.items() if isinstance(v, int | float) and math.isfinite(v)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.global_step, **values}) + "\n")


def _line_step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):
        return math.inf
