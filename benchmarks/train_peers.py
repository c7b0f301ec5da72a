"""The other side of the training benchmarks: TRL's trainers, and RRHF as its authors compute it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from train_work import build_model, word_tokenizer
from transformers import TrainerCallback

from train.data import Group

__all__ = ["authors_rrhf_loss", "trl_dpo", "trl_reward"]


def _words(ids: Sequence[int]) -> str:
    return " ".join(f"w{token}" for token in ids)


def _common(batch: int, steps: int, best: bool, device: str) -> dict[str, Any]:
    return {
        "output_dir": tempfile.mkdtemp(),
        "per_device_train_batch_size": batch,
        "max_steps": steps,
        "learning_rate": 1e-6,
        "max_length": 2048,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10_000,
        "disable_tqdm": True,
        "gradient_checkpointing": not best,
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "dataloader_num_workers": 2 if device == "cuda" else 0,
    }


def trl_dpo(
    shape: str,
    groups: Sequence[Group],
    *,
    batch: int,
    steps: int,
    best: bool,
    attention: str,
    device: str,
    callback: TrainerCallback,
) -> Any:
    """Return a TRL DPOTrainer on the same token ids, checked.

    ``best``: bfloat16 weights, no checkpointing, reference precomputed; otherwise TRL's defaults
    (float32 weights under autocast, checkpointing, live reference).
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    dtype = torch.bfloat16 if best and device == "cuda" else torch.float32
    model = build_model(shape, dtype=dtype, device=device, attn_implementation=attention)
    folder = tempfile.mkdtemp()
    if not best:  # the live reference is loaded by the model's name
        model.save_pretrained(folder)
        model = folder
    rows = [
        {
            "prompt": _words(group.prompt_ids),
            "chosen": " " + _words(group.completions[0][:-1]),
            "rejected": " " + _words(group.completions[1][:-1]),
        }
        for group in groups[: batch * steps]
    ]
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(precompute_ref_log_probs=best, **_common(batch, steps, best, device)),
        processing_class=word_tokenizer(),
        train_dataset=Dataset.from_list(rows),
        callbacks=[callback],
    )
    for group, row in zip(groups, trainer.train_dataset, strict=False):
        assert row["prompt_ids"] == list(group.prompt_ids), "TRL sees another prompt"
        for ids, name in zip(group.completions, ("chosen_ids", "rejected_ids"), strict=True):
            assert row[name] == list(ids), f"TRL sees other {name}"
    return trainer


def trl_reward(
    shape: str,
    groups: Sequence[Group],
    *,
    batch: int,
    steps: int,
    best: bool,
    attention: str,
    device: str,
    callback: TrainerCallback,
) -> Any:
    """Return a TRL RewardTrainer on the same token ids."""
    from datasets import Dataset
    from trl import RewardConfig, RewardTrainer

    dtype = torch.bfloat16 if best and device == "cuda" else torch.float32
    model = build_model(
        shape, dtype=dtype, device=device, kind="reward", attn_implementation=attention
    )
    rows = [
        {
            "chosen_ids": np.concatenate([group.prompt_ids, group.completions[0]]).tolist(),
            "rejected_ids": np.concatenate([group.prompt_ids, group.completions[1]]).tolist(),
        }
        for group in groups[: batch * steps]
    ]
    return RewardTrainer(
        model=model,
        args=RewardConfig(**_common(batch, steps, best, device)),
        processing_class=word_tokenizer(),
        train_dataset=Dataset.from_list(rows),
        callbacks=[callback],
    )


def authors_rrhf_loss(model: Any, group: Group) -> torch.Tensor:
    """Return RRHF's loss of one prompt as the authors' trainer computes it (arXiv 2304.05302).

    One prompt per batch, all candidates padded to the longest with the prompt repeated, full
    log-softmax over the vocabulary; the paper's weight of 1 on the ranking term.
    """
    device = next(model.parameters()).device
    rows = [np.concatenate([group.prompt_ids, ids]) for ids in group.completions]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.from_numpy(row.astype(np.int64))
        mask[place, : len(row)] = 1
    ids, mask = ids.to(device), mask.to(device)
    logits = model(input_ids=ids, attention_mask=mask).logits
    logprobs = F.log_softmax(logits.float(), dim=-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    answer = mask[:, 1:].clone()
    answer[:, : len(group.prompt_ids) - 1] = 0
    sums = (logprobs * answer).sum(1)
    means = sums / answer.sum(1)
    scores = torch.tensor(group.scores, device=device)
    worse = scores[:, None] < scores[None]
    rank = torch.where(worse, (means[:, None] - means[None]).clamp(min=0), 0.0).sum()
    return rank - sums[scores.argmax()]
