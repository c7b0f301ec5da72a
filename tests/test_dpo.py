"""DPO on packed rows: losses by hand, optimum, normalisation, options, drift, the whole command."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from feedback.errors import InputError, RecipeError
from feedback.records import Preference, Ranking
from tests.packed_helpers import make_model, ragged_groups, relative, unpacked_logps
from tests.preference_rows import preferences, rankings, write_rows
from train.attention import with_layout
from train.batches import Packing, StepDataset
from train.chat import DataReport
from train.config import DpoOptions, RewardOptions
from train.data import Group, Pair
from train.dpo import DpoObjective, DriftMonitor, pair_logps, run
from train.models import CompletionLogps
from train.packing import PackedBatch, pack_groups
from train.reward import run as run_reward


def options(**fields: Any) -> DpoOptions:
    return DpoOptions(**({"data": ("x",), "output": Path("y")} | fields))


def referenced(groups: list[Group], shift: float = 0.0) -> list[Group]:
    """Give every completion a reference of -2 nats per token plus a shift by its index."""
    return [
        dataclasses.replace(
            group,
            ref_logps=tuple(-2.0 * len(c) + shift * i for i, c in enumerate(group.completions)),
        )
        for group in groups
    ]


def packed(groups: list[Group]) -> PackedBatch:
    return with_layout(pack_groups(groups), "blocks")


class Fixed(torch.nn.Module):
    """A model whose token log-probabilities are given."""

    def __init__(self, logprobs: list[float]):
        super().__init__()
        self.logprobs = torch.nn.Parameter(torch.tensor(logprobs))

    def forward(self, packed: Any) -> Any:
        return self.logprobs, None


def two_pairs() -> list[Group]:
    """Prompt with completions of 2, 1 and 3 tokens; pairs 0 > 1 (p 0.9), 2 ~ 1 (tie, weight 3)."""
    return [
        Group(
            prompt_id="a",
            prompt_ids=[1],
            completions=[[2, 3], [4], [5, 6, 7]],
            pairs=(Pair(0, 1, 0.9, 1.0, False, 0.8), Pair(2, 1, 0.5, 3.0, True)),
            ref_logps=(-1.0, -2.0, -3.0),
            ranking=((0,), (1, 2)),
        )
    ]


LOGPROBS = [-0.5, -0.2, -1.5, -1.0, -2.0, -0.5]
# s = -0.7, -1.5, -3.5; with beta 2: h of the first pair 2 * ((0.3) - (0.5)) = -0.4,
# of the second 2 * ((-0.5) - (0.5)) = -2.
H = (-0.4, -2.0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def cross_entropy(p: float, h: float) -> float:
    return -p * math.log(sigmoid(h)) - (1 - p) * math.log(sigmoid(-h))


def value(**fields: Any) -> float:
    objective = DpoObjective(options(beta=2.0, **fields))
    groups = two_pairs()
    result = objective.loss(Fixed(LOGPROBS), pack_groups(groups), objective.counts(groups))
    return float(result.loss.detach())


def test_the_soft_loss_by_hand() -> None:
    """Weighted over the pairs: (1 * CE(0.9, -0.4) + 3 * CE(0.5, -2)) / 4."""
    expected = (cross_entropy(0.9, H[0]) + 3 * cross_entropy(0.5, H[1])) / 4
    assert value() == pytest.approx(expected, rel=1e-5)


def test_hard_labels_keep_ties() -> None:
    expected = (cross_entropy(1.0, H[0]) + 3 * cross_entropy(0.5, H[1])) / 4
    assert value(soft_labels=False) == pytest.approx(expected, rel=1e-5)


def test_a_coin_flip_stays_one_and_a_tie_is_one() -> None:
    """Not marked as a tie, p = 0.5 is no certainty; marked as one, p = 0.8 counts as 0.5."""
    for pair, soft in ((Pair(0, 1, 0.5), False), (Pair(0, 1, 0.8, 1.0, True), True)):
        groups = [dataclasses.replace(two_pairs()[0], pairs=(pair,))]
        objective = DpoObjective(options(beta=2.0, soft_labels=soft))
        found = objective.loss(Fixed(LOGPROBS), pack_groups(groups), objective.counts(groups))
        assert float(found.loss.detach()) == pytest.approx(cross_entropy(0.5, H[0]), rel=1e-5)


def test_smoothing_mixes_into_the_label() -> None:
    expected = (cross_entropy(0.9 * 0.8 + 0.1 * 0.2, H[0]) + 3 * cross_entropy(0.5, H[1])) / 4
    assert value(label_smoothing=0.2) == pytest.approx(expected, rel=1e-5)


def test_gdpo_by_hand() -> None:
    expected = (-math.log(sigmoid(0.8 * H[0])) - 3 * math.log(0.5)) / 4
    assert value(loss="gdpo") == pytest.approx(expected, rel=1e-5)


def test_ipo_by_hand() -> None:
    """x = h / beta, target 1 / (2 beta) = 0.25; soft: both targets, weighted."""
    x = [h / 2 for h in H]
    first = 0.9 * (x[0] - 0.25) ** 2 + 0.1 * (x[0] + 0.25) ** 2
    second = 0.5 * (x[1] - 0.25) ** 2 + 0.5 * (x[1] + 0.25) ** 2
    assert value(loss="ipo") == pytest.approx((first + 3 * second) / 4, rel=1e-5)


def test_rpo_by_hand() -> None:
    """Squared distance to eta times the margin: 0.8 and 0."""
    expected = ((H[0] - 1.6) ** 2 + 3 * H[1] ** 2) / 4
    assert value(loss="rpo", rpo_eta=2.0, rpo_form="squared") == pytest.approx(expected, rel=1e-5)


def test_simpo_by_hand() -> None:
    """No reference: beta (s_w / |y_w| - s_l / |y_l|) - gamma."""
    first = 2 * (-0.35 + 1.5)
    second = 2 * (-3.5 / 3 + 1.5)
    soft = [
        -p * math.log(sigmoid(x - 0.5)) - (1 - p) * math.log(sigmoid(-x - 0.5))
        for p, x in ((0.9, first), (0.5, second))
    ]
    assert value(loss="simpo") == pytest.approx((soft[0] + 3 * soft[1]) / 4, rel=1e-5)


def test_rao_kupper_by_hand() -> None:
    """nu = 3: P(win) = sigma(h - ln 3), P(tie) = 8 sigma(h - ln 3) sigma(-h - ln 3)."""
    a = math.log(3)
    first = -0.9 * math.log(sigmoid(H[0] - a)) - 0.1 * math.log(sigmoid(-H[0] - a))
    tie = -math.log(8 * sigmoid(H[1] - a) * sigmoid(-H[1] - a))
    assert value(loss="rao-kupper") == pytest.approx((first + 3 * tie) / 4, rel=1e-5)


def test_davidson_by_hand() -> None:
    """nu = 1: weights e^{h/2}, 2, e^{-h/2}."""

    def total(h: float) -> float:
        return math.exp(h / 2) + math.exp(-h / 2) + 2

    first = -0.9 * math.log(math.exp(H[0] / 2) / total(H[0]))
    first -= 0.1 * math.log(math.exp(-H[0] / 2) / total(H[0]))
    tie = -math.log(2 / total(H[1]))
    assert value(loss="davidson") == pytest.approx((first + 3 * tie) / 4, rel=1e-5)


def test_robust_by_hand() -> None:
    """One flip rate for hard labels: -0.4 with e = 0.3; the tie counts with h = 0: log 2."""

    def robust(e: float, h: float) -> float:
        right, wrong = math.log(sigmoid(h)), math.log(sigmoid(-h))
        return (-(1 - e) * right + e * wrong) / (1 - 2 * e)

    expected = (robust(0.3, H[0]) + 3 * math.log(2)) / 4
    assert value(loss="robust", label_smoothing=0.3) == pytest.approx(expected, rel=1e-5)


def test_robust_pulls_as_the_judge_decided_and_not_harder_where_it_doubts() -> None:
    """dL/dh at h = 0 is -1/2 / (1 - 2e), here -5/6, to the side of p and whatever p; a tie's 0."""
    slopes = []
    for p, tie in ((1.0, False), (0.6, False), (0.5, True), (0.2, False)):
        groups = [
            dataclasses.replace(
                two_pairs()[0], pairs=(Pair(0, 1, p, 1.0, tie),), ref_logps=(-0.7, -1.5, 0.0)
            )
        ]
        model = Fixed(LOGPROBS)
        objective = DpoObjective(options(beta=1.0, loss="robust", label_smoothing=0.2))
        objective.loss(model, pack_groups(groups), objective.counts(groups)).loss.backward()
        assert model.logprobs.grad is not None
        slopes.append(float(model.logprobs.grad[0]))  # of the first completion: dL/dh
    assert slopes == pytest.approx([-5 / 6, -5 / 6, 0.0, 5 / 6])


