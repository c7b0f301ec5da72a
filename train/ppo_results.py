"""What a finished PPO run leaves behind: the policy, its card, and the figures of the run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feedback.installed import package_versions
from feedback.shards import write_json
from train.model_card import write_model_card
from train.models import base_model, resolve_model
from train.ppo_checks import reward_models
from train.ppo_config import PpoOptions
from train.ppo_models import save_policy
from train.ppo_setup import Run
from train.ppo_state import Progress, run_fingerprint
from train.results import Trained

__all__ = ["finish", "finished"]

RECORD = "training.json"


def finished(options: PpoOptions) -> Trained | None:
    """Return the run if the output folder holds it complete already, else None."""
    path = options.output / RECORD
    if not options.resume or not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    if record.get("fingerprint") != run_fingerprint(options):
        return None
    return Trained(options.output, record["figures"], f"{options.output} is complete already")


def finish(
    this: Run, progress: Progress, *, seconds: float, gates: Sequence[dict[str, Any]]
) -> Trained:
    """Save policy and tokenizer, write the record, free the sampler; return what was reached.

    Args:
        this: the run.
        progress: how far it came.
        seconds: that it took, all its starts together.
        gates: what ``reward_gates`` said of the reward.
    """
    options, folder = this.options, this.options.output
    this.sampler.close()
    this.accelerator.wait_for_everyone()
    figures = _figures(this, progress, seconds)
    line = _line(this, progress, figures)
    if this.accelerator.is_main_process:
        base_model(this.networks.module.policy).config.use_cache = True
        save_policy(this.networks, options, folder)
        record = {
            "command": "ppo",
            # As it was at the start: a model that was trained again meanwhile is another one.
            "fingerprint": json.loads((folder / "run.json").read_text(encoding="utf-8")),
            "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
            "base_model": resolve_model(options.model),
            "reward_data": _reward_data(options),
            "reward_gates": list(gates),
            "stopped": progress.stopped,
            "figures": figures,
            "versions": package_versions(),
        }
        write_model_card(folder, record)
        write_json(folder / RECORD, record)
        # After the record: a run that is killed before it goes back to the best policy again.
        for path in folder.glob("best-*.pt"):
            path.unlink()
    if options.report_to:
        this.accelerator.end_training()
    return Trained(folder, figures, line)


def _reward_data(options: PpoOptions) -> list[dict[str, Any]]:
    """Return what the reward models were trained on, as far as their folders say."""
    records = [Path(name) / RECORD for name in options.reward.models]
    known = [json.loads(path.read_text(encoding="utf-8")) for path in records if path.is_file()]
    return [entry for record in known for entry in record.get("data", [])]


def _figures(this: Run, progress: Progress, seconds: float) -> dict[str, Any]:
    curve = _rows(this.options.output / "metrics.jsonl")
    figures: dict[str, Any] = {"steps": progress.step, "seconds": seconds}
    if curve:
        first, last = curve[0], curve[-1]
        names = ("objective/scores", "objective/kl", "completion/length", "completion/ended")
        figures |= {f"first_{name.partition('/')[2]}": first[name] for name in names}
        figures |= {name.partition("/")[2]: last[name] for name in names}
        figures["failed_share"] = sum(row["completion/failed"] for row in curve) / len(curve)
        times = [name for name in last if name.startswith("time/")]
        figures |= {
            f"seconds_{name.partition('/')[2]}": sum(row.get(name, 0.0) for row in curve)
            for name in times
        }
        if "memory/peak_gib" in last:
            figures["peak_gib"] = last["memory/peak_gib"]
    if this.gold is not None:
        figures |= {"best_step": this.guard.best_step, "gold": _rows_gold(this)}
    figures["models_held"] = this.networks.models_held
    figures["reward_models_held"] = sum(
        len(list(reward_models(scorer))) for scorer in (this.scorer, this.gold) if scorer
    )
    figures["prompts"] = len(this.prompts)
    figures["prompts_too_long"] = this.dropped_prompts
    return figures


def _rows_gold(this: Run) -> float:
    rows = _rows(this.options.output / "guard.jsonl")
    return next(row["gold"] for row in rows if row["step"] == this.guard.best_step)


def _rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _line(this: Run, progress: Progress, figures: dict[str, Any]) -> str:
    parts = [f"ppo: {progress.step} steps in {figures['seconds']:.0f} s"]
    if "scores" in figures:
        parts.append(f"score {figures['first_scores']:.3f} -> {figures['scores']:.3f}")
        parts.append(f"KL {figures['kl']:.2f}")
    if "best_step" in figures:
        parts.append(f"gold best at step {figures['best_step']} ({figures['gold']:.3f})")
    if progress.stopped:
        parts.append(f"stopped because {progress.stopped}")
    return ", ".join(parts) + f"; policy in {this.options.output}"
