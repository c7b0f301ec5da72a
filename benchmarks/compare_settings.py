"""Settings of the comparison's algorithms, tried on requests that nothing else uses.

    make compare                                         (its data is used)
    python -m benchmarks.compare_settings SETTINGS.toml [--folder runs/compare]

SETTINGS.toml holds one table per trial: ``[name]`` with ``algorithm``, ``tokens``, ``seed``, and
whatever of that algorithm's table in recipes/compare.toml it changes. Every trial is trained like a
training of the comparison and meets the starting policy on 300 requests from the generator of the
prompt sets: neither in ``booking-train`` nor in ``booking-eval``, so that the settings that are
chosen here owe nothing to the requests on which the comparison is reported. Results:
FOLDER-settings/trials.jsonl. What was tried for recipes/compare.toml stands in
benchmarks/results/compare_settings.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tomllib
from pathlib import Path
from typing import Any

from feedback.config import load_recipe
from feedback.progress import say
from recipes.pocket_model.prompts import banned_openings, draw_prompts, write_prompts
from train.compare import prepare
from train.compare_config import CompareOptions
from train.compare_jobs import Job, run_jobs
from train.compare_measure import read_outcome
from train.compare_plan import Comparison

ROOT = Path(__file__).parent.parent
SEED, PROMPTS, COMPLETIONS = 2026, 300, 2


def trial_prompts(path: Path) -> Path:
    """Write the requests that settings are tried on."""
    seen = set(banned_openings())
    rows = draw_prompts(random.Random(SEED), PROMPTS, held_out=False, seen=seen)
    write_prompts(path, rows)
    return path


def trial(shared: Comparison, name: str, changes: dict[str, Any]) -> list[Job]:
    """Return the training and the evaluation of one trial."""
    algorithm, seed = changes.pop("algorithm"), changes.pop("seed", 0)
    tokens = changes.pop("tokens", shared.tokens)
    recipe = {**shared.recipe, algorithm: {**shared.recipe[algorithm], **changes}}
    training = shared.train(algorithm, name, seed, recipe=recipe, tokens=tokens)
    model = shared.options.folder / "policies" / name
    return [training, shared.evaluate(name, model=model, needs=name, seed=seed)]


def main() -> None:
    """Run the trials that are not done yet, and print and append what each came to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "compare")
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "compare.toml")
    parser.add_argument("--jobs", type=int, default=1)
    given = parser.parse_args()
    folder = given.folder.with_name(given.folder.name + "-settings")
    recipe = load_recipe(given.recipe)
    prompts = trial_prompts(folder / "prompts.jsonl")
    recipe["evaluate"] |= {"prompts": str(prompts), "completions": COMPLETIONS}
    options = CompareOptions(folder=folder, recipe=str(given.recipe))
    shared = prepare(options, recipe, data=given.folder / "data")
    trials = tomllib.loads(given.settings.read_text(encoding="utf-8"))
    jobs = [shared.start()]
    for name, changes in trials.items():
        jobs += trial(shared, name, dict(changes))
    results = run_jobs(jobs, folder, parallel=given.jobs, say=say)
    for name, changes in trials.items():
        outcome = read_outcome([folder / "evaluations" / name])
        rate = next(iter(outcome.win_rates.values()))
        say(
            f"{name}: win rate {rate.win_rate}, at equal length {rate.at_equal_length}, "
            f"gold gain {outcome.gold_gain}, KL {outcome.kl:.2f}, reward {outcome.reward:.2f}, "
            f"length {outcome.length_gain:+.1f}, {results[name].seconds:.0f} s"
        )
        record = {"name": name, **changes, "seconds": results[name].seconds, **outcome.to_dict()}
        with (folder / "trials.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