def test_nll_is_per_token_of_the_chosen() -> None:
    extra = (0.7 / 2 + 3 * 3.5 / 3) / 4
    assert value(nll_weight=0.5) - value() == pytest.approx(0.5 * extra, rel=1e-4)


def test_listwise_by_hand() -> None:
    """Rewards 0.6, 1.0, -1.0; ranking 0 > (1 ~ 2): the tied pair is the mean of both orders."""
    rewards = [0.6, 1.0, -1.0]
    first = math.log(sum(map(math.exp, rewards))) - rewards[0]
    pair = cross_entropy(0.5, rewards[1] - rewards[2])
    assert value(loss="listwise") == pytest.approx(first + pair, rel=1e-5)


def test_ld_weighs_the_tail() -> None:
    """Pair of 2 and 1 tokens: the chosen's second token counts alpha."""
    groups = [
        dataclasses.replace(
            two_pairs()[0],
            ref_logprobs=[[-0.6, -0.4], [-2.0], [-1.0, -1.0, -1.0]],
        )
    ]
    batch = pack_groups(groups)
    logprobs = torch.tensor(LOGPROBS)
    sums = torch.tensor([-0.7, -1.5, -3.5])
    policy = CompletionLogps(sums, batch.lengths, logprobs)
    pair = pair_logps(policy, batch, ld_alpha=0.25)
    assert pair.policy_chosen.tolist() == pytest.approx([-0.5 - 0.05, -1.0 + 0.25 * -2.5])
    assert pair.policy_rejected.tolist() == pytest.approx([-1.5, -1.5])
    assert pair.ref_chosen is not None
    assert pair.ref_chosen.tolist() == pytest.approx([-0.6 - 0.1, -1.0 + 0.25 * -2.0])


