"""What survives a stop: one file with all of a run's state, written whole or not at all.

A checkpoint can fall anywhere: between steps, after a rollout, between two updates of a step. It
holds the trained weights, both optimisers, the KL controller, the reward's moments, the guard, and
the rollout with the statistics of the updates done on it. Prompts, samples and minibatches are
drawn from seeds of (run, step, place), so there is no generator to save, and a resumed run repeats
what a whole one does.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import torch

from feedback.errors import InputError
from feedback.records import content_id
from feedback.sampling import prompt_source
from feedback.shards import write_json
from feedback.templates import load_rubric, load_template
from train.data import Group
from train.identity import code_identity, file_identity, model_identity, source_identity
from train.ppo_config import PpoOptions, RewardSource
from train.rollout import Rollout

__all__ = [
    "Progress",
    "StopRequest",
    "append_metrics",
    "cut_metrics",
    "load_checkpoint",
    "pack_rollout",
    "run_fingerprint",
    "save_checkpoint",
    "start_run",
    "unpack_rollout",
]

# Options that change where or how fast a run goes, not what it computes.
_FREE = {
    "output",
    "resume",
    "save_every",
    "keep_checkpoints",
    "copy_every",
    "log_every",
    "report_to",
}
_TENSORS = (
    "scores",
    "ended",
    "mask",
    "sampler_logprobs",
    "logprobs",
    "ref_logprobs",
    "values",
)


@dataclass(slots=True)
class Progress:
    """How far a run has come."""

    step: int = 0
    """Finished steps."""
    updates: int = 0
    """Finished updates of the step in progress."""
    stats: list[dict[str, float]] = field(default_factory=list)
    """Statistics of those updates."""
    rollout: Rollout | None = None
    """Rollout of the step in progress, this process's part."""
    passes_over: bool = False
    """The step's passes have ended early."""
    stopped: str = ""
    """Why the run ended before its last step."""

    def next_step(self) -> None:
        """Close the step in progress."""
        self.step += 1
        self.updates, self.stats, self.rollout, self.passes_over = 0, [], None, False


class StopRequest:
    """Notes SIGINT and SIGTERM, so that the loop can save before it stops; a second one kills."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                self._before[number] = signal.signal(number, self._note)
            except ValueError:  # not the main thread: signals are somebody else's
                return self
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def pack_rollout(rollout: Rollout) -> dict[str, Any]:
    """Return a rollout as plain containers and tensors."""
    return {
        "prompt_ids": [group.prompt_id for group in rollout.groups],
        "prompts": [list(map(int, group.prompt_ids)) for group in rollout.groups],
        "completions": [
            [list(map(int, ids)) for ids in group.completions] for group in rollout.groups
        ],
        "texts": list(rollout.texts),
        **{name: getattr(rollout, name) for name in _TENSORS},
    }


def unpack_rollout(packed: dict[str, Any]) -> Rollout:
    """Return the rollout that ``pack_rollout`` packed."""
    groups = tuple(
        Group(prompt_id=name, prompt_ids=prompt, completions=tuple(completions))
        for name, prompt, completions in zip(
            packed["prompt_ids"], packed["prompts"], packed["completions"], strict=True
        )
    )
    return Rollout(
        groups=groups, texts=tuple(packed["texts"]), **{name: packed[name] for name in _TENSORS}
    )


def save_checkpoint(folder: Path, state: dict[str, Any], *, step: int, keep: int) -> Path:
    """Write a run's state and forget all but the newest ``keep`` checkpoints.

    The file appears under its name only when it is whole and on disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:06d}-{state['progress']['updates']:04d}.pt"
    write_state(path, state)
    for old in sorted(folder.glob("step-*.pt"))[: -max(keep, 1)]:
        old.unlink()
    return path


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Write a state file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the newest checkpoint's state, on the CPU, or None where there is none."""
    for torn in folder.glob(".step-*.tmp"):
        torn.unlink()
    found = sorted(folder.glob("step-*.pt"))
    if not found:
        return None
    state: dict[str, Any] = torch.load(found[-1], map_location="cpu", weights_only=True)
    return state


