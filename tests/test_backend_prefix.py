"""The shared prefix: whatever the grouping, each row's logits are those of a plain forward pass."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from feedback.backends.prefix import (
    Group,
    Stem,
    common_prefix,
    last_logits,
    members_of,
    plan_batches,
    plan_groups,
    plan_stems,
)

token = st.integers(0, 3)
row_lists = st.lists(st.lists(token, min_size=1, max_size=12), min_size=1, max_size=12)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def plain_logits(model: Any, row: list[int]) -> torch.Tensor:
    """The model on one row alone: no padding, no cache, no mask."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1]


def random_rows(seed: int, prompts: int = 4) -> list[list[int]]:
    """Rows as a judge sees them: a common head, a prompt's text, something of their own."""
    draw = random.Random(seed)

    def text(low: int, high: int) -> list[int]:
        return [draw.randrange(5, 250) for _ in range(draw.randint(low, high))]

    head = text(3, 10)
    rows = []
    for _ in range(prompts):
        prompt = head + text(1, 40)
        if draw.random() < 0.5:
            rows += [prompt + text(1, 30) for _ in range(draw.randint(1, 6))]
        else:  # pairs in both orders: those that show the same completion first share more
            shown = [text(1, 25) for _ in range(draw.randint(3, 4))]
            rows += [prompt + a + b + text(1, 3) for a in shown for b in shown if a is not b]
    draw.shuffle(rows)
    return rows


@given(row_lists, row_lists)
def test_common_prefix_is_the_longest(first: list[list[int]], second: list[list[int]]) -> None:
    a, b = first[0], second[0]
    length = common_prefix(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]


@given(row_lists)
def test_groups_hold_each_row_once_and_share_what_they_say(rows: list[list[int]]) -> None:
    groups = plan_groups(rows)
    assert sorted(member for group in groups for member in group.members) == list(range(len(rows)))
    for group in groups:
        heads = {tuple(rows[member][: group.prefix]) for member in group.members}
        assert len(heads) == 1
        assert all(group.prefix < len(rows[member]) for member in group.members)


@given(row_lists)
def test_grouping_never_costs_more_than_no_grouping(rows: list[list[int]]) -> None:
    planned = sum(
        group.prefix + sum(len(rows[member]) - group.prefix for member in group.members)
        for group in plan_groups(rows)
    )
    assert planned <= sum(map(len, rows))


def test_the_pairs_of_a_prompt_make_one_group() -> None:
    rows = [[1, 2, 3] + [prompt] * 20 + [9, each] for prompt in (5, 6) for each in range(12)]
    groups = plan_groups(rows)
    assert [group.prefix for group in groups] == [24, 24]
    assert [sorted(group.members) for group in groups] == [list(range(12)), list(range(12, 24))]


@given(row_lists, st.integers(1, 40))
def test_batches_hold_each_row_once_within_the_budget(rows: list[list[int]], budget: int) -> None:
    batches = list(plan_batches(rows, plan_stems(rows), budget))
    assert sorted(member for batch in batches for member in members_of(batch)) == list(
        range(len(rows))
    )
    for batch in batches:
        groups = [group for stem in batch for group in stem.groups]
        width = max(
            len(rows[member]) - group.prefix for group in groups for member in group.members
        )
        count = len(members_of(batch))
        assert count * width <= budget or count == 1
        assert len({stem.prefix > 0 for stem in batch}) == 1


@given(row_lists)
def test_stems_share_what_they_say_on_both_levels(rows: list[list[int]]) -> None:
    for stem in plan_stems(rows):
        heads = {tuple(rows[member][: stem.prefix]) for member in members_of([stem])}
        assert len(heads) == 1
        for group in stem.groups:
            assert group.prefix >= stem.prefix
            assert len({tuple(rows[member][: group.prefix]) for member in group.members}) == 1


def test_completions_shown_first_are_a_second_level() -> None:
    prompt = list(range(100, 130))
    texts = [[number] * 25 for number in range(4)]
    rows = [prompt + a + b + [9] for a in texts for b in texts if a is not b]
    (stem,) = plan_stems(rows)
    assert stem.prefix == 30
    assert [group.prefix for group in stem.groups] == [55] * 4
    assert [len(group.members) for group in stem.groups] == [3] * 4


@pytest.mark.parametrize("seed", range(8))
def test_shared_prefix_equals_plain_forward(model: Any, seed: int) -> None:
    rows = random_rows(seed)
    for batch in plan_batches(rows, plan_stems(rows), 300):
        with torch.inference_mode():
            logits = last_logits(model, rows, batch)
        for member, got in zip(members_of(batch), logits, strict=True):
            expected = plain_logits(model, rows[member])
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_a_row_much_shorter_than_its_batch(model: Any) -> None:
    rows = [[7], [7, 8], list(range(5, 65))]
    with torch.inference_mode():
        logits = last_logits(model, rows, [Stem(0, [Group(0, [place])]) for place in range(3)])
    for row, got in zip(rows, logits, strict=True):
        torch.testing.assert_close(got, plain_logits(model, row), atol=1e-5, rtol=1e-5)


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_sliding_windows_see_true_distances(seed: int) -> None:
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=7,
    )
    model = MistralForCausalLM(config).eval()
    rows = random_rows(seed, prompts=2)
    for batch in plan_batches(rows, plan_stems(rows), 10_000):
        with torch.inference_mode():
            logits = last_logits(model, rows, batch)
        for member, got in zip(members_of(batch), logits, strict=True):
            expected = plain_logits(model, rows[member])
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
