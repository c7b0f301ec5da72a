"""``rlaif rrhf``: the paper's loss on packed groups, candidates from rankings and pairs, rounds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from feedback.errors import InputError
from tests.preference_rows import preferences, rankings, write_rows
from train.attention import with_layout
from train.chat import DataReport
from train.config import RrhfOptions
from train.data import Group, Pair
from train.models import load_model, load_tokenizer
from train.packing import pack_groups
from train.rrhf import RrhfObjective, iterate, rank_candidates, run
from train.trainer import PackedTrainer


def options(tiny: Path, output: Path, **given: Any) -> RrhfOptions:
    fields: dict[str, Any] = {"data": (), "model": str(tiny), "output": output, "device": "cpu"}
    return RrhfOptions(**(fields | given))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    chosen = options(tiny_model, tiny_model)
    return load_model(chosen, tokenizer=load_tokenizer(chosen))


RANKED = Group(  # ragged, a tie, one completion of a single token, one unranked
    prompt_id="a",
    prompt_ids=[20, 21, 22],
    completions=[[30, 31, 1], [1], [32, 33, 34, 35, 1], [40, 1], [50, 51, 1]],
    pairs=(Pair(2, 0, 0.5, tie=True), Pair(3, 1, 0.7), Pair(1, 0, 0.6)),
    ranking=((2, 0), (3,), (1,)),
)
COMPARED = Group(  # preferences: 0 over 1, 2 over 1; 3 over 2 was seen, 3 over 0 was not
    prompt_id="b",
    prompt_ids=[50],
    completions=[[60, 61, 62, 1], [63, 1], [64, 65, 1], [66, 1]],
    pairs=(Pair(0, 1, 0.9, 2.0), Pair(2, 1, 1.0, 0.5), Pair(3, 2, 0.6, 1.0)),
)


def mean_logprobs(model: Any, group: Group) -> tuple[Tensor, Tensor]:
    """Sums and means, one sequence at a time through transformers' own forward."""
    sums, means = [], []
    for completion in group.completions:
        ids = torch.tensor([[*group.prompt_ids, *completion]])
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float()
        start = len(group.prompt_ids)
        rows = logits[start - 1 : -1].log_softmax(-1)
        total = rows[torch.arange(len(completion)), ids[0, start:]].sum()
        sums.append(total)
        means.append(total / len(completion))
    return torch.stack(sums), torch.stack(means)


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [w.grad.clone() for w in model.parameters() if w.grad is not None]


def expected_loss(model: Any, confident: bool) -> Tensor:
    """RANKED: places 0 3 0 1 2... by hand: 2 and 0 best (tied), then 3, then 1; 4 is unranked.

    Ordered pairs (worse, better): (3,2), (3,0), (1,2), (1,0), (1,3), weight 1; with confidence
    (1,3) counts 2 * 0.7 - 1 = 0.4, and (1,0), where the judge's 0.6 was for 1, counts nothing.
    COMPARED: win rates by weight 0: 0.9, 1: 0.2 / 2.5, 2: (0.5 * 1 + 0.4) / 1.5 = 0.6, 3: 0.6: so
    0, then 2 and 3 tied, then 1. Pair (2,3) is a tie there: no term. (1,0) counts 2, (1,2) 0.5; no
    other was compared.
    Group weights: 1 and 3.5 / 3. Best of the second is 0.
    """
    sums, p = mean_logprobs(model, RANKED)
    order = {(3, 2): 1.0, (3, 0): 1.0, (1, 2): 1.0, (1, 0): 1.0, (1, 3): 1.0}
    if confident:
        order |= {(1, 3): 0.4, (1, 0): 0.0}
    first = sum(c * torch.relu(p[i] - p[j] + 0.3) for (i, j), c in order.items())
    first = first - (sums[2] + sums[0]) / 2
    sums, p = mean_logprobs(model, COMPARED)
    weights = {(1, 0): 2.0 * (0.8 if confident else 1), (1, 2): 0.5}
    second = sum(c * torch.relu(p[i] - p[j] + 0.3) for (i, j), c in weights.items())
    weight = 3.5 / 3
    return (first + second - weight * sums[0]) / (1 + weight)


