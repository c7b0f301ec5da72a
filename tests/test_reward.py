"""``rlaif reward``: packed equals unpacked for every loss, what it learns, what it writes."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from feedback.errors import InputError, RecipeError
from tests.preference_rows import preferences, rankings, write_rows
from train import losses
from train.attention import with_layout
from train.config import RewardOptions
from train.data import Group, Pair
from train.models import load_model, load_tokenizer
from train.packing import pack_groups
from train.reward import RewardObjective, run
from train.reward_model import (
    RewardEnsemble,
    RewardModel,
    load_reward_model,
    start_reward_model,
)


def options(tiny: Path, output: Path, **given: Any) -> RewardOptions:
    fields: dict[str, Any] = {"data": (), "model": str(tiny), "output": output, "device": "cpu"}
    return RewardOptions(**(fields | given))


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    chosen = options(tiny_model, tiny_model)
    tokenizer = load_tokenizer(chosen)
    loaded = load_model(chosen, tokenizer=tokenizer, kind="reward")
    start_reward_model(loaded, tokenizer, seed=1)
    return loaded


GROUPS = [
    Group(  # ragged, a tie, weights, a completion of one token
        prompt_id="a",
        prompt_ids=[20, 21, 22],
        completions=[[30, 31, 1], [1], [32, 33, 34, 35, 1], [40, 1]],
        pairs=(
            Pair(0, 1, 0.8, 1.0, False, 0.6),
            Pair(2, 0, 0.5, 2.0, True, 0.0),
            Pair(1, 3, 0.3, 0.5, False, 0.1),
            Pair(2, 3, 0.9, 0.0, False, 0.8),
        ),
        ranking=((2, 0), (3,), (1,)),
    ),
    Group(
        prompt_id="b",
        prompt_ids=[50],
        completions=[[60, 61, 62, 1], [63, 1]],
        pairs=(Pair(1, 0, 1.0, 1.0, False, 2.0),),
        ranking=((1,), (0,)),
    ),
]


def plain_rewards(model: Any, group: Group) -> Tensor:
    """One sequence at a time, through transformers' own backbone call."""
    rewards = []
    for completion in group.completions:
        ids = torch.tensor([[*group.prompt_ids, *completion]])
        hidden = model.model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        rewards.append(model.score.weight[0].float() @ hidden[0, -1].float())
    return torch.stack(rewards)


def plain_pair(settings: RewardOptions, pair: Pair, rewards: Tensor) -> Tensor:
    chosen, rejected = rewards[pair.chosen], rewards[pair.rejected]
    d = chosen - rejected
    p = pair.p
    if settings.loss == "bradley-terry":
        m = settings.margin_scale * pair.margin
        loss = -p * torch.log(torch.sigmoid(d - m)) - (1 - p) * torch.log(torch.sigmoid(-d - m))
    elif settings.loss == "rao-kupper":
        a = math.log(settings.nu)
        won, lost = torch.sigmoid(d - a), torch.sigmoid(-d - a)
        tied = 1 - won - lost
        loss = -torch.log(tied) if pair.tie else -p * torch.log(won) - (1 - p) * torch.log(lost)
    else:
        z = torch.exp(d / 2) + torch.exp(-d / 2) + 2 * settings.nu
        won, lost, tied = torch.exp(d / 2) / z, torch.exp(-d / 2) / z, 2 * settings.nu / z
        loss = -torch.log(tied) if pair.tie else -p * torch.log(won) - (1 - p) * torch.log(lost)
    return loss + settings.centring * (chosen + rejected) ** 2


def plain_loss(model: Any, settings: RewardOptions, groups: list[Group]) -> Tensor:
    total, weight = torch.zeros(()), 0.0
    for group in groups:
        rewards = plain_rewards(model, group)
        active = sum(pair.weight > 0 for pair in group.pairs)
        for pair in group.pairs:
            c = pair.weight / (active if settings.average == "prompt" else 1)
            total = total + c * plain_pair(settings, pair, rewards)
            weight += c
    return total / weight


VARIANTS: list[dict[str, Any]] = [
    {},
    {"average": "pair"},
    {"margin_scale": 0.7, "centring": 0.0},
    {"loss": "rao-kupper", "tie_nu": 2.0},
    {"loss": "davidson"},
]


