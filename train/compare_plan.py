"""Which trainings a comparison runs, so that each algorithm gets the same number of tokens.

A token counts once for every time that it is passed forward and backward through the policy. A
prompt that stands in a packed row once for all of its completions counts once. What an algorithm
costs besides (PPO's value model, samples and scores, best-of-n's samples) is in the seconds that
are shown beside it, not in the tokens; the reward model is trained once before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from feedback.config import build_options
from feedback.records import Ranking
from feedback.shards import read_rows, write_text
from train.compare_config import CompareOptions
from train.compare_jobs import Job
from train.config import DpoOptions, RrhfOptions, SftOptions, TrainOptions
from train.data import read_groups
from train.documents import read_documents
from train.evaluate import EvaluateOptions
from train.models import load_tokenizer
from train.packing import group_tokens
from train.ppo_config import PpoOptions

__all__ = [
    "Comparison",
    "Data",
    "Lengths",
    "evaluation_options",
    "measure",
    "start_engine",
    "training_job",
    "underscored",
    "write_best",
]

Table = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Data:
    """Folders that trainings read."""

    preferences: Path
    rankings: Path
    candidates: Path
    best: Path
    """JSONL of each prompt's best completion, for SFT."""
    reward_model: Path


class Lengths(NamedTuple):
    """How many tokens a pass over the data has."""

    sft: int
    dpo: int
    rrhf: int
    prompt: float
    """Mean tokens of a prompt."""
    completion: float
    """Mean tokens of a completion of the starting policy."""
    groups: Mapping[str, int]
    """Prompts by algorithm."""


def write_best(rankings: Path, target: Path) -> Path:
    """Write the best completion of every ranking as rows for SFT; ties go to the first."""
    lines = [
        json.dumps(
            {"prompt": row.prompt, "completion": row.completions[row.ranking[0][0]]},
            ensure_ascii=False,
        )
        for row in read_rows(rankings, Ranking)
        if row.ranking
    ]
    write_text(target, "\n".join(lines) + "\n")
    return target


def measure(data: Data, recipe: Mapping[str, Any], scratch: Path) -> Lengths:
    """Count the tokens of one pass of each algorithm over its data."""
    dpo = build_options(DpoOptions, _base(recipe.get("dpo", {}), data.preferences, scratch))
    tokenizer = load_tokenizer(dpo)
    pairs, _ = read_groups([str(data.preferences)], tokenizer, max_length=dpo.max_length)
    rrhf = build_options(RrhfOptions, _base(recipe.get("rrhf", {}), data.rankings, scratch))
    ranked, _ = read_groups([str(data.rankings)], tokenizer, max_length=rrhf.max_length)
    sft = build_options(SftOptions, _base(recipe.get("sft", {}), data.best, scratch))
    texts, _ = read_documents([str(data.best)], tokenizer, max_length=sft.max_length)
    prompts = [len(group.prompt_ids) for group in ranked]
    answers = [len(ids) for group in ranked for ids in group.completions]
    return Lengths(
        sft=sum(map(group_tokens, texts)),
        dpo=sum(map(group_tokens, pairs)),
        rrhf=sum(map(group_tokens, ranked)),
        prompt=sum(prompts) / len(prompts),
        completion=sum(answers) / len(answers),
        groups={"sft": len(texts), "dpo": len(pairs), "rrhf": len(ranked)},
    )


def _base(table: Mapping[str, Any], source: Path, output: Path) -> Table:
    # A job that is run again has other options, or other data: nothing of the old run is of use.
    return {**underscored(table), "resume": False, "data": [str(source)], "output": str(output)}


