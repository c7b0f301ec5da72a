"""What a PPO run needs before its first step: networks, reward, sampler, optimisers, prompts."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

from feedback.errors import InputError, RecipeError
from feedback.records import content_id
from train.advantages import KlController, RewardNormaliser
from train.attention import resolve_attention
from train.guard import Guard
from train.models import resolve_device, resolve_precision
from train.optimizer import MasterAdamW, parameter_groups
from train.ppo_checks import check_contexts, check_scorer, guard_doubts, warn_too_long
from train.ppo_config import PpoOptions
from train.ppo_models import Networks, load_networks
from train.reward_model import Scorer
from train.rewards import open_reward
from train.rollout import PromptTokens, RowMaker, read_prompts
from train.sampler import CachedSampler, GenerateSampler, Sampler, SamplingPlan

__all__ = ["Clock", "Optimiser", "Run", "prompts_of_step", "seeds_of_step", "set_up"]

logger = logging.getLogger(__name__)


class Clock:
    """Adds up the seconds that each phase takes."""

    def __init__(self, device: str):
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block's time under ``phase``."""
        started = time.perf_counter()
        yield
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - started

    def drain(self) -> dict[str, float]:
        """Return the seconds since the last call, as metrics."""
        found = {f"time/{phase}": seconds for phase, seconds in self.seconds.items()}
        self.seconds.clear()
        return found


class Optimiser:
    """AdamW of one network, with its learning rate and gradient clipping."""

    def __init__(self, module: nn.Module, *, rate: float, options: PpoOptions, processes: int):
        groups = parameter_groups(module, options.weight_decay)
        if not groups:
            raise InputError("nothing to train: the network has no trainable parameters")
        rounded = groups[0]["params"][0].dtype == torch.bfloat16
        if rounded and processes > 1:
            raise InputError(
                "precision bfloat16 keeps its float32 copies on one process; use autocast with "
                "several"
            )
        self.rate = rate
        self.max_norm = options.max_grad_norm
        self.inner: torch.optim.AdamW = (MasterAdamW if rounded else torch.optim.AdamW)(
            groups, lr=rate, betas=options.adam_betas, eps=options.adam_epsilon, fused=True
        )

    def step(self, share: float) -> Tensor:
        """Update at ``share`` of the peak rate; return the gradient norm before clipping."""
        for group in self.inner.param_groups:
            group["lr"] = self.rate * share
        if isinstance(self.inner, MasterAdamW):
            norm = self.inner.clip(self.max_norm)
        else:
            weights = [p for group in self.inner.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(weights, self.max_norm or math.inf)
        self.inner.step()
        self.discard()
        return norm

    def discard(self) -> None:
        """Forget the gradients."""
        self.inner.zero_grad(set_to_none=True)


@dataclass(slots=True, kw_only=True)
class Run:
    """Everything that the steps of one run share."""

    options: PpoOptions
    accelerator: Accelerator
    networks: Networks
    module: Any
    """The networks' module as accelerate wraps it."""
    policy_optimiser: Optimiser
    value_optimiser: Optimiser
    sampler: Sampler
    plan: SamplingPlan
    scorer: Scorer
    maker: RowMaker
    prompts: list[PromptTokens]
    held_out: list[PromptTokens]
    """Prompts of the guard's probes; empty without a guard."""
    gold: Scorer | None
    guard: Guard
    controller: KlController
    normaliser: RewardNormaliser
    clock: Clock
    dropped_prompts: int

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over processes, on the values' device."""
        if self.accelerator.num_processes == 1:
            return values
        moved = values.to(self.accelerator.device)
        return self.accelerator.reduce(moved, "sum").to(values.device)

    def means(self, pairs: Mapping[str, tuple[float, float]]) -> dict[str, float]:
        """Return sum / count of each (sum, count), over all processes; 0 where nothing counts."""
        totals = self.sum(torch.tensor(list(pairs.values()), dtype=torch.float64)).tolist()
        return {
            name: total / count if count else 0.0
            for name, (total, count) in zip(pairs, totals, strict=True)
        }


def set_up(options: PpoOptions) -> Run:
    """Load everything.

    Raises:
        InputError: a model, prompt file or reward cannot be loaded, or they do not fit each other.
        RecipeError: the options do not fit the number of processes.
    """
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    unused = DistributedDataParallelKwargs(find_unused_parameters=options.critic_warmup > 0)
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if precision == "autocast" else "no",
        log_with=list(options.report_to) or None,
        project_dir=str(options.output),
        kwargs_handlers=[unused],
    )
    processes = accelerator.num_processes
    if options.prompts_per_step % processes or (
        options.prompts_per_step // processes < options.minibatches
    ):
        raise RecipeError(
            f"prompts_per_step ({options.prompts_per_step}) must be a multiple of the {processes} "
            f"processes, with at least minibatches ({options.minibatches}) prompts for each"
        )
    networks = load_networks(options)
    prompts, dropped = read_prompts(
        options.prompts, networks.chat, max_tokens=options.max_prompt_tokens
    )
    warn_too_long(dropped, len(prompts), options, what="prompts")
    prompts, held_out = _hold_out(options, prompts, networks)
    met = [*prompts, *held_out]
    check_contexts(networks, met, options)
    references = {content_id(item.prompt): item.gold for item in met if item.gold}
    scorer = open_reward(options.reward, device=options.device, references=references)
    check_scorer(scorer, met, options, option="reward")
    gold = None
    if options.guard.gold.kind != "none":
        gold = open_reward(options.guard.gold, device=options.device, references=references)
        check_scorer(gold, held_out, options, option="guard.gold")
        for doubt in guard_doubts(options, prompts, held_out):
            logger.warning(doubt)
    module = networks.module
    value_rate = options.value_learning_rate or options.learning_rate
    return Run(
        options=options,
        accelerator=accelerator,
        networks=networks,
        module=accelerator.prepare_model(module) if processes > 1 else module,
        policy_optimiser=Optimiser(
            module.policy, rate=options.learning_rate, options=options, processes=processes
        ),
        value_optimiser=Optimiser(
            module.value_module(), rate=value_rate, options=options, processes=processes
        ),
        sampler=_open_sampler(options, networks, device, processes),
        plan=sampling_plan(options, networks, device),
        scorer=scorer,
        maker=RowMaker(
            row_tokens=_row_tokens(options, device),
            attention=resolve_attention(options.attention, device),
            device=str(accelerator.device),
        ),
        prompts=prompts,
        held_out=held_out,
        gold=gold,
        guard=Guard(patience=options.guard.patience, tolerance=options.guard.tolerance),
        controller=KlController(
            options.kl_coef, target=options.kl_target, horizon=options.kl_horizon
        ),
        normaliser=RewardNormaliser(options.normalise_rewards, clip=options.reward_clip),
        clock=Clock(device),
        dropped_prompts=dropped,
    )


