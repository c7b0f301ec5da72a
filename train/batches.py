"""Optimiser steps as data: which groups, in which rows, with which totals to divide by.

One item of the loader is a whole optimiser step: the rows (micro-batches) that this process runs,
and the counts over all rows of all processes that normalise its loss. The order follows from seed
and epoch alone, so a resumed run sees the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from train.attention import AttentionKind, with_layout
from train.data import Group
from train.packing import PackedBatch, StepPlan, group_tokens, pack_groups, plan_epoch

__all__ = ["Counts", "Packing", "Step", "StepDataset", "step_loader"]

Counts = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How groups become rows."""

    batch_size: int
    """Groups per step over all processes; 0: as many as fill one row per process."""
    row_tokens: int
    attention: AttentionKind
    share_prompt: bool = True
    pack: bool = True
    """False: every group has a row of its own."""
    seed: int = 0
    shuffle: bool = True
    processes: int = 1
    process: int = 0
    """Which of the processes this is."""

    @property
    def multiple(self) -> int:
        """Rows are padded to a multiple of this: few lengths, so few compiled graphs."""
        if self.attention not in ("triton", "flex", "varlen"):
            return 1
        return max(128, self.row_tokens // 8 // 128 * 128) if self.pack else 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One optimiser step of one process."""

    batches: tuple[PackedBatch, ...]
    counts: Counts
    """Totals over all rows of all processes."""
    groups: int
    """Groups of all processes."""

    def pin_memory(self) -> Self:
        """Return the step in page-locked memory (called by the data loader)."""
        return type(self)(
            batches=tuple(batch.pin_memory() for batch in self.batches),
            counts=self.counts,
            groups=self.groups,
        )


class StepDataset(Dataset[Step]):
    """Steps by (epoch, number)."""

    def __init__(
        self, groups: Sequence[Group], packing: Packing, count: Callable[[Sequence[Group]], Counts]
    ):
        self.groups = groups
        self.packing = packing
        self.count = count
        self.sizes = [group_tokens(group, share_prompt=packing.share_prompt) for group in groups]
        self._plans: dict[int, list[StepPlan]] = {}

    def __len__(self) -> int:
        """Return the number of groups (what transformers calls examples)."""
        return len(self.groups)

    def plan(self, epoch: int) -> list[StepPlan]:
        """Return the steps of an epoch; every epoch has the same number of them."""
        if epoch not in self._plans:
            self._plans = {epoch: self._plan(epoch)}
        return self._plans[epoch]

    def _plan(self, epoch: int) -> list[StepPlan]:
        packing = self.packing
        plans = plan_epoch(
            self.sizes,
            batch_size=packing.batch_size,
            row_tokens=packing.row_tokens if packing.pack else 1,
            seed=packing.seed,
            # Filled rows differ in number from order to order: keep the rows, change their order.
            epoch=epoch if packing.batch_size else 0,
            processes=packing.processes,
            shuffle=packing.shuffle,
        )
        if not packing.batch_size and packing.shuffle:
            order = np.random.default_rng((packing.seed, epoch, 1)).permutation(len(plans))
            plans = [plans[place] for place in order]
        return plans

    def __getitem__(self, key: tuple[int, int]) -> Step:
        """Return step ``key = (epoch, number)`` as this process runs it."""
        epoch, number = key
        packing = self.packing
        plan = self.plan(epoch)[number]
        real = len(plan.rows) - plan.fillers
        members = [index for row in plan.rows[:real] for index in row]
        batches = [
            self._pack(row, counts=place < real)
            for place, row in enumerate(plan.rows)
            if place % packing.processes == packing.process
        ]
        return Step(
            batches=tuple(batches),
            counts=self.count([self.groups[index] for index in members]),
            groups=len(members),
        )

    def _pack(self, row: Sequence[int], *, counts: bool) -> PackedBatch:
        batch = pack_groups(
            [self.groups[index] for index in row],
            indices=row,
            share_prompt=self.packing.share_prompt,
            multiple=self.packing.multiple,
            counts=counts,
        )
        return with_layout(batch, self.packing.attention)


class _StepSampler(Sampler[list[tuple[int, int]]]):
    """Yields the steps of an epoch, one by one, as accelerate's batch samplers do."""

    drop_last = False
    batch_size = 1

    def __init__(self, dataset: StepDataset):
        self.dataset = dataset
        self.epoch = 0
        # transformers looks for set_epoch one level down, where accelerate's wrappers keep it.
        self.batch_sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose steps come next."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Return the number of steps of an epoch."""
        return len(self.dataset.plan(self.epoch))

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(len(self)):
            yield [(self.epoch, number)]


def step_loader(dataset: StepDataset, *, workers: int = 0, pin_memory: bool = False) -> Any:
    """Return a loader of whole steps; ``len`` is the number of steps per epoch."""
    return DataLoader(
        dataset,
        batch_sampler=_StepSampler(dataset),
        collate_fn=_only,
        num_workers=workers,
        pin_memory=pin_memory and torch.cuda.is_available(),
        # A new process for every epoch is seconds of waiting where an epoch has few steps.
        persistent_workers=workers > 0,
    )


def _only(steps: Sequence[Step]) -> Step:
    return steps[0]
