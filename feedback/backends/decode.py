"""Sampling text from a causal language model: one prefill per prompt, rows dropped as they end.

Each row draws from a random stream of its own, named by (seed, number): the result does not depend
on which other rows share the batch, up to the rounding of the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Drawn", "Generated", "generate"]

# Rows that ended are taken out of the batch once they are this share of it.
_DROP_SHARE = 0.2


class Drawn(NamedTuple):
    """One text to sample: which prompt, how, and the name of its random stream."""

    prompt: int
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    number: int = 0


@dataclass(slots=True)
class Generated:
    """One sampled text: ids without the end token, and how it ended."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str = "length"
    logp: float = 0.0
    """Sum of the model's own log-probabilities (temperature 1), the end token's included."""


def generate(
    model: Any, prompts: Sequence[list[int]], rows: Sequence[Drawn], *, stop_ids: set[int]
) -> tuple[list[Generated], Any]:
    """Sample one text per row, all in one batch.

    Returns:
        The texts, and the logits at the first generated position, (number of prompts, vocabulary).
    """
    import torch

    results = [Generated() for _ in rows]
    most = max(row.max_tokens for row in rows)
    past, first = _prefill(model, prompts, most)
    owner = torch.tensor([row.prompt for row in rows], device=first.device)
    past.batch_select_indices(owner)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=first.device)[owner]
    width = max(map(len, prompts))
    mask = torch.ones(len(rows), width + most, dtype=torch.long, device=first.device)
    mask[:, :width] = torch.arange(width, device=first.device) >= (width - lengths)[:, None]
    draws = torch.from_numpy(np.stack([_uniforms(row, most) for row in rows])).to(first.device)
    live = list(range(len(rows)))
    settings = _Settings.of(rows, first.device)
    logits = first[owner]
    for step in range(most):
        tokens, logps = settings.choose(logits, draws[:, step])
        ended = _record(results, rows, live, tokens.tolist(), logps.tolist(), stop_ids)
        if all(ended):
            break
        keep = [place for place, over in enumerate(ended) if not over]
        if len(keep) <= (1 - _DROP_SHARE) * len(live):
            index = torch.tensor(keep, device=first.device)
            past.batch_select_indices(index)
            mask, draws, lengths, tokens = mask[index], draws[index], lengths[index], tokens[index]
            settings = settings.select(index)
            live = [live[place] for place in keep]
        logits = (
            model(
                input_ids=tokens[:, None],
                attention_mask=mask[:, : width + step + 1],
                position_ids=(lengths + step)[:, None],
                past_key_values=past,
                use_cache=True,
            )
            .logits[:, -1]
            .float()
        )
    return results, first


def _record(
    results: list[Generated],
    rows: Sequence[Drawn],
    live: list[int],
    tokens: list[int],
    logps: list[float],
    stop_ids: set[int],
) -> list[bool]:
    """Note one step's tokens; return for each row of the batch whether it has ended."""
    ended = []
    for place, token, logp in zip(live, tokens, logps, strict=True):
        result = results[place]
        over = result.finish_reason == "stop" or len(result.ids) >= rows[place].max_tokens
        if not over:
            result.logp += logp
            if token in stop_ids:
                result.finish_reason = "stop"
                over = True
            else:
                result.ids.append(token)
                over = len(result.ids) >= rows[place].max_tokens
        ended.append(over)
    return ended


def _uniforms(row: Drawn, count: int) -> np.ndarray:
    stream = np.random.Generator(np.random.Philox(key=[row.seed % 2**64, row.number]))
    return stream.random(count, dtype=np.float32)


def _prefill(model: Any, prompts: Sequence[list[int]], most: int) -> tuple[Any, Any]:
    """Run the prompts, padded on the left; return their cache and the logits after each."""
    import torch

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for place, prompt in enumerate(prompts):
        ids[place, width - len(prompt) :] = torch.tensor(prompt)
        mask[place, width - len(prompt) :] = 1
    past = _new_cache(model, width + most)
    output = model(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0).to(model.device),
        past_key_values=past,
        use_cache=True,
        logits_to_keep=1,
    )
    return past, output.logits[:, -1].float()