def _row_tokens(options: PpoOptions, device: str) -> int:
    group = options.max_prompt_tokens + options.completions_per_prompt * options.max_tokens
    return max(options.row_tokens or (32768 if device == "cuda" else 2048), group)


def _hold_out(
    options: PpoOptions, prompts: list[PromptTokens], networks: Networks
) -> tuple[list[PromptTokens], list[PromptTokens]]:
    """Return the prompts to train on and those of the guard's probes."""
    guard = options.guard
    if guard.gold.kind == "none":
        return prompts, []
    if guard.prompts:
        held, dropped = read_prompts(
            guard.prompts, networks.chat, max_tokens=options.max_prompt_tokens
        )
        warn_too_long(dropped, len(held), options, what="guard.prompts")
        return prompts, held[: guard.prompt_count]
    if len(prompts) <= guard.prompt_count:
        raise RecipeError(
            f"{len(prompts)} prompts leave none to train on once guard.prompt_count "
            f"({guard.prompt_count}) are held out; lower it, or name guard.prompts"
        )
    order = np.random.default_rng((options.seed, 1)).permutation(len(prompts))
    chosen = set(order[: guard.prompt_count].tolist())
    kept = [item for place, item in enumerate(prompts) if place not in chosen]
    return kept, [prompts[place] for place in sorted(chosen)]


def sampling_plan(options: PpoOptions, networks: Networks, device: str) -> SamplingPlan:
    """Return how completions are sampled; a completion ends where the chat template ends it."""
    tokenizer, chat = networks.tokenizer, networks.chat
    stops = {chat.end_ids[-1]}
    if tokenizer.eos_token_id is not None:
        stops.add(tokenizer.eos_token_id)
    return SamplingPlan(
        max_tokens=options.max_tokens,
        stop_ids=frozenset(stops),
        pad_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
        temperature=options.temperature,
        top_p=options.top_p,
        batch_tokens=options.sampler_tokens or (262_144 if device == "cuda" else 65_536),
    )


def _open_sampler(options: PpoOptions, networks: Networks, device: str, processes: int) -> Sampler:
    kind = options.sampler
    if kind == "auto":
        installed = importlib.util.find_spec("vllm") is not None
        kind = "vllm" if device == "cuda" and installed and processes == 1 else "cached"
    policy = networks.module.policy
    if kind == "vllm" and processes > 1:
        raise RecipeError(
            "sampler 'vllm' runs beside a trainer of one process; use --sampler cached with several"
        )
    if kind == "cached":
        return CachedSampler(policy)
    if kind == "generate":
        return GenerateSampler(policy)
    if options.top_p < 1:
        logger.warning(
            "vLLM gives log-probabilities within the nucleus of top_p (%g), the trainer over the "
            "whole vocabulary: sampler/gap and the importance weights hold that difference too",
            options.top_p,
        )
    from train.vllm_sampler import VllmSampler

    return VllmSampler(
        policy,
        max_length=options.max_prompt_tokens + options.max_tokens,
        memory=options.vllm_memory,
        sleep=options.vllm_sleep,
        eager=options.vllm_eager,
        seed=options.seed,
    )


def prompts_of_step(run: Run, step: int) -> list[PromptTokens]:
    """Return this process's prompts of a step; every pass over the prompts has its own order."""
    options, accelerator = run.options, run.accelerator
    count = len(run.prompts)
    first = step * options.prompts_per_step
    places = range(first, first + options.prompts_per_step)[
        accelerator.process_index :: accelerator.num_processes
    ]
    orders = {
        turn: np.random.default_rng((options.seed, 2, turn)).permutation(count)
        for turn in {place // count for place in places}
    }
    return [run.prompts[orders[place // count][place % count]] for place in places]


def seeds_of_step(run: Run, step: int, count: int) -> list[int]:
    """Return this process's sampling seeds of a step, one per prompt."""
    index, processes = run.accelerator.process_index, run.accelerator.num_processes
    return _seeds(
        (run.options.seed, 3, step), [index + place * processes for place in range(count)]
    )


def _seeds(stream: Sequence[int], places: Sequence[int]) -> list[int]:
    return [int(np.random.SeedSequence((*stream, place)).generate_state(1)[0]) for place in places]


def probe_seeds(run: Run) -> list[int]:
    """Return the seeds of the guard's probes: the same at every probe."""
    return _seeds((run.options.seed, 4), range(len(run.held_out)))
