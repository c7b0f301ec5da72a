"""False positives and power of the judge A/B test, by simulation.

    python benchmarks/abtest_simulation.py

False positives: two arms that are equally good, looked at after every 25 pairs up to 500, stopped
at the first look that calls one of them better or worse. Power: a true difference of 5 points at
the number of pairs that the plan names for 80%, with one look. Writes
benchmarks/results/abtest_simulation.json.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from result_file import RESULTS, cpu, write_result

from feedback.abtest_decisions import compare_arms
from feedback.intervals import binomial_interval
from feedback.paired import discordance, mcnemar, needed_items
from feedback.sequential import sign_e_process

Floats = npt.NDArray[np.float64]
RATE, DIFFERENCE, ALPHA = 0.2, 0.05, 0.05


def answers(rng: np.random.Generator, n: int, gain: float) -> Floats:
    """Return scores of two arms that differ on a share RATE of pairs, the second ahead by gain."""
    first = (rng.random(n) < 0.7).astype(float)
    second = first.copy()
    differ = rng.random(n) < RATE
    better = rng.random(n) < (RATE + gain) / (2 * RATE)
    first[differ], second[differ] = ~better[differ], better[differ]
    return np.stack([first, second], axis=1)


def peeked(rng: np.random.Generator, runs: int) -> tuple[int, int]:
    """Count null runs called different at some look: by the e-process, and by p-values."""
    by_e, by_p = 0, 0
    for _ in range(runs):
        scores = answers(rng, 500, 0.0)
        log_e = sign_e_process(scores[:, 1] - scores[:, 0])
        ends = np.arange(25, 501, 25)
        by_e += bool((log_e[ends - 1] >= np.log(1 / ALPHA)).any())
        by_p += any(mcnemar(discordance(scores[:end, 0], scores[:end, 1])) <= ALPHA for end in ends)
    return by_e, by_p


def main() -> None:
    """Simulate and write the figures."""
    rng = np.random.default_rng(0)
    runs = 2000
    by_e, by_p = peeked(rng, runs)
    need = needed_items(rate=RATE, difference=DIFFERENCE, alpha=ALPHA, power=0.8)
    found = 0
    for _ in range(1000):
        scores = answers(rng, need, DIFFERENCE)
        (row,) = compare_arms(
            ["a", "b"], scores, np.arange(need), margin=DIFFERENCE, alpha=ALPHA, replicates=50
        )
        found += row.conclusion == "better"
    figures = {
        "false_positive_rate": by_e / runs,
        "false_positive_rate_high": binomial_interval(by_e, runs)[1],
        "false_positive_rate_of_repeated_p_values": by_p / runs,
        "power": found / 1000,
        "planned_pairs": need,
        "looks": 20,
    }
    write_result(
        RESULTS / "abtest_simulation.json",
        "abtest_simulation",
        command="python benchmarks/abtest_simulation.py",
        hardware=cpu(),
        figures=figures,
        runs={"null_runs": runs, "power_runs": 1000, "rate": RATE, "difference": DIFFERENCE},
    )
    for name, value in figures.items():
        print(f"{name:45} {value:.4g}")


if __name__ == "__main__":
    main()