def test_the_optimum_is_the_logit_of_the_label() -> None:
    """Descend on the completions' log-probabilities: h goes to logit(0.9), and a tie's to 0."""
    groups = two_pairs()
    objective = DpoObjective(options(beta=1.0))
    model = Fixed(LOGPROBS)
    batch, counts = pack_groups(groups), objective.counts(groups)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2000):
        optimiser.zero_grad()
        result = objective.loss(model, batch, counts)
        result.loss.backward()
        optimiser.step()
    s = torch.zeros(3).index_add(0, batch.owners, model.logprobs.detach()) - batch.ref_logps
    assert float(s[0] - s[1]) == pytest.approx(math.log(9), abs=1e-3)
    assert float(s[2] - s[1]) == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(
    "fields",
    [
        {"loss": "sigmoid", "nll_weight": 0.3},
        {"loss": "gdpo"},
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss": "ipo"},
        {"loss": "simpo"},
        {"loss": "davidson"},
        {"loss": "listwise"},
    ],
)
def test_gradients_equal_the_unpacked_models(fields: dict[str, Any]) -> None:
    """The same loss from separate forward passes, all the way to the weights."""
    groups = referenced(ragged_groups(), 0.7)
    objective = DpoObjective(options(**fields))
    counts = objective.counts(groups)
    batch = packed(groups)
    model = make_model()
    loss = objective.loss(model, batch, counts).loss
    loss.backward()
    slopes = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    logps = unpacked_logps(model, groups)

    class Given(torch.nn.Module):
        def forward(self, packed: Any) -> Any:
            return tokens, None

    # Spread each sum over the completion's first token: the losses read sums only.
    firsts = torch.cat([torch.zeros(1, dtype=torch.long), batch.lengths.cumsum(0)[:-1]])
    tokens = torch.zeros(len(batch.targets)).index_add(0, firsts, logps)
    expected = objective.loss(Given(), batch, counts).loss
    expected.backward()
    assert relative(loss, expected) < 1e-5
    for slope, weight in zip(slopes, model.parameters(), strict=True):
        assert relative(slope, weight.grad) < 1e-5


