"""A comparison's figures from its evaluations: per method, along the way, and by kind of labels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table

from feedback.installed import package_versions
from feedback.provenance import origins_in
from feedback.shards import manifest_sha256, read_manifest
from train.best_of_n import best_of_n_kl
from train.compare_jobs import Job, JobResult
from train.compare_measure import Outcome, difference, read_outcome
from train.compare_plan import Comparison, evaluation_options, start_engine
from train.models import resolve_model
from train.results import RECORD
from train.reward_model import ENSEMBLE

__all__ = ["GATE", "KINDS", "judges_that_labelled", "models_held", "print_table", "summarise"]

GATE = "gate.json"
"""Which rows of the report card the gate would refuse such labels for."""
# Short and stacked: the table fits into 80 columns.
_HEADS = (
    "win rate", "at equal\nlength", "gold", "KL", "reward", "chars", "s", "MiB", "held",
)  # fmt: skip
KINDS = ("hard", "soft", "corrected")
"""How labels are made of the biased verdicts: hard from one order; soft from both; soft from both,
with the pull of length taken out."""


def summarise(
    shared: Comparison, jobs: Sequence[Job], results: Mapping[str, JobResult]
) -> dict[str, Any]:
    """Return everything that the page shows, as JSON values."""
    options = shared.options
    record: dict[str, Any] = {
        "tokens": shared.tokens,
        "seeds": list(options.seeds),
        "prompts": dict(shared.lengths.groups),
        "lengths": {"prompt": shared.lengths.prompt, "completion": shared.lengths.completion},
        "best_of": options.best_of,
        "start": start_engine(shared.recipe)["model"],
        "judges": [engine.model for engine in evaluation_options(shared.recipe).judges],
        "judges_that_labelled": judges_that_labelled(shared),
        "methods": {},
        "curves": {},
        "versions": package_versions(),
    }
    outcomes: dict[str, Outcome] = {}
    if "methods" in options.parts:
        for algorithm in options.algorithms:
            outcome = _outcome(shared, algorithm)
            outcomes[algorithm] = outcome
            record["methods"][algorithm] = {
                **outcome.to_dict(),
                **_cost(algorithm, jobs, results),
                "models_held": models_held(shared, algorithm),
            }
            record["curves"][algorithm] = _curve(shared, algorithm, jobs)
    if "labels" in options.parts:
        record["labels"] = _labels(shared, outcomes.get("dpo") or _outcome(shared, "dpo"))
    if "bias" in options.parts:
        record["bias"] = _bias(shared, outcomes)
    return record


def _folder(shared: Comparison, name: str) -> Path:
    return shared.options.folder / "evaluations" / name


def _outcome(shared: Comparison, algorithm: str) -> Outcome:
    folders = [_folder(shared, f"{algorithm}-{seed}") for seed in shared.options.seeds]
    kl = best_of_n_kl(shared.options.best_of) if algorithm == "bon" else None
    return read_outcome(folders, kl=kl)


def _cost(
    algorithm: str, jobs: Sequence[Job], results: Mapping[str, JobResult]
) -> dict[str, float]:
    """Return the mean cost of one training (best-of-n: of its samples)."""
    mine = [
        job
        for job in jobs
        if job.meta.get("algorithm") == algorithm and job.name == f"{algorithm}-{job.meta['seed']}"
    ]
    count = len(mine)
    return {
        "tokens": sum(job.meta["tokens"] for job in mine) / count,
        "steps": sum(job.meta["steps"] for job in mine) / count,
        "seconds": sum(results[job.name].seconds for job in mine) / count,
        "cpu_seconds": sum(results[job.name].cpu_seconds for job in mine) / count,
        "peak_mib": max(results[job.name].peak_mib for job in mine),
    }


def judges_that_labelled(shared: Comparison) -> list[str]:
    """Return the judges of the evaluation whose labels the policies were trained on."""
    manifest = read_manifest(shared.data.preferences)
    origins = origins_in("preferences", manifest, manifest_sha256(shared.data.preferences))
    labelled = {resolve_model(str(judge["model"])) for origin in origins for judge in origin.judges}
    judges = [engine.model for engine in evaluation_options(shared.recipe).judges]
    return [name for name in judges if resolve_model(name) in labelled]


def models_held(shared: Comparison, algorithm: str) -> int:
    """Return the full sets of weights in memory: in training, or while best-of-n chooses.

    SFT, DPO and RRHF hold the policy alone: DPO computes the reference's log-probabilities before
    it starts. What PPO held, its own record says.
    """
    if algorithm == "ppo":
        folder = shared.options.folder / "policies" / f"ppo-{shared.options.seeds[0]}"
        figures = json.loads((folder / RECORD).read_text(encoding="utf-8"))["figures"]
        return int(figures["models_held"]) + int(figures["reward_models_held"])
    if algorithm == "bon":
        index = shared.data.reward_model / ENSEMBLE
        members = json.loads(index.read_text())["members"] if index.is_file() else [""]
        return 1 + len(members)
    return 1


def _curve(shared: Comparison, algorithm: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Return points of KL, gold and reward: the start, copies on the way, the first seed's end."""
    seed, best_of = shared.options.seeds[0], shared.options.best_of
    prefix = f"evaluate-{algorithm}-{seed}"
    points: list[dict[str, Any]] = []
    for job in jobs:
        if job.name != prefix and not job.name.startswith(f"{prefix}-"):
            continue
        name = job.name.removeprefix("evaluate-")
        size = int(name.rpartition("-of-")[2]) if "-of-" in name else best_of
        kl = best_of_n_kl(size) if algorithm == "bon" else None
        outcome = read_outcome([_folder(shared, name)], kl=kl)
        if not points:
            points.append({"name": "start", "kl": 0.0, **outcome.start})
        points.append(
            {
                "name": name,
                "kl": outcome.kl,
                "gold": outcome.gold.value if outcome.gold else None,
                "reward": outcome.reward,
                "length": outcome.length,
            }
        )
    return sorted(points, key=lambda point: point["kl"] or 0.0)


