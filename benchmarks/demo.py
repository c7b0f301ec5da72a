"""The demo's figures, read from its finished run.

    python benchmarks/demo.py [runs/pocket] [--write]

Writes benchmarks/results/demo.json; with --write also the README's block of what comes out. The
minutes are the sum of the stages' wall times on the machine that ran ``make demo``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from result_file import RESULTS, cpu, write_result

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- demo: begin -->", "<!-- demo: end -->"


def stage_seconds(run: Path) -> dict[str, float]:
    """Return each stage's wall time in seconds, as the pipeline recorded it."""
    records = [json.loads(path.read_text()) for path in (run / "stages").glob("*.json")]
    return {record["stage"]: record["seconds"] for record in records if "seconds" in record}


def figures(evaluation: dict[str, Any]) -> dict[str, float]:
    """Return the figures that the README and later comparisons read."""
    judged = next(iter(evaluation["win_rate"].values()))["win_rate"]
    gold = evaluation["gold"]
    return {
        "second_judge_win_rate": judged["value"],
        "second_judge_win_rate_low": judged["low"],
        "gold_win_rate": gold["win_rate"]["value"],
        "gold_win_rate_low": gold["win_rate"]["low"],
        "gold_before": gold["before"]["value"],
        "gold_after": gold["after"]["value"],
        "gold_gain_low": gold["gain"]["low"],
        "kl_per_completion": evaluation["kl"]["per_completion"]["value"],
    }


def block(evaluation: dict[str, Any]) -> str:
    """Return the table of one evaluation as Markdown."""

    def cell(estimate: dict[str, Any]) -> str:
        if estimate["low"] is None:
            return f"{estimate['value']:.3f} | {estimate['n']:,}"
        return (
            f"{estimate['value']:.3f} ({estimate['low']:.3f} to {estimate['high']:.3f}) "
            f"| {estimate['n']:,}"
        )

    judge, judged = next(iter(evaluation["win_rate"].items()))
    gold, length = evaluation["gold"], evaluation["length"]
    rows = [
        (f"win rate over the start, by `{judge}`", judged["win_rate"]),
        ("the same, length held equal", judged["at_equal_length"]),
        ("win rate over the start, by the programmatic check", gold["win_rate"]),
        ("programmatic check, before", gold["before"]),
        ("programmatic check, after", gold["after"]),
        ("characters of a reply, before", length["characters_before"]),
        ("characters of a reply, after", length["characters_after"]),
        ("KL to the start, nats per reply", evaluation["kl"]["per_completion"]),
    ]
    lines = ["| on held-out requests | value (95% interval) | n |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {cell(estimate)} |" for name, estimate in rows)])


def main() -> None:
    """Collect and write the figures."""
    words = [word for word in sys.argv[1:] if not word.startswith("--")]
    run = Path(words[0]) if words else ROOT / "runs" / "pocket"
    evaluation = json.loads((run / "evaluation" / "evaluation.json").read_text(encoding="utf-8"))
    seconds = stage_seconds(run)
    found = {"minutes": round(sum(seconds.values()) / 60, 2), **figures(evaluation)}
    write_result(
        RESULTS / "demo.json",
        "demo",
        command="make demo && python benchmarks/demo.py",
        hardware=cpu(),
        figures=found,
        runs={"seconds": seconds, "evaluation": evaluation},
    )
    print(json.dumps(found, indent=2))
    if "--write" in sys.argv[1:]:
        path = ROOT / "README.md"
        before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
        text = f"{before}{BEGIN}\n{block(evaluation)}\n{END}{rest.partition(END)[2]}"
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
