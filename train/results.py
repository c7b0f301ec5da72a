"""From prepared parts to a finished run: resume or start, train, save, write down what happened.

A run's folder ends up holding the model and its tokenizer, ``training.json`` (options, data,
figures; written last, so its presence means that the run is complete), ``loss.jsonl``,
``README.md``, the model card, and a picture of the curves.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState

from feedback.errors import InputError
from feedback.installed import package_versions
from feedback.records import content_id
from feedback.shards import MANIFEST, read_manifest, write_json
from train.chat import DataReport
from train.config import RewardOptions, TrainOptions
from train.data import Group
from train.identity import file_identity, model_identity, source_identity
from train.model_card import write_model_card
from train.model_checks import require_context
from train.models import (
    base_model,
    resolve_device,
    resolve_model,
)
from train.trainer import Objective, PackedTrainer, newest_checkpoint
from train.whole import make_whole

__all__ = ["Trained", "announce", "conclude", "finished", "fit", "run_identity"]

# Options that change where or how fast a run goes, not what it computes; and how an ensemble's
# scores are combined, which no member's training knows of.
_FREE = {
    "output",
    "resume",
    "save_every",
    "keep_checkpoints",
    "report_to",
    "workers",
    "peak_tflops",
    "rule",
    "uwo_lambda",
}
RECORD = "training.json"


class Trained(NamedTuple):
    """A finished run."""

    folder: Path
    figures: dict[str, Any]
    line: str
    """One line for people: loss, speed, time."""


def fit(
    options: TrainOptions,
    *,
    command: str,
    model: Any,
    tokenizer: Any,
    objective: Objective,
    groups: Sequence[Group],
    eval_groups: Sequence[Group] = (),
    report: DataReport,
    extra: dict[str, Any] | None = None,
    callbacks: Sequence[Any] = (),
) -> Trained:
    """Train, evaluate, save; continue from the last checkpoint of the same run if there is one.

    Args:
        options: the algorithm's options.
        command: its name (sft, dpo ...).
        model: from ``load_model``, with adapters if any.
        tokenizer: of the model.
        objective: the algorithm.
        groups: to train on.
        eval_groups: to evaluate on at the end, and every ``eval_every`` steps.
        report: what reading the data found.
        extra: more facts for ``training.json``.
        callbacks: transformers callbacks of the algorithm.

    Raises:
        InputError: the folder holds a checkpoint of another run, or a group is longer than the
            model's context.
    """
    started = time.perf_counter()
    output = options.output
    require_context(base_model(model).config, [*groups, *eval_groups])
    identity = run_identity(options)
    output.mkdir(parents=True, exist_ok=True)
    state = PartialState(cpu=resolve_device(options.device) == "cpu")
    with state.main_process_first():
        checkpoint = _checkpoint(options, command, identity, write=state.is_main_process)
    trainer = PackedTrainer(
        model=model,
        options=options,
        objective=objective,
        groups=groups,
        eval_groups=eval_groups,
        tokenizer=tokenizer,
        curve=output / "loss.jsonl",
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    figures = trainer.throughput.summary()
    if eval_groups:
        figures |= trainer.evaluate()
    return conclude(
        options,
        command=command,
        identity=identity,
        trainer=trainer,
        figures=figures,
        seconds=time.perf_counter() - started,
        report=report,
        extra=extra,
    )


def conclude(
    options: TrainOptions,
    *,
    command: str,
    identity: dict[str, Any],
    trainer: Any,
    figures: dict[str, Any],
    seconds: float,
    report: DataReport,
    extra: dict[str, Any] | None = None,
) -> Trained:
    """Save what a transformers trainer has trained, and write down what happened.

    Args:
        options: of the run.
        command: its name.
        identity: from ``run_identity``, as it was before the training: data or a model that changed
            meanwhile are others.
        trainer: after training.
        figures: speed and evaluation.
        seconds: what the run took.
        report: what reading the data found.
        extra: more facts for ``training.json``.
    """
    figures = {
        "steps": trainer.state.global_step,
        **_last_losses(trainer.state.log_history),
        **figures,
        "seconds": seconds,
    }
    _save(trainer, options)
    if trainer.is_world_process_zero():
        _record(options, command, identity, figures, report, extra or {})
    return Trained(options.output, figures, _line(command, figures, options.output))


def announce(trained: Trained) -> None:
    """Print the run's line on stdout."""
    sys.stdout.write(trained.line + "\n")
    sys.stdout.flush()


def finished(options: TrainOptions, command: str) -> Trained | None:
    """Return the run if the output folder holds it complete already, else None."""
    path = options.output / RECORD
    if not options.resume or not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("fingerprint") != content_id(command, run_identity(options)):
        return None
    return Trained(options.output, record["figures"], f"{options.output} is complete already")