class _Settings(NamedTuple):
    """Temperature and nucleus of each row of the batch; (R, 1) tensors."""

    temperature: Any
    top_p: Any
    greedy: bool
    nucleus: bool

    @classmethod
    def of(cls, rows: Sequence[Drawn], device: Any) -> _Settings:
        import torch

        return cls(
            torch.tensor([[row.temperature] for row in rows], device=device),
            torch.tensor([[row.top_p] for row in rows], device=device),
            all(row.temperature == 0 for row in rows),
            any(row.top_p < 1 for row in rows),
        )

    def select(self, index: Any) -> _Settings:
        return self._replace(temperature=self.temperature[index], top_p=self.top_p[index])

    def choose(self, logits: Any, draws: Any) -> tuple[Any, Any]:
        """Return the next token of each row and its log-probability under the model, both (R,)."""
        import torch

        logprobs = torch.log_softmax(logits, dim=-1)
        tokens = logprobs.argmax(dim=-1)
        if not self.greedy:
            sampled = self._sample(logprobs, draws)
            tokens = torch.where(self.temperature[:, 0] == 0, tokens, sampled)
        return tokens, logprobs.gather(1, tokens[:, None])[:, 0]

    def _sample(self, logprobs: Any, draws: Any) -> Any:
        """Invert each row's cumulative distribution at its draw."""
        import torch

        heat = torch.where(self.temperature == 0, 1.0, self.temperature)
        probs = torch.softmax(logprobs / heat, dim=-1)
        if self.nucleus:
            ordered, order = probs.sort(dim=-1, descending=True)
            # The token that crosses top_p is kept: the nucleus is never empty.
            outside = ordered.cumsum(dim=-1) - ordered >= self.top_p
            probs = probs.scatter(1, order, ordered.masked_fill(outside, 0.0))
        heaps = probs.cumsum(dim=-1)
        goal = draws[:, None] * heaps[:, -1:]
        return torch.searchsorted(heaps, goal, right=True)[:, 0].clamp(max=probs.shape[-1] - 1)


def _new_cache(model: Any, capacity: int) -> Any:
    """Return an empty cache: preallocated where every layer sees all, else the model's own."""
    from transformers import Cache, DynamicCache

    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(config, "sliding_window", None):
        return DynamicCache(config=model.config)
    layer = _growing_layer()
    return Cache(layers=[layer(capacity) for _ in range(config.num_hidden_layers)])


@cache
def _growing_layer() -> Any:
    """Return the class of a cache layer that is allocated once and written in place.

    The library's own layer copies all keys and values at every token.
    """
    import torch
    from transformers.cache_utils import DynamicLayer

    class GrowingLayer(DynamicLayer):
        def __init__(self, capacity: int):
            super().__init__()
            self.capacity = capacity
            self.length = 0

        def update(self, key_states: Any, value_states: Any, *_: Any, **__: Any) -> Any:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                shape = (*key_states.shape[:2], self.capacity)
                self.keys = key_states.new_empty((*shape, key_states.shape[-1]))
                self.values = value_states.new_empty((*shape, value_states.shape[-1]))
            start, self.length = self.length, self.length + key_states.shape[-2]
            self.keys[:, :, start : self.length] = key_states
            self.values[:, :, start : self.length] = value_states
            return self.keys[:, :, : self.length], self.values[:, :, : self.length]

        def get_seq_length(self) -> int:
            return self.length

        def batch_select_indices(self, indices: Any) -> None:
            for name in ("keys", "values"):
                old = getattr(self, name)
                new = old.new_empty((len(indices), *old.shape[1:]))
                new[:, :, : self.length] = torch.index_select(old[:, :, : self.length], 0, indices)
                setattr(self, name, new)

    return GrowingLayer
