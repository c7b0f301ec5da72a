"""Measures the pocket models on held-out dialogues, and what the judge's choice is worth.

    python -m recipes.pocket_model.evaluate --data lm_dialogue.jsonl.gz --json figures.json

Reads the shipped weights (or ``--assistant``, ``--second-judge``), runs on the CPU in some minutes.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from feedback.installed import package_versions
from feedback.pocket import model_path
from feedback.shards import write_json
from recipes.pocket_model.bookings import good_reply, make_booking
from recipes.pocket_model.contests import Contest, booking_contest, dialogue_contest
from recipes.pocket_model.details import collect_details
from recipes.pocket_model.dialogues import (
    Dialogue,
    Split,
    read_dialogues,
    split_dialogues,
    turns_to_judge,
)
from recipes.pocket_model.flaws import Material
from recipes.pocket_model.sampling import draw_replies
from recipes.pocket_model.scoring import Answers, calibration_error, compare, perplexity

__all__ = ["evaluate_judge", "evaluate_policy", "load", "make_material", "sample_contests"]

_SEED = 20_001


def load(folder: Path, device: str = "cpu", dtype: str = "float32") -> tuple[Any, Any]:
    """Return model and tokenizer of one folder."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM

    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    )
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def make_material(dialogues: Sequence[Dialogue]) -> Material:
    """Return what flaws are made from: the assistant turns of ``dialogues`` and their details."""
    turns = [
        turn["content"]
        for dialogue in dialogues
        for turn in dialogue
        if turn["role"] == "assistant"
    ]
    return Material([turn for turn in turns if len(turn) > 15], collect_details(turns))


