"""Judge templates against each other for real: constructed gold, and people's labels by path.

    python benchmarks/abtest_real.py --data ../shared/data [--pairs 300] [--model pocket:judge]

Three gold sets: the project's own booking pairs (recipes/abtest.toml), and a seeded slice each of
PandaLM's and UKPConvArg's human labels from ``human_pairs.jsonl.gz``, whose rows are ``source``,
``prompt``, ``a``, ``b``, ``label``. The same judge answers every arm. The embedded judge was
trained on narrow service dialogues and nothing else; on the other two it is expected to guess, and
the result says whether it does. Verdicts go to ``--work``; nothing of the data enters the project.
Writes benchmarks/results/abtest_real.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from result_file import RESULTS, cpu, write_result

from feedback.abtest import AbtestOptions, ArmOptions
from feedback.abtest_run import Result, abtest
from feedback.config import EngineOptions, build_options, recipe_table
from feedback.intervals import Estimate
from feedback.records import Candidates, Completion, GoldPair, content_id, encode, normalise_text
from feedback.shards import write_text

ROOT = Path(__file__).parent.parent
SOURCES = {"pandalm": "pandalm", "ukp": "ukpconvarg"}
TEMPLATES = ("pairwise", "pairwise-numbers", "pairwise-brief", "helpfulness")


def main() -> None:
    """Run all three and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with human_pairs.jsonl.gz")
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--model", default="pocket:judge")
    parser.add_argument("--backend", default="transformers")
    parser.add_argument("--work", type=Path, help="folder for verdicts; none: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    engine = EngineOptions(model=given.model, backend=given.backend)
    with tempfile.TemporaryDirectory() as temporary:
        work = given.work or Path(temporary)
        runs = [run("booking", booking(work, engine))]
        if given.data is not None:
            for name, source in SOURCES.items():
                rows = slice_of(given.data / "human_pairs.jsonl.gz", source, given.pairs)
                runs.append(run(name, options(name, rows, work, engine)))
    write_result(
        given.out / "abtest_real.json",
        "abtest_real",
        command=f"python benchmarks/abtest_real.py --data DIR --pairs {given.pairs} "
        f"--model {given.model}",
        hardware=cpu(),
        figures=figures_of(runs),
        runs=runs,
    )


def booking(work: Path, engine: EngineOptions) -> AbtestOptions:
    """Return the options of the default recipe, with the judge that was asked for."""
    path = ROOT / "recipes/abtest.toml"
    found = build_options(AbtestOptions, recipe_table(path, "abtest"), path=path)
    return dataclasses.replace(
        found,
        candidates=ROOT / found.candidates,
        gold=ROOT / found.gold,
        training=tuple(ROOT / source for source in found.training),
        out=work / "booking",
        arms=tuple(dataclasses.replace(arm, engine=engine) for arm in found.arms),
    )


def slice_of(path: Path, source: str, count: int) -> list[dict[str, Any]]:
    """Return ``count`` pairs of one source that have a winner and differ, by a hash of their id."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    kept = [
        row
        for row in rows
        if row["source"] == source
        and row["label"] != "tie"
        and row["a"].strip()
        and row["b"].strip()
        and normalise_text(row["a"]) != normalise_text(row["b"])
    ]
    return sorted(kept, key=lambda row: content_id("abtest_real", row["id"]))[:count]


def options(
    name: str, rows: list[dict[str, Any]], work: Path, engine: EngineOptions
) -> AbtestOptions:
    """Write a slice as candidates and gold, and return the test of it."""
    texts: dict[str, dict[str, Completion]] = {}
    gold = []
    for row in rows:
        ids = [content_id(row["prompt"], row[side], length=16) for side in "ab"]
        known = texts.setdefault(row["prompt"], {})
        for side, completion_id in zip("ab", ids, strict=True):
            known[completion_id] = Completion(
                completion_id=completion_id, completion=row[side], model="people"
            )
        gold.append(GoldPair(prompt_id=_id(row["prompt"]), a=ids[0], b=ids[1], label=row["label"]))
    candidates = [
        Candidates(prompt_id=_id(prompt), prompt=prompt, completions=list(known.values()))
        for prompt, known in texts.items()
    ]
    folder = work / name
    write_text(folder / "candidates.jsonl", "".join(_lines(candidates)))
    write_text(folder / "gold.jsonl", "".join(_lines(gold)))
    return AbtestOptions(
        candidates=folder / "candidates.jsonl",
        gold=folder / "gold.jsonl",
        out=folder / "out",
        arms=tuple(ArmOptions(template=template, engine=engine) for template in TEMPLATES),
        margin=0.05,
    )


def _id(prompt: str) -> str:
    return content_id("prompt", prompt, length=16)


def _lines(rows: list[Any]) -> Iterator[str]:
    return (encode(row).decode() + "\n" for row in rows)


def run(name: str, given: AbtestOptions) -> dict[str, Any]:
    """Run one test and return its row of the result file."""
    print(f"--- {name}", flush=True)
    started = time.monotonic()
    result = abtest(given)
    assert isinstance(result, Result)
    return {
        "gold": name,
        "pairs": len(result.items),
        "prompts": len({item.gold.prompt_id for item in result.items}),
        "margin": given.margin,
        "seconds": round(time.monotonic() - started, 1),
        "arms": [_rounded(figures.to_dict()) for figures in result.figures],
        "comparisons": [_rounded(found.to_dict()) for found in result.comparisons],
        "notes": result.notes,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return round(value, 4) if isinstance(value, float) else value


def figures_of(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Return accuracies and conclusions as one flat map."""
    figures: dict[str, float] = {}
    for row in runs:
        for arm in row["arms"]:
            accuracy = Estimate(**arm["accuracy"])
            name = f"{row['gold']}_{arm['name']}_accuracy"
            for ending, value in (("", accuracy.value), ("_low", accuracy.low),
                                  ("_high", accuracy.high)):  # fmt: skip
                if value is not None:
                    figures[name + ending] = value
        for conclusion in ("better", "worse", "equivalent", "undecided"):
            figures[f"{row['gold']}_{conclusion}"] = sum(
                found["conclusion"] == conclusion for found in row["comparisons"]
            )
    return figures


if __name__ == "__main__":
    main()
