"""Best-of-n: sample n completions, keep the one that the reward model likes best.

No training; all of its cost is at sampling time. Its distance to the starting policy is known
without a model: ``KL = log n - (n - 1) / n`` (Stiennon et al., arXiv 2009.01325, appendix G; an
upper bound where completions repeat, Beirami et al., arXiv 2401.01879).
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from feedback.config import EngineOptions, build_options
from feedback.records import Candidates
from feedback.sampling import SampleOptions
from feedback.sampling import run as sample
from feedback.shards import ShardWriter, read_rows, shard_paths
from train.reward_model import load_reward_model

__all__ = ["best_of_n", "best_of_n_kl", "run_table"]


def best_of_n_kl(n: int) -> float:
    """Return KL(best-of-n || policy) in nats."""
    return math.log(n) - (n - 1) / n


def best_of_n(samples: Path, reward_model: str, out: Path, *, sizes: list[int]) -> None:
    """Write, for each n of ``sizes``, the best of every prompt's first n completions.

    Args:
        samples: candidates folder with at least ``max(sizes)`` completions per prompt.
        reward_model: folder.
        out: gets a candidates folder ``n-8`` for n = 8.
        sizes: each at least 1.
    """
    rows = list(read_rows(samples, Candidates))
    scorer = load_reward_model(reward_model)
    rewards = scorer.score(
        [row.prompt for row in rows for _ in row.completions],
        [entry.completion for row in rows for entry in row.completions],
        ended=[entry.finish_reason == "stop" for row in rows for entry in row.completions],
    ).tolist()
    by_row = iter(rewards)
    scored = [(row, [next(by_row) for _ in row.completions]) for row in rows]
    for size in sizes:
        folder = out / f"n-{size}"
        ShardWriter[Candidates](folder, "candidates").close()
        for path in shard_paths(folder, "candidates"):
            path.unlink()
        with ShardWriter[Candidates](folder, "candidates") as writer:
            for row, values in scored:
                first = values[:size]
                best = row.completions[first.index(max(first))]
                writer.append(dataclasses.replace(row, completions=[best]))
            writer.finish({"stage": "best-of-n", "n": size, "reward_model": reward_model})


def run_table(table: dict[str, Any]) -> None:
    """Sample and choose, as a job's table says."""
    out = Path(table["out"])
    sample(
        SampleOptions(
            prompts=Path(table["prompts"]),
            out=out / "samples",
            engine=build_options(EngineOptions, table["engine"]),
            completions=max(table["sizes"]),
            temperatures=(table["temperature"],),
            max_tokens=table["max_tokens"],
            repeats="keep",
            seed=table["seed"],
            limit=table["limit"],
            on_change="replace",
        )
    )
    best_of_n(out / "samples", table["reward_model"], out, sizes=table["sizes"])
