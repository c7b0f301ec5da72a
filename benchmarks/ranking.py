"""How well each way of choosing pairs ranks, by simulation.

    python benchmarks/ranking.py [--prompts 200]

A noisy judge compares 16 completions whose strengths are normal with the given spread (log-odds);
after so many pairs the fitted strengths are compared with the true ones by Kendall's tau. Written
to benchmarks/results/ranking.json, with the pairs that active choice needs to reach the tau that
random choice reaches with 56.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import numpy as np
from result_file import RESULTS, cpu, write_result

from feedback.bradley_terry import Duel, fit_bradley_terry
from feedback.cycles import kendall_tau
from feedback.pair_schedule import Method, SchedulePlan, next_pairs

COUNT = 16
SPREAD = 3.0
BUDGETS = (16, 24, 32, 40, 48, 56, 80, 120)
YARDSTICK = 56


def taus(method: Method, budget: int, prompts: int) -> list[float]:
    """Return Kendall's tau of each simulated prompt."""
    found = []
    plan = SchedulePlan(method=method, budget=budget, prior_sd=SPREAD)
    for prompt in range(prompts):
        random = np.random.default_rng(prompt)
        strengths = random.normal(scale=SPREAD, size=COUNT)
        answers: dict[tuple[int, int], float | None] = {}
        while pairs := next_pairs(COUNT, answers, plan, salt=str(prompt)):
            for i, j in pairs:
                chance = 1 / (1 + math.exp(strengths[j] - strengths[i]))
                answers[i, j] = float(random.random() < chance)
        duels = [Duel(i, j, p, 1 - p) for (i, j), p in answers.items() if p is not None]
        fit = fit_bradley_terry(COUNT, duels, prior_sd=SPREAD)
        found.append(kendall_tau(fit.values.tolist(), strengths.tolist()))
    return found


def main() -> None:
    """Simulate, print the table, and write the results file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=200)
    prompts = parser.parse_args().prompts
    runs: list[dict[str, Any]] = []
    for method in ("random", "sort", "swiss", "active"):
        for budget in BUDGETS:
            values = taus(method, budget, prompts)
            half = 1.96 * float(np.std(values, ddof=1)) / math.sqrt(prompts)
            runs.append(
                {
                    "method": method,
                    "budget": budget,
                    "tau": round(float(np.mean(values)), 4),
                    "half_interval": round(half, 4),
                }
            )
            print(runs[-1], flush=True)
    tau = {(row["method"], row["budget"]): row["tau"] for row in runs}
    target = tau["random", YARDSTICK]
    needed = next(budget for budget in BUDGETS if tau["active", budget] >= target)
    figures = {
        "tau_random_56": target,
        "tau_active_56": tau["active", YARDSTICK],
        "pairs_active_for_random_56": needed,
        "completions": COUNT,
        "prompts": prompts,
    }
    print(figures)
    write_result(
        RESULTS / "ranking.json",
        "ranking",
        command=f"python benchmarks/ranking.py --prompts {prompts}",
        hardware=cpu(),
        figures=figures,
        runs=runs,
    )


if __name__ == "__main__":
    main()
