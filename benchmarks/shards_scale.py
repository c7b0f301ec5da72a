"""A million verdict rows: write, resume, pair. Rows per second, and memory that must stay flat.

python benchmarks/shards_scale.py [ROWS]    (writes benchmarks/results/shards_scale.json)

Each phase runs in a process of its own, at a tenth of the rows and at all of them; the peak of
resident memory is the process's own. The rows are invented, but their questions, ids and fields are
those of a real run: 4 completions a prompt, 6 pairs, both orders. ``pair`` includes the gate, whose
report card is computed from a sample of whole prompts of at most 50,000 verdicts: its share of the
prompts is halved until that many are left. So its memory is bounded, but not constant: 49,680
verdicts stay of the smaller size, 31,032 of the larger one, which therefore needs less.
"""

from __future__ import annotations

import json
import math
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from result_file import RESULTS, cpu, write_result

from feedback import pairing_run
from feedback.backends import JudgeReply
from feedback.budget import Budget
from feedback.judge import Judge, Question
from feedback.labeling_run import LabelingRun
from feedback.pairing import PairOptions
from feedback.progress import ProgressBar
from feedback.questions import QuestionPlan, questions_of
from feedback.records import Candidates, Completion, JudgeIdentity, Usage, Verdict, encode
from feedback.shards import ShardWriter
from feedback.templates import load_rubric, load_template

QUESTIONS_PER_PROMPT = 12
WORDS = ("a", "table", "for", "four", "people", "at", "noon", "please", "book", "the", "flight")


def candidates(prompts: int) -> Iterator[Candidates]:
    """Yield invented candidates, always the same."""
    draw = random.Random(0)
    for number in range(prompts):
        completions = [
            Completion(
                completion_id=f"c{place}",
                completion=" ".join(draw.choices(WORDS, k=30)) + f" {number} {place}",
                model="policy",
            )
            for place in range(4)
        ]
        prompt = " ".join(draw.choices(WORDS, k=40))
        yield Candidates(prompt_id=f"prompt-{number}", prompt=prompt, completions=completions)


def judge() -> Judge:
    """Return the judge whose verdicts are invented."""
    template = load_template("pairwise")
    identity = JudgeIdentity(model="invented")
    return Judge(identity=identity, template=template, rubric=load_rubric(template.rubric))


def questions(prompts: int) -> Iterator[Question]:
    """Yield the questions of a run over all candidates."""
    plan = QuestionPlan(template=load_template("pairwise"))
    for row in candidates(prompts):
        yield from questions_of(row, plan)


def write(folder: Path, prompts: int) -> int:
    """Write every verdict, as a labelling run does."""
    draw = random.Random(1)
    asker = judge()
    usage = Usage(prompt_tokens=220, cached_tokens=120, completion_tokens=1)
    rows = 0
    with ShardWriter[Verdict](folder / "verdicts", "verdicts") as writer:
        for question in questions(prompts):
            first = 0.001 + 0.997 * draw.random()
            logprobs = {"A": math.log(0.98 * first), "B": math.log(0.98 * (1 - first))}
            reply = JudgeReply(
                call_id="", text="A", choice_logprobs=logprobs, usage=usage, latency_s=0.02
            )
            verdict = asker.read(asker.ask(question), reply)
            writer.append(verdict)
            rows += 1
        writer.finish({"stage": "judge", "orders": "both", "judge": {"model": "invented"}})
    return rows


class NoEngine:
    """A backend that must not be asked anything: all verdicts are on disk."""

    identity = JudgeIdentity(model="invented")

    def judge(self, calls: Any) -> Iterator[JudgeReply]:
        """Fail at the first call."""
        for call in calls:
            raise AssertionError(f"{call.call_id} was asked again")
        yield from ()


def resume(folder: Path, prompts: int) -> int:
    """Scan the folder and go through all questions, none of which is asked again."""
    engine: Any = NoEngine()
    run = LabelingRun(judge(), engine, folder=folder / "verdicts", budget=Budget())
    with ProgressBar("resuming", None) as bar:
        run.ask_all(questions(prompts), bar)
    done = run.totals.already_done
    run.writer.finish({"stage": "judge", "orders": "both", "judge": {"model": "invented"}})
    run.close()
    return done


def pair(folder: Path, prompts: int) -> int:
    """Turn the verdicts into preferences and rankings."""
    path = folder / "candidates.jsonl"
    with path.open("wb") as file:
        file.writelines(encode(row) + b"\n" for row in candidates(prompts))
    pairing_run.pair(
        PairOptions(
            verdicts=folder / "verdicts",
            candidates=path,
            out=folder,
            # Invented verdicts are coin flips, which the gate finds out.
            accept_bias=("position_bias", "stability"),
        )
    )
    return prompts * QUESTIONS_PER_PROMPT


PHASES = {"write": write, "resume": resume, "pair": pair}


def run_phase(name: str, folder: Path, prompts: int) -> None:
    """Run one phase in this process and print what it took."""
    started = time.perf_counter()
    rows = PHASES[name](folder, prompts)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"phase": name, "rows": rows, "seconds": seconds, "peak_mib": peak}))


def main(rows: int) -> None:
    """Run all phases at two sizes and write the results."""
    runs = []
    for size in (rows // 10, rows):
        prompts = size // QUESTIONS_PER_PROMPT
        folder = Path(tempfile.mkdtemp(prefix="shards-scale-"))
        for name in PHASES:
            command = [sys.executable, __file__, name, str(folder), str(prompts)]
            out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.append(json.loads(out.splitlines()[-1]))
            print(runs[-1], flush=True)
        shutil.rmtree(folder)
    figures: dict[str, float] = {"rows": runs[-1]["rows"]}
    for small, large in zip(runs[: len(PHASES)], runs[len(PHASES) :], strict=True):
        name = large["phase"]
        figures[f"{name}_rows_per_s"] = round(large["rows"] / large["seconds"])
        figures[f"{name}_peak_mib"] = round(large["peak_mib"], 1)
        figures[f"{name}_peak_growth_mib"] = round(large["peak_mib"] - small["peak_mib"], 1)
    write_result(
        RESULTS / "shards_scale.json",
        "shards_scale",
        command=f"python benchmarks/shards_scale.py {rows}",
        hardware=cpu(),
        figures=figures,
        runs=runs,
    )
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run_phase(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