def constructed_contests(held_out: list[Dialogue], count: int) -> list[Contest]:
    """Return contests on held-out dialogues and new booking conversations, half of each."""
    rng = random.Random(_SEED)
    material = make_material(held_out)
    contests = [dialogue_contest(held_out, material, rng) for _ in range(count // 2)]
    return contests + [
        booking_contest(material, frozenset(), rng, held_out=True)
        for _ in range(count - count // 2)
    ]


def sample_contests(
    model: Any, tokenizer: Any, held_out: list[Dialogue], count: int, *, batch: int = 256
) -> dict[str, list[Contest]]:
    """Return true turn against the model's own sample, on dialogues and on booking conversations."""
    rng = random.Random(_SEED + 1)
    asked: list[tuple[Any, str]] = []
    while len(asked) < count:
        found = turns_to_judge(rng.choice(held_out), rng)
        if found is not None:
            asked.append(found)
    for _ in range(count):
        booking = make_booking(rng, held_out=True)
        asked.append((booking.messages, good_reply(booking, rng)))
    drawn = draw_replies(model, tokenizer, [prompt for prompt, _ in asked], batch=batch)
    contests = [
        Contest(tuple(prompt), (truth, reply.text), ("", "sampled"))
        if reply.text and reply.text != truth
        else None
        for (prompt, truth), reply in zip(asked, drawn, strict=True)
    ]
    return {
        "dialogue": [contest for contest in contests[:count] if contest],
        "booking": [contest for contest in contests[count:] if contest],
    }


def _accuracy(answers: Answers, chosen: Sequence[bool] | np.ndarray) -> float:
    return float(np.mean(answers.preferred[np.asarray(chosen)] > 0.5))


def evaluate_judge(
    model: Any,
    tokenizer: Any,
    held_out: list[Dialogue],
    samples: dict[str, list[Contest]],
    *,
    count: int,
) -> dict[str, float]:
    """Return the judge's figures on constructed contests and on true turn against sample."""
    contests = constructed_contests(held_out, count)
    answers = compare(model, tokenizer, contests)
    right = answers.preferred > 0.5
    longer_worse = np.array(
        [len(contest.replies[1]) > len(contest.replies[0]) for contest in contests]
    )
    flaws = np.array([contest.flaws[1] for contest in contests])
    figures = {
        "accuracy": float(right.mean()),
        "accuracy_dialogue": _accuracy(answers, np.arange(count) < count // 2),
        "accuracy_booking": _accuracy(answers, np.arange(count) >= count // 2),
        "order_consistency": answers.consistency,
        "ece": calibration_error(np.maximum(answers.preferred, 1 - answers.preferred), right),
        "accuracy_longer_is_worse": _accuracy(answers, longer_worse),
        "accuracy_longer_is_better": _accuracy(answers, ~longer_worse),
        "verdict_mass": float(answers.mass.mean()),
    }
    figures |= {
        f"accuracy_{flaw}": _accuracy(answers, flaws == flaw) for flaw in sorted(set(flaws))
    }
    for name, pairs in {**samples, "": [*samples["dialogue"], *samples["booking"]]}.items():
        own = compare(model, tokenizer, pairs)
        confidence = np.maximum(own.preferred, 1 - own.preferred)
        found = {
            "accuracy": _accuracy(own, np.ones(len(pairs), bool)),
            "order_consistency": own.consistency,
            "ece": calibration_error(confidence, own.preferred > 0.5),
            "pairs": float(len(pairs)),
        }
        suffix = f"_{name}" if name else ""
        figures |= {f"{key}_true_vs_sample{suffix}": value for key, value in found.items()}
    return figures


def evaluate_policy(
    model: Any, tokenizer: Any, held_out: list[Dialogue], *, count: int, batch: int = 256
) -> dict[str, float]:
    """Return perplexity on held-out dialogues and the share of sampled replies that end by themselves."""
    rng = random.Random(_SEED + 2)
    prompts = [found[0] for dialogue in held_out if (found := turns_to_judge(dialogue, rng))][
        :count
    ]
    prompts += [make_booking(rng, held_out=True).messages for _ in range(count)]
    drawn = draw_replies(model, tokenizer, prompts, batch=batch)
    return {
        "perplexity": perplexity(model, tokenizer, held_out),
        "eos_share": float(np.mean([reply.ended for reply in drawn])),
    }


def all_figures(
    assistant: tuple[Any, Any],
    second: tuple[Any, Any],
    split: Split,
    *,
    count: int,
    prompts: int,
    batch: int = 256,
) -> dict[str, float]:
    """Return every figure that ``benchmarks/results/pocket.json`` holds, but for the sizes."""
    held_out = split.held_out
    figures: dict[str, float] = {}
    for prefix, (model, tokenizer) in (("", assistant), ("second_", second)):
        policy = evaluate_policy(model, tokenizer, held_out, count=min(count, 500), batch=batch)
        samples = sample_contests(model, tokenizer, held_out, count // 2, batch=batch)
        judge = evaluate_judge(model, tokenizer, held_out, samples, count=count)
        figures |= {f"{prefix}policy_{name}": value for name, value in policy.items()}
        figures |= {f"{prefix}judge_{name}": value for name, value in judge.items()}
        if not prefix:
            # The second judge, too, on what the first model samples: that is what it will have to tell apart.
            others = compare(*second, samples["dialogue"])
            figures["second_judge_accuracy_true_vs_assistant_sample"] = _accuracy(
                others, np.ones(len(samples["dialogue"]), bool)
            )
    from recipes.pocket_model.selection import selection_figures

    return figures | selection_figures(assistant, second, prompts=prompts, batch=batch)


def _result(figures: dict[str, float], options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures as a file of benchmarks/results holds them."""
    shipped = model_path("policy").parent
    size = sum(path.stat().st_size for path in shipped.rglob("*") if path.is_file()) / 1e6
    return {
        "bench": "pocket",
        "command": f"python -m recipes.pocket_model.evaluate --data lm_dialogue.jsonl.gz "
        f"--count {options.count} --prompts {options.prompts} --json benchmarks/results/pocket.json",
        "date": date.today().isoformat(),
        "hardware": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": package_versions(),
        "figures": figures | {"megabytes": size},
    }


def main() -> None:
    """Print the figures of the shipped weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="lm_dialogue.jsonl.gz")
    parser.add_argument("--assistant", type=Path, default=model_path("policy"))
    parser.add_argument("--second-judge", type=Path, default=model_path("second-judge"))
    parser.add_argument("--count", type=int, default=3000, help="contests to judge")
    parser.add_argument(
        "--prompts", type=int, default=160, help="prompts for the best-of-four trial"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    options = parser.parse_args()
    models = [load(folder, options.device) for folder in (options.assistant, options.second_judge)]
    split = split_dialogues(read_dialogues(options.data))
    figures = all_figures(models[0], models[1], split, count=options.count, prompts=options.prompts)
    for name, value in figures.items():
        print(f"{name:58s} {value:.4f}")
    if options.json:
        write_json(options.json, _result(figures, options))


if __name__ == "__main__":
    main()
