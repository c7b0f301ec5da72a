"""Groups of completions packed into rows: a prompt once, each completion seeing only it and itself.

A row is one long sequence. Each group's prompt stands in it once, followed by its completions,
whose positions restart right after the prompt; so each completion is computed as if it stood alone
behind its prompt. ``PackedBatch`` is one row with everything a loss needs to read it back: which
position predicts which completion token, which completion a token belongs to, the last token of
each completion, and the pairs, scores and ranks of the rows' labels.

Nothing here knows about models, kernels or losses; ``train/attention.py`` turns ``extents`` into a
mask, ``train/logprobs.py`` owns the label shift.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from train.data import Group
from train.logprobs import predictor_positions

__all__ = [
    "BlockLayout",
    "GroupLayout",
    "PackedBatch",
    "Run",
    "StepPlan",
    "group_tokens",
    "pack_groups",
    "pack_rows",
    "plan_epoch",
]


class Run(NamedTuple):
    """A stretch of a row: a completion (or document) and the shared prompt that it may read.

    All four are positions in the row; ``[start, end)`` is causal within itself and sees all of
    ``[prompt_start, prompt_end)``, which is empty for a prompt itself.
    """

    start: int
    end: int
    prompt_start: int
    prompt_end: int


class BlockLayout(NamedTuple):
    """Blocks of keys per block of queries and the reverse, as a FlexAttention block mask has them.

    Each count is (1, 1, blocks) int32, each list of indices (1, 1, blocks, blocks) int32; ``full``
    blocks are allowed as a whole.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor
    full_kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor
    full_q_num_blocks: Tensor
    full_q_indices: Tensor


class GroupLayout(NamedTuple):
    """Stretches of the row that attend within themselves: sizes, and masks unless just causal."""

    sizes: tuple[int, ...]
    masks: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """One packed row of S tokens holding C completions with T counted completion tokens, G groups.

    Completions are numbered in the order of ``groups``, then of each group's completions; counted
    tokens in the order of completions, then of position. ``to`` moves all tensors.
    """

    input_ids: Tensor
    """(S,) token ids; padding at the end only."""
    position_ids: Tensor
    """(S,) positions; they restart after the prompt for every completion."""
    extents: Tensor
    """(3, S) int32, what each position may read of the row, itself and earlier only: everything
    from extents[0] on, and the shared prompt [extents[1], extents[2])."""
    runs: tuple[Run, ...]
    """The same as stretches, in order, without the padding."""
    predictors: Tensor
    """(T,) position whose hidden state predicts the token."""
    targets: Tensor
    """(T,) id of the token."""
    owners: Tensor
    """(T,) completion that the token belongs to."""
    places: Tensor
    """(T,) place of the token within its completion, from 0."""
    lengths: Tensor
    """(C,) counted tokens of each completion."""
    last_tokens: Tensor
    """(C,) position of each completion's last token."""
    completion_groups: Tensor
    """(C,) which group of the batch a completion belongs to."""
    pairs: Tensor
    """(P, 2) completions (chosen, rejected) of each labelled pair."""
    pair_p: Tensor
    """(P,) P(chosen preferred)."""
    pair_weights: Tensor
    """(P,) weight of each pair."""
    pair_ties: Tensor
    """(P,) bool, the judge called it a tie."""
    pair_margins: Tensor
    """(P,) strength of the preference, >= 0."""
    scores: Tensor
    """(C,) score of each completion; NaN where there is none."""
    ranks: Tensor
    """(C,) rank of each completion within its group, 0 best, ties share one; -1: unranked."""
    ref_logps: Tensor
    """(C,) reference log-probability of each completion; NaN where it is not known yet."""
    ref_logprobs: Tensor
    """(T,) the same per counted token, or (0,) when not known for all."""
    groups: tuple[int, ...]
    """Index of each group, in the sequence given to ``plan_epoch`` or ``pack_groups``."""
    processed_tokens: int
    """Tokens in the row, padding not counted."""
    real_tokens: int
    """The same work counted as others count it: a prompt once per completion."""
    counts: bool = True
    """False for a filler that keeps processes in step: its loss must be multiplied by 0."""
    layout: Any = None
    """What the attention kernel needs of this row; None: the dense mask says it all."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch with all tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """Return the batch in page-locked memory, from which copies to the GPU do not block."""
        return self._map(lambda tensor: tensor.pin_memory())

    def with_layout(self, layout: Any) -> Self:
        """Return the batch with its attention layout."""
        return dataclasses.replace(self, layout=layout)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Self:
        values = ((entry.name, getattr(self, entry.name)) for entry in dataclasses.fields(self))
        moved = {name: change(value) for name, value in values if isinstance(value, Tensor)}
        return dataclasses.replace(self, **moved, layout=_map_nested(self.layout, change))

    def __len__(self) -> int:
        """Return the number of completions."""
        return int(self.lengths.shape[0])


def _map_nested(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``change`` to the tensors in named tuples and tuples."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [_map_nested(part, change) for part in value]
        return type(value)(*parts) if type(value) is not tuple else tuple(parts)
    return value


class StepPlan(NamedTuple):
    """One optimiser step: the groups of each row, and the number of those that are fillers."""

    rows: list[list[int]]
    fillers: int = 0


def group_tokens(group: Group, *, share_prompt: bool = True) -> int:
    """Return how many tokens a group takes in a row."""
    prompts = 1 if share_prompt else len(group.completions)
    return prompts * len(group.prompt_ids) + sum(len(ids) for ids in group.completions)


def pack_rows(sizes: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Return rows of indices whose sizes sum to at most ``row_tokens`` (first fit, largest first).

    Rows keep the items' order within themselves; an item larger than a row gets a row to itself.
    """
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    rows: list[list[int]] = []
    free: list[int] = []
    for index in order:
        for row, space in enumerate(free):
            if sizes[index] <= space:
                rows[row].append(index)
                free[row] -= sizes[index]
                break
        else:
            rows.append([index])
            free.append(row_tokens - sizes[index])
    return [sorted(row) for row in rows]


