"""Trains the pocket models from the dialogue corpus to finished folders; ``README.md`` has the commands.

    python -m recipes.pocket_model.build tokenizer --data lm_dialogue.jsonl.gz --out build/pocket
    python -m recipes.pocket_model.build assistant --data lm_dialogue.jsonl.gz --out build/pocket
    python -m recipes.pocket_model.build second-judge --data lm_dialogue.jsonl.gz --out build/pocket

Each model is made in three steps: learn dialogue and judging with constructed flaws; sample its own
replies to its own dialogues; learn again, now with those samples among the flawed replies too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from feedback.templates import load_rubric, load_template
from recipes.pocket_model.bookings import good_reply
from recipes.pocket_model.chat import LABELS, save_tokenizer, train_tokenizer
from recipes.pocket_model.contests import Sampled, fresh_booking
from recipes.pocket_model.dialogues import read_dialogues, split_dialogues, turns_to_judge
from recipes.pocket_model.evaluate import (
    evaluate_judge,
    evaluate_policy,
    load,
    make_material,
    sample_contests,
)
from recipes.pocket_model.judge_rows import TEMPLATES
from recipes.pocket_model.lessons import Source, policy_rows
from recipes.pocket_model.prompts import banned_openings
from recipes.pocket_model.rows import RowFactory, Wave, join_rows, tokenise
from recipes.pocket_model.sampling import draw_replies
from recipes.pocket_model.training import Schedule, Stage, build_model, train, warm_up


@dataclass(frozen=True)
class Plan:
    """Sizes of one model's training; the two models differ in data, seed and amount."""

    seed: int
    feed_forward: int
    first: int = 150_000
    """Judge rows that go with most of the dialogues: the model learns to speak, and to judge."""
    second: int = 320_000
    """More of them, with fewer dialogues; then the policy samples. Half of them come again later."""
    third: int = 150_000
    """Judge rows for the time in which the sampled rows are made."""
    sampled: int = 280_000
    """Judge rows with the policy's own replies."""
    samples: int = 84_000
    """Replies sampled to dialogues; a third as many again to booking conversations."""
    passes: tuple[float, float, float, float] = (5.0, 2.0, 0.7, 1.3)
    """Passes over the dialogues in the four stages."""
    policy_bookings: int = 1500
    """Booking conversations among the dialogues: few, so that the policy has something to learn."""


PLANS = {
    "assistant": Plan(seed=1, feed_forward=768),
    "second-judge": Plan(seed=2, feed_forward=704, samples=72_000),
}
_SCALED = ("first", "second", "third", "sampled", "samples", "policy_bookings")
Log = Callable[[str], None]


def tokenizer_texts(data: Path) -> Iterator[str]:
    """Yield what the tokenizer is trained on: all but the held-out dialogues, bookings, judge templates."""
    split = split_dialogues(read_dialogues(data))
    for dialogue in (*split.assistant, *split.second_judge):
        yield from (turn["content"] for turn in dialogue)
    rng = random.Random(0)
    banned = banned_openings()
    for _ in range(6000):
        booking = fresh_booking(banned, rng)
        yield from (message["content"] for message in booking.messages)
        yield good_reply(booking, rng)
    for name in TEMPLATES:
        yield from [load_template(name).user] * 300
    yield from ["User: I", "Assistant: I"] * 3000
    yield from [load_rubric("booking"), load_rubric("helpfulness")] * 300


def build_tokenizer(data: Path, out: Path) -> None:
    """Train and save the tokenizer that both models share; check that labels are single tokens."""
    tokenizer = train_tokenizer(tokenizer_texts(data))
    for label in LABELS:
        if len(tokenizer.encode(label).ids) != 1:
            raise RuntimeError(f"label {label!r} is not one token")
    save_tokenizer(tokenizer, out / "tokenizer")


