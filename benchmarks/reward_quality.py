"""Does a reward model learn more than words and length? UKP debates and BLiMP, unseen parts.

    python benchmarks/reward_quality.py prepare --data ../shared/data --out .bench/reward_quality
    python benchmarks/reward_quality.py run --prepared .bench/reward_quality --out .bench/results

``prepare`` (CPU) writes training text, a tokenizer, folds and floors. ``run`` (GPU) trains a small
language model from scratch on the text by ``rlaif sft``, then reward models on it by ``rlaif
reward``, and scores the held-out folds. Nothing of what it trains is shipped.

Four folds each, by debate (both stances together), by BLiMP paradigm, and by BLiMP phenomenon (its
paradigms together, so that no sibling of a held-out paradigm is seen). The floors see the same
folds: a Bradley-Terry model on hashed unigrams and bigrams, given its best regularisation in
hindsight, and "the longer one wins". Intervals resample debates, paradigms or phenomena.

BLiMP's rate and epochs were the best of four, tried on a quarter of each fold's training paradigms
(50 or 51 of 67 train, and a quarter of those was held out for the choice).
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import platform
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from reward_data import FOLDS, TASKS, Fold, JudgedPair, prepare, split, write_preferences

from feedback.shards import package_versions, write_json

SETTINGS = {
    "ukp": {"learning_rate": 1e-4, "epochs": 8.0},
    "blimp": {"learning_rate": 2e-4, "epochs": 3.0},
}


def run(options: argparse.Namespace) -> None:
    """Train the language model and reward models, score the held-out folds, write the result."""
    started = time.perf_counter()
    shutil.rmtree(options.work, ignore_errors=True)
    figures = pretrain(options, options.work / "lm")
    figures["pretrain_seconds"] = time.perf_counter() - started
    print(json.dumps(figures), flush=True)
    done: list[FoldResult] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        waiting = [pool.submit(run_fold, options, t, f) for t in TASKS for f in range(FOLDS)]
        for future in as_completed(waiting):
            done.append(future.result())
            print(json.dumps(done[-1].row), flush=True)
            # After every fold: a run that is cut short keeps what it has.
            figures["seconds"] = time.perf_counter() - started
            write_result(options, figures, done)
    print(json.dumps(figures, indent=1))


class FoldResult(NamedTuple):
    """One fold: its row for the record, and per held-out pair what was right, and its cluster."""

    row: dict[str, Any]
    scored: tuple[np.ndarray, ...]


def run_fold(options: argparse.Namespace, task: str, number: int) -> FoldResult:
    """Train on one fold and score what it holds out."""
    begun = time.perf_counter()
    with gzip.open(options.prepared / f"{task}.json.gz", "rt", encoding="utf-8") as file:
        prepared = json.load(file)
    fold = split([JudgedPair(*pair) for pair in prepared["pairs"]], number)
    right = train_and_score(options, options.work / f"{task}-{number}", task, fold)
    floors = prepared["floors"][number]
    row = {"task": task, "fold": number, "pairs": len(right), "accuracy": float(np.mean(right))}
    row |= {name: float(np.mean(values)) for name, values in floors.items()}
    row["seconds"] = time.perf_counter() - begun
    names = [pair.cluster for pair in fold.held]
    scored = map(np.array, (right, floors["bag_of_words"], floors["longer"], names))
    return FoldResult(row, tuple(scored))


def write_result(
    options: argparse.Namespace, figures: dict[str, float], done: list[FoldResult]
) -> None:
    """Add the figures of the tasks whose folds are all done, and write the file."""
    import torch

    for task in TASKS:
        scored = [result.scored for result in done if result.row["task"] == task]
        if len(scored) == FOLDS:
            figures |= summary(task, *map(np.concatenate, zip(*scored, strict=True)))
    cuda = torch.cuda.is_available()
    result = {
        "bench": "reward_quality",
        "command": "python benchmarks/reward_quality.py run",
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name() if cuda else platform.processor(),
        "versions": package_versions(),
        "settings": {k: str(v) for k, v in vars(options).items() if k not in ("command",)},
        "figures": figures,
        "runs": sorted((x.row for x in done), key=lambda row: (row["task"], row["fold"])),
    }
    write_json(options.out / "reward_quality.json", result)


def pretrain(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Train a small Llama from scratch on the text."""
    from train import sft
    from train.config import ModelShape, SftOptions

    shape = ModelShape(
        layers=options.layers,
        width=options.width,
        heads=options.width // 64,
        kv_heads=options.width // 64,
        mlp=options.width * 8 // 3 // 64 * 64,
        max_positions=2048,
    )
    sft.run(
        SftOptions(
            data=(str(options.prepared / "text.jsonl.gz"),),
            model="scratch",
            tokenizer=str(options.prepared / "tokenizer"),
            shape=shape,
            output=folder,
            epochs=options.epochs,
            max_steps=options.steps,
            batch_size=0,
            row_tokens=options.row_tokens,
            max_length=512,
            learning_rate=options.learning_rate,
            warmup=0.05,
            min_learning_rate=0.1,
            weight_decay=0.1,
            adam_betas=(0.9, 0.95),
        )
    )
    found = json.loads((folder / "training.json").read_text(encoding="utf-8"))["figures"]
    kept = ("steps", "loss", "real_tokens_per_s", "mfu")
    return {f"lm_{name}": found[name] for name in kept if name in found}


