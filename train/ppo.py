"""Proximal policy optimisation: sample, score, compare with the reference, update; repeat.

    rlaif ppo --prompts FILE --reward.kind model --reward.models runs/x/reward-model --output OUT

The loop reads top to bottom in ``train``; each of its phases is one function below it. The reward
is a reward model, an ensemble, the judge itself (direct RLAIF) or a Python function, always by
text. A run can be stopped anywhere and continues exactly where it was: with the same seed on the
same machine the metrics are the same to the last bit, unless vLLM samples on a GPU, where no two
runs draw the same.

Sources: Schulman et al., arXiv 1707.06347; Ziegler et al., arXiv 1909.08593; Huang et al., arXiv
2403.17031.
"""

from __future__ import annotations

import contextlib
import logging
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from feedback.errors import BackendError, RecipeError, RlaifError
from train.guard import Probe, prompt_means
from train.optimizer import Schedule
from train.packing import PackedBatch
from train.ppo_config import PpoOptions
from train.ppo_gate import reward_gates
from train.ppo_losses import policy_loss, value_loss
from train.ppo_models import reference_logprobs
from train.ppo_results import finish, finished
from train.ppo_setup import Run, probe_seeds, prompts_of_step, seeds_of_step, set_up
from train.ppo_shaping import Shaped, shape
from train.ppo_state import Progress, StopRequest, minibatches
from train.ppo_store import RunStore
from train.results import Trained, announce
from train.rollout import Rollout, collect, recompute

__all__ = ["Shaped", "run", "shape", "train", "update"]

logger = logging.getLogger(__name__)


def run(options: PpoOptions) -> None:
    """Train the policy and print one line about it."""
    announce(train(options))


def train(options: PpoOptions) -> Trained:
    """Train a policy by PPO; continue the same run where it was stopped.

    Raises:
        RecipeError: there is no reward.
        GateRefused: the judge that is the reward fails its report card.
        InputError: a model, prompt file or checkpoint folder does not fit.
        BackendError: the reward gave no score for any completion of a step.
        RlaifError: sampler and trainer disagree, or the loss is not a number.
        KeyboardInterrupt: asked to stop; everything is saved.
    """
    if options.reward.kind == "none":
        raise RecipeError("PPO needs a reward: set reward.kind to model, judge or function")
    done = finished(options)
    if done is not None:
        return done
    started = time.perf_counter()
    gates = reward_gates(options)
    this = set_up(options)
    store = RunStore(this, started=started)
    progress = store.restore()
    schedule = Schedule(options.schedule, steps=options.steps, warmup=options.warmup)
    with StopRequest() as stop:
        if this.gold is not None and progress.step == 0 and progress.rollout is None:
            _probe_start(this, store)
        while progress.step < options.steps and not progress.stopped:
            began = time.perf_counter()
            if progress.rollout is None:
                progress.rollout = roll_out(this, progress.step)
                store.stop_if_asked(stop, progress)
            rollout = progress.rollout
            shaped = shape(this, rollout)
            plan = minibatches(
                rollout.groups,
                count=options.minibatches,
                epochs=options.ppo_epochs,
                seed=(options.seed, 5, progress.step, this.accelerator.process_index),
            )
            with this.clock("update"):
                for members in plan[progress.updates :]:
                    if progress.passes_over:
                        break
                    statistic = update(
                        this,
                        rollout,
                        shaped,
                        members,
                        share=schedule(progress.step),
                        values_only=progress.step < options.critic_warmup,
                    )
                    progress.stats.append(statistic)
                    progress.updates += 1
                    progress.passes_over = 0 < options.stop_kl < statistic["approxkl"]
                    store.stop_if_asked(stop, progress)
            metrics = summarise(this, progress, shaped)
            metrics["lr"] = options.learning_rate * schedule(progress.step)
            this.controller.update(metrics["objective/kl"], int(metrics["completions"]))
            progress.next_step()
            phases = {**this.clock.drain(), "time/step": time.perf_counter() - began}
            store.log({"step": progress.step, **metrics, **phases})
            if 0 < options.max_kl < metrics["objective/kl"]:
                progress.stopped = f"the KL to the reference exceeds {options.max_kl} nats"
            # The last step too: only a policy that was probed can be the result.
            last = progress.step == options.steps or bool(progress.stopped)
            if this.gold is not None and (last or progress.step % options.guard.every == 0):
                probe(this, store, step=progress.step)
                if this.guard.stop:
                    progress.stopped = progress.stopped or "the gold score has fallen"
            if options.copy_every and progress.step % options.copy_every == 0:
                store.copy_policy(progress.step)
            if options.save_every and progress.step % options.save_every == 0:
                store.save(progress)
            store.stop_if_asked(stop, progress)
    if this.guard.best_step >= 0:
        store.load_best()
    return finish(this, progress, seconds=store.seconds(), gates=gates)


