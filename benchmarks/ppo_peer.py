"""TRL 1.12.0's PPO trainer: the proof that it does our work, and its time by phase."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_work import MIXES, build_model, clean, make_groups, word_tokenizer
from transformers import TrainerCallback

from train import ppo
from train.ppo_config import PpoOptions, RewardSource
from train.ppo_setup import Run, set_up
from train.rollout import Rollout

__all__ = ["prove", "trl_steps"]


def _models(folder: Path, *, device: str, reference: str) -> dict[str, Any]:
    """Return TRL's four models, as saved."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    dtype = torch.bfloat16 if device == "cuda" and "proof" not in str(folder) else torch.float32

    def load(kind: Any, name: str) -> Any:
        return kind.from_pretrained(folder / name, dtype=dtype, attn_implementation="sdpa")

    return {
        "model": load(AutoModelForCausalLM, "policy"),
        "ref_model": load(AutoModelForCausalLM, reference),
        "reward_model": load(AutoModelForSequenceClassification, "reward"),
        "value_model": load(AutoModelForSequenceClassification, "reward"),
    }


def _trainer(
    folder: Path,
    rows: list[list[int]],
    *,
    device: str,
    batch: int,
    accumulation: int,
    callbacks: list[Any],
    reference: str = "policy",
    optimizers: Any = None,
    **settings: Any,
) -> Any:
    """Return TRL's trainer over token ids; ``rows`` are all prompts of all steps."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    tokenizer = word_tokenizer()
    tokenizer.padding_side = "left"
    models = _models(folder, device=device, reference=reference)
    config = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        num_mini_batches=1,
        local_rollout_forward_batch_size=batch * accumulation,
        num_sample_generations=0,
        total_episodes=len(rows),
        stop_token=None,
        whiten_rewards=False,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        bf16=device == "cuda" and "proof" not in str(folder),
        gradient_checkpointing=False,
        use_cpu=device == "cpu",
        seed=0,
        **settings,
    )
    chosen = {} if optimizers is None else {"optimizers": optimizers(models)}
    return PPOTrainer(
        args=config,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"input_ids": row} for row in rows]),
        callbacks=callbacks,
        **models,
        **chosen,
    )


# --- equal work


def prove(folder: Path, *, device: str) -> dict[str, float]:
    """Make the same updates by both sides on one rollout; return the largest differences.

    Three epochs of plain gradient steps at a large rate, so that ratios leave 1 and both clips act;
    the reference differs from the policy, so that the KL is not 0. Raises AssertionError.
    """
    clean(device)
    for name, kind, scale in (
        ("policy", "causal", 0.0),
        ("reference", "causal", 0.02),
        ("reward", "reward", 0.1),
    ):
        model = build_model("tiny", dtype=torch.float32, device="cpu", kind=kind)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    groups = make_groups(MIXES["tiny"], 8, seed=3)
    prompts = [[int(token) for token in group.prompt_ids] for group in groups]
    lines = [
        {"prompt_id": str(place), "prompt": " ".join(f"w{token}" for token in ids)}
        for place, ids in enumerate(prompts)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    this, rollout = _our_rollout(folder, device)
    trainer = _their_update(folder, rollout, this, device)
    ours = _our_update(this, rollout)
    figures = {}
    sides = (("policy", trainer.policy_model), ("value", trainer.value_model))
    for (name, theirs), mine in zip(
        sides, (this.networks.module.policy, this.networks.module.value_model), strict=True
    ):
        start = dict(_saved(folder / ("policy" if name == "policy" else "reward")))
        found = {key: p.detach().cpu() for key, p in mine.named_parameters()}
        wanted = {key: p.detach().cpu() for key, p in theirs.named_parameters()}
        moved = torch.cat([(wanted[key] - start[key]).flatten() for key in found])
        gap = torch.cat([(found[key] - wanted[key]).flatten() for key in found])
        figures[f"{name}_update_difference"] = float(gap.norm() / moved.norm())
    logged = next(row for row in trainer.state.log_history if "objective/kl" in row)
    for name in ("objective/kl", "objective/scores", "loss/policy_avg", "loss/value_avg"):
        figures[name.replace("/", "_") + "_difference"] = abs(logged[name] - ours[name])
    for name, value in figures.items():
        print(f"  equal work: {name} {value:.1e}", flush=True)
        assert value < 1e-3, name
    assert logged["policy/clipfrac_avg"] > 0, "the clip never acted: nothing is proved about it"
    return figures


def _saved(folder: Path) -> Iterator[tuple[str, Tensor]]:
    from safetensors.torch import load_file

    yield from load_file(folder / "model.safetensors").items()


def _our_rollout(folder: Path, device: str) -> tuple[Run, Rollout]:
    import dataclasses

    this = set_up(
        PpoOptions(
            prompts=(str(folder / "prompts.jsonl"),),
            output=folder / "out",
            reward=RewardSource(
                kind="model", models=(str(folder / "reward"),), precision="float32"
            ),
            model=str(folder / "policy"),
            reference_model=str(folder / "reference"),
            steps=1,
            prompts_per_step=8,
            completions_per_prompt=1,
            max_tokens=6,
            temperature=0.9,
            ppo_epochs=3,
            max_grad_norm=0.0,
            importance_cap=0.0,
            missing_eos_penalty=None,
            sampler="cached",
            precision="float32",
            compile="none",
            device=device,
        )
    )
    # TRL takes every 0 for padding, and its stop token is off: no completion may end early.
    this.plan = dataclasses.replace(
        this.plan, stop_ids=frozenset(), banned_ids=frozenset({0, 1, 2})
    )
    for optimiser in (this.policy_optimiser, this.value_optimiser):
        weights = [p for group in optimiser.inner.param_groups for p in group["params"]]
        optimiser.inner = torch.optim.SGD(weights, lr=1.0)
        optimiser.rate = 1.0
    return this, ppo.roll_out(this, 0)


def _our_update(this: Run, rollout: Rollout) -> dict[str, float]:
    shaped = ppo.shape(this, rollout)
    progress = ppo.Progress(rollout=rollout)
    for _ in range(this.options.ppo_epochs):
        members = range(len(rollout.groups))
        progress.stats.append(ppo.update(this, rollout, shaped, members, share=1.0))
    return ppo.summarise(this, progress, shaped)


def _their_update(folder: Path, rollout: Rollout, this: Run, device: str) -> Any:
    from trl.experimental.ppo import ppo_trainer

    completions = {
        tuple(map(int, group.prompt_ids)): [int(token) for token in group.completions[0]]
        for group in rollout.groups
    }

    def given(model: Any, queries: Tensor, size: int, pad: int, config: Any) -> Any:
        """Return our completions, and the logits as generation hands them over."""
        rows = [completions[tuple(row[row != pad].tolist())] for row in queries]
        answers = torch.tensor(rows, device=queries.device)
        whole = torch.cat([queries, answers], dim=1)
        with torch.no_grad():
            output = ppo_trainer.forward(model, whole, pad)
        return whole, output.logits[:, queries.shape[1] - 1 : -1].float() / 0.9

    def plain(models: dict[str, Any]) -> Any:
        weights = [p for name in ("model", "value_model") for p in models[name].parameters()]
        optimizer = torch.optim.SGD(weights, lr=1.0)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    trainer = _trainer(
        folder,
        [list(map(int, group.prompt_ids)) for group in rollout.groups],
        device=device,
        batch=8,
        accumulation=1,
        callbacks=[],
        reference="reference",
        optimizers=plain,
        response_length=6,
        temperature=0.9,
        num_ppo_epochs=this.options.ppo_epochs,
        kl_coef=this.options.kl_coef,
        vf_coef=this.options.vf_coef,
        lam=this.options.lam,
    )
    original = ppo_trainer.batch_generation
    ppo_trainer.batch_generation = given
    try:
        trainer.train()
    finally:
        ppo_trainer.batch_generation = original
    return trainer


# --- speed


class _Steps(TrainerCallback):
    """Notes when each step ends."""

    def __init__(self, device: str):
        self.device = device
        self.ends: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time, with the device's queue emptied."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


@contextlib.contextmanager
def _phases(device: str) -> Iterator[dict[str, float]]:
    """Count the seconds of TRL's generation and of its scoring passes."""
    from trl.experimental.ppo import ppo_trainer

    seconds: dict[str, float] = defaultdict(float)
    originals = {
        name: vars(ppo_trainer)[name] for name in ("batch_generation", "forward", "get_reward")
    }

    def timed(name: str, phase: str) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if torch.is_grad_enabled():  # a training pass
                return originals[name](*arguments, **keywords)
            begun = time.perf_counter()
            result = originals[name](*arguments, **keywords)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[phase] += time.perf_counter() - begun
            return result

        return call

    for name, phase in (
        ("batch_generation", "time/generate"),
        ("forward", "time/logprobs"),
        ("get_reward", "time/score"),
    ):
        setattr(ppo_trainer, name, timed(name, phase))
    try:
        yield seconds
    finally:
        for name, original in originals.items():
            setattr(ppo_trainer, name, original)


