"""Policy against policy: sampled on the same prompts, judged in both orders by judges of their own.

Prints and writes, each with its interval: win rate by judge, the programmatic gold check before and
after, length, and the distance to the start (per-token KL, estimated on the new policy's own
samples). Judges here should have labelled nothing that the policy was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from feedback.backends.opening import open_backend
from feedback.config import EngineOptions, recipe_of
from feedback.goldcheck import gold_score
from feedback.intervals import Estimate, Resampler, average, mean, ratio
from feedback.labeling import JudgeOptions, Work, answer
from feedback.progress import say
from feedback.records import Candidates, prompt_messages
from feedback.sampling import SampleOptions
from feedback.sampling import run as sample
from feedback.shards import ShardWriter, read_rows, shard_paths, write_json, write_text
from feedback.unread import engine_on
from feedback.winrate import (
    NEW,
    OLD,
    Meeting,
    WinRate,
    meeting_questions,
    meetings,
    meetings_row,
    win_rate,
)
from train.evaluate import EvaluateOptions

__all__ = ["evaluate"]


def evaluate(options: EvaluateOptions) -> None:
    """Sample, judge and check both policies, and write ``evaluation.json`` and ``rows.jsonl``.

    Raises:
        InputError: prompts or templates are wrong.
        BackendError: a model cannot be loaded or cannot judge.
    """
    # Seeds apart: with the same draws two policies that differ little write the same text.
    sides = (
        ("new", options.policy, options.seed, options.policy_samples),
        ("start", options.start, options.seed + 1, options.start_samples),
    )
    for name, engine, seed, given in sides:
        if given is not None:
            continue
        sample(
            SampleOptions(
                prompts=options.prompts,
                out=options.out / f"samples-{name}",
                engine=engine,
                completions=options.completions,
                temperatures=(options.temperature,),
                top_p=options.top_p,
                max_tokens=options.max_tokens,
                repeats="keep",
                on_change="replace",
                seed=seed,
                limit=options.limit,
            )
        )
    _pair_up(options)
    rows = list(read_rows(options.out / "pairs", Candidates))
    results: dict[str, list[Meeting]] = {}
    for place, engine in enumerate(options.judges):
        results[_judge_name(options, place)] = _judge(options, engine, place, rows)
    rates = {name: win_rate(found, seed=options.seed) for name, found in results.items()}
    evaluation: dict[str, Any] = {
        "policy": options.policy.model,
        "start": options.start.model,
        "prompts": len(rows),
        "win_rate": {name: rate.to_dict() for name, rate in rates.items()},
        "length": _lengths(rows, options.seed),
        "gold": _gold(options, rows),
        "kl": _divergence(options, rows),
        "recipe": recipe_of(options),
    }
    _write_rows(options.out / "rows.jsonl", rows, results)
    write_json(options.out / "evaluation.json", evaluation)
    _say(options, evaluation, rates)


def _pair_up(options: EvaluateOptions) -> None:
    """Write one candidates row per prompt that both policies answered."""
    folder = options.out / "pairs"
    samples = {
        "start": options.start_samples or options.out / "samples-start",
        "new": options.policy_samples or options.out / "samples-new",
    }
    old = {row.prompt_id: row for row in read_rows(samples["start"], Candidates)}
    ShardWriter[Candidates](folder, "candidates").close()
    for path in shard_paths(folder, "candidates"):
        path.unlink()
    new = {row.prompt_id: row for row in read_rows(samples["new"], Candidates)}
    with ShardWriter[Candidates](folder, "candidates") as writer:
        # Sorted: the samplers finish in an order of their own, and what is judged must not vary.
        for prompt_id in sorted(new.keys() & old.keys()):
            writer.append(meetings_row(new[prompt_id], old[prompt_id]))
        writer.finish({"stage": "evaluate"})


def _judge_name(options: EvaluateOptions, place: int) -> str:
    name = options.judges[place].model
    others = [engine.model for engine in options.judges[:place]]
    return name if name not in others else f"{name} ({place + 1})"


def _judge(
    options: EvaluateOptions, engine: EngineOptions, place: int, rows: list[Candidates]
) -> list[Meeting]:
    verdicts = options.out / f"verdicts-{place + 1}"
    questions = sum(1 for _ in meeting_questions(rows))
    if questions:
        answer(
            JudgeOptions(
                candidates=options.out / "pairs",
                out=verdicts,
                engine=engine,
                template=options.template,
                rubric=options.rubric,
                pairs="cross",
                on_change="replace",
                min_mass=options.min_mass,
                seed=options.seed,
            ),
            lambda: meeting_questions(rows),
            Work(prompts=len(rows), questions=questions),
        )
    return list(meetings(rows, verdicts))


def _sides(rows: list[Candidates]) -> Iterator[tuple[int, bool, str, str | None]]:
    """Yield (prompt number, whether new, text, finish reason) of every completion."""
    for number, row in enumerate(rows):
        for entry in row.completions:
            new = entry.completion_id.startswith(NEW)
            yield number, new, entry.completion, entry.finish_reason


def _side_means(
    values: list[tuple[int, bool, float]], seed: int
) -> tuple[Estimate, Estimate, Estimate]:
    """Return the means of the start, of the new policy, and their difference, by prompt."""
    groups = np.array([number for number, _, _ in values], dtype=np.int64)
    new = np.array([side for _, side, _ in values], dtype=bool)
    scores = np.array([value for _, _, value in values], dtype=np.float64)
    resampler = Resampler(groups, seed=seed)
    columns = np.stack([scores * new, new, scores * ~new, ~new], axis=1)
    gain = resampler.estimate(
        groups, columns, lambda sums: sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3]
    )
    before = average(resampler, groups[~new], scores[~new])
    after = average(resampler, groups[new], scores[new])
    return before, after, gain


def _lengths(rows: list[Candidates], seed: int) -> dict[str, Any]:
    sides = list(_sides(rows))
    characters = [(number, new, float(len(text))) for number, new, text, _ in sides]
    ended = [(number, new, float(reason == "stop")) for number, new, _, reason in sides]
    length = _side_means(characters, seed)
    stops = _side_means(ended, seed)
    return {
        "characters_before": length[0].to_dict(),
        "characters_after": length[1].to_dict(),
        "ended_share_before": stops[0].to_dict(),
        "ended_share_after": stops[1].to_dict(),
    }


def _divergence(options: EvaluateOptions, rows: list[Candidates]) -> dict[str, Any] | None:
    """Estimate KL(new || start) on the new policy's samples, in nats, at temperature 1.

    The estimate is unbiased only for samples at temperature 1 and the whole distribution; otherwise
    it is the mean log-ratio on the samples that were drawn, which is recorded as such.
    """
    if not options.kl:
        return None
    for engine in (options.policy, options.start):
        if engine.backend not in ("transformers", "vllm"):
            return {"left_out": f"{engine.model} runs behind an endpoint"}
    samples = [
        (prompt_messages(row.prompt), entry.completion, entry.finish_reason == "stop")
        for row in rows
        for entry in row.completions
        if entry.completion_id.startswith(NEW)
    ]
    owners = [
        number
        for number, row in enumerate(rows)
        for entry in row.completions
        if entry.completion_id.startswith(NEW)
    ]
    scored = []
    for engine in (options.policy, options.start):
        backend: Any = open_backend(engine_on(engine, "transformers"))
        try:
            scored.append(list(backend.logps(samples)))
        finally:
            backend.close()
    gaps = np.array([new.logp - old.logp for new, old in zip(*scored, strict=True)])
    tokens = np.array([new.tokens for new in scored[0]], dtype=np.float64)
    groups = np.array(owners, dtype=np.int64)
    resampler = Resampler(groups, seed=options.seed)
    return {
        "per_token": ratio(resampler, groups, gaps, tokens).to_dict(),
        "per_completion": mean(resampler, groups, gaps).to_dict(),
        "tokens_per_completion": mean(resampler, groups, tokens).to_dict(),
        "unbiased": options.temperature == 1.0 and options.top_p == 1.0,
    }


def _gold(options: EvaluateOptions, rows: list[Candidates]) -> dict[str, Any] | None:
    """Check every completion against its prompt's known slots, where the prompts have them."""
    if options.gold == "off" or not rows or not all("given" in row.meta for row in rows):
        return None
    values: list[tuple[int, bool, float]] = []
    scores: list[dict[str, float]] = []
    for number, row in enumerate(rows):
        checked = {
            entry.completion_id: gold_score(
                row.meta, entry.completion, ended=entry.finish_reason == "stop"
            )
            for entry in row.completions
        }
        scores.append(checked)
        values += [(number, name.startswith(NEW), score) for name, score in checked.items()]
    before, after, gain = _side_means(values, options.seed)
    return {
        "before": before.to_dict(),
        "after": after.to_dict(),
        "gain": gain.to_dict(),
        "win_rate": _gold_win_rate(scores, options.seed).to_dict(),
    }


