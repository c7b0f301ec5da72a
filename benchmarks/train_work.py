"""The work of the training benchmarks: model shapes, length mixes, and synthetic rows of them.

Speed depends on lengths and shapes, not on what the tokens say: token ids are drawn from a Zipf
distribution, lengths from log-normals with the means of the data sets that the mixes are named
after (HH-harmless: prompt 124, chosen 40, rejected 50 tokens; UltraFeedback: 170, 400, 400).
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from train.data import Group, Pair

__all__ = ["MIXES", "SHAPES", "Mix", "build_model", "clean", "make_groups", "word_tokenizer"]

VOCABULARY = 49_152
EOS = 2

SHAPES: dict[str, dict[str, int]] = {
    "362m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "1500m": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


@dataclass(frozen=True)
class Mix:
    """Mean lengths in tokens of prompt, chosen and rejected; spread is the log's deviation."""

    prompt: int
    chosen: int
    rejected: int
    spread: float
    longest_prompt: int
    longest_completion: int


MIXES = {
    "hh": Mix(124, 40, 50, 0.8, 600, 300),
    "uf": Mix(170, 400, 400, 0.6, 1000, 1200),
    "tiny": Mix(12, 6, 8, 0.6, 40, 30),
}


def make_groups(mix: Mix, count: int, *, completions: int = 2, seed: int = 0) -> list[Group]:
    """Return groups of ``completions``, best first; each ends in EOS. Two make a DPO pair."""
    random = np.random.default_rng(seed)

    def lengths(mean: int, longest: int, size: int) -> np.ndarray:
        # The mean of a log-normal is exp(mu + spread^2 / 2).
        drawn = random.lognormal(np.log(mean) - mix.spread**2 / 2, mix.spread, size)
        return np.clip(drawn.round(), 2, longest).astype(int)

    def tokens(length: int) -> np.ndarray:
        return (random.zipf(1.2, length) % (VOCABULARY - 3) + 3).astype(np.int32)

    prompts = lengths(mix.prompt, mix.longest_prompt, count)
    best = lengths(mix.chosen, mix.longest_completion, count)
    others = lengths(mix.rejected, mix.longest_completion, count * (completions - 1))
    groups = []
    for number in range(count):
        rest = others[number * (completions - 1) : (number + 1) * (completions - 1)]
        members = [
            np.append(tokens(length - 1), EOS).astype(np.int32) for length in (best[number], *rest)
        ]
        groups.append(
            Group(
                prompt_id=str(number),
                prompt_ids=tokens(prompts[number]),
                completions=members,
                pairs=tuple(Pair(0, other) for other in range(1, completions)),
                scores=tuple(float(-place) for place in range(completions)),
                ranking=tuple((place,) for place in range(completions)),
            )
        )
    return groups


def build_model(
    shape: str, *, dtype: torch.dtype, device: str, kind: str = "causal", **extra: Any
) -> Any:
    """Return a random Llama; the same weights for the same arguments."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=EOS,
        num_labels=1,
        **SHAPES[shape],
        **extra,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = (LlamaForCausalLM if kind == "causal" else LlamaForSequenceClassification)(config)
    return model.to(dtype)


def word_tokenizer() -> Any:
    """Return a tokenizer whose word ``w17`` is token 17, so that text and ids are the same work."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>"
    )


def clean(device: str) -> None:
    """Forget compiled code and free memory between jobs."""
    gc.collect()
    torch._dynamo.reset()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
