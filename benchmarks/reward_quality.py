r"""Does a reward model learn more than words and length? UKP debates and BLiMP, unseen parts.

    python benchmarks/reward_quality.py prepare --data ../shared/data --out build/reward_quality
    python benchmarks/reward_quality.py run --prepared build/reward_quality --model build/smollm2 \
        --out benchmarks/results

``prepare`` (CPU) writes folds and floors; ``run`` (GPU) trains reward models by ``rlaif reward``
on a pretrained model (``gguf_model.py`` says where the one of the recorded figures comes from) and
scores what each fold holds out. Nothing of what it trains is shipped.

Four folds each, by debate (both stances together), by BLiMP paradigm, and by BLiMP phenomenon (its
paradigms together, so that no sibling of a held-out paradigm is seen). The floors see the same
folds: a Bradley-Terry model on hashed unigrams and bigrams, given its best regularisation in
hindsight, and "the longer one wins". Intervals resample debates, paradigms or phenomena.

Rate and epochs are chosen anew for each fold, among ``SETTINGS``, on a quarter of its training
debates, paradigms or phenomena: what a fold holds out has no part in the choice.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from result_file import gpu, write_result
from reward_data import FOLDS, TASKS, Fold, JudgedPair, prepare, split, write_preferences

SETTINGS: dict[str, list[dict[str, float]]] = {
    "ukp": [{"learning_rate": r, "epochs": e} for r in (2e-5, 6e-5) for e in (3.0, 6.0)],
    "blimp": [{"learning_rate": r, "epochs": 3.0} for r in (2e-5, 6e-5)],
}


def run(options: argparse.Namespace) -> None:
    """Train reward models, score the held-out folds, write the result."""
    started = time.perf_counter()
    shutil.rmtree(options.work, ignore_errors=True)
    figures: dict[str, float] = {}
    done: list[FoldResult] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        waiting = [pool.submit(run_fold, options, t, f) for t in TASKS for f in range(FOLDS)]
        for future in as_completed(waiting):
            done.append(future.result())
            print(json.dumps(done[-1].row), flush=True)
            # After every fold: a run that is cut short keeps what it has.
            figures["seconds"] = time.perf_counter() - started
            save(options, figures, done)
    print(json.dumps(figures, indent=1))


class FoldResult(NamedTuple):
    """One fold: its row for the record, and per held-out pair what was right, and its cluster."""

    row: dict[str, Any]
    scored: tuple[np.ndarray, ...]


def run_fold(options: argparse.Namespace, task: str, number: int) -> FoldResult:
    """Choose a setting within a fold's training part, train on all of it, score the rest."""
    begun = time.perf_counter()
    with gzip.open(options.prepared / f"{task}.json.gz", "rt", encoding="utf-8") as file:
        prepared = json.load(file)
    fold = split([JudgedPair(*pair) for pair in prepared["pairs"]], number)
    folder = options.work / f"{task}-{number}"
    settings = SETTINGS["ukp" if task == "ukp" else "blimp"]
    trial = split(fold.train, 0, seed=11)
    tried = [
        float(np.mean(train_and_score(options, folder / f"trial-{place}", task, trial, setting)))
        for place, setting in enumerate(settings)
    ]
    chosen = settings[int(np.argmax(tried))]
    right = train_and_score(options, folder / "chosen", task, fold, chosen)
    floors = prepared["floors"][number]
    row = {"task": task, "fold": number, "pairs": len(right), "accuracy": float(np.mean(right))}
    row |= {name: float(np.mean(values)) for name, values in floors.items()}
    row |= {"tried": tried, **chosen, "seconds": time.perf_counter() - begun}
    names = [pair.cluster for pair in fold.held]
    scored = map(np.array, (right, floors["bag_of_words"], floors["longer"], names))
    return FoldResult(row, tuple(scored))


def save(options: argparse.Namespace, figures: dict[str, float], done: list[FoldResult]) -> None:
    """Add the figures of the tasks whose folds are all done, and write the file."""
    for task in TASKS:
        scored = [result.scored for result in done if result.row["task"] == task]
        if len(scored) == FOLDS:
            figures |= summary(task, *map(np.concatenate, zip(*scored, strict=True)))
    write_result(
        options.out / "reward_quality.json",
        "reward_quality",
        hardware=gpu(),
        figures=figures,
        runs=sorted((x.row for x in done), key=lambda row: (row["task"], row["fold"])),
        settings=SETTINGS,
    )


def train_and_score(
    options: argparse.Namespace, folder: Path, task: str, fold: Fold, setting: dict[str, float]
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
        "model": options.model,
        "output": output,
        "average": "pair",
        "max_length": 512,
        "compile": "none",
        "workers": 0,  # a row of short texts is packed in a millisecond
        "weight_decay": 0.05,
        **setting,
    }
    if task == "ukp":
        # A debate's stance is one prompt: some thirty arguments, all of their pairs in one step.
        settings["batch_size"] = 2
    else:
        # All sentences share the empty prompt: groups of a row's size, one a step.
        settings |= {"batch_size": 1, "row_tokens": options.blimp_row_tokens}
    reward.run(RewardOptions(**settings))
    model = load_reward_model(output)
    prompts = [pair.prompt for pair in fold.held]
    first = model.score(prompts, [pair.a for pair in fold.held])
    second = model.score(prompts, [pair.b for pair in fold.held])
    shutil.rmtree(output)
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
    first = commands.add_parser("prepare", help="write folds and floors (CPU)")
    first.add_argument("--data", type=Path, default=Path("../shared/data"))
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--pairs", type=int, default=0, help="of each task; 0: all")
    second = commands.add_parser("run", help="train and score (GPU)")
    second.add_argument("--prepared", type=Path, required=True)
    second.add_argument("--model", required=True, help="folder or Hub name to start from")
    second.add_argument("--out", type=Path, required=True)
    second.add_argument("--work", type=Path, default=Path("/tmp/reward_quality"))
    second.add_argument("--jobs", type=int, default=3, help="folds at a time")
    second.add_argument("--blimp-row-tokens", type=int, default=8192)
    options = parser.parse_args()
    prepare(options) if options.command == "prepare" else run(options)


if __name__ == "__main__":
    main()