def run_identity(options: TrainOptions) -> dict[str, Any]:
    """Return all that decides the run's result: options, data, starting weights."""
    values = {k: v for k, v in dataclasses.asdict(options).items() if k not in _FREE}
    values["data_identity"] = [source_identity(Path(source)) for source in options.data]
    values["eval_data_identity"] = [source_identity(Path(source)) for source in options.eval_data]
    values["weights_identity"] = model_identity(options.model)
    values["tokenizer_identity"] = model_identity(options.tokenizer)
    values["chat_template_identity"] = (
        options.chat_template and file_identity(options.chat_template)
    )  # fmt: skip
    values["reference_identity"] = model_identity(values.get("reference_model"))
    return json.loads(json.dumps(values, default=str, sort_keys=True))


def _checkpoint(
    options: TrainOptions, command: str, identity: dict[str, Any], *, write: bool
) -> Path | None:
    """Return the checkpoint to continue from; ``write``: note whose run this folder is."""
    folder = options.output / "checkpoints"
    path = options.output / "run.json"
    identity = {"command": command, **identity}
    changed = []
    if path.is_file():
        known = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in identity if identity[key] != known.get(key)]
    if options.resume and folder.is_dir() and path.is_file():
        newest = newest_checkpoint(folder)
        if newest is not None:
            if changed:
                raise InputError(
                    f"checkpoints of another run ({', '.join(changed)} differ); choose another "
                    "output folder, or start over with --resume False",
                    path=folder,
                )
            return newest
    if write:
        if changed and (options.output / RECORD).is_file():
            names = ", ".join(changed)
            sys.stderr.write(f"{options.output}: replaces a finished run ({names} differ)\n")
        shutil.rmtree(folder, ignore_errors=True)
        (options.output / RECORD).unlink(missing_ok=True)
        write_json(path, identity)
    return None


def _save(trainer: Any, options: TrainOptions) -> None:
    """Write model and tokenizer beside the folder first, then move the files in.

    Every process takes part: sharded weights (FSDP, DeepSpeed) are gathered from all of them.
    """
    output = options.output
    temporary = output / ".saving"
    if trainer.is_world_process_zero():
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(temporary))
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    # Reward models are merged by their own command: their head is another.
    if not isinstance(options, RewardOptions):
        make_whole(options, temporary)
    for stale in itertools.chain(output.glob("model*.safetensors*"), output.glob("adapter_*")):
        stale.unlink()
    for path in temporary.iterdir():
        if path.name != "training_args.bin":
            os.replace(path, output / path.name)
    shutil.rmtree(temporary)


def _record(
    options: TrainOptions,
    command: str,
    identity: dict[str, Any],
    figures: dict[str, Any],
    report: DataReport,
    extra: dict[str, Any],
) -> None:
    known = zip(options.data, identity["data_identity"], strict=True)
    sources = [_source_record(Path(source), found) for source, found in known]
    record = {
        "command": command,
        "fingerprint": content_id(command, identity),
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "base_model": resolve_model(options.model),
        "data": sources,
        "data_report": report.as_dict(),
        "figures": figures,
        "versions": package_versions(),
        **extra,
    }
    write_model_card(options.output, record)
    write_json(options.output / RECORD, record)


def _source_record(source: Path, identity: str) -> dict[str, Any]:
    record: dict[str, Any] = {"source": str(source), "identity": identity}
    if source.is_dir() and (source / MANIFEST).is_file():
        manifest = read_manifest(source)
        record["rows"] = manifest["rows"]
        record["manifest"] = {key: value for key, value in manifest.items() if key != "shards"}
    return record


def _last_losses(history: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the last logged training figures, and the first loss."""
    logged = [entry for entry in history if "loss" in entry]
    if not logged:
        return {}
    skipped = ("epoch", "step")
    last = {k: v for k, v in logged[-1].items() if k not in skipped and not k.startswith("speed/")}
    return {"first_loss": logged[0]["loss"], **last}


def _line(command: str, figures: dict[str, Any], output: Path) -> str:
    parts = [f"{command}: {figures['steps']} steps in {figures['seconds']:.0f} s"]
    if "loss" in figures:
        parts.append(f"loss {figures['first_loss']:.4f} -> {figures['loss']:.4f}")
    if "eval_loss" in figures:
        parts.append(f"evaluation loss {figures['eval_loss']:.4f}")
    if "real_tokens_per_s" in figures:
        parts.append(f"{figures['real_tokens_per_s']:,.0f} real tokens/s")
    if "mfu" in figures:
        parts.append(f"MFU {figures['mfu']:.2f}")
    if "peak_gib" in figures:
        parts.append(f"peak {figures['peak_gib']:.1f} GiB")
    return ", ".join(parts) + f"; model in {output}"
