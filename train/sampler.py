"""Sampling from the policy that is being trained: batched decoding with a key-value cache.

A sampler takes token ids and gives token ids, with the log-probability of each token under the
temperature it was drawn at. A prompt is prefilled once for all of its completions; rows that have
ended leave the batch. Each token is drawn by inverting the cumulative distribution at a uniform
number that depends only on the prompt's seed, the completion's number and the position, so that the
same seeds give the same completions however the prompts are batched or spread over processes.

Knows nothing of text, rewards or training. ``train/vllm_sampler.py`` has the same face on vLLM.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = ["CachedSampler", "GenerateSampler", "Sample", "Sampler", "SamplingPlan", "draw_tokens"]

TokenIds = Sequence[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingPlan:
    """How to draw completions."""

    max_tokens: int
    stop_ids: frozenset[int]
    """A completion ends with the first of these; it keeps that token."""
    pad_id: int = 0
    temperature: float = 1.0
    """Divides the logits; 0: the most probable token."""
    top_p: float = 1.0
    top_k: int = 0
    banned_ids: frozenset[int] = frozenset()
    """Never drawn."""
    batch_tokens: int = 65_536
    """Most tokens (padding and room for completions included) in one batch."""


class Sample(NamedTuple):
    """One completion."""

    token_ids: list[int]
    logprobs: list[float]
    """Natural log-probability of each token: softmax of logits / temperature over the whole
    vocabulary, as the trainer computes it, whatever top_p and top_k left out. vLLM's are over what
    they left in, and so a little higher."""
    ended: bool
    """Whether it ended by a stop token rather than by its length."""


class Sampler(Protocol):
    """Draws completions from the current policy; from the seeds alone, except vLLM on a GPU."""

    def sample(
        self, prompts: Sequence[TokenIds], *, seeds: Sequence[int], n: int, plan: SamplingPlan
    ) -> list[list[Sample]]:
        """Return ``n`` completions of each prompt, in order; one seed per prompt."""
        ...

    def sync(self, policy: Any) -> None:
        """Take over the policy's weights."""
        ...

    def close(self) -> None:
        """Free what the sampler holds."""
        ...


def draw_tokens(logits: Tensor, uniform: Tensor, plan: SamplingPlan) -> tuple[Tensor, Tensor]:
    """Return drawn token ids and their log-probabilities, both (B,).

    Args:
        logits: (B, V).
        uniform: numbers in [0, 1), (B,).
        plan: temperature, top_p, top_k, banned tokens.
    """
    logits = logits.float()
    if plan.banned_ids:
        logits[:, list(plan.banned_ids)] = -math.inf
    if plan.temperature <= 0:
        logprobs = logits.log_softmax(-1)
        tokens = logprobs.argmax(-1)
    else:
        logprobs = (logits / plan.temperature).log_softmax(-1)
        cumulative = _kept(logprobs, plan).cumsum(-1)
        whole = cumulative[:, -1]
        # Below the whole even after rounding, so that the token found has a probability above 0.
        point = torch.minimum(uniform * whole, torch.nextafter(whole, torch.zeros_like(whole)))
        tokens = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]
    return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _kept(logprobs: Tensor, plan: SamplingPlan) -> Tensor:
    """Return probabilities with what top_k and top_p leave out at 0, (B, V)."""
    probabilities = logprobs.exp()
    if plan.top_k and plan.top_k < probabilities.shape[-1]:
        least = probabilities.topk(plan.top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if plan.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        share = ordered.cumsum(-1) / ordered.sum(-1, keepdim=True)
        # The token that crosses the threshold stays.
        beyond = share - ordered / ordered.sum(-1, keepdim=True) >= plan.top_p
        probabilities = probabilities.masked_fill(
            torch.zeros_like(beyond).scatter(-1, order, beyond), 0.0
        )
    return probabilities


class CachedSampler:
    """Decodes with the policy module itself; nothing to synchronise."""

    def __init__(self, model: Any):
        self.model = model

    def sync(self, policy: Any) -> None:
        """Decode with this module from now on."""
        self.model = policy

    def close(self) -> None:
        """Hold nothing."""

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[TokenIds], *, seeds: Sequence[int], n: int, plan: SamplingPlan
    ) -> list[list[Sample]]:
        """Return ``n`` completions of each prompt, in order; one seed per prompt."""
        uniform = torch.cat(
            [
                torch.rand(n, plan.max_tokens, generator=torch.Generator().manual_seed(seed))
                for seed in seeds
            ]
        )
        found: dict[int, list[Sample]] = {}
        with _ready_to_decode(self.model):
            for batch in _batches(prompts, n, plan):
                rows = [index * n + copy for index in batch for copy in range(n)]
                samples = self._decode([prompts[index] for index in batch], n, plan, uniform[rows])
                for place, index in enumerate(batch):
                    found[index] = samples[place * n : (place + 1) * n]
        return [found[index] for index in range(len(prompts))]

    def _decode(
        self, prompts: list[TokenIds], n: int, plan: SamplingPlan, uniform: Tensor
    ) -> list[Sample]:
        """Decode one batch; ``uniform`` is (len(prompts) * n, max_tokens)."""
        device = next(self.model.parameters()).device
        uniform = uniform.to(device)
        state = _prefill(self.model, prompts, n, plan, device)
        stops = torch.tensor(sorted(plan.stop_ids), device=device)
        tokens = torch.full(uniform.shape, plan.pad_id, device=device)
        logprobs = torch.zeros(uniform.shape, device=device)
        lengths = torch.full((len(uniform),), plan.max_tokens, device=device)
        ended = torch.zeros(len(uniform), dtype=torch.bool, device=device)
        alive = torch.arange(len(uniform), device=device)  # row of the result behind each batch row
        for step in range(plan.max_tokens):
            drawn, logprob = draw_tokens(state.logits, uniform[alive, step], plan)
            tokens[alive, step], logprobs[alive, step] = drawn, logprob
            stopped = torch.isin(drawn, stops) & ~ended[alive]
            lengths[alive[stopped]] = step + 1
            ended[alive] |= stopped
            open_rows = (~ended[alive]).nonzero()[:, 0]
            if not len(open_rows) or step + 1 == plan.max_tokens:
                break
            if len(open_rows) <= len(alive) * 3 // 4:  # fewer rows are worth a copy of the cache
                alive, drawn = alive[open_rows], drawn[open_rows]
                state = state.select(open_rows)
            state = state.advance(self.model, drawn)
        return _samples(tokens, logprobs, lengths, ended)