def train_and_score(
    options: argparse.Namespace, folder: Path, task: str, fold: Fold
) -> list[float]:
    """Train on a fold and return which of its held-out pairs the model orders right."""
    from train import reward
    from train.config import RewardOptions
    from train.reward_model import load_reward_model

    folder.mkdir(parents=True)
    train, test = folder / "train.jsonl", folder / "test.jsonl"
    write_preferences(train, fold.train)
    write_preferences(test, fold.held)
    output = folder / "reward-model"
    settings: dict[str, Any] = {
        "data": (str(train),),
        "eval_data": (str(test),),
        "model": str(options.work / "lm"),
        "output": output,
        "average": "pair",
        "max_length": 512,
        "compile": "none",
        "members": options.members,
        "weight_decay": 0.05,
        **SETTINGS["ukp" if task == "ukp" else "blimp"],
    }
    if task == "ukp":
        # A debate's stance is one prompt: some thirty arguments, all of their pairs in one step.
        settings["batch_size"] = 4
    else:
        # All sentences share the empty prompt: groups of a row's size, one a step.
        settings |= {"batch_size": 1, "row_tokens": options.blimp_row_tokens}
    reward.run(RewardOptions(**settings))
    model = load_reward_model(output)
    prompts = [pair.prompt for pair in fold.held]
    first = model.score(prompts, [pair.a for pair in fold.held])
    second = model.score(prompts, [pair.b for pair in fold.held])
    d = (first - second).numpy() * np.array([1.0 if p.p > 0.5 else -1.0 for p in fold.held])
    return np.where(d == 0, 0.5, d > 0).tolist()


def summary(
    task: str, right: np.ndarray, floor: np.ndarray, longer: np.ndarray, clusters: np.ndarray
) -> dict[str, float]:
    """Return accuracy, floors and gains with intervals over resampled clusters."""
    names, member = np.unique(clusters, return_inverse=True)
    counts = np.bincount(member)
    sums = np.stack([np.bincount(member, values) for values in (right, floor, longer)])
    draws = np.random.default_rng(0).multinomial(
        len(names), np.full(len(names), 1 / len(names)), size=2000
    )
    means = (draws @ sums.T) / (draws @ counts)[:, None]
    gain = means[:, 0] - means[:, 1:].max(axis=1)
    best = max(float(floor.mean()), float(longer.mean()))
    return {
        f"{task}_pairs": len(right),
        f"{task}_accuracy": float(right.mean()),
        f"{task}_accuracy_low": float(np.quantile(means[:, 0], 0.025)),
        f"{task}_accuracy_high": float(np.quantile(means[:, 0], 0.975)),
        f"{task}_bag_of_words": float(floor.mean()),
        f"{task}_longer": float(longer.mean()),
        f"{task}_gain": float(right.mean()) - best,
        f"{task}_gain_low": float(np.quantile(gain, 0.025)),
        f"{task}_gain_high": float(np.quantile(gain, 0.975)),
    }


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("prepare", help="write text, tokenizer, folds and floors (CPU)")
    first.add_argument("--data", type=Path, default=Path("../shared/data"))
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--megabytes", type=float, default=250.0, help="of training text")
    first.add_argument("--vocabulary", type=int, default=16384)
    first.add_argument("--pairs", type=int, default=0, help="of each task; 0: all")
    second = commands.add_parser("run", help="train and score (GPU)")
    second.add_argument("--prepared", type=Path, required=True)
    second.add_argument("--out", type=Path, required=True)
    second.add_argument("--work", type=Path, default=Path("/tmp/reward_quality"))
    second.add_argument("--jobs", type=int, default=3, help="folds at a time")
    second.add_argument("--layers", type=int, default=8)
    second.add_argument("--width", type=int, default=512)
    second.add_argument("--epochs", type=float, default=3.0)
    second.add_argument("--steps", type=int, default=0, help="of pretraining at most; 0: epochs")
    second.add_argument("--row-tokens", type=int, default=65536)
    second.add_argument("--learning-rate", type=float, default=1.5e-3)
    second.add_argument("--members", type=int, default=2, help="of each ensemble")
    second.add_argument("--blimp-row-tokens", type=int, default=8192)
    options = parser.parse_args()
    prepare(options) if options.command == "prepare" else run(options)


if __name__ == "__main__":
    main()
