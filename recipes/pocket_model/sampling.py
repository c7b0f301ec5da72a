"""Draws a trained policy's own replies, many conversations at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from feedback.records import Message
from recipes.pocket_model.chat import chat_text

__all__ = ["Drawn", "draw_replies"]

_EOS_ID = 1
_DROP_EVERY = 8
"""Steps between two removals of finished replies from the batch."""


class Drawn(NamedTuple):
    """One sampled reply; ``ended`` says that the model stopped by itself."""

    text: str
    ended: bool


def draw_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[Message]],
    *,
    batch: int,
    max_tokens: int = 64,
    seed: int = 0,
) -> list[Drawn]:
    """Sample one reply a prompt at temperature 1.0 with nothing cut from the distribution."""
    torch.manual_seed(seed)
    encoded = tokenizer.encode_batch(
        [chat_text(prompt, add_generation_prompt=True) for prompt in prompts]
    )
    order = sorted(range(len(prompts)), key=lambda place: len(encoded[place].ids))
    drawn: list[Drawn] = [Drawn("", False)] * len(prompts)
    for begin in range(0, len(order), batch):
        places = order[begin : begin + batch]
        replies = _draw(model, [encoded[place].ids for place in places], max_tokens)
        for place, tokens in zip(places, replies, strict=True):
            ended = tokens[-1] == _EOS_ID
            text = tokenizer.decode(tokens[:-1] if ended else tokens, skip_special_tokens=True)
            drawn[place] = Drawn(text.strip(), ended)
    return drawn


@torch.no_grad()
def _draw(model: Any, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Return the sampled tokens of each prompt, ``<eos>`` included; finished ones leave the batch."""
    from transformers import DynamicCache

    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros(len(prompts), width, dtype=torch.long)
    for line, tokens in enumerate(prompts):
        ids[line, width - len(tokens) :] = torch.tensor(tokens)
        mask[line, width - len(tokens) :] = 1
    ids, mask = ids.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    alive = torch.arange(len(prompts), device=model.device)
    out = torch.full((len(prompts), max_tokens), _EOS_ID, device=model.device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=model.device)
    cache = DynamicCache(config=model.config)
    for step in range(max_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        # The largest of logit + Gumbel noise is a sample of the softmax.
        noise = -torch.empty_like(logits, dtype=torch.float32).exponential_().log()
        drawn = (logits.float() + noise).argmax(-1)
        drawn[done] = _EOS_ID
        out[alive, step] = drawn
        done |= drawn == _EOS_ID
        if (step + 1) % _DROP_EVERY == 0:
            kept = (~done).nonzero()[:, 0]
            if not len(kept):
                break
            cache.batch_select_indices(kept)
            alive, mask, positions, drawn, done = (
                alive[kept],
                mask[kept],
                positions[kept],
                drawn[kept],
                done[kept],
            )
        ids = drawn[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    return [
        tokens[: tokens.index(_EOS_ID) + 1] if _EOS_ID in tokens else tokens
        for tokens in out.tolist()
    ]