@pytest.mark.parametrize("loss", ["sigmoid", "listwise"])
def test_how_a_step_is_cut_does_not_matter(loss: str) -> None:
    """One row, several rows, one group a row: the same loss and the same gradient."""
    groups = referenced(ragged_groups(), 0.7)
    objective = DpoObjective(options(loss=loss))
    results = []
    for row_tokens, pack in ((4096, True), (90, True), (4096, False)):
        model = make_model()
        packing = Packing(
            batch_size=5, row_tokens=row_tokens, attention="blocks", pack=pack, shuffle=False
        )
        step = StepDataset(groups, packing, objective.counts)[0, 0]
        total = sum(objective.loss(model, batch, step.counts).loss for batch in step.batches)
        assert isinstance(total, torch.Tensor)
        total.backward()
        slope = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        results.append((len(step.batches), total, slope))
    assert results[0][0] < results[1][0] < results[2][0]
    for _, total, slope in results[1:]:
        assert relative(total, results[0][1]) < 1e-5
        assert relative(slope, results[0][2]) < 1e-5


def test_metrics() -> None:
    objective = DpoObjective(options(beta=2.0))
    groups = two_pairs()
    result = objective.loss(Fixed(LOGPROBS), pack_groups(groups), objective.counts(groups))
    means = {name: float(total) / float(count) for name, (total, count) in result.metrics.items()}
    assert means["rewards/chosen"] == pytest.approx((0.6 - 1.0) / 2)
    assert means["rewards/rejected"] == pytest.approx(1.0)
    assert means["rewards/margins"] == pytest.approx(-1.2)
    assert means["rewards/accuracies"] == 0.0  # of the one decided pair
    assert means["logps/chosen"] == pytest.approx((-0.7 - 3.5) / 2)
    assert means["logps/chosen_drift"] == pytest.approx((0.3 / 2 - 0.5 / 3) / 2)


def test_falling_chosen_likelihood_warns_once() -> None:
    report = DataReport()
    monitor = DriftMonitor(0.5, report)

    class State:
        global_step = 7

    for drift in (-0.2, -0.6, -0.9):
        monitor.on_log(None, State(), None, logs={"logps/chosen_drift": drift})
    assert len(report.warnings) == 1
    assert "0.60 nats" in report.warnings[0]
    assert "nll_weight" in report.warnings[0]


@pytest.mark.parametrize(
    "fields",
    [
        {"label_smoothing": 0.5},
        {"loss": "robust"},
        {"loss": "robust", "label_smoothing": 0.45},
        {"ld_alpha": 1.5},
        {"loss": "davidson", "ties": "drop"},
        {"loss": "simpo", "reference_model": "x"},
        {"tie_nu": 2.0},
        {"loss": "rao-kupper", "tie_nu": 1.0},
        {"loss": "listwise", "label_smoothing": 0.1},
        {"ipo_averaged": True},
        {"loss": "simpo", "ld_alpha": 0.5},
        {"eval_share": 0.1, "eval_data": ("z",)},
        {"quantize": "4bit"},
        {"lora_alpha": 4.0},
        {"row_tokens": 100, "max_length": 200},
    ],
)
def test_options_that_would_do_nothing_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        options(**fields)


