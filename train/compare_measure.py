"""What a policy is worth: the evaluation job of a comparison, and reading its results back.

Every policy meets the starting policy on the same prompts, judged by judges that labelled nothing.
Trainings that differ only in their seed are pooled, and resampled by prompt; their spread is the
standard deviation between seeds.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from feedback.config import build_options
from feedback.goldcheck import gold_score
from feedback.intervals import Estimate, Resampler, mean
from feedback.records import Candidates, Completion
from feedback.shards import read_rows, write_json
from feedback.winrate import NEW, OLD, Meeting, WinRate, win_rate
from train.evaluate import EvaluateOptions
from train.evaluation import evaluate
from train.reward_model import load_reward_model

__all__ = ["Outcome", "difference", "evaluate_table", "read_outcome"]

REWARDS = "rewards.json"

Measure = Literal["win", "gold", "length"]


def evaluate_table(table: dict[str, Any]) -> None:
    """Evaluate a policy, and score its completions by the reward model; a job."""
    options: EvaluateOptions = build_options(EvaluateOptions, table["evaluate"])
    evaluate(options)
    rows = list(read_rows(options.out / "pairs", Candidates))
    entries = [(row, entry) for row in rows for entry in row.completions]
    rewards = load_reward_model(table["reward_model"]).score(
        [row.prompt for row, _ in entries],
        [entry.completion for _, entry in entries],
        ended=[entry.finish_reason == "stop" for _, entry in entries],
    )
    found: dict[str, list[float]] = {"new": [], "start": []}
    for (_, entry), reward in zip(entries, rewards.tolist(), strict=True):
        found["new" if entry.completion_id.startswith(NEW) else "start"].append(reward)
    write_json(options.out / REWARDS, found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One policy, or several that differ by their seed, against the starting policy."""

    win_rates: dict[str, WinRate]
    """By judge, seeds pooled."""
    gold: Estimate | None
    """Gold check of the policy; None where the prompts have none."""
    gold_gain: Estimate | None
    """Its difference to the starting policy."""
    kl: float | None
    """Mean KL to the start per completion, in nats."""
    reward: float
    """Mean score of the reward model."""
    length: float
    """Mean characters."""
    length_gain: float
    start: dict[str, float | None]
    """The starting policy's gold, reward and length."""
    spread: dict[str, float]
    """Standard deviation between seeds of win rate (first judge), gold, KL and length."""
    by_prompt: dict[Measure, dict[str, list[float]]]
    """Prompt id to one value per pair: wins by the first judge, the gold check of the policy, its
    characters."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "win_rate": {name: rate.to_dict() for name, rate in self.win_rates.items()},
            "gold": None if self.gold is None else self.gold.to_dict(),
            "gold_gain": None if self.gold_gain is None else self.gold_gain.to_dict(),
            "kl": self.kl,
            "reward": self.reward,
            "length": self.length,
            "length_gain": self.length_gain,
            "start": self.start,
            "spread": self.spread,
        }


def read_outcome(folders: Sequence[Path], *, kl: float | None = None) -> Outcome:
    """Return what the evaluations in ``folders`` (one per seed) say together.

    Args:
        folders: of evaluations.
        kl: known without an estimate (best-of-n); None: as the evaluations estimated it.
    """
    meetings: dict[str, list[Meeting]] = {}
    by_prompt: dict[Measure, dict[str, list[float]]] = {"win": {}, "gold": {}, "length": {}}
    golds: list[tuple[str, float, float]] = []
    start_golds: list[float] = []
    per_seed: dict[str, list[float]] = {"win_rate": [], "gold": [], "kl": [], "length": []}
    rewards: dict[str, list[float]] = {"new": [], "start": []}
    lengths: list[tuple[int, int]] = []
    for folder in folders:
        record = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        found = _meetings(folder)
        for name, rows in found.items():
            meetings.setdefault(name, []).extend(rows)
        first = next(iter(found.values()))
        for row in first:
            by_prompt["length"].setdefault(row.prompt_id, []).append(len(row.new.completion))
            if row.p is not None:
                by_prompt["win"].setdefault(row.prompt_id, []).append(_win(row.p))
        per_seed["win_rate"].append(win_rate(first).win_rate.value or 0.0)
        checked = _checked(folder)
        met = list(_paired(checked))
        golds += met
        for prompt_id, new, _ in met:
            by_prompt["gold"].setdefault(prompt_id, []).append(new)
        if met:
            per_seed["gold"].append(statistics.fmean(new for _, new, _ in met))
        for _, scores in checked:
            start_golds += [value for name, value in scores.items() if name.startswith(OLD)]
        if record["kl"] and "per_completion" in record["kl"]:
            per_seed["kl"].append(record["kl"]["per_completion"]["value"])
        sizes = [(len(row.new.completion), len(row.old.completion)) for row in first]
        lengths += sizes
        per_seed["length"].append(statistics.fmean(new for new, _ in sizes))
        scored = json.loads((folder / REWARDS).read_text(encoding="utf-8"))
        for side, values in rewards.items():
            values += scored[side]
    return Outcome(
        win_rates={name: win_rate(rows) for name, rows in meetings.items()},
        gold=_by_prompt([(name, new) for name, new, _ in golds]),
        gold_gain=_by_prompt([(name, new - old) for name, new, old in golds]),
        kl=kl if kl is not None else _average(per_seed["kl"]),
        reward=statistics.fmean(rewards["new"]),
        length=statistics.fmean(new for new, _ in lengths),
        length_gain=statistics.fmean(new - old for new, old in lengths),
        start={
            "gold": _average(start_golds),
            "reward": statistics.fmean(rewards["start"]),
            "length": statistics.fmean(old for _, old in lengths),
        },
        spread={
            name: statistics.stdev(values) for name, values in per_seed.items() if len(values) > 1
        },
        by_prompt=by_prompt,
    )


def _win(p: float) -> float:
    return 1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0


def _average(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _meetings(folder: Path) -> dict[str, list[Meeting]]:
    """Return the judged meetings of one evaluation, by judge."""
    found: dict[str, list[Meeting]] = {}
    for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        new, old = (
            Completion(completion_id=side, completion=row[side], model=side)
            for side in ("new", "start")
        )
        agree = row.get("consistent", {})  # evaluations of older versions do not have it
        for judge, p in row["p_new"].items():
            meeting = Meeting(row["prompt_id"], new, old, p, agree.get(judge))
            found.setdefault(judge, []).append(meeting)
    return found


def _checked(folder: Path) -> list[tuple[str, dict[str, float]]]:
    """Return each prompt's gold scores by completion id; none where slots are not known."""
    found = []
    for row in read_rows(folder / "pairs", Candidates):
        if "given" not in row.meta:
            return []
        scores = {
            entry.completion_id: gold_score(
                row.meta, entry.completion, ended=entry.finish_reason == "stop"
            )
            for entry in row.completions
        }
        found.append((row.prompt_id, scores))
    return found


def _paired(
    checked: Sequence[tuple[str, Mapping[str, float]]],
) -> Iterator[tuple[str, float, float]]:
    """Yield (prompt id, new, start) of every meeting; best of n has one completion, not several."""
    for prompt_id, scores in checked:
        for place in range(len(scores)):
            new, old = f"{NEW}-{place}", f"{OLD}-{place}"
            if new in scores and old in scores:
                yield prompt_id, scores[new], scores[old]


def _by_prompt(values: Sequence[tuple[str, float]]) -> Estimate | None:
    if not values:
        return None
    groups = _numbered([name for name, _ in values])
    return mean(Resampler(groups), groups, [value for _, value in values])


def _numbered(names: Sequence[str]) -> Any:
    numbers = {name: place for place, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], dtype=np.int64)


def difference(first: Outcome, second: Outcome, measure: Measure = "win") -> Estimate:
    """Return the first's mean less the second's, paired by prompt."""
    mine, theirs = first.by_prompt[measure], second.by_prompt[measure]
    names = [name for name in mine if name in theirs]
    groups = _numbered(names)
    gaps = [statistics.fmean(mine[name]) - statistics.fmean(theirs[name]) for name in names]
    return mean(Resampler(groups), groups, gaps)
