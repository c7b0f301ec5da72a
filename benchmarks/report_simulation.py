"""Does the report card find what was planted, and do its intervals hold what they promise?

    python benchmarks/report_simulation.py [--replicates 2000] [--prompts 150] [--only SCENARIO ...]

Judges with planted biases are simulated again and again; each time the card's figures are computed
with their 95% intervals. The truth is the planted parameter itself where a figure estimates one,
else the figure's value in one very large run of the same judge. Writes
benchmarks/results/report_simulation.json: ``coverage`` is the share of all intervals that hold the
truth, ``recovered`` the share of planted parameters whose own intervals do so 93% to 97% of times.

A figure's coverage over R runs is itself uncertain by sqrt(0.95 * 0.05 / R): half a percent at
2,000 runs, and the lowest of some thirty figures then lies two such errors under its true value by
luck alone. ``--only`` runs some scenarios and puts their rows in the place of the old ones.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from result_file import RESULTS, cpu, write_result

from feedback.agreement import accuracy_halves, cohen_kappa, leave_one_out
from feedback.bias import length_section
from feedback.consistency import repeat_agreement
from feedback.installed import package_versions
from feedback.intervals import Estimate, Resampler, nothing, proportion
from feedback.observations import Pairs
from feedback.outcomes import outcome_section
from feedback.position import position_section
from feedback.selfpreference import self_preference_section
from feedback.simulation import Planted, simulate


class Scenario(NamedTuple):
    """A judge, the figures to look at, and the values that were planted as such."""

    planted: Planted
    figures: tuple[str, ...]
    known: dict[str, float]


TIES = "ties, noise, unreadable replies"
ARRAYS = f"{TIES}, drawn as arrays"
SCENARIOS = {
    "position, bare verdicts": Scenario(
        Planted(position=0.8),
        (
            "position_bias.logit_shift",
            "position_bias.order_consistency",
            "position_bias.first_slot_both",
            "position_bias.first_slot_of_rest",
            "position_bias.preference_fairness",
            "position_bias.first_slot_share",
            "agreement.accuracy",
            "agreement.kappa",
        ),
        {"position_bias.logit_shift": 0.8},
    ),
    "position, probabilities with noise": Scenario(
        Planted(position=-0.5, noise=0.7, soft=True),
        (
            "position_bias.logit_shift",
            "position_bias.order_consistency",
            "position_bias.probability_bonus",
            "position_bias.swing",
            "agreement.accuracy",
        ),
        {"position_bias.logit_shift": -0.5},
    ),
    "length": Scenario(
        Planted(length=1.0, sensitivity=0.0, lean=0.0),
        (
            "length_bias.effect",
            "length_bias.prefer_longer",
            "length_bias.excess",
            "length_bias.effect_given_gold",
        ),
        {"length_bias.effect": 1.0, "length_bias.effect_given_gold": 1.0},
    ),
    "length beside quality": Scenario(
        Planted(length=0.8, soft=True, votes=5),
        (
            "length_bias.prefer_longer",
            "length_bias.excess",
            "length_bias.accuracy_longer_is_worse",
            "agreement.judge_less_human",
            "agreement.human_ceiling",
        ),
        {},
    ),
    "self-preference": Scenario(
        Planted(own=0.9),
        (
            "self_preference.equal_opportunity",
            "self_preference.recall_own",
            "self_preference.recall_other",
            "self_preference.own_wins",
        ),
        {},
    ),
    "no self-preference": Scenario(
        Planted(),
        ("self_preference.equal_opportunity",),
        {"self_preference.equal_opportunity": 0.0},
    ),
    TIES: Scenario(
        Planted(tie=-0.6, unparsed=0.06, noise=1.0, repeats=2),
        (
            "outcomes.parse_rate",
            "outcomes.ties",
            "position_bias.order_consistency",
            "position_bias.order_consistency_decided",
            "stability.repeats",
            "agreement.accuracy",
        ),
        {"outcomes.parse_rate": 0.94},
    ),
}


def measure(pairs: Pairs, wanted: tuple[str, ...], replicates: int) -> dict[str, Estimate]:
    """Return the wanted figures of one simulated run."""
    resampler = Resampler(np.arange(len(pairs.prompt_ids)), replicates=replicates)
    sections = {
        "position_bias": lambda: position_section(pairs, resampler).figures,
        "length_bias": lambda: length_section(pairs, resampler).figures,
        "self_preference": lambda: self_preference_section(pairs, resampler).figures,
        "outcomes": lambda: outcome_section(pairs, resampler).figures,
    }
    found: dict[str, Estimate] = {}
    for name in {figure.split(".")[0] for figure in wanted} & set(sections):
        found |= {figure.name: figure.estimate for figure in sections[name]()}
    rest: dict[str, Callable[[], Estimate]] = {
        "agreement.accuracy": lambda: accuracy_halves(pairs, resampler),
        "agreement.kappa": lambda: cohen_kappa(pairs.verdict, pairs.gold, pairs.prompt, resampler),
        "stability.repeats": lambda: repeat_agreement(pairs),
    }
    for name in set(wanted) & set(rest):
        found[name] = rest[name]()
    if {"agreement.judge_less_human", "agreement.human_ceiling"} & set(wanted):
        people = leave_one_out(pairs, resampler)
        found["agreement.judge_less_human"] = people.difference if people else nothing()
        found["agreement.human_ceiling"] = people.human if people else nothing()
    return {name: found[name] for name in wanted}


def run_scenario(
    scenario: Scenario, *, replicates: int, prompts: int, truth_prompts: int, resamples: int = 1000
) -> list[dict[str, float | str]]:
    """Return, per figure: truth, mean estimate, and how often the interval held the truth."""
    large = simulate(scenario.planted, prompts=truth_prompts, seed=10**6).pairs()
    truth = {
        name: estimate.value
        for name, estimate in measure(large, scenario.figures, 2).items()
    } | scenario.known  # fmt: skip
    held: dict[str, list[bool]] = {name: [] for name in scenario.figures}
    values: dict[str, list[float]] = {name: [] for name in scenario.figures}
    for seed in range(replicates):
        pairs = simulate(scenario.planted, prompts=prompts, seed=seed).pairs()
        for name, estimate in measure(pairs, scenario.figures, resamples).items():
            target = truth[name]
            assert target is not None and estimate.value is not None
            values[name].append(estimate.value)
            held[name].append(
                estimate.low is not None
                and estimate.high is not None
                and estimate.low <= target <= estimate.high
            )
    return [
        {
            "figure": name,
            "planted": name in scenario.known,
            "truth": round(float(truth[name] or 0.0), 5),
            "mean_estimate": round(float(np.mean(values[name])), 5),
            "coverage": round(float(np.mean(held[name])), 4),
            "replicates": replicates,
        }
        for name in scenario.figures
    ]


def drawn_winners(planted: Planted, *, runs: int, prompts: int, seed: int) -> np.ndarray:
    """Draw what ``simulate`` draws, as arrays: the winners of three answers' pairs.

    Returns:
        (runs, prompts, 3 pairs x repeats, 2 orders): 1 a, -1 b, 0 tie, NaN unreadable.
    """
    random = np.random.default_rng(seed)
    quality = random.normal(size=(runs, prompts, 3)) * planted.sensitivity
    quality += random.normal(0, planted.lean, (runs, prompts, 3))
    pull = np.stack([quality[..., i] - quality[..., j] for i, j in ((0, 1), (0, 2), (1, 2))], -1)
    shape = (runs, prompts, 3, planted.repeats, 2)
    logit = pull[..., None, None] * np.array([1.0, -1.0]) + planted.position
    logit = logit + planted.noise * random.normal(size=shape)
    tie = 0.0 if planted.tie is None else np.exp(planted.tie)
    weights = np.stack([np.exp(logit / 2), np.exp(-logit / 2), np.full(shape, tie)], -1)
    edges = np.cumsum(weights / weights.sum(-1, keepdims=True), -1)
    place = (random.random(shape)[..., None] > edges).sum(-1)
    first = np.where(place == 0, 1.0, np.where(place == 1, -1.0, 0.0))
    winner = first * np.array([1.0, -1.0]) + 0.0
    winner[random.random(shape) < planted.unparsed] = np.nan
    return winner.reshape(runs, prompts, -1, 2)


def consistency_coverage(planted: Planted, *, runs: int, prompts: int) -> dict[str, float | str]:
    """Return the coverage of the order-consistency interval over many runs drawn as arrays."""

    def asked_twice(winner: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        known = np.isfinite(winner).all(-1)
        return winner[..., 0] == winner[..., 1], known

    same, known = asked_twice(drawn_winners(planted, runs=1, prompts=600_000, seed=10**6))
    truth = float(same[known].mean())
    held, values = [], []
    for start in range(0, runs, 500):
        count = min(500, runs - start)
        same, known = asked_twice(drawn_winners(planted, runs=count, prompts=prompts, seed=start))
        groups = np.broadcast_to(np.arange(prompts)[:, None], same.shape[1:])
        for hits, rows in zip(same, known, strict=True):
            estimate = proportion(hits[rows], groups[rows])
            assert estimate.value is not None
            assert estimate.low is not None and estimate.high is not None
            held.append(estimate.low <= truth <= estimate.high)
            values.append(estimate.value)
    return {
        "figure": "position_bias.order_consistency",
        "planted": False,
        "truth": round(truth, 5),
        "mean_estimate": round(float(np.mean(values)), 5),
        "coverage": round(float(np.mean(held)), 4),
        "replicates": runs,
    }


def main() -> None:
    """Run every scenario and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--replicates", type=int, default=2000)
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), metavar="SCENARIO")
    parser.add_argument("--prompts", type=int, default=150)
    parser.add_argument("--truth-prompts", type=int, default=40_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    path = given.out / "report_simulation.json"
    started = time.monotonic()
    kept = json.loads(path.read_text()) if given.only and path.is_file() else {"runs": []}
    found: dict[str, list[dict]] = {name: [] for name in SCENARIOS}
    arrays = [row for row in kept["runs"] if row["scenario"] == ARRAYS]
    for row in kept["runs"]:
        if row["scenario"] != ARRAYS:
            found[row["scenario"]].append(row)
    for name in given.only or SCENARIOS:
        rows = run_scenario(
            SCENARIOS[name],
            replicates=given.replicates,
            prompts=given.prompts,
            truth_prompts=given.truth_prompts,
        )
        found[name] = [{"scenario": name, **row} for row in rows]
        for row in rows:
            print(f"{name:36} {row['figure']:44} {row['coverage']:.4f}", flush=True)
    runs = [row for name in SCENARIOS for row in found[name]]
    runs += arrays
    if not given.only or TIES in given.only:
        row = consistency_coverage(
            SCENARIOS[TIES].planted, runs=10 * given.replicates, prompts=given.prompts
        )
        runs = [row for row in runs if row["scenario"] != ARRAYS]
        runs.append({"scenario": ARRAYS, **row})
        print(f"{ARRAYS:36} {row['figure']:44} {row['coverage']:.4f}", flush=True)
    seconds = round(time.monotonic() - started) + kept.get("seconds", 0) * bool(given.only)
    figures = summary(runs)
    print(json.dumps(figures, indent=2))
    write_result(
        path,
        "report_simulation",
        command=f"python benchmarks/report_simulation.py --replicates {given.replicates} "
        f"--prompts {given.prompts}",
        hardware=cpu(),
        seconds=seconds,
        versions=package_versions(("numpy", "scipy")),
        figures=figures,
        runs=runs,
    )


def summary(runs: list[dict]) -> dict[str, float]:
    """Return coverage and recovery over all runs as one flat map."""
    planted = [0.93 <= float(row["coverage"]) <= 0.97 for row in runs if row["planted"]]
    fewest = min(row["replicates"] for row in runs)
    # The row drawn as arrays repeats a figure with ten times the runs.
    covered = [float(row["coverage"]) for row in runs if row["scenario"] != ARRAYS]
    return {
        "coverage": round(float(np.mean(covered)), 4),
        "coverage_lowest_figure": min(covered),
        "coverage_highest_figure": max(covered),
        "recovered": round(float(np.mean(planted)), 4),
        "standard_error_per_figure": round((0.95 * 0.05 / fewest) ** 0.5, 4),
        "intervals": sum(row["replicates"] for row in runs),
    }


if __name__ == "__main__":
    main()