def run_fingerprint(options: PpoOptions) -> dict[str, Any]:
    """Return all that decides the run's result: options, and the content of what they name."""
    values = {
        name: value for name, value in dataclasses.asdict(options).items() if name not in _FREE
    }
    sources = (*options.prompts, *options.guard.prompts)
    values |= {
        "prompt_files": {
            str(source): source_identity(prompt_source(Path(source))) for source in sources
        },
        "policy_files": model_identity(options.model),
        "tokenizer_files": model_identity(options.tokenizer),
        "reference_files": model_identity(options.reference_model),
        "value_model_files": model_identity(options.value_model),
        "chat_template_file": options.chat_template and file_identity(options.chat_template),
        "reward_files": _scorer_identity(options.reward),
        "gold_files": _scorer_identity(options.guard.gold),
    }
    known: dict[str, Any] = json.loads(json.dumps(values, default=str, sort_keys=True))
    return known


def _scorer_identity(source: RewardSource) -> Any:
    if source.kind == "model":
        return [model_identity(name) for name in source.models]
    if source.kind == "function":
        return code_identity(source.function)
    if source.kind == "none":
        return None
    template = load_template(source.template)
    rubric = load_rubric(source.rubric or template.rubric)
    models = [model_identity(source.judge.model), model_identity(source.judge.lora)]
    return [template.sha256, content_id(rubric), *models]


def start_run(options: PpoOptions) -> dict[str, Any] | None:
    """Return the state to continue from, or None for a fresh start, which clears the folder.

    Raises:
        InputError: the folder holds checkpoints of another run.
    """
    folder, path = options.output / "checkpoints", options.output / "run.json"
    fingerprint = run_fingerprint(options)
    if options.resume and path.is_file() and (state := load_checkpoint(folder)) is not None:
        changed = _changed(fingerprint, path)
        if changed:
            raise InputError(
                f"checkpoints of another run ({', '.join(changed)} differ); choose another output "
                "folder, or start over with --resume False",
                path=folder,
            )
        return state
    if (options.output / "training.json").is_file() and path.is_file():
        names = ", ".join(_changed(fingerprint, path)) or "resume = False"
        sys.stderr.write(f"{options.output}: replaces a finished run ({names})\n")
    shutil.rmtree(folder, ignore_errors=True)
    for name in ("training.json", "metrics.jsonl", "guard.jsonl"):
        (options.output / name).unlink(missing_ok=True)
    for best in options.output.glob("best-*.pt"):
        best.unlink()
    write_json(path, fingerprint)
    return None


def _changed(fingerprint: dict[str, Any], path: Path) -> list[str]:
    """Return the names that differ from those of the run that is noted in ``path``."""
    known = json.loads(path.read_text(encoding="utf-8"))
    return sorted(key for key in {*fingerprint, *known} if fingerprint.get(key) != known.get(key))


def append_metrics(path: Path, metrics: dict[str, float]) -> None:
    """Append one line to a curve."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(metrics) + "\n")


def cut_metrics(path: Path, *, step: int) -> None:
    """Drop the lines of steps after ``step``, which a resumed run writes again."""
    if not path.is_file():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
    path.write_text("".join(line + "\n" for line in kept), encoding="utf-8")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError):  # torn by a crash
        return float("inf")


def minibatches(
    groups: Sequence[Group], *, count: int, epochs: int, seed: Sequence[int]
) -> list[list[int]]:
    """Return the groups of each update of a step: ``epochs`` shuffles, cut into ``count`` parts."""
    import numpy as np

    updates = []
    for epoch in range(epochs):
        order = np.random.default_rng((*seed, epoch)).permutation(len(groups))
        updates += [part.tolist() for part in np.array_split(order, count)]
    return updates