def gradients(model: Any, loss: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [w.grad.clone() for w in model.parameters() if w.grad is not None]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("split", [False, True])
def test_packed_equals_unpacked(
    model: Any, tiny_model: Path, variant: dict[str, Any], split: bool
) -> None:
    """Loss and gradients, whether the step is one row or two."""
    settings = options(tiny_model, tiny_model, **variant)
    objective = RewardObjective(settings)
    counts = objective.counts(GROUPS)
    rows = [[group] for group in GROUPS] if split else [GROUPS]
    packed = torch.zeros(())
    for row in rows:
        batch = with_layout(pack_groups(row), "blocks")
        packed = packed + objective.loss(model, batch, counts).loss
    expected = plain_loss(model, settings, GROUPS)
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(model, packed), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("variant", [{}, {"loss": "davidson"}])
def test_packed_equals_unpacked_in_bfloat16(
    tiny_model: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    settings = options(tiny_model, tmp_path, precision="bfloat16", **variant)
    tokenizer = load_tokenizer(settings)
    half = load_model(settings, tokenizer=tokenizer, kind="reward")
    start_reward_model(half, tokenizer, seed=1)
    objective = RewardObjective(settings)
    batch = with_layout(pack_groups(GROUPS), "blocks")
    packed = objective.loss(half, batch, objective.counts(GROUPS)).loss
    expected = plain_loss(half, settings, GROUPS)
    torch.testing.assert_close(packed, expected, atol=0, rtol=1e-2)
    ours, theirs = (
        torch.cat([g.flatten().float() for g in gradients(half, loss)])
        for loss in (packed, expected)
    )
    assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_listwise_packed_equals_unpacked(model: Any, tiny_model: Path) -> None:
    """Group a: {2, 0} tied, then 3, then 1: the mean of the orders 2 0 3 1 and 0 2 3 1.

    The rankings count by the mean weight of their pairs that count: 3.5 / 3 and 1.
    """
    settings = options(tiny_model, tiny_model, loss="plackett-luce", centring=0.0)
    objective = RewardObjective(settings)
    total = torch.zeros(())
    orders_of = ([(2, 0, 3, 1), (0, 2, 3, 1)], [(1, 0)])
    for group, weight, orders in zip(GROUPS, (3.5 / 3, 1.0), orders_of, strict=True):
        f = plain_rewards(model, group)
        for order in orders:
            ranked = f[list(order)]
            steps = [ranked[k] - ranked[k:].logsumexp(0) for k in range(len(order))]
            total = total - weight * sum(steps) / len(orders)
    expected = total / (3.5 / 3 + 1)
    batch = with_layout(pack_groups(GROUPS), "blocks")
    packed = objective.loss(model, batch, objective.counts(GROUPS)).loss
    torch.testing.assert_close(packed, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(gradients(model, packed), gradients(model, expected), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_length_decorrelation_is_added(model: Any, tiny_model: Path) -> None:
    plain = RewardObjective(options(tiny_model, tiny_model, average="pair"))
    both = RewardObjective(
        options(tiny_model, tiny_model, average="pair", length_decorrelation=3.0)
    )
    batch = with_layout(pack_groups(GROUPS), "blocks")
    counts = plain.counts(GROUPS)
    d, lengths, weights = [], [], []
    for group in GROUPS:
        rewards = plain_rewards(model, group)
        for pair in group.pairs:
            d.append(rewards[pair.chosen] - rewards[pair.rejected])
            chosen, rejected = group.completions[pair.chosen], group.completions[pair.rejected]
            lengths.append(len(chosen) - len(rejected))
            weights.append(pair.weight)
    extra = losses.length_correlation_loss(
        torch.stack(d), torch.tensor(lengths), weights=torch.tensor(weights)
    )
    difference = both.loss(model, batch, counts).loss - plain.loss(model, batch, counts).loss
    torch.testing.assert_close(difference, 3.0 * extra, atol=1e-5, rtol=1e-4)


def test_metrics(model: Any, tiny_model: Path) -> None:
    objective = RewardObjective(options(tiny_model, tiny_model))
    batch = with_layout(pack_groups(GROUPS), "blocks")
    metrics = objective.loss(model, batch, objective.counts(GROUPS)).metrics
    a, b = plain_rewards(model, GROUPS[0]), plain_rewards(model, GROUPS[1])
    right = [a[0] > a[1], a[3] > a[1], a[2] > a[3], b[1] > b[0]]  # p = 0.3 prefers the other
    assert metrics["rewards/accuracies"][0] == sum(right)
    assert metrics["rewards/accuracies"][1] == 4


def test_options_that_do_nothing_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    for bad in (
        {"tie_nu": 2.0},
        {"loss": "rao-kupper", "tie_nu": 0.5},
        {"loss": "davidson", "ties": "drop"},
        {"loss": "plackett-luce", "label_smoothing": 0.1},
        {"margin_scale": 1.0, "loss": "davidson"},
        {"label_smoothing": 0.5},
        {"members": 0},
    ):
        with pytest.raises(RecipeError):
            options(tiny_model, tmp_path, **bad)


LEARN: dict[str, Any] = {
    "epochs": 3.0,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "eval_share": 0.25,
    "precision": "float32",
    "log_every": 5,
}


def read_report(folder: Path) -> Any:
    return json.loads((folder / "report.json").read_text())


def test_learns_and_reports(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "preferences.jsonl", preferences(40))
    settings = options(tiny_model, tmp_path / "rm", data=(data,), **LEARN)
    run(settings)
    report = read_report(tmp_path / "rm")
    assert report["data"] == "held-out prompts"
    assert report["accuracy"]["value"] >= 0.9
    assert report["invariance"]["holds"], report["invariance"]
    assert (tmp_path / "rm" / "reliability.svg").is_file()
    # The judge was sure to 0.9: so is the model, no more.
    assert report["calibration"]["nll_soft"] < 0.5
    record = json.loads((tmp_path / "rm" / "training.json").read_text())
    assert record["figures"]["eval_rewards/accuracies"] == pytest.approx(
        report["accuracy"]["value"]
    )
    scores = load_reward_model(tmp_path / "rm", device="cpu").score(
        ["I need a lamp today"] * 2, ["Gladly, the lamp is yours.", "No."]
    )
    assert scores[0] > scores[1]
    before = (tmp_path / "rm" / "model.safetensors").stat().st_mtime_ns
    run(settings)  # complete: nothing is trained again
    assert (tmp_path / "rm" / "model.safetensors").stat().st_mtime_ns == before


def test_soft_labels_are_learnt_as_probabilities(tiny_model: Path, tmp_path: Path) -> None:
    """All labels say 0.7: rewards differ by logit(0.7) = 0.847, not without end."""
    data = write_rows(tmp_path / "preferences.jsonl", preferences(8, p=0.7))
    settings = options(
        tiny_model,
        tmp_path / "rm",
        data=(data,),
        **LEARN | {"eval_share": 0.0, "epochs": 30.0, "schedule": "constant", "centring": 0.0},
    )
    run(settings)
    report = read_report(tmp_path / "rm")
    assert "set eval_share" in report["data"]
    assert report["calibration"]["nll_soft"] == pytest.approx(
        report["calibration"]["judge_entropy"], abs=0.01
    )


@pytest.mark.parametrize("loss", ["plackett-luce", "davidson", "bradley-terry"])
def test_learns_from_rankings(tiny_model: Path, tmp_path: Path, loss: str) -> None:
    data = write_rows(tmp_path / "rankings.jsonl", rankings(40))
    run(options(tiny_model, tmp_path / "rm", data=(data,), loss=loss, **LEARN))
    report = read_report(tmp_path / "rm")
    assert report["rankings"]["best_is_best"] >= 0.8
    assert report["rankings"]["kendall_tau"] >= 0.6
    if loss != "bradley-terry":
        assert report["ties"]["separation"] > 0.6


def test_ensembles_train_apart_and_score_together(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "preferences.jsonl", preferences(40))
    settings = options(
        tiny_model,
        tmp_path / "rm",
        data=(data,),
        members=2,
        rule="min",
        **LEARN | {"epochs": 1.0},
    )
    run(settings)
    ensemble = load_reward_model(tmp_path / "rm", device="cpu")
    assert isinstance(ensemble, RewardEnsemble)
    rewards = ensemble.score_members(["I need a car today"], ["Of course, one car today."])
    assert rewards[0] != rewards[1]
    assert len(read_report(tmp_path / "rm")["ensemble"]["members"]) == 2
    weights = tmp_path / "rm" / "member-1" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    run(dataclasses.replace(settings, rule="mean"))  # the members stay as they are
    assert weights.stat().st_mtime_ns == before
    assert read_report(tmp_path / "rm")["ensemble"]["rule"] == "mean"
    mean = load_reward_model(tmp_path / "rm", device="cpu")
    assert isinstance(mean, RewardEnsemble) and mean.rule == "mean"


def test_length_decorrelation_of_single_pairs_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "preferences.jsonl", preferences(12))
    learn = LEARN | {"max_steps": 1, "eval_share": 0.0, "length_decorrelation": 1.0}
    alone = options(tiny_model, tmp_path / "rm", data=(data,), **learn, pack=False)
    with pytest.raises(RecipeError, match="each row holds one; raise row_tokens"):
        run(alone)
    run(dataclasses.replace(alone, pack=True))


def test_eval_data_that_is_trained_on_is_named(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "preferences.jsonl", preferences(8))
    learn = LEARN | {"max_steps": 1, "eval_share": 0.0, "eval_data": (data,)}
    run(options(tiny_model, tmp_path / "rm", data=(data,), **learn))
    warnings = json.loads((tmp_path / "rm" / "training.json").read_text())["data_report"][
        "warnings"
    ]
    assert any("8 of 8 evaluation rows" in warning for warning in warnings)


def test_another_rule_trains_nothing_again(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "preferences.jsonl", preferences(16))
    learn = LEARN | {"max_steps": 1}
    settings = options(tiny_model, tmp_path / "rm", data=(data,), members=2, **learn)
    run(settings)

    def weights() -> list[int]:
        found = sorted((tmp_path / "rm").glob("member-*/model.safetensors"))
        return [path.stat().st_mtime_ns for path in found]

    before, report = weights(), read_report(tmp_path / "rm")
    run(dataclasses.replace(settings, rule="uwo", uwo_lambda=50.0))
    assert weights() == before
    ensemble = load_reward_model(tmp_path / "rm", device="cpu")
    assert isinstance(ensemble, RewardEnsemble)
    assert (ensemble.rule, ensemble.uwo_lambda) == ("uwo", 50.0)
    assert read_report(tmp_path / "rm")["calibration"] != report["calibration"]
    card = (tmp_path / "rm" / "README.md").read_text()
    assert "an ensemble of 2 reward models" in card and "by rule `uwo`" in card
    assert "[member-1](member-1/README.md)" in card and "load_reward_model" in card
    assert 'rule = "uwo"' in card and "## Evaluation" in card


def test_rankings_count_as_the_pairs_they_are_trained_on(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rankings.jsonl", rankings(8))
    learn = LEARN | {"max_steps": 1, "eval_share": 0.0}
    run(options(tiny_model, tmp_path / "rm", data=(data,), **learn))
    found = json.loads((tmp_path / "rm" / "training.json").read_text())["data_report"]
    assert found["pairs"] > 0
    card = (tmp_path / "rm" / "README.md").read_text()
    assert f"{found['rankings']} rankings, {found['pairs']} pairs ({found['ties']} ties)" in card


def test_adapters_are_merged_into_a_whole_model(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "preferences.jsonl", preferences(40))
    run(options(tiny_model, tmp_path / "rm", data=(data,), lora_rank=4, **LEARN))
    assert not list((tmp_path / "rm").glob("adapter_*"))
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
    assert read_report(tmp_path / "rm")["accuracy"]["value"] > 0.6


def test_the_head_moves_in_bfloat16_beside_adapters(tiny_model: Path, tmp_path: Path) -> None:
    """Steps of 1e-5 are lost on bfloat16 weights without float32 copies."""
    from safetensors.torch import load_file

    data = write_rows(tmp_path / "preferences.jsonl", preferences(16))
    fields = LEARN | {"learning_rate": 1e-5, "precision": "bfloat16", "eval_share": 0.0}
    settings = options(
        tiny_model, tmp_path / "rm", data=(data,), lora_rank=2, **fields | {"epochs": 30.0}
    )
    tokenizer = load_tokenizer(settings)
    start = load_model(settings, tokenizer=tokenizer, kind="reward")
    start_reward_model(start, tokenizer, seed=settings.seed)
    run(settings)
    head = load_file(tmp_path / "rm" / "model.safetensors")["score.weight"]
    assert int((head != start.score.weight).sum()) > 16  # of 64; without the copies 1 or 2


def test_continues_from_a_reward_model_with_its_head(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "preferences.jsonl", preferences(40))
    run(options(tiny_model, tmp_path / "rm", data=(data,), **LEARN))
    more = options(tmp_path / "rm", tmp_path / "more", data=(data,), **LEARN | {"max_steps": 1})
    run(more)
    record = json.loads((tmp_path / "more" / "training.json").read_text())
    assert record["figures"]["rewards/accuracies"] > 0.8  # at the first step
    assert isinstance(RewardModel.load(tmp_path / "more", device="cpu"), RewardModel)


def test_pairs_of_many_completions_have_no_plackett_luce(tiny_model: Path, tmp_path: Path) -> None:
    rows = preferences(4)
    other = [
        type(row)(
            prompt=row.prompt,
            chosen=row.chosen,
            rejected="Hm.",
            margin=0.5,
            p_chosen=0.75,
            prompt_id=row.prompt_id,
        )
        for row in rows
    ]
    data = write_rows(tmp_path / "preferences.jsonl", rows + other)
    with pytest.raises(InputError, match="rankings folder"):
        run(options(tiny_model, tmp_path / "rm", data=(data,), loss="plackett-luce"))
