"""Rows of groups: positions, what may be read, label places, plans of steps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.packed_helpers import ragged_groups
from train.attention import dense_mask
from train.batches import Packing, StepDataset, step_loader
from train.data import Group, Pair
from train.packing import group_tokens, pack_groups, pack_rows, plan_epoch


def hand_groups() -> list[Group]:
    """Two groups: prompt 10 11 with completions 20 and 30 31; prompt 12 with 40 41."""
    return [
        Group(
            prompt_id="a",
            prompt_ids=[10, 11],
            completions=[[20], [30, 31]],
            pairs=(Pair(1, 0, 0.8, 2.0, False, 0.6),),
            scores=(None, 1.5),
            ranking=((1,), (0,)),
        ),
        Group(prompt_id="b", prompt_ids=[12], completions=[[40, 41]], ref_logps=(-3.0,)),
    ]


def test_a_row_by_hand() -> None:
    batch = pack_groups(hand_groups(), multiple=4)
    #                                   prompt  | a0 | a1     | p  | b0
    assert batch.input_ids.tolist() == [10, 11, 20, 30, 31, 12, 40, 41]
    assert batch.position_ids.tolist() == [0, 1, 2, 2, 3, 0, 1, 2]
    assert batch.predictors.tolist() == [1, 1, 3, 5, 6]  # a1's first token: the prompt's last
    assert batch.targets.tolist() == [20, 30, 31, 40, 41]
    assert batch.owners.tolist() == [0, 1, 1, 2, 2]
    assert batch.places.tolist() == [0, 0, 1, 0, 1]
    assert batch.lengths.tolist() == [1, 2, 2]
    assert batch.last_tokens.tolist() == [2, 4, 7]
    assert batch.completion_groups.tolist() == [0, 0, 1]
    assert batch.pairs.tolist() == [[1, 0]]
    assert batch.pair_p.tolist() == pytest.approx([0.8])
    assert batch.pair_weights.tolist() == [2.0]
    assert batch.pair_margins.tolist() == pytest.approx([0.6])
    assert batch.ranks.tolist() == [1, 0, -1]
    assert batch.scores.isnan().tolist() == [True, False, True]
    assert batch.ref_logps.isnan().tolist() == [True, True, False]
    assert (batch.processed_tokens, batch.real_tokens) == (8, 2 + 1 + 2 + 2 + 1 + 2)
    readable = {
        0: [0],
        1: [0, 1],
        2: [0, 1, 2],  # a0: the prompt and itself
        3: [0, 1, 3],  # a1 does not see a0
        4: [0, 1, 3, 4],
        5: [5],  # another group
        6: [5, 6],
        7: [5, 6, 7],
    }
    mask = dense_mask(batch)[0, 0]
    assert {q: mask[q].nonzero()[:, 0].tolist() for q in range(8)} == readable


def test_padding_reads_only_itself_and_nothing_reads_it() -> None:
    batch = pack_groups(hand_groups(), multiple=6)
    assert batch.input_ids.shape == (12,)
    mask = dense_mask(batch)[0, 0]
    assert mask[8:].sum(1).tolist() == [1, 1, 1, 1]
    assert not mask[:8, 8:].any()


def test_without_sharing_every_completion_has_its_prompt() -> None:
    batch = pack_groups(hand_groups()[:1], share_prompt=False)
    assert batch.input_ids.tolist() == [10, 11, 20, 10, 11, 30, 31]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 1, 2, 3]
    assert batch.predictors.tolist() == [1, 4, 5]
    assert batch.processed_tokens == batch.real_tokens == 7
    assert group_tokens(hand_groups()[0], share_prompt=False) == 7


def test_loss_masks_leave_tokens_out() -> None:
    group = Group(prompt_id="a", prompt_ids=[1], completions=[[2, 3, 4]], loss_masks=[[1, 0, 1]])
    batch = pack_groups([group])
    assert batch.targets.tolist() == [2, 4]
    assert batch.predictors.tolist() == [0, 2]
    assert batch.places.tolist() == [0, 2]
    assert batch.lengths.tolist() == [2]
    assert batch.last_tokens.tolist() == [3]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty prompt"):
        pack_groups([Group(prompt_id="a", prompt_ids=[], completions=[[1]])])


def test_moving_a_batch_moves_nested_tensors() -> None:
    batch = pack_groups(hand_groups()).with_layout((torch.ones(2), (None, torch.zeros(1)), 3))
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta"
    assert moved.layout[0].device.type == moved.layout[1][1].device.type == "meta"
    assert moved.layout[1][0] is None
    assert moved.layout[2] == 3


def test_rows_hold_everything_once_and_never_overflow() -> None:
    sizes = np.random.default_rng(0).integers(1, 60, 300).tolist()
    rows = pack_rows(sizes, 100)
    assert sorted(itertools.chain(*rows)) == list(range(300))
    assert max(sum(sizes[i] for i in row) for row in rows) <= 100
    # Largest-first first fit wastes little: within a tenth of the fewest rows there could be.
    assert len(rows) <= 1.1 * sum(sizes) / 100 + 1


def test_an_oversized_item_gets_a_row_to_itself() -> None:
    assert sorted(pack_rows([5, 500, 5], 100)) == [[0, 2], [1]]


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_plans_cover_every_group_once_and_fill_up_processes(processes: int) -> None:
    sizes = [10 + i % 7 for i in range(50)]
    plans = plan_epoch(sizes, batch_size=8, row_tokens=40, seed=3, epoch=1, processes=processes)
    assert len(plans) == 7
    seen = []
    for plan in plans:
        assert len(plan.rows) % processes == 0
        real = plan.rows[: len(plan.rows) - plan.fillers]
        seen += itertools.chain(*real)
    assert sorted(seen) == list(range(50))


def test_plans_follow_from_seed_and_epoch() -> None:
    sizes = [10] * 40

    def plan(seed: int, epoch: int) -> list:
        return plan_epoch(sizes, batch_size=8, row_tokens=40, seed=seed, epoch=epoch)

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1)
    assert plan(0, 0) != plan(1, 0)


def test_steps_that_fill_a_row() -> None:
    plans = plan_epoch(
        [30, 30, 30, 50, 90], batch_size=0, row_tokens=100, seed=0, epoch=0, shuffle=False
    )
    assert [plan.rows for plan in plans] == [[[0, 1, 2]], [[3]], [[4]]]


def count_groups(groups: list[Group]) -> dict[str, float]:
    return {"groups": float(len(groups))}


@pytest.mark.parametrize("batch_size", [0, 4])
def test_the_loader_gives_whole_steps_in_the_planned_order(batch_size: int) -> None:
    groups = ragged_groups(10)
    packing = Packing(batch_size=batch_size, row_tokens=96, attention="blocks", seed=5)
    dataset = StepDataset(groups, packing, count_groups)
    loader = step_loader(dataset)
    first = list(loader)
    assert len(first) == len(loader)
    seen = [index for step in first for batch in step.batches for index in batch.groups]
    assert sorted(seen) == list(range(10))
    assert all(step.counts["groups"] == step.groups for step in first)
    loader.batch_sampler.set_epoch(1)
    second = [index for step in loader for batch in step.batches for index in batch.groups]
    assert sorted(second) == list(range(10))
    assert second != seen


def test_two_processes_share_a_step_and_know_the_same_totals() -> None:
    groups = ragged_groups(10)
    parts = []
    for process in range(2):
        packing = Packing(
            batch_size=5, row_tokens=96, attention="sdpa", processes=2, process=process
        )
        parts.append(list(step_loader(StepDataset(groups, packing, count_groups))))
    for one, other in zip(*parts, strict=True):
        assert one.counts == other.counts == {"groups": 5.0}
        assert len(one.batches) == len(other.batches)
        members = [i for step in (one, other) for b in step.batches if b.counts for i in b.groups]
        assert len(members) == len(set(members)) == 5


def test_unpacked_rows_hold_one_group_each() -> None:
    packing = Packing(batch_size=4, row_tokens=4096, attention="sdpa", pack=False)
    steps = list(step_loader(StepDataset(ragged_groups(4), packing, count_groups)))
    assert [len(batch.groups) for batch in steps[0].batches] == [1, 1, 1, 1]