def train(tmp_path: Path, tiny_model: Path, rows: list[Any], **fields: Any) -> Path:
    data = tmp_path / "rows"
    if not data.exists():
        write_rows(data, rows)
    settings = {
        "model": str(tiny_model),
        "learning_rate": 3e-3,
        "batch_size": 16,
        "epochs": 3.0,
        "log_every": 1,
        "device": "cpu",
        "row_tokens": 2048,
        "max_length": 256,
    }
    output = tmp_path / fields.pop("name", "out")
    run(DpoOptions(data=(str(data),), output=output, **(settings | fields)))
    return output


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]


def test_the_command_learns_and_saves(tmp_path: Path, tiny_model: Path, capsys: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    output = train(tmp_path, tiny_model, preferences(64), eval_share=0.2)
    record = json.loads((output / "training.json").read_text())
    first = curve(output)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert record["figures"]["loss"] < 0.6
    assert record["figures"]["eval_loss"] < 0.65
    assert record["figures"]["eval_rewards/accuracies"] > 0.9
    assert record["data_report"]["pairs"] == 64
    assert record["figures"]["real_tokens_per_s"] > 0
    assert "dpo:" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.chat_template
    ids = tokenizer("Hi", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2, do_sample=False).shape[1] >= 3
    card = (output / "README.md").read_text()
    assert "rlaif dpo" in card
    assert "64 pairs" in card
    before = (output / "training.json").stat().st_mtime_ns
    train(tmp_path, tiny_model, preferences(64), eval_share=0.2)
    assert (output / "training.json").stat().st_mtime_ns == before
    assert "complete already" in capsys.readouterr().out


def test_soft_labels_hold_the_margin_back(tmp_path: Path, tiny_model: Path) -> None:
    """With p = 0.6 the margin stops near logit(0.6) = 0.41 (in h); hard labels go on."""
    rows = preferences(48, p=0.6)
    soft = train(tmp_path, tiny_model, rows, epochs=12.0, name="soft")
    hard = train(tmp_path, tiny_model, rows, epochs=12.0, name="hard", soft_labels=False)
    margins = [curve(folder)[-2]["rewards/margins"] for folder in (soft, hard)]
    assert margins[0] == pytest.approx(math.log(0.6 / 0.4), abs=0.15)
    assert margins[1] > 1.5


def test_rankings_train_listwise_and_pairwise(tmp_path: Path, tiny_model: Path) -> None:
    listwise = train(tmp_path, tiny_model, rankings(48), loss="listwise", name="list")
    pairwise = train(tmp_path, tiny_model, rankings(48), name="pairs")
    assert curve(listwise)[-2]["loss"] < 0.8 * curve(listwise)[0]["loss"]
    assert curve(pairwise)[-2]["rewards/accuracies"] > 0.9


def test_listwise_needs_rankings_and_rpo_needs_margins(tmp_path: Path, tiny_model: Path) -> None:
    rows = [dataclasses.replace(row, margin=0.0) for row in preferences(8)]
    with pytest.raises(InputError, match="reads rankings"):
        train(tmp_path, tiny_model, rows, loss="listwise")
    with pytest.raises(InputError, match="needs margins"):
        train(tmp_path, tiny_model, rows, loss="rpo")


@pytest.mark.parametrize("loss", ["gdpo", "robust"])
def test_losses_to_which_a_tie_is_nothing_refuse_ties_alone(
    tmp_path: Path, tiny_model: Path, loss: str
) -> None:
    rows = [dataclasses.replace(row, p_chosen=0.5, tie=True) for row in preferences(8)]
    smoothing = 0.1 if loss == "robust" else 0.0
    with pytest.raises(InputError, match="learns nothing"):
        train(tmp_path, tiny_model, rows, loss=loss, label_smoothing=smoothing)


def test_thirteen_tied_are_refused_before_training(tmp_path: Path, tiny_model: Path) -> None:
    names = [f"answer {number}" for number in range(13)]
    tied = Ranking(
        prompt="Hi", completions=names, scores=[None] * 13, ranking=[[*range(13)]], prompt_id="t"
    )
    with pytest.raises(InputError, match="'t': 13 completions are tied"):
        train(tmp_path, tiny_model, [tied], loss="listwise")
    with pytest.raises(InputError, match="'t': 13 completions are tied"):
        data = str(tmp_path / "rows")
        run_reward(
            RewardOptions(
                data=(data,), model=str(tiny_model), output=tmp_path / "rm", loss="plackett-luce"
            )
        )


def test_dropping_ties_is_counted(tmp_path: Path, tiny_model: Path) -> None:
    rows: list[Preference | Ranking] = list(preferences(24))
    rows += [
        dataclasses.replace(row, prompt=f"{row.prompt}, again", p_chosen=0.5, tie=True)
        for row in preferences(8)
    ]
    output = train(tmp_path, tiny_model, rows, ties="drop", epochs=1.0)
    record = json.loads((output / "training.json").read_text())
    assert any("8 ties left out" in text for text in record["data_report"]["warnings"])


def test_adapters_train_over_a_frozen_model(tmp_path: Path, tiny_model: Path) -> None:
    output = train(tmp_path, tiny_model, preferences(48), lora_rank=4, learning_rate=1e-2)
    assert (output / "adapter_config.json").is_file()
    assert not (output / "model.safetensors").exists()
    rows = curve(output)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-2]["loss"] < 0.6