@pytest.mark.parametrize("confident", [False, True])
def test_a_row_that_comes_twice_or_weighs_nothing_changes_nothing(
    model: Any, tiny_model: Path, confident: bool
) -> None:
    settings = options(tiny_model, tiny_model, confidence_weights=confident, margin=0.3)
    objective = RrhfObjective(settings)

    def loss(*more: Pair) -> Tensor:
        rows = [dataclasses.replace(COMPARED, pairs=(Pair(0, 1, 0.9, 2.0), *more))]
        groups = rank_candidates(rows, DataReport(), settings)
        batch = with_layout(pack_groups(groups), "blocks")
        return objective.loss(model, batch, objective.counts(groups)).loss

    twice, ignored = Pair(0, 1, 0.9, 2.0), Pair(1, 0, 1.0, 0.0)
    torch.testing.assert_close(loss(twice), loss())
    torch.testing.assert_close(loss(ignored), loss())


@pytest.mark.parametrize("confident", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_packed_equals_the_paper_unpacked(
    model: Any, tiny_model: Path, confident: bool, split: bool
) -> None:
    settings = options(tiny_model, tiny_model, confidence_weights=confident, margin=0.3)
    groups = rank_candidates([RANKED, COMPARED], DataReport(), settings)
    objective = RrhfObjective(settings)
    counts = objective.counts(groups)
    packed = torch.zeros(())
    for row in [[group] for group in groups] if split else [groups]:
        batch = with_layout(pack_groups(row), "blocks")
        packed = packed + objective.loss(model, batch, counts).loss
    expected = expected_loss(model, confident)
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(model, packed), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_evaluation_loss_is_that_of_all_rows_at_once(
    model: Any, tiny_model: Path, tmp_path: Path, batch_size: int
) -> None:
    settings = options(tiny_model, tmp_path, batch_size=batch_size)
    groups = rank_candidates([RANKED, COMPARED, RANKED], DataReport(), settings)
    objective = RrhfObjective(settings)
    batch = with_layout(pack_groups(groups), "blocks")
    with torch.no_grad():
        expected = objective.loss(model, batch, objective.counts(groups)).loss
    trainer = PackedTrainer(
        model=model, options=settings, objective=objective, groups=groups, eval_groups=groups
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


def test_packed_equals_unpacked_in_bfloat16(tiny_model: Path, tmp_path: Path) -> None:
    settings = options(tiny_model, tmp_path, precision="bfloat16", margin=0.3)
    half = load_model(settings, tokenizer=load_tokenizer(settings))
    groups = rank_candidates([RANKED, COMPARED], DataReport(), settings)
    objective = RrhfObjective(settings)
    batch = with_layout(pack_groups(groups), "blocks")
    packed = objective.loss(half, batch, objective.counts(groups)).loss
    expected = expected_loss(half, confident=False)
    torch.testing.assert_close(packed, expected, atol=0, rtol=1e-2)
    ours, theirs = (
        torch.cat([g.flatten().float() for g in gradients(half, loss)])
        for loss in (packed, expected)
    )
    assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_authors_variant_divides_by_the_padded_row(model: Any, tiny_model: Path) -> None:
    """RANKED: prompt 3 + longest completion 5 = 8; the first of the tied best is completion 0."""
    settings = options(tiny_model, tiny_model, sft_form="row_mean", rank_weight=0.0)
    groups = rank_candidates([RANKED], DataReport(), settings)
    objective = RrhfObjective(settings)
    for share in (True, False):
        batch = with_layout(pack_groups(groups, share_prompt=share), "blocks")
        loss = objective.loss(model, batch, objective.counts(groups)).loss
        sums, _ = mean_logprobs(model, RANKED)
        torch.testing.assert_close(loss, -sums[0] / 8, atol=1e-5, rtol=1e-5)


def test_pairs_are_completed_from_a_ranking_but_not_from_preferences(tiny_model: Path) -> None:
    settings = options(tiny_model, tiny_model)
    ranked, compared = rank_candidates([RANKED, COMPARED], DataReport(), settings)
    assert len(ranked.pairs) == 6  # four ranked completions; the fifth has none
    assert sum(pair.tie for pair in ranked.pairs) == 1
    assert compared.pairs == COMPARED.pairs
    assert compared.ranking == ((0,), (2, 3), (1,))


def test_groups_that_are_one_tie(tiny_model: Path) -> None:
    tied = dataclasses.replace(RANKED, pairs=(), ranking=((0, 1),))
    report = DataReport()
    kept = rank_candidates([tied, RANKED], report, options(tiny_model, tiny_model, ties="drop"))
    assert len(kept) == 1 and "1 prompts left out" in report.warnings[0]
    assert len(rank_candidates([tied], DataReport(), options(tiny_model, tiny_model))) == 1
    with pytest.raises(InputError, match="tied"):
        rank_candidates([tied], DataReport(), options(tiny_model, tiny_model, ties="drop"))


LEARN: dict[str, Any] = {
    "epochs": 5.0,
    "batch_size": 8,
    "learning_rate": 3e-3,
    "sft_form": "token_mean",
    "margin": 0.5,
    "eval_share": 0.25,
    "log_every": 1,
}


def figures(folder: Path) -> dict[str, float]:
    return json.loads((folder / "training.json").read_text())["figures"]


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["rankings", "preferences"])
def test_learns_to_rank_unseen_prompts(tiny_model: Path, tmp_path: Path, kind: str) -> None:
    rows: Any = rankings(40) if kind == "rankings" else preferences(40)
    data = write_rows(tmp_path / f"{kind}.jsonl", rows)
    run(options(tiny_model, tmp_path / "policy", data=(data,), **LEARN))
    found, first = figures(tmp_path / "policy"), curve(tmp_path / "policy")[0]
    assert found["eval_rewards/accuracies"] > 0.85
    assert found["eval_rewards/accuracies"] > first["rewards/accuracies"]
    assert found["eval_loss/sft"] < first["loss/sft"] - 1  # nats per token


def test_candidates_from_sampling_and_data_together(tiny_model: Path, tmp_path: Path) -> None:
    sampled = write_rows(tmp_path / "rankings.jsonl", rankings(6))
    given = write_rows(tmp_path / "preferences.jsonl", preferences(6))
    settings = options(tiny_model, tmp_path / "policy", data=(sampled, given), max_steps=1)
    run(settings)
    record = json.loads((tmp_path / "policy" / "training.json").read_text())
    assert record["data_report"]["groups"] == 12


def test_rounds_start_from_the_policy_before(tiny_model: Path, tmp_path: Path) -> None:
    first = write_rows(tmp_path / "preferences.jsonl", preferences(8))
    asked: list[tuple[Path, int]] = []

    def resample(policy: Path, round_number: int) -> Sequence[str]:
        assert (policy / "model.safetensors").is_file()
        asked.append((policy, round_number))
        rows = preferences(8, seed=round_number)
        return [write_rows(tmp_path / f"preferences-{round_number}.jsonl", rows)]

    settings = options(
        tiny_model, tmp_path / "policy", data=(first,), **LEARN | {"eval_share": 0.0}
    )
    last = iterate(settings, rounds=3, resample=resample)
    assert last == tmp_path / "policy" / "round-3"
    assert asked == [
        (tmp_path / "policy" / "round-1", 2),
        (tmp_path / "policy" / "round-2", 3),
    ]
    starts = [curve(tmp_path / "policy" / f"round-{n}")[0]["loss/sft"] for n in (1, 2, 3)]
    assert starts[0] > starts[1] > starts[2]
    weights = last / "model.safetensors"
    before = weights.stat().st_mtime_ns
    iterate(settings, rounds=3, resample=resample)  # finished rounds are not trained again
    assert weights.stat().st_mtime_ns == before