def plan_epoch(
    sizes: Sequence[int],
    *,
    batch_size: int,
    row_tokens: int,
    seed: int,
    epoch: int,
    processes: int = 1,
    shuffle: bool = True,
) -> list[StepPlan]:
    """Return the optimiser steps of one epoch, the same on every process.

    Args:
        sizes: tokens of each group.
        batch_size: groups per step over all processes; 0: as many as fill one row per process.
        row_tokens: tokens per row.
        seed: with ``epoch`` it decides the order.
        epoch: number of the epoch, from 0.
        processes: each step's rows are a multiple of this, filled up with fillers if need be.
        shuffle: False keeps the order given (evaluation).
    """
    order = np.arange(len(sizes))
    if shuffle:
        np.random.default_rng((seed, epoch)).shuffle(order)
    plans = []
    for step in _steps(order, sizes, batch_size, row_tokens * processes):
        packed = pack_rows([sizes[index] for index in step], row_tokens)
        rows = [[step[place] for place in row] for row in packed]
        fillers = -len(rows) % processes
        plans.append(StepPlan(rows + rows[:1] * fillers, fillers))
    return plans


def _steps(
    order: np.ndarray, sizes: Sequence[int], batch_size: int, budget: int
) -> list[list[int]]:
    if batch_size:
        return [
            order[start : start + batch_size].tolist() for start in range(0, len(order), batch_size)
        ]
    steps: list[list[int]] = []
    space = 0
    for index in order.tolist():
        if not steps or sizes[index] > space:
            steps.append([])
            space = budget
        steps[-1].append(index)
        space -= sizes[index]
    return steps


def pack_groups(
    groups: Sequence[Group],
    *,
    indices: Sequence[int] | None = None,
    share_prompt: bool = True,
    multiple: int = 1,
    pad_id: int = 0,
    counts: bool = True,
) -> PackedBatch:
    """Pack groups into one row.

    Args:
        groups: at least one; every prompt has at least one token.
        indices: what to call the groups in ``PackedBatch.groups``; None: 0, 1, 2 ...
        share_prompt: False repeats the prompt before every completion (the same numbers, slower).
        multiple: the row is padded to a multiple of this.
        pad_id: token id of the padding, which nothing reads.
        counts: False marks a filler.
    """
    layout = _Layout()
    for group in groups:
        layout.add(group, share_prompt)
    return layout.finish(
        groups,
        indices=tuple(range(len(groups)) if indices is None else indices),
        multiple=multiple,
        pad_id=pad_id,
        counts=counts,
    )


