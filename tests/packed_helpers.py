"""Tiny models and ragged groups for tests of the packed engine, and the unpacked computation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from train.data import Group, Pair
from train.models import enable_packing

VOCABULARY = 97
SHAPES: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    "smollm2": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": False, "head_dim": 16}),
}


def make_model(kind: str = "smollm2", dtype: torch.dtype = torch.float32) -> Any:
    """Return a random model of 2 layers with grouped queries, ready for packed rows."""
    config_class, model_class, extra = SHAPES[kind]
    torch.manual_seed(0)
    model = model_class(
        config_class(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=3,
            num_key_value_heads=1,
            max_position_embeddings=256,
            **extra,
        )
    ).to(dtype)
    enable_packing(model)
    return model


def ragged_groups(count: int = 5) -> list[Group]:
    """Return groups of 1 to 4 completions of 1 to 17 tokens, with soft pairs and ties."""
    random = torch.Generator().manual_seed(1)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, VOCABULARY, (length,), generator=random).tolist()

    groups = []
    for number in range(count):
        size = (2, 1, 4, 3, 2)[number % 5]
        pairs = [Pair(i, i + 1, 0.5 + 0.1 * i, 1.0 + number, i == 0) for i in range(size - 1)]
        groups.append(
            Group(
                prompt_id=str(number),
                prompt_ids=tokens(1 + 7 * number),
                completions=[tokens((1, 9, 4, 17)[(number + i) % 4]) for i in range(size)],
                pairs=tuple(pairs),
                ranking=tuple((i,) for i in range(size)),
                scores=tuple(float(-i) for i in range(size)),
            )
        )
    return groups


def unpacked_logps(model: Any, groups: list[Group]) -> Tensor:
    """Return each completion's log-probability from a forward pass of its own, (C,)."""
    sums = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([*group.prompt_ids, *completion])
            logprobs = model(input_ids=ids[None]).logits[0].float().log_softmax(-1)
            first = len(group.prompt_ids) - 1
            picked = [logprobs[first + t, token] for t, token in enumerate(completion)]
            sums.append(torch.stack(picked).sum())
    return torch.stack(sums)


def relative(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm())