@contextlib.contextmanager
def _ready_to_decode(model: Any) -> Iterator[None]:
    """Put the model into eval mode, with layers that were compiled for training left as they are.

    Every token has a cache of another length: compiled layers would be compiled again for each.
    """
    training = model.training
    compiled = {
        module: module._compiled_call_impl
        for module in model.modules()
        if module._compiled_call_impl is not None
    }
    model.eval()
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call
        model.train(training)


def _batches(prompts: Sequence[TokenIds], n: int, plan: SamplingPlan) -> Iterator[list[int]]:
    """Yield indices of prompts of similar length whose padded batch fits the budget."""
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda index: (len(prompts[index]), index)):
        rows = (len(batch) + 1) * n
        if batch and rows * (len(prompts[index]) + plan.max_tokens) > plan.batch_tokens:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@dataclass(slots=True)
class _State:
    """A batch between two tokens."""

    logits: Tensor
    """(B, V) logits of the next token."""
    cache: Any
    attention: Tensor | None
    """(B, L) mask of left padding; None where nothing is padded."""
    positions: Tensor
    """(B,) position of the next token."""

    def select(self, rows: Tensor) -> _State:
        self.cache.batch_select_indices(rows)
        attention = None if self.attention is None else self.attention[rows]
        return _State(self.logits, self.cache, attention, self.positions[rows])

    def advance(self, model: Any, drawn: Tensor) -> _State:
        attention = self.attention
        if attention is not None:
            attention = torch.cat([attention, attention.new_ones(len(drawn), 1)], dim=1)
        output = model(
            input_ids=drawn[:, None],
            attention_mask=attention,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return _State(output.logits[:, -1], self.cache, attention, self.positions + 1)


def _prefill(
    model: Any, prompts: list[TokenIds], n: int, plan: SamplingPlan, device: torch.device
) -> _State:
    """Run the prompts once and repeat their cache for ``n`` completions each."""
    width = max(map(len, prompts))
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    ids = torch.full((len(prompts), width), plan.pad_id)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
    mask = torch.arange(width)[None] >= width - lengths[:, None]
    attention = None if bool(mask.all()) else mask.long().to(device)
    output = model(
        input_ids=ids.to(device),
        attention_mask=attention,
        position_ids=(mask.cumsum(1) - 1).clamp(min=0).to(device),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = output.past_key_values
    if n > 1:
        cache.batch_repeat_interleave(n)
    return _State(
        output.logits[:, -1].repeat_interleave(n, 0),
        cache,
        None if attention is None else attention.repeat_interleave(n, 0),
        lengths.repeat_interleave(n).to(device),
    )


def _samples(tokens: Tensor, logprobs: Tensor, lengths: Tensor, ended: Tensor) -> list[Sample]:
    rows = zip(tokens.tolist(), logprobs.tolist(), lengths.tolist(), ended.tolist(), strict=True)
    return [Sample(ids[:length], logp[:length], stop) for ids, logp, length, stop in rows]


class GenerateSampler(CachedSampler):
    """Decodes by the model's own ``generate``: for architectures with a cache of their own kind."""

    def _decode(
        self, prompts: list[TokenIds], n: int, plan: SamplingPlan, uniform: Tensor
    ) -> list[Sample]:
        device = next(self.model.parameters()).device
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), plan.pad_id)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.repeat_interleave(n, 0).to(device), mask.repeat_interleave(n, 0).to(device)
        draws = _Draws(uniform.to(device), plan)
        output = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=plan.max_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=sorted(plan.stop_ids) or None,
            pad_token_id=plan.pad_id,
            logits_processor=[draws],
        )
        tokens = output[:, width:]
        logprobs = torch.stack(draws.logprobs, dim=1)
        stopped = torch.isin(tokens, torch.tensor(sorted(plan.stop_ids), device=device))
        ended = stopped.any(1)
        length = tokens.shape[1]
        lengths = torch.where(ended, stopped.int().argmax(1) + 1, length)
        return _samples(tokens, logprobs, lengths, ended)


class _Draws:
    """A logits processor that draws the token itself, so that ``generate`` has no choice left."""

    def __init__(self, uniform: Tensor, plan: SamplingPlan):
        self.uniform = uniform
        self.plan = plan
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = len(self.logprobs)
        tokens, logprobs = draw_tokens(scores.clone(), self.uniform[:, step], self.plan)
        self.logprobs.append(logprobs)
        only = torch.full_like(scores, -math.inf)
        return only.scatter(1, tokens[:, None], 0.0)