class _Layout:
    """Collects the pieces of a row; ``finish`` makes the tensors."""

    def __init__(self) -> None:
        self.size = 0
        self.runs: list[Run] = []
        self.pieces: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.tokens: list[np.ndarray] = []  # positions of counted completion tokens
        self.places: list[np.ndarray] = []
        self.firsts: list[int] = []  # where each completion starts
        self.prompt_lasts: list[int] = []  # last token of each completion's prompt
        self.last_tokens: list[int] = []
        self.real_tokens = 0

    def add(self, group: Group, share_prompt: bool) -> None:
        prompt = np.asarray(group.prompt_ids, dtype=np.int64)
        if not len(prompt):
            raise ValueError(
                f"group {group.prompt_id!r} has an empty prompt: nothing predicts its first token"
            )
        span = (0, 0)
        for number, completion in enumerate(group.completions):
            if number == 0 or not share_prompt:
                start = self._append(prompt, 0, self.size, self.size)
                span = (start, start + len(prompt))
            ids = np.asarray(completion, dtype=np.int64)
            start = self._append(ids, len(prompt), *span)
            mask = group.loss_masks[number] if group.loss_masks else None
            counted = np.arange(len(ids)) if mask is None else np.flatnonzero(mask)
            self.tokens.append(start + counted)
            self.places.append(counted)
            self.firsts.append(start)
            self.prompt_lasts.append(span[1] - 1)
            self.last_tokens.append(start + len(ids) - 1)
            self.real_tokens += len(prompt) + len(ids)

    def _append(self, ids: np.ndarray, position: int, prompt_start: int, prompt_end: int) -> int:
        start = self.size
        self.size += len(ids)
        self.pieces.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.runs.append(Run(start, self.size, prompt_start, prompt_end))
        return start

    def finish(
        self,
        groups: Sequence[Group],
        *,
        indices: tuple[int, ...],
        multiple: int,
        pad_id: int,
        counts: bool,
    ) -> PackedBatch:
        padding = -self.size % multiple
        rows = self.size + padding
        lengths = np.array([len(tokens) for tokens in self.tokens])
        tokens = torch.from_numpy(np.concatenate(self.tokens))
        owners = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
        input_ids = torch.from_numpy(
            np.concatenate([*self.pieces, np.full(padding, pad_id, dtype=np.int64)])
        )
        return PackedBatch(
            input_ids=input_ids,
            position_ids=torch.from_numpy(
                np.concatenate([*self.positions, np.zeros(padding, dtype=np.int64)])
            ),
            extents=_extents(self.runs, rows),
            runs=tuple(self.runs),
            predictors=predictor_positions(
                tokens,
                firsts=torch.tensor(self.firsts)[owners],
                prompt_lasts=torch.tensor(self.prompt_lasts)[owners],
            ),
            targets=input_ids[tokens],
            owners=owners,
            places=torch.from_numpy(np.concatenate(self.places)),
            lengths=torch.from_numpy(lengths),
            last_tokens=torch.tensor(self.last_tokens),
            **_labels(groups),
            groups=indices,
            processed_tokens=self.size,
            real_tokens=self.real_tokens,
            counts=counts,
        )


def _extents(runs: Sequence[Run], rows: int) -> Tensor:
    extents = np.tile(np.arange(rows, dtype=np.int32), (3, 1))  # padding reads only itself
    for start, end, prompt_start, prompt_end in runs:
        extents[0, start:end] = start
        extents[1, start:end] = prompt_start
        extents[2, start:end] = prompt_end
    return torch.from_numpy(extents)


def _labels(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Return the tensors that say what the judge thought of the completions."""
    owner: list[int] = []
    pairs: list[tuple[int, int, float, float, bool, float]] = []
    scores: list[float] = []
    ranks: list[int] = []
    ref_logps: list[float] = []
    for number, group in enumerate(groups):
        base = len(owner)
        count = len(group.completions)
        owner += [number] * count
        pairs += [(base + p.chosen, base + p.rejected, *p[2:]) for p in group.pairs]
        known = group.scores or (None,) * count
        scores += [float("nan") if score is None else score for score in known]
        rank = dict.fromkeys(range(count), -1)
        rank |= {member: place for place, tied in enumerate(group.ranking) for member in tied}
        ranks += [rank[member] for member in range(count)]
        ref_logps += list(group.ref_logps or (float("nan"),) * count)
    return {
        "completion_groups": torch.tensor(owner),
        "pairs": torch.tensor([pair[:2] for pair in pairs], dtype=torch.long).reshape(-1, 2),
        "pair_p": torch.tensor([pair[2] for pair in pairs], dtype=torch.float32),
        "pair_weights": torch.tensor([pair[3] for pair in pairs], dtype=torch.float32),
        "pair_ties": torch.tensor([pair[4] for pair in pairs], dtype=torch.bool),
        "pair_margins": torch.tensor([pair[5] for pair in pairs], dtype=torch.float32),
        "scores": torch.tensor(scores, dtype=torch.float32),
        "ranks": torch.tensor(ranks, dtype=torch.long),
        "ref_logps": torch.tensor(ref_logps, dtype=torch.float32),
        "ref_logprobs": _reference_tokens(groups),
    }


def _reference_tokens(groups: Sequence[Group]) -> Tensor:
    if not all(group.ref_logprobs for group in groups):
        return torch.empty(0, dtype=torch.float32)
    parts = [part for group in groups for part in group.ref_logprobs]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))