def training_job(
    algorithm: str,
    *,
    name: str,
    seed: int,
    data: Data,
    lengths: Lengths,
    tokens: int,
    recipe: Mapping[str, Any],
    options: CompareOptions,
    copies: int = 0,
    needs: tuple[str, ...] = (),
) -> Job:
    """Return the training of one algorithm on ``tokens`` tokens.

    Args:
        algorithm: sft, dpo, rrhf or ppo.
        name: of the job and of its folder.
        seed: of the training.
        data: what it reads.
        lengths: of that data.
        tokens: forward and backward.
        recipe: the algorithm's table is taken from it.
        options: of the comparison.
        copies: earlier copies of the policy to keep.
        needs: jobs to wait for.
    """
    output = options.folder / "policies" / name
    if algorithm == "ppo":
        table = _ppo_table(recipe.get("ppo", {}), data, output)
        settings: PpoOptions = build_options(PpoOptions, {**table, "steps": 1})
        per_step = (
            settings.ppo_epochs
            * settings.prompts_per_step
            * (lengths.prompt + settings.completions_per_prompt * lengths.completion)
        )
        steps = max(round(tokens / per_step), 1)
        table |= {"steps": steps, "seed": seed}
        if copies:
            table["copy_every"] = math.ceil(steps / (copies + 1))
        return Job(name, "ppo", table, needs, _meta(algorithm, seed, per_step, steps))
    source = {"sft": data.best, "dpo": data.preferences, "rrhf": data.rankings}[algorithm]
    kinds: dict[str, type[TrainOptions]] = {
        "sft": SftOptions,
        "dpo": DpoOptions,
        "rrhf": RrhfOptions,
    }
    table = _base(recipe.get(algorithm, {}), source, output)
    table.pop("eval_share", None)
    chosen = build_options(kinds[algorithm], table)
    whole = {"sft": lengths.sft, "dpo": lengths.dpo, "rrhf": lengths.rrhf}[algorithm]
    per_step = whole * min((chosen.batch_size or 1) / lengths.groups[algorithm], 1.0)
    steps = max(round(tokens / per_step), 1)
    table |= {"max_steps": steps, "epochs": 1000.0, "seed": seed}
    if copies:
        # transformers saves once more at the end.
        table |= {"save_every": math.ceil(steps / (copies + 1)), "keep_checkpoints": copies + 2}
    return Job(name, algorithm, table, needs, _meta(algorithm, seed, per_step, steps))


def _meta(algorithm: str, seed: int, per_step: float, steps: int) -> Table:
    return {"algorithm": algorithm, "seed": seed, "tokens": per_step * steps, "steps": steps}


def _ppo_table(table: Mapping[str, Any], data: Data, output: Path) -> Table:
    given = underscored(table)
    given.setdefault("prompts", [str(data.candidates)])
    given.setdefault("reward", {"kind": "model", "models": [str(data.reward_model)]})
    return {**given, "resume": False, "output": str(output)}


def underscored(table: Mapping[str, Any]) -> Table:
    """Return a recipe's table with its keys spelled as the options' fields are."""
    return {key.replace("-", "_"): value for key, value in table.items()}


def start_engine(recipe: Mapping[str, Any]) -> Table:
    """Return the engine of the starting policy: the recipe's, or DPO's model on the default one."""
    table = underscored(recipe.get("evaluate", {}))
    model = underscored(recipe.get("dpo", {})).get("model", "pocket:policy")
    return {"model": model, **table.get("start", {})}


def evaluation_options(recipe: Mapping[str, Any]) -> EvaluateOptions:
    """Return how policies are evaluated."""
    return build_options(EvaluateOptions, underscored(recipe.get("evaluate", {})))


@dataclass(frozen=True, slots=True)
class Comparison:
    """What the parts of one comparison share."""

    options: CompareOptions
    recipe: Mapping[str, Any]
    data: Data
    lengths: Lengths
    tokens: int

    def train(self, algorithm: str, name: str, seed: int, **changes: Any) -> Job:
        """Return the training of an algorithm on the comparison's data, or as ``changes`` say."""
        return training_job(
            algorithm,
            name=name,
            seed=seed,
            **{
                "data": self.data,
                "lengths": self.lengths,
                "tokens": self.tokens,
                "recipe": self.recipe,
                "options": self.options,
                **changes,
            },
        )

    def start(self) -> Job:
        """Return the sampling of the starting policy, done once for all evaluations."""
        chosen = evaluation_options(self.recipe)
        table = {
            "prompts": str(chosen.prompts),
            "out": str(self.options.folder / "evaluations" / "start"),
            "engine": start_engine(self.recipe),
            "completions": chosen.completions,
            "temperatures": [chosen.temperature],
            "top_p": chosen.top_p,
            "max_tokens": chosen.max_tokens,
            "repeats": "keep",
            "seed": chosen.seed + 1,
            "limit": chosen.limit,
            "on_change": "replace",
        }
        return Job("start", "sample", table)

    def evaluate(self, name: str, *, model: Path | None, needs: str, **changes: Any) -> Job:
        """Return the evaluation of a policy folder, or of completions that are there already."""
        start = start_engine(self.recipe)
        table = {
            **underscored(self.recipe.get("evaluate", {})),
            "start": start,
            "policy": {**start, "model": str(model) if model else start["model"]},
            "out": str(self.options.folder / "evaluations" / name),
            "start_samples": str(self.options.folder / "evaluations" / "start"),
            **changes,
        }
        return Job(
            f"evaluate-{name}",
            "train.compare_measure:evaluate_table",
            {"evaluate": table, "reward_model": str(self.data.reward_model)},
            (needs, "start"),
        )