def trl_steps(
    folder: Path,
    *,
    prompts: int,
    completions: int,
    steps: int,
    warm: int,
    epochs: int,
    max_tokens: int,
    batch: int,
    device: str,
) -> dict[str, float]:
    """Run TRL's PPO on the prompts in ``folder``; return seconds per step by phase."""
    lines = (folder / "prompts.jsonl").read_text().splitlines()
    ids = [[int(word[1:]) for word in json.loads(line)["prompt"].split()] for line in lines]
    rows = [row for row in ids for _ in range(completions)]
    clock = _Steps(device)
    size = prompts * completions
    trainer = _trainer(
        folder,
        rows,
        device=device,
        batch=min(batch, size),
        accumulation=max(size // batch, 1),
        callbacks=[clock],
        response_length=max_tokens,
        temperature=1.0,
        num_ppo_epochs=epochs,
        kl_coef=0.05,
        learning_rate=3e-6,
    )
    with _phases(device) as seconds:
        begun = time.perf_counter()
        trainer.train()
    ends = [begun, *clock.ends]
    share = 1 / (steps + warm)
    figures = {phase: value * share for phase, value in seconds.items()}
    figures["time/step"] = (ends[-1] - ends[warm]) / steps
    figures["time/update"] = figures["time/step"] - sum(seconds.values()) * share
    return figures
