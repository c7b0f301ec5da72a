"""The demo again on requests that nobody has looked at: does its gain hold?

    python benchmarks/demo_fresh.py --seeds 1 2 3

The settings of ``recipes/pocket.toml`` were chosen on the evaluation requests that ``make demo``
reports. Here each seed draws training and evaluation requests of its own, none of which is in the
shipped sets, and the same recipe runs on them with that seed for sampling and training. Writes
benchmarks/results/demo_fresh.json.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from demo import figures, stage_seconds
from result_file import RESULTS, cpu, write_result

from feedback.shards import write_text
from recipes.pocket_model.prompts import banned_openings, draw_prompts, write_prompts

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "pocket.toml"


def recipe(folder: Path, seed: int) -> str:
    """Return the demo's recipe with the folder's prompts and another seed."""
    text = RECIPE.read_text(encoding="utf-8")
    known = tomllib.loads(text)
    changes = {
        f'folder = "{known["run"]["folder"]}"': f'folder = "{folder / "run"}"',
        f'prompts = "{known["sample"]["prompts"]}"': f'prompts = "{folder / "train.jsonl"}"',
        f'prompts = "{known["evaluate"]["prompts"]}"': f'prompts = "{folder / "eval.jsonl"}"',
        f"seed = {known['sample']['seed']}\n": f"seed = {seed}\n",
        "[dpo]\n": f"[dpo]\nseed = {seed}\n",
        "[evaluate]\n": f"[evaluate]\nseed = {seed}\n",
    }
    for old, new in changes.items():
        assert text.count(old) == 1, f"{RECIPE}: {old!r} does not stand there once"
        text = text.replace(old, new)
    return text


def run_seed(folder: Path, seed: int) -> dict[str, Any]:
    """Run the whole chain with one seed and return its figures."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, seen = random.Random(10_000 + seed), set(banned_openings())
    write_prompts(folder / "train.jsonl", draw_prompts(rng, 480, held_out=False, seen=seen))
    write_prompts(folder / "eval.jsonl", draw_prompts(rng, 200, held_out=True, seen=seen))
    write_text(folder / "recipe.toml", recipe(folder, seed))
    command = [sys.executable, "-m", "train.cli", "run", "--recipe", str(folder / "recipe.toml")]
    subprocess.run(command, check=True, cwd=ROOT)
    evaluation = json.loads((folder / "run/evaluation/evaluation.json").read_text(encoding="utf-8"))
    return {"seed": seed, **figures(evaluation), "seconds": stage_seconds(folder / "run")}


def main() -> None:
    """Run every seed and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "demo-fresh")
    options = parser.parse_args()
    runs = [run_seed(options.folder.resolve() / f"seed-{seed}", seed) for seed in options.seeds]
    names = [name for name in runs[0] if name not in ("seed", "seconds")]
    found = {
        **{f"mean_{name}": statistics.fmean(run[name] for run in runs) for name in names},
        **{f"least_{name}": min(run[name] for run in runs) for name in names},
        "seeds": len(runs),
    }
    write_result(
        RESULTS / "demo_fresh.json",
        "demo_fresh",
        command=f"python benchmarks/demo_fresh.py --seeds {' '.join(map(str, options.seeds))}",
        hardware=cpu(),
        figures=found,
        runs=runs,
    )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
