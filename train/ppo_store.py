"""A run's files: checkpoints of its state, the best policy so far, and its curves."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from feedback.errors import InputError
from train.guard import Probe
from train.ppo_models import save_policy
from train.ppo_setup import Run
from train.ppo_state import (
    Progress,
    StopRequest,
    append_metrics,
    cut_metrics,
    load_checkpoint,
    pack_rollout,
    save_checkpoint,
    start_run,
    unpack_rollout,
    write_state,
)

__all__ = ["RunStore"]


class RunStore:
    """Saves and restores one run; the first process writes.

    Args:
        this: the run.
        started: when this start of it began, by ``time.perf_counter``; None: now.
    """

    def __init__(self, this: Run, *, started: float | None = None):
        self.this = this
        self._started = time.perf_counter() if started is None else started
        self._seconds_before = 0.0
        self.folder: Path = this.options.output
        self.main: bool = this.accelerator.is_main_process

    def restore(self) -> Progress:
        """Return how far the run has come; load its state if it has come anywhere.

        Raises:
            InputError: the checkpoint is of another run, or of another number of processes.
        """
        this = self.this
        self.folder.mkdir(parents=True, exist_ok=True)
        state = start_run(this.options) if self.main else None
        this.accelerator.wait_for_everyone()
        if not self.main:
            state = load_checkpoint(self.folder / "checkpoints")
        if this.options.report_to:
            this.accelerator.init_trackers("rlaif-ppo")
        if state is None:
            return Progress()
        self._check_processes(state)
        self._seconds_before = state["seconds"]
        this.networks.module.load_trained_state(state["weights"])
        this.policy_optimiser.inner.load_state_dict(state["policy_optimiser"])
        this.value_optimiser.inner.load_state_dict(state["value_optimiser"])
        this.controller.load_state_dict(state["controller"])
        this.normaliser.load_state_dict(state["normaliser"])
        this.guard.load_state_dict(state["guard"])
        saved = dict(state["progress"])
        rollouts = saved.pop("rollouts")
        if rollouts:
            saved["rollout"] = unpack_rollout(rollouts[this.accelerator.process_index])
        progress = Progress(**saved)
        if self.main:
            cut_metrics(self.folder / "metrics.jsonl", step=progress.step)
            # A probe of the step in progress was written before its checkpoint.
            cut_metrics(self.folder / "guard.jsonl", step=progress.step)
        return progress

    def seconds(self) -> float:
        """Return what the run has taken, up to its newest checkpoint and since this start."""
        return self._seconds_before + time.perf_counter() - self._started

    def _check_processes(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint whose parts of a rollout belong to other processes than there are."""
        now = self.this.accelerator.num_processes
        if state["processes"] != now:
            raise InputError(
                f"the checkpoint is of a run with {state['processes']} processes, and this one has "
                f"{now}: start as many again, or start over with --resume False",
                path=self.folder / "checkpoints",
            )

    def save(self, progress: Progress) -> None:
        """Write a checkpoint."""
        this = self.this
        mine = [] if progress.rollout is None else [pack_rollout(progress.rollout)]
        rollouts = gather_object(mine) if this.accelerator.num_processes > 1 else mine
        if not self.main:
            return
        state: dict[str, Any] = {
            "weights": this.networks.module.trained_state(),
            "policy_optimiser": this.policy_optimiser.inner.state_dict(),
            "value_optimiser": this.value_optimiser.inner.state_dict(),
            "controller": this.controller.state_dict(),
            "normaliser": this.normaliser.state_dict(),
            "guard": this.guard.state_dict(),
            "processes": this.accelerator.num_processes,
            "seconds": self.seconds(),
            "progress": {
                "step": progress.step,
                "updates": progress.updates,
                "stats": progress.stats,
                "passes_over": progress.passes_over,
                "stopped": progress.stopped,
                "rollouts": rollouts,
            },
        }
        save_checkpoint(
            self.folder / "checkpoints",
            state,
            step=progress.step,
            keep=this.options.keep_checkpoints,
        )
        self._forget_old_best()

    def stop_if_asked(self, stop: StopRequest, progress: Progress) -> None:
        """Save and leave, where any process was asked to stop.

        Raises:
            KeyboardInterrupt: after saving.
        """
        asked = self.this.sum(torch.tensor(float(stop.asked)))
        if asked:
            self.save(progress)
            raise KeyboardInterrupt

    def log(self, metrics: dict[str, float]) -> None:
        """Append a step to the curve, and print it now and then."""
        step = int(metrics["step"])
        if torch.cuda.is_available():
            metrics["memory/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        if self.main:
            append_metrics(self.folder / "metrics.jsonl", metrics)
            if step % self.this.options.log_every == 0:
                _print_step(metrics, self.this.options.steps)
        if self.this.options.report_to:
            self.this.accelerator.log(metrics, step=step)

    def log_probe(self, found: Probe, means: dict[str, float]) -> None:
        """Append a probe to the gold curve."""
        if not self.main:
            return
        append_metrics(self.folder / "guard.jsonl", {**found._asdict(), **means})
        asked = len(self.this.held_out)
        missing = "" if found.known == asked else f", {asked - found.known} of {asked} not scored"
        sys.stderr.write(
            f"probe at step {found.step}: gold {found.gold:.3f} ({found.outcome}{missing}), "
            f"reward {means['reward']:.3f}, KL {means['kl']:.2f}\n"
        )

    def copy_policy(self, step: int) -> None:
        """Keep the policy as it stands, to look at later."""
        if self.main:
            folder = self.folder / "policies" / f"step-{step:06d}"
            save_policy(self.this.networks, self.this.options, folder)

    def save_best(self, step: int) -> None:
        """Keep the current weights as the best so far."""
        if not self.main:
            return
        write_state(self._best(step), self.this.networks.module.trained_state())
        if not any((self.folder / "checkpoints").glob("step-*.pt")):
            self._forget_old_best()

    def load_best(self) -> None:
        """Go back to the weights of the best probe."""
        self.this.accelerator.wait_for_everyone()
        path = self._best(self.this.guard.best_step)
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.this.networks.module.load_trained_state(state)

    def _best(self, step: int) -> Path:
        return self.folder / f"best-{step:06d}.pt"

    def _forget_old_best(self) -> None:
        """Remove best policies that no checkpoint on disk refers to any more."""
        for path in self.folder.glob("best-*.pt"):
            if path != self._best(self.this.guard.best_step):
                path.unlink()


def _print_step(metrics: dict[str, float], steps: int) -> None:
    shown = (
        ("score", "objective/scores", ".3f"),
        ("KL", "objective/kl", ".2f"),
        ("length", "completion/length", ".1f"),
        ("policy", "loss/policy_avg", ".4f"),
        ("value", "loss/value_avg", ".4f"),
        ("clipped", "policy/clipfrac_avg", ".3f"),
    )
    parts = [f"{label} {metrics[name]:{form}}" for label, name, form in shown]
    if metrics["completion/failed"]:
        parts.append(f"without a score {metrics['completion/failed']:.1%}")
    seconds = metrics["time/step"]
    sys.stderr.write(f"step {int(metrics['step'])}/{steps}  {'  '.join(parts)}  {seconds:.1f} s\n")