def _gold_win_rate(scores: list[dict[str, float]], seed: int) -> Estimate:
    """Return the share of meetings in which the new policy scores higher, level ones half."""
    groups, wins = [], []
    for number, checked in enumerate(scores):
        for place in range(len(checked)):
            new, old = checked.get(f"{NEW}-{place}"), checked.get(f"{OLD}-{place}")
            if new is not None and old is not None:
                groups.append(number)
                wins.append(1.0 if new > old else 0.0 if new < old else 0.5)
    array = np.array(groups, dtype=np.int64)
    return mean(Resampler(array, seed=seed), array, wins)


def _write_rows(path: Path, rows: list[Candidates], results: dict[str, list[Meeting]]) -> None:
    """Write each meeting with its texts, what each judge says of it, and whether in both orders."""
    prompts = {row.prompt_id: row for row in rows}
    lines = []
    for found in zip(*results.values(), strict=True):
        first = found[0]
        lines.append(
            json.dumps(
                {
                    "prompt_id": first.prompt_id,
                    "prompt": prompts[first.prompt_id].prompt,
                    "new": first.new.completion,
                    "start": first.old.completion,
                    "p_new": {name: entry.p for name, entry in zip(results, found, strict=True)},
                    "consistent": {
                        name: entry.consistent for name, entry in zip(results, found, strict=True)
                    },
                },
                ensure_ascii=False,
            )
        )
    write_text(path, "\n".join(lines) + "\n")


def _say(options: EvaluateOptions, evaluation: dict[str, Any], rates: dict[str, WinRate]) -> None:
    say(f"{options.policy.model} against {options.start.model}, {evaluation['prompts']} prompts")
    for name, rate in rates.items():
        say(
            f"  win rate by {name}: {rate.win_rate} ({rate.won} won, {rate.level} level, "
            f"{rate.lost} lost, {rate.undecided} undecided)"
        )
        say(f"    where both orders agree: {rate.consistent_win_rate}")
        say(f"    at equal length: {rate.at_equal_length}")
        say(f"    mean preference: {rate.preference}")
        say(f"    mean preference at equal length: {rate.preference_at_equal_length}")
    for title, part in (("gold check", "gold"), ("length", "length"), ("KL to the start", "kl")):
        for name, value in (evaluation[part] or {}).items():
            if isinstance(value, dict):
                say(f"  {title}, {name.replace('_', ' ')}: {Estimate(**value)}")