def _labels(shared: Comparison, judge: Outcome) -> dict[str, Any]:
    seeds = shared.options.seeds
    gold = read_outcome([_folder(shared, f"labels-gold-{seed}") for seed in seeds])
    return {
        "judge": judge.to_dict(),
        "gold": gold.to_dict(),
        "win_rate_difference": difference(judge, gold).to_dict(),
    }


def _bias(shared: Comparison, plain: Mapping[str, Outcome]) -> dict[str, Any]:
    """Return what each algorithm became on each kind of biased labels, and how far that is off."""
    found: dict[str, Any] = {"strength": shared.options.bias, "labels": {}, "refused": {}}
    for kind in KINDS:
        path = shared.options.folder / "labels" / kind / GATE
        found["refused"][kind] = json.loads(path.read_text(encoding="utf-8"))
        found["labels"][kind] = {}
        for algorithm in shared.options.algorithms:
            kl = best_of_n_kl(shared.options.best_of) if algorithm == "bon" else None
            outcome = read_outcome([_folder(shared, f"bias-{kind}-{algorithm}")], kl=kl)
            row = outcome.to_dict()
            if algorithm in plain:
                for measure in ("length", "gold"):
                    gap = difference(outcome, plain[algorithm], measure)
                    row[f"{measure}_change"] = gap.to_dict()
            found["labels"][kind][algorithm] = row
    return found


def print_table(record: Mapping[str, Any]) -> None:
    """Print one line per method."""
    grid = Table(
        box=rich.box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
        title=f"against {record['start']}", title_justify="left",
    )  # fmt: skip
    grid.add_column("", no_wrap=True)
    for head in _HEADS:
        grid.add_column(head, justify="right", no_wrap=True)
    for algorithm, row in record["methods"].items():
        rate = next(iter(row["win_rate"].values()))
        grid.add_row(
            algorithm,
            _span(rate["win_rate"]),
            _span(rate["at_equal_length"]),
            "" if row["gold"] is None else f"{row['gold']['value']:.3f}",
            "" if row["kl"] is None else f"{row['kl']:.2f}",
            f"{row['reward']:.2f}",
            f"{row['length']:.0f}",
            f"{row['seconds']:.0f}",
            f"{row['peak_mib']:.0f}",
            str(row["models_held"]),
        )
    if record["methods"]:
        Console().print(grid)


def _span(estimate: Mapping[str, Any]) -> str:
    if estimate["value"] is None:
        return "-"
    if estimate["low"] is None:
        return f"{estimate['value']:.3f}"
    return f"{estimate['value']:.3f}\n{estimate['low']:.3f}-{estimate['high']:.3f}"