def build_model_folder(name: str, plan: Plan, options: argparse.Namespace, log: Log) -> None:
    """Run the three steps for one model, save it, and measure it on held-out dialogues."""
    started = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out: Path = options.out
    tokenizer_path = out / "tokenizer" / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    split = split_dialogues(read_dialogues(options.data))
    dialogues = split.assistant if name == "assistant" else split.second_judge
    dialogues = dialogues[: max(40, int(len(dialogues) * min(1.0, 10 * options.scale)))]
    source = Source(dialogues, make_material(dialogues), banned_openings(), [])
    waves = [
        Wave(name, getattr(plan, name), plan.seed + 10 * number)
        for number, name in enumerate(("first", "second", "third"))
    ]
    rows = RowFactory(out / f"{name}-rows", source, tokenizer_path, waves, workers=options.workers)
    text = tokenise(policy_rows(source, bookings=plan.policy_bookings, seed=plan.seed), tokenizer)

    model = build_model(
        seed=plan.seed,
        feed_forward=plan.feed_forward,
        device=device,
        layers=options.layers,
        width=options.width,
        vocabulary=tokenizer.get_vocab_size(),
    )
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(dialogues)} dialogues")
    shape = {"line_length": options.line_length, "lines": options.lines}
    # On a rented machine: half of what is left after starting up for the first phase.
    halfway = started + 0.55 * options.deadline if options.deadline else math.inf
    schedule = Schedule(
        learning_rate=2e-3, final_share=0.15, seed=plan.seed, deadline=halfway, **shape
    )
    warm_up(model, schedule)
    log("first phase: dialogue, and judging with constructed flaws")
    share = plan.first / (plan.first + plan.second)
    stages = [
        Stage(lambda: (text, rows.collect("first")), plan.passes[0], share),
        Stage(lambda: (text, rows.collect("second")), plan.passes[1], 1 - share),
    ]
    train(model, stages, schedule, log=log)

    save(model, tokenizer, out / name)
    sampled = sample_lessons(inference_copy(model, device), tokenizer, source, plan, log)
    wave = Wave("sampled", plan.sampled, plan.seed + 50)
    drawn = replace(source, sampled=sampled, sampled_share=1.0)
    more = RowFactory(out / f"{name}-rows", drawn, tokenizer_path, [wave], workers=options.workers)
    log("second phase: the same, then with the policy's own replies among the flawed ones")
    share = (plan.third + plan.second / 2) / (plan.third + plan.second + plan.sampled)
    stages = [
        Stage(
            lambda: (
                text,
                join_rows([rows.collect("third"), rows.collect("second", slice(0, None, 2))]),
            ),
            plan.passes[2],
            share,
        ),
        Stage(
            lambda: (
                text,
                join_rows([more.collect("sampled"), rows.collect("second", slice(1, None, 2))]),
            ),
            plan.passes[3],
            1 - share,
        ),
    ]
    deadline = started + options.deadline if options.deadline else math.inf
    schedule = Schedule(
        learning_rate=1.2e-3, final_share=0.0, seed=plan.seed + 1, deadline=deadline, **shape
    )
    train(model, stages, schedule, log=log)

    save(model, tokenizer, out / name)
    log("saved")
    if not options.count:
        return
    measured = load(out / name, device, "bfloat16" if device == "cuda" else "float32")
    samples = sample_contests(*measured, split.held_out, options.count // 2, batch=4096)
    figures = evaluate_policy(*measured, split.held_out, count=500, batch=4096)
    figures |= evaluate_judge(*measured, split.held_out, samples, count=options.count)
    for key, value in figures.items():
        log(f"{key:50s} {value:.4f}")
    (out / f"{name}-figures.json").write_text(
        json.dumps(figures, indent=2) + "\n", encoding="utf-8"
    )


def inference_copy(model: Any, device: str) -> Any:
    """Return the model with plain attention, in bfloat16 on a GPU, for sampling."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    )
    copy = LlamaForCausalLM(config)
    copy.load_state_dict(plain_state(model))
    return copy.to(device, torch.bfloat16 if device == "cuda" else torch.float32).eval()


def plain_state(model: Any) -> dict[str, Any]:
    """Return the weights under their plain names, whether or not layers were compiled."""
    return {
        key.replace("_orig_mod.", ""): value.detach().cpu()
        for key, value in model.state_dict().items()
    }


def sample_lessons(
    model: Any, tokenizer: Any, source: Source, plan: Plan, log: Log
) -> list[Sampled]:
    """Sample one reply each to many conversations of the model's own training dialogues and bookings."""
    rng = random.Random(plan.seed + 7)
    asked: list[tuple[Any, str, bool]] = []
    while len(asked) < plan.samples:
        found = turns_to_judge(rng.choice(source.dialogues), rng)
        if found is not None:
            asked.append((*found, False))
    for _ in range(plan.samples // 3):
        booking = fresh_booking(source.banned, rng)
        asked.append((booking.messages, good_reply(booking, rng), True))
    begun = time.time()
    drawn = draw_replies(
        model, tokenizer, [prompt for prompt, _, _ in asked], batch=8192, seed=plan.seed
    )
    log(
        f"{len(drawn)} replies sampled in {time.time() - begun:.0f} s, {sum(reply.ended for reply in drawn) / len(drawn):.3f} ended"
    )
    for (prompt, truth, _), reply in list(zip(asked, drawn, strict=True))[-6:]:
        log(f"  {prompt[-1]['content']!r} -> {reply.text!r} (true: {truth!r})")
    return [
        Sampled(tuple(prompt), truth, reply.text, reply.ended, is_booking)
        for (prompt, truth, is_booking), reply in zip(asked, drawn, strict=True)
    ]


def save(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the finished folder: weights in bfloat16, configuration, tokenizer, generation settings."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **{key: value for key, value in model.config.to_dict().items() if not key.startswith("_")}
    )
    plain = LlamaForCausalLM(config)
    plain.load_state_dict(plain_state(model))
    plain = plain.to(torch.bfloat16)
    plain.generation_config = GenerationConfig(eos_token_id=1, pad_token_id=0)
    plain.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    save_tokenizer(tokenizer, folder)


def main() -> None:
    """Build the tokenizer or one model."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tokenizer", *PLANS])
    parser.add_argument("--data", type=Path, required=True, help="lm_dialogue.jsonl.gz")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder for rows, tokenizer, models and logs"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies all row counts, for trials"
    )
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--line-length", type=int, default=4096)
    parser.add_argument("--lines", type=int, default=16)
    parser.add_argument(
        "--count", type=int, default=2000, help="contests of the evaluation; 0: none"
    )
    parser.add_argument(
        "--deadline", type=float, default=0.0, help="seconds after which training must be done"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "tokenizer":
        build_tokenizer(options.data, options.out)
        return
    begun = time.time()
    with (options.out / f"{options.what}-train.log").open("w", encoding="utf-8") as file:

        def log(line: str) -> None:
            text = f"[{options.what} {time.time() - begun:5.0f} s] {line}"
            print(text, flush=True)
            file.write(text + "\n")
            file.flush()

        plan = PLANS[options.what]
        scaled = {key: max(1, int(getattr(plan, key) * options.scale)) for key in _SCALED}
        log(f"plan {replace(plan, **scaled)}")
        build_model_folder(options.what, replace(plan, **scaled), options, log)


if __name__ == "__main__":
    main()
