"""Does PPO beat its start? The comparison's settings, with vLLM rollouts where there is a GPU.

    make compare                         # leaves the reward model and the judge's labels
    python benchmarks/ppo_learning.py --reward runs/compare/data/reward-model

Trains the embedded policy by PPO with the settings of ``recipes/compare.toml`` and judges it on
requests that training never saw by the second judge, which labelled nothing. Writes
benchmarks/results/ppo_learning.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from result_file import RESULTS, gpu, write_result

from feedback.config import build_options, load_recipe
from train import evaluate, ppo
from train.evaluate import EvaluateOptions
from train.ppo_config import PpoOptions

ROOT = Path(__file__).parent.parent


def learn(given: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, float]:
    """Train; return the seconds of each phase and how far sampler and trainer differ at most."""
    table = recipe["ppo"] | {
        "prompts": [recipe["sample"]["prompts"]],
        "reward": {"kind": "model", "models": [str(given.reward)]},
        "output": str(given.folder / "policy"),
        "steps": given.steps,
        "sampler": given.sampler,
        "vllm_eager": True,
        "resume": False,
    }
    begun = time.perf_counter()
    ppo.run(build_options(PpoOptions, table))
    lines = (given.folder / "policy" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    phases = {
        name.replace("time/", "seconds_"): sum(row.get(name, 0.0) for row in rows)
        for name in rows[0]
        if name.startswith("time/")
    }
    gap = max(row["sampler/gap"] for row in rows)
    return {"train_seconds": time.perf_counter() - begun, "sampler_gap": gap, **phases}


def judge(given: argparse.Namespace, recipe: dict[str, Any]) -> dict[str, float]:
    """Evaluate the policy against its start; return the figures."""
    table = recipe["evaluate"] | {
        "policy": {"model": str(given.folder / "policy")},
        "out": str(given.folder / "evaluation"),
        "limit": given.limit,
    }
    evaluate.run(build_options(EvaluateOptions, table))
    found = json.loads((given.folder / "evaluation/evaluation.json").read_text(encoding="utf-8"))
    rate = next(iter(found["win_rate"].values()))
    figures = {"prompts": found["prompts"]}
    for name, value in (
        ("win_rate", rate["win_rate"]),
        ("gold_gain", found["gold"]["gain"]),
        ("kl_per_completion", found["kl"]["per_completion"]),
    ):
        figures |= {name: value["value"]}
        figures |= {f"{name}_{end}": value[end] for end in ("low", "high")}
    return figures


def main() -> None:
    """Train, judge, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reward", type=Path, default=ROOT / "runs/compare/data/reward-model")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "compare.toml")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "ppo-learning")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--sampler", default="vllm")
    parser.add_argument("--steps", type=int, default=22, help="as in the comparison")
    parser.add_argument("--limit", type=int, help="of the requests judged; None: all")
    given = parser.parse_args()
    recipe = load_recipe(given.recipe)
    figures = learn(given, recipe) | judge(given, recipe)
    path = given.out / "ppo_learning.json"
    write_result(path, "ppo_learning", hardware=gpu(), figures=figures, runs=[])
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