def roll_out(this: Run, step: int) -> Rollout:
    """Sample, score, and compute the log-probabilities and values of one step."""
    options = this.options
    prompts = prompts_of_step(this, step)
    with this.clock("sync"):
        this.sampler.sync(this.networks.module.policy)
    rollout = collect(
        prompts,
        seeds=seeds_of_step(this, step, len(prompts)),
        n=options.completions_per_prompt,
        sampler=this.sampler,
        plan=this.plan,
        scorer=this.scorer,
        chat=this.networks.chat,
        clock=this.clock,
    )
    scored = float(this.sum(torch.tensor(float(len(rollout.texts) - rollout.failed))))
    if not scored:
        raise BackendError(
            f"step {step + 1}: the reward gave no score for any completion; is the judge "
            "reachable, and does its template fit?"
        )
    with this.clock("logprobs"):
        rollout = _recompute(this, rollout)
    gap = _sampler_gap(this, rollout)
    if gap > options.sampler_tolerance:
        raise RlaifError(
            f"step {step + 1}: sampler and trainer differ by {gap:.3f} nats per token on the same "
            "completions: the sampler's weights are not the policy's. If the model is known to be "
            "so imprecise, raise sampler_tolerance"
        )
    this.normaliser.update(rollout.scores, this.sum)
    return rollout


def _recompute(this: Run, rollout: Rollout) -> Rollout:
    options, networks = this.options, this.networks

    def score(batch: PackedBatch) -> tuple[Tensor, Tensor]:
        with this.accelerator.autocast():
            found = this.module(batch, temperature=options.temperature, chunk=options.logprob_chunk)
        return found.logprobs, found.values

    def reference(batch: PackedBatch) -> Tensor:
        with this.accelerator.autocast():
            return reference_logprobs(
                networks, batch, temperature=options.temperature, chunk=options.logprob_chunk
            )

    return recompute(rollout, this.maker, score=score, reference=reference)


def _sampler_gap(this: Run, rollout: Rollout) -> float:
    """Return the mean absolute difference between sampler's and trainer's log-probabilities."""
    gaps = (rollout.sampler_logprobs - rollout.logprobs).abs()[rollout.mask]
    return this.means({"gap": (float(gaps.sum()), float(gaps.numel()))})["gap"]


def update(
    this: Run,
    rollout: Rollout,
    shaped: Shaped,
    members: Sequence[int],
    *,
    share: float,
    values_only: bool = False,
) -> dict[str, float]:
    """Do one optimiser step on the given groups; return its statistics over all processes.

    Args:
        this: the run.
        rollout: its groups are packed.
        shaped: the same rollout's advantages.
        members: indices of groups.
        share: of the peak learning rates.
        values_only: leave the policy as it is (critic warm-up).
    """
    options, accelerator = this.options, this.accelerator
    rows = list(this.maker.rows(rollout.groups, members))
    tokens = sum(shaped.mask[owners, batch.places].sum() for batch, owners in rows)
    total = this.sum(torch.as_tensor(tokens, dtype=torch.float32)).clamp(min=1)
    sums = torch.zeros(6, device=accelerator.device)
    for place, (batch, owners) in enumerate(rows):
        last = place == len(rows) - 1
        with _together(this, last), accelerator.autocast():
            scored = this.module(
                batch,
                temperature=options.temperature,
                chunk=options.logprob_chunk,
                values_only=values_only,
            )
            at = owners, batch.places
            value = value_loss(
                scored.values,
                shaped.values[at],
                shaped.returns[at],
                shaped.mask[at],
                cliprange=options.cliprange_value,
                total=total,
            )
            loss = options.vf_coef * value.loss
            if not values_only:
                policy = policy_loss(
                    scored.logprobs,
                    shaped.logprobs[at],
                    shaped.advantages[at],
                    shaped.mask[at],
                    cliprange=options.cliprange,
                    cliprange_high=options.cliprange_high,
                    dual_clip=options.dual_clip,
                    weights=shaped.weights[at],
                    total=total,
                )
                loss = loss + policy.loss
                sums[:4] += torch.stack([part.detach() for part in policy])
            sums[4:] += torch.stack([part.detach() for part in value])
            # Wrappers average gradients over processes; total is a sum over them, so undo that.
            accelerator.backward(loss * accelerator.num_processes)
    value_norm = this.value_optimiser.step(share)
    if values_only:
        this.policy_optimiser.discard()
        policy_norm = torch.zeros(())
    else:
        policy_norm = this.policy_optimiser.step(share)
    found = [*this.sum(sums).tolist(), float(policy_norm), float(value_norm)]
    if not all(map(math.isfinite, found)):
        raise RlaifError(
            "the loss or a gradient is not a finite number: lower the learning rate, or look for "
            f"extreme scores (normalise_rewards, reward_clip); {_what_is_saved(options)}"
        )
    names = (
        "policy_loss", "clipfrac", "approxkl", "ratio", "value_loss", "value_clipfrac",
        "policy_norm", "value_norm",
    )  # fmt: skip
    return dict(zip(names, found, strict=True))


def _what_is_saved(options: PpoOptions) -> str:
    if any((options.output / "checkpoints").glob("step-*.pt")):
        return "the last checkpoint is intact"
    return f"no checkpoint was saved (save_every is {options.save_every})"


