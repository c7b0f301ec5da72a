"""SFT, best-of-n, DPO, RRHF and PPO on one judge's labels, at equal tokens, scored by others.

    rlaif compare --recipe recipes/compare.toml

The data is made once (sample, judge, pair, reward model); then every algorithm is trained once per
seed on the same number of tokens, and every policy meets the starting one on prompts that nothing
was trained on, before judges and a programmatic check that labelled nothing. Two experiments can be
added: the judge's labels against gold labels on the same pairs, and a planted length bias.

Writes ``comparison.json`` and ``comparison.html``; everything that is finished is kept, so a
stopped comparison continues.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from feedback.config import build_options, load_recipe
from feedback.errors import RecipeError
from feedback.gate import GateThresholds, judge_card
from feedback.pairing import PairOptions
from feedback.pairing import run as pair
from feedback.progress import say
from feedback.records import content_id
from feedback.report_run import card_of_folder
from feedback.shards import file_sha256, manifest_sha256, write_json, write_text
from train.compare_config import CompareOptions
from train.compare_jobs import Job, run_jobs
from train.compare_labels import bias_verdicts, gold_preferences
from train.compare_page import render_comparison
from train.compare_plan import (
    Comparison,
    Data,
    evaluation_options,
    measure,
    start_engine,
    underscored,
    write_best,
)
from train.compare_summary import GATE, KINDS, judges_that_labelled, print_table, summarise
from train.config import DpoOptions
from train.models import resolve_device
from train.pipeline import PipelineOptions
from train.pipeline import run as run_pipeline

__all__ = ["prepare", "run"]


def run(options: CompareOptions) -> None:
    """Make the data, train, evaluate, and write the table and the page.

    Raises:
        RecipeError: the recipe lacks a table, or a table is wrong.
        RlaifError: a training or an evaluation failed; the message names its log.
    """
    # Asking CUDA itself whether there is a GPU would leave the jobs, which are forked, without it.
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    if not options.recipe:
        raise RecipeError("compare needs --recipe: its tables say how each algorithm is run")
    recipe = load_recipe(options.recipe)
    run_pipeline(
        PipelineOptions(
            folder=options.folder / "data",
            stages=("sample", "judge", "pair", "reward"),
            recipe=options.recipe,
        )
    )
    shared = prepare(options, recipe, data=options.folder / "data")
    for name in judges_that_labelled(shared):
        say(
            f"warning: {name} labelled the training data and scores the policies too: its win rate "
            "is of what was trained for; name another judge in [[evaluate.judges]]"
        )
    jobs = _jobs(shared)
    say(f"{len(jobs)} trainings and evaluations, {shared.tokens:,} tokens per training")
    results = run_jobs(
        jobs, options.folder, parallel=_parallel(options), say=say, data=_fingerprint(shared.data)
    )
    record = summarise(shared, jobs, results)
    write_json(options.folder / "comparison.json", record)
    write_text(options.folder / "comparison.html", render_comparison(record))
    print_table(record)
    say(f"page: {options.folder / 'comparison.html'}")


def prepare(options: CompareOptions, recipe: Mapping[str, Any], *, data: Path) -> Comparison:
    """Return what the trainings share, from the folder in which the data was made."""
    made = Data(
        preferences=data / "preferences",
        rankings=data / "rankings",
        candidates=data / "candidates",
        best=write_best(data / "rankings", data / "best.jsonl"),
        reward_model=data / "reward-model",
    )
    lengths = measure(made, recipe, options.folder)
    dpo = build_options(
        DpoOptions,
        {**underscored(recipe.get("dpo", {})), "data": [], "output": str(options.folder)},
    )
    tokens = options.tokens or round(lengths.dpo * dpo.epochs)
    return Comparison(options, recipe, made, lengths, tokens)


def _fingerprint(data: Data) -> str:
    """Return what names the exact data that everything is trained on."""
    manifests = [manifest_sha256(path) for path in (data.preferences, data.rankings)]
    return content_id(*manifests, file_sha256(data.reward_model / "training.json"))


def _parallel(options: CompareOptions) -> int:
    if options.jobs:
        return options.jobs
    return 1 if resolve_device("auto") == "cuda" else os.cpu_count() or 1


# --- the jobs


def _jobs(shared: Comparison) -> list[Job]:
    options = shared.options
    jobs = [shared.start()]
    if "methods" in options.parts:
        for algorithm in options.algorithms:
            for seed in options.seeds:
                jobs += _method_jobs(shared, algorithm, seed)
    if "labels" in options.parts:
        jobs += _label_jobs(shared)
    if "bias" in options.parts:
        jobs += _bias_jobs(shared)
    return jobs


def _method_jobs(shared: Comparison, algorithm: str, seed: int) -> list[Job]:
    """Return the training of one algorithm at one seed, and the evaluations of its policies."""
    options = shared.options
    name = f"{algorithm}-{seed}"
    if algorithm == "bon":
        return _best_of_jobs(shared, seed)
    copies = options.copies if seed == options.seeds[0] else 0
    training = shared.train(algorithm, name, seed, copies=copies)
    output = options.folder / "policies" / name
    jobs = [training, shared.evaluate(name, model=output, needs=name, seed=seed)]
    every = training.table.get("copy_every") or training.table.get("save_every") or 0
    for place in range(1, copies + 1):
        step = every * place
        if step and step < training.meta["steps"]:
            copy = (
                f"policies/step-{step:06d}"
                if algorithm == "ppo"
                else (f"checkpoints/checkpoint-{step}")
            )
            label = f"{name}-step-{step}"
            jobs.append(shared.evaluate(label, model=output / copy, needs=name, seed=seed))
    return jobs


def _sizes(best_of: int) -> list[int]:
    """Return the powers of 2 up to ``best_of``, and it."""
    powers = [2**power for power in range(1, best_of.bit_length())]
    return sorted({*(size for size in powers if size <= best_of), best_of})


def _best_of_jobs(shared: Comparison, seed: int) -> list[Job]:
    options = shared.options
    sizes = _sizes(options.best_of) if seed == options.seeds[0] else [options.best_of]
    return _chosen_jobs(shared, f"bon-{seed}", seed, shared.data.reward_model, sizes)


def _chosen_jobs(
    shared: Comparison,
    name: str,
    seed: int,
    reward_model: Path,
    sizes: list[int],
    needs: tuple[str, ...] = (),
) -> list[Job]:
    """Return the sampling and choosing of best-of-n, and the evaluation at every n."""
    chosen = evaluation_options(shared.recipe)
    out = shared.options.folder / "best-of-n" / name
    table = {
        "prompts": str(chosen.prompts),
        "out": str(out),
        "engine": start_engine(shared.recipe),
        "reward_model": str(reward_model),
        "sizes": sizes,
        "temperature": chosen.temperature,
        "max_tokens": chosen.max_tokens,
        "seed": seed + 1000,
        "limit": chosen.limit,
    }
    meta = {"algorithm": "bon", "seed": seed, "tokens": 0, "steps": 0}
    jobs = [Job(name, "train.best_of_n:run_table", table, needs, meta)]
    for size in sizes:
        jobs.append(
            shared.evaluate(
                name if size == shared.options.best_of else f"{name}-of-{size}",
                model=None,
                needs=name,
                policy_samples=str(out / f"n-{size}"),
                kl=False,
                completions=1,
            )
        )
    return jobs


def _label_jobs(shared: Comparison) -> list[Job]:
    """DPO on the judge's labels and on the gold check's, for the same pairs and seeds."""
    options = shared.options
    gold = options.folder / "labels" / "gold" / "preferences"
    gold_preferences(shared.data.candidates, shared.data.preferences, gold)
    data = Data(
        gold,
        shared.data.rankings,
        shared.data.candidates,
        shared.data.best,
        shared.data.reward_model,
    )
    jobs = []
    for seed in options.seeds:
        name = f"labels-gold-{seed}"
        jobs.append(shared.train("dpo", name, seed, data=data))
        output = options.folder / "policies" / name
        jobs.append(shared.evaluate(name, model=output, needs=name, seed=seed))
        if "methods" not in options.parts or "dpo" not in options.algorithms:
            jobs += _method_jobs(shared, "dpo", seed)  # the very same: it may be done already
    return jobs


def _bias_jobs(shared: Comparison) -> list[Job]:
    """Every algorithm on labels of a judge that likes length, made in three ways; one seed."""
    options, seed = shared.options, shared.options.seeds[0]
    source = options.folder / "data"
    jobs: list[Job] = []
    for kind in KINDS:
        folder = options.folder / "labels" / kind
        _biased_labels(shared, kind, folder)
        data = Data(
            preferences=folder / "preferences",
            rankings=folder / "rankings",
            candidates=source / "candidates",
            best=write_best(folder / "rankings", folder / "best.jsonl"),
            reward_model=folder / "reward-model",
        )
        reward = f"bias-{kind}-reward"
        table = {
            **underscored(shared.recipe.get("reward", {})),
            "data": [str(data.preferences)],
            "output": str(data.reward_model),
            "seed": seed,
            "resume": False,
        }
        jobs.append(Job(reward, "reward", table))
        for algorithm in options.algorithms:
            name = f"bias-{kind}-{algorithm}"
            if algorithm == "bon":
                sizes = [options.best_of]
                jobs += _chosen_jobs(shared, name, seed, data.reward_model, sizes, (reward,))
                continue
            needs = (reward,) if algorithm == "ppo" else ()
            jobs.append(shared.train(algorithm, name, seed, data=data, needs=needs))
            output = options.folder / "policies" / name
            jobs.append(shared.evaluate(name, model=output, needs=name, seed=seed))
    return jobs


def _biased_labels(shared: Comparison, kind: str, folder: Path) -> None:
    """Plant the bias into the verdicts and pair them as ``kind`` says.

    What the gate would refuse of such a judge is accepted, knowingly, and written down.
    """
    source = shared.options.folder / "data"
    bias_verdicts(
        source / "verdicts",
        source / "candidates",
        folder / "verdicts",
        strength=shared.options.bias,
        orders="one" if kind == "hard" else "both",
    )
    given = underscored(shared.recipe.get("pair", {}))
    card = card_of_folder(folder / "verdicts", candidates=source / "candidates")
    refused = [row.name for row in judge_card(card, GateThresholds()).refused]
    write_json(folder / GATE, refused)
    table = {
        **given,
        "accept_bias": sorted({*given.get("accept_bias", ()), *refused}),
        "verdicts": str(folder / "verdicts"),
        "candidates": str(source / "candidates"),
        "out": str(folder),
        "labels": "hard" if kind == "hard" else "soft",
        "remedy": "length" if kind == "corrected" else "none",
    }
    pair(build_options(PairOptions, table))
