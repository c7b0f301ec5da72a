"""Score held-out groups with one or several reward models, and hand the figures to the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train.data import Group
from train.reward_model import RewardModel, Rule, combine_rewards
from train.reward_report import (
    ScoredCompletions,
    ScoredPairs,
    reliability_plot,
    reward_report,
)

__all__ = ["evaluate_reward_models", "invariance"]

CHECKED = 16
"""Completions that the invariance check scores in different company."""


def evaluate_reward_models(
    members: Sequence[RewardModel],
    groups: Sequence[Group],
    *,
    rule: Rule = "mean",
    uwo_lambda: float = 0.5,
    plot: Path | None = None,
) -> dict[str, Any]:
    """Return the report of a reward model, or of an ensemble with its members beside it.

    Args:
        members: one or more; their tokenizers must be the one that made the groups.
        groups: tokenised, with the judge's labels as given (neither hardened nor smoothed).
        rule: how the ensemble scores.
        uwo_lambda: of rule ``uwo``.
        plot: where to draw the reliability plot.
    """
    rewards = torch.stack([torch.cat(member.score_groups(groups)) for member in members])
    combined = combine_rewards(rewards, rule=rule, uwo_lambda=uwo_lambda)
    report = _report(combined, groups)
    report["invariance"] = invariance(members[0], groups)
    if len(members) > 1:
        report["ensemble"] = {
            "rule": rule,
            "members": [_report(one, groups)["accuracy"] for one in rewards],
            "disagreement": float(rewards.std(dim=0, correction=0).mean()),
        }
    if plot is not None:
        reliability_plot(report, plot)
    return report


def _report(rewards: Tensor, groups: Sequence[Group]) -> dict[str, Any]:
    values = rewards.double().numpy()
    numbers = _prompt_numbers(groups)
    lengths = [len(ids) for group in groups for ids in group.completions]
    prompts = [
        number for number, group in zip(numbers, groups, strict=True) for _ in group.completions
    ]
    ranks = [rank for group in groups for rank in _ranks(group)]
    pairs: list[tuple[float, ...]] = []
    base = 0
    for number, group in zip(numbers, groups, strict=True):
        for pair in group.pairs:
            a, b = base + pair.chosen, base + pair.rejected
            row = (values[a] - values[b], pair.p, pair.tie, pair.margin, pair.weight)
            pairs.append((*row, lengths[a] - lengths[b], number))
        base += len(group.completions)
    columns = np.array(pairs, dtype=float).reshape(-1, 7).T
    return reward_report(
        ScoredPairs(
            differences=columns[0],
            p_chosen=columns[1],
            ties=columns[2].astype(bool),
            margins=columns[3],
            weights=columns[4],
            length_differences=columns[5],
            prompts=columns[6].astype(int),
        ),
        ScoredCompletions(
            rewards=values,
            lengths=np.array(lengths, dtype=float),
            prompts=np.array(prompts),
            ranks=np.array(ranks),
        ),
    )


def _prompt_numbers(groups: Sequence[Group]) -> list[int]:
    """Return a number per group, equal for groups of one prompt."""
    known: dict[bytes, int] = {}
    keys = (np.asarray(group.prompt_ids, dtype=np.int64).tobytes() for group in groups)
    return [known.setdefault(key, len(known)) for key in keys]


def _ranks(group: Group) -> list[int]:
    place = {member: rank for rank, tied in enumerate(group.ranking) for member in tied}
    return [place.get(member, -1) for member in range(len(group.completions))]


def invariance(model: RewardModel, groups: Sequence[Group]) -> dict[str, Any]:
    """Return how far scores move with company and padding: largest absolute differences.

    The same completions are scored in packed rows, one by one, and as transformers does it, padded
    on the right and on the left in one batch. ``holds`` allows for rounding: 1e-4 in float32, 5% of
    the scores' spread in half precision.
    """
    rows: list[Group] = []
    for group in groups:
        room = CHECKED - sum(len(row.completions) for row in rows)
        if room > 0:
            whole = tuple(group.completions[:room])
            rows.append(
                Group(prompt_id=group.prompt_id, prompt_ids=group.prompt_ids, completions=whole)
            )
    sequences = [[*map(int, row.prompt_ids), *map(int, c)] for row in rows for c in row.completions]
    packed = torch.cat(model.score_groups(rows))
    alone = torch.cat([_padded(model, [sequence], "right") for sequence in sequences])
    right, left = (_padded(model, sequences, side) for side in ("right", "left"))
    full = next(model.model.parameters()).dtype == torch.float32
    spread = float(packed.std(correction=0))
    tolerance = 1e-4 * max(1.0, spread) if full else 0.05 * max(1.0, spread)
    figures = {
        "packed_against_alone": float((packed - alone).abs().max()),
        "padded_right_against_alone": float((right - alone).abs().max()),
        "padded_left_against_alone": float((left - alone).abs().max()),
    }
    return {
        **figures,
        "completions": len(sequences),
        "tolerance": tolerance,
        "holds": max(figures.values()) <= tolerance,
    }


def _padded(model: RewardModel, sequences: Sequence[Sequence[int]], side: str) -> Tensor:
    """Return scores by transformers' own forward pass, which looks for the last token itself."""
    width = max(map(len, sequences))
    pad = model.tokenizer.pad_token_id
    ids = torch.full((len(sequences), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        where = slice(width - len(sequence), None) if side == "left" else slice(len(sequence))
        ids[row, where] = torch.tensor(sequence)
        mask[row, where] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model.model(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            position_ids=positions.to(model.device),
        ).logits
    return logits[:, 0].float().cpu()
