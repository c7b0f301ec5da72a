"""The comparison's figures, read from its finished run.

    make compare                  or make compare-study, with three seeds and both experiments
    python benchmarks/compare.py [runs/compare] [--note TEXT]

Writes benchmarks/results/compare.json, or that of another ``--bench``. Seconds are those of the
machine that ran it; the note says what else there is to know of it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from result_file import RESULTS, cpu, write_result

ROOT = Path(__file__).parent.parent


def figures(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the comparison's figures as one flat map."""
    found: dict[str, float] = {}
    for algorithm, row in record["methods"].items():
        rate = next(iter(row["win_rate"].values()))
        found |= _estimate(f"win_rate_{algorithm}", rate["win_rate"])
        found |= _estimate(f"equal_length_{algorithm}", rate["at_equal_length"])
        found |= _estimate(f"gold_gain_{algorithm}", row["gold_gain"])
        for name in ("kl", "reward", "length_gain", "tokens", "seconds", "cpu_seconds", "peak_mib"):
            found[f"{name}_{algorithm}"] = row[name]
        for name, value in row["spread"].items():
            found[f"spread_{name}_{algorithm}"] = value
    memory = {name: row["peak_mib"] for name, row in record["methods"].items()}
    if {"rrhf", "ppo"} <= memory.keys():
        found["rrhf_memory_over_ppo"] = memory["rrhf"] / memory["ppo"]
    if "labels" in record:
        found |= _estimate("judge_less_gold_labels", record["labels"]["win_rate_difference"])
    for kind, rows in record.get("bias", {}).get("labels", {}).items():
        for algorithm, row in rows.items():
            for measure in ("length_change", "gold_change"):
                found |= _estimate(f"bias_{kind}_{measure}_{algorithm}", row[measure])
    return found


def _estimate(name: str, value: Mapping[str, Any]) -> dict[str, float]:
    ends = {f"{name}_{end}": value[end] for end in ("low", "high") if value[end] is not None}
    return {name: value["value"], **ends}


def main() -> None:
    """Read, write and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=ROOT / "runs" / "compare")
    parser.add_argument("--note", default="")
    parser.add_argument("--bench", default="compare", help="name of the result file")
    parser.add_argument("--made-by", default="", help="the command that made the run")
    given = parser.parse_args()
    record = json.loads((given.run / "comparison.json").read_text(encoding="utf-8"))
    target = "make compare-study" if "bias" in record else "make compare"
    command = f"{given.made_by or target} && python benchmarks/compare.py"
    found = figures(record)
    write_result(
        RESULTS / f"{given.bench}.json",
        given.bench,
        command=command + (f" --bench {given.bench}" if given.bench != "compare" else ""),
        hardware=f"{cpu()}; {given.note}" if given.note else cpu(),
        versions=record["versions"],
        figures=found,
        runs={name: value for name, value in record.items() if name != "versions"},
    )
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