def test_another_reference(tmp_path: Path, tiny_model: Path) -> None:
    first = train(tmp_path, tiny_model, preferences(32), name="first")
    output = train(
        tmp_path, tiny_model, preferences(32), name="second", reference_model=str(first), epochs=1.0
    )
    start = curve(output)[0]
    assert start["loss"] > math.log(2) + 0.01  # the trained reference already prefers the chosen
    assert start["rewards/margins"] < 0
    assert len(list((tmp_path / "reference-cache").glob("*.sqlite"))) == 2


def test_bfloat16_with_float32_copies_learns(tmp_path: Path, tiny_model: Path) -> None:
    output = train(tmp_path, tiny_model, preferences(48), precision="bfloat16")
    rows = curve(output)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=2e-2)
    assert rows[-2]["loss"] < 0.6
    assert F.softplus(torch.zeros(())) == pytest.approx(math.log(2))


def test_listwise_watches_the_best_completions_drift() -> None:
    """Completion 0 is the best: 0.3 nats over two tokens above its reference."""
    groups, objective = two_pairs(), DpoObjective(options(loss="listwise"))
    result = objective.loss(Fixed(LOGPROBS), pack_groups(groups), objective.counts(groups))
    total, count = result.metrics["logps/chosen_drift"]
    assert float(total) / float(count) == pytest.approx(0.3 / 2)


@pytest.mark.parametrize("fields", [{}, {"nll_weight": 0.3}, {"loss": "listwise"}])
def test_packed_equals_unpacked_in_bfloat16(fields: dict[str, Any]) -> None:
    groups = referenced(ragged_groups(), 0.7)
    objective = DpoObjective(options(**fields))
    counts, batch = objective.counts(groups), packed(groups)
    model = make_model(dtype=torch.bfloat16)
    firsts = torch.cat([torch.zeros(1, dtype=torch.long), batch.lengths.cumsum(0)[:-1]])

    class Given(torch.nn.Module):
        def forward(self, packed: Any) -> Any:
            logps = unpacked_logps(model, groups)
            return torch.zeros(len(batch.targets)).index_add(0, firsts, logps), None

    losses, slopes = [], []
    for given in (model, Given()):
        model.zero_grad()
        loss = objective.loss(given, batch, counts).loss
        loss.backward()
        losses.append(loss)
        slopes.append(torch.cat([w.grad.flatten().float() for w in model.parameters()]))
    assert relative(losses[0], losses[1]) < 1e-2
    assert relative(slopes[0], slopes[1]) < 1e-2