def _together(this: Run, last: bool) -> Any:
    """Return the context in which gradients are (last row) or are not exchanged."""
    return contextlib.nullcontext() if last else this.accelerator.no_sync(this.module)


def summarise(this: Run, progress: Progress, shaped: Shaped) -> dict[str, float]:
    """Return a step's metrics, over all processes."""
    rollout = progress.rollout
    assert rollout is not None
    known = ~rollout.scores.isnan()
    n, tokens = float(known.sum()), float(rollout.mask.sum())
    lengths = rollout.mask.sum(1)
    unexplained = (shaped.returns - shaped.values)[shaped.mask]
    spread = shaped.returns[shaped.mask]
    gaps = (rollout.sampler_logprobs - rollout.logprobs).abs()[rollout.mask]
    metrics = this.means(
        {
            "objective/kl": (
                float((rollout.logprobs - rollout.ref_logprobs)[rollout.mask].sum()),
                n,
            ),
            "objective/entropy": (float(-rollout.logprobs[rollout.mask].sum()), n),
            "objective/non_score_reward": (float(shaped.non_score.sum()), n),
            "objective/scores": (float(rollout.scores[known].sum()), n),
            "objective/rlhf_reward": (float(shaped.scores.sum() + shaped.non_score.sum()), n),
            "completion/length": (float(lengths[known].sum()), n),
            "completion/ended": (float(rollout.ended[known].sum()), n),
            "completion/failed": (float(rollout.failed), float(len(known))),
            "sampler/gap": (float(gaps.sum()), tokens),
            "unexplained": (float(unexplained.square().sum()), tokens),
            "returns": (float(spread.sum()), tokens),
            "returns_squared": (float(spread.square().sum()), tokens),
        }
    )
    variance = metrics.pop("returns_squared") - metrics.pop("returns") ** 2
    unexplained_share = metrics.pop("unexplained") / variance if variance > 0 else math.nan
    stats = progress.stats

    def mean(name: str) -> float:
        return statistics.fmean(entry[name] for entry in stats)

    return metrics | {
        "completions": float(this.sum(known.sum().float())),
        "objective/kl_coef": this.controller.kl_coef,
        "policy/approxkl_avg": mean("approxkl"),
        "policy/clipfrac_avg": mean("clipfrac"),
        "policy/grad_norm": mean("policy_norm"),
        "loss/policy_avg": mean("policy_loss"),
        "loss/value_avg": mean("value_loss"),
        "val/clipfrac_avg": mean("value_clipfrac"),
        "val/grad_norm": mean("value_norm"),
        "val/ratio": mean("ratio"),
        "val/ratio_var": statistics.pvariance([entry["ratio"] for entry in stats]),
        "val/explained_variance": 1.0 - unexplained_share,
        "val/updates": float(len(stats)),
        "episode": float(
            (progress.step + 1)
            * this.options.prompts_per_step
            * this.options.completions_per_prompt
        ),
    }


def _probe_start(this: Run, store: RunStore) -> None:
    """Probe the starting policy, which all later probes are compared with.

    Raises:
        BackendError: the gold scorer scores fewer than two prompts.
    """
    found = probe(this, store, step=0)
    if found.outcome == "unknown":
        raise BackendError(
            f"the guard's gold scorer scored {found.known} of {len(this.held_out)} prompts before "
            "the first step, so that there is nothing to compare later probes with; is it "
            "reachable, and does its template fit?"
        )


def probe(this: Run, store: RunStore, *, step: int) -> Probe:
    """Let the gold scorer look at the policy; keep the weights if they are the best so far."""
    assert this.gold is not None
    index, processes = this.accelerator.process_index, this.accelerator.num_processes
    mine = slice(index, None, processes)
    count = this.options.guard.completions
    with this.clock("probe"):
        this.sampler.sync(this.networks.module.policy)
        part = collect(
            this.held_out[mine],
            seeds=probe_seeds(this)[mine],
            n=count,
            sampler=this.sampler,
            plan=this.plan,
            scorer=this.gold,
            chat=this.networks.chat,
            clock=lambda phase: contextlib.nullcontext(),
        )
        part = _recompute(this, part)
    places = range(index, len(this.held_out), processes)
    scores = prompt_means(part.scores, completions=count)
    merged = dict(gather_object(list(zip(places, scores, strict=True))))
    found = this.guard.add(step, [merged[place] for place in sorted(merged)])
    reward = this.scorer.score(
        [item.prompt for item in this.held_out[mine] for _ in range(count)],
        part.texts,
        ended=part.ended.tolist(),
    )
    kl = (part.logprobs - part.ref_logprobs)[part.mask].sum()
    n = float(len(part.texts))
    store.log_probe(
        found,
        this.means(
            {
                "reward": (float(reward.nansum()), float((~reward.isnan()).sum())),
                "kl": (float(kl), n - part.failed),
                "length": (float(part.mask.sum()), n - part.failed),
                "ended": (float(part.ended.sum()), n),
            }
        ),
    )
    if found.outcome == "best":
        store.save_best(step)
    return found
