"""PPO holds the judge behind its reward to the report card."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from feedback.card import make_card
from feedback.config import EngineOptions
from feedback.errors import GateRefused, RecipeError
from feedback.gate import GateThresholds, judge_card
from feedback.shards import write_json
from feedback.simulation import Planted, simulate
from feedback.templates import load_template
from train import ppo
from train.ppo_config import PpoOptions, RewardSource
from train.ppo_gate import reward_gates

LEANING = Planted(sensitivity=0.4, position=3.0, soft=True)
SOUND = Planted(sensitivity=3.0, lean=0.1, soft=True)


def written(folder: Path, planted: Planted) -> Path:
    """Write the report card of a simulated judge under the pocket judge's name."""
    template = load_template("rating").sha256
    made = simulate(planted, prompts=60, judge="pocket:judge", template=template)
    card = make_card([made.pairs()], replicates=100)
    gate = judge_card(card, GateThresholds())
    write_json(folder / "report.json", {**card.to_dict(), "gate": gate.manifest()})
    return folder / "report.json"


def options(
    folder: Path, card: Path | None, *accept: str, model: str = "pocket:judge"
) -> PpoOptions:
    source = RewardSource(kind="judge", judge=EngineOptions(model=model), report_card=card)
    return PpoOptions(
        prompts=("booking-train",), output=folder / "out", reward=source, accept_bias=accept
    )


def test_a_judge_that_fails_its_card_is_no_reward(tmp_path: Path) -> None:
    """Refused before any model is loaded; accepted by name, and that is written down."""
    card = written(tmp_path, LEANING)
    with pytest.raises(GateRefused, match=r"position_bias\.order_consistency") as refused:
        ppo.train(options(tmp_path, card))
    names = str(refused.value).rpartition("--accept-bias ")[2].split()
    (gate,) = reward_gates(options(tmp_path, card, *names))
    assert gate == {"source": str(card), "status": "accepted", "accepted": sorted(names)}
    with pytest.raises(RecipeError, match="is no figure of the report card"):
        reward_gates(options(tmp_path, card, "position_bia"))


def test_a_sound_judge_passes_and_another_ones_card_does_not_count(tmp_path: Path) -> None:
    card = written(tmp_path, SOUND)
    assert [gate["status"] for gate in reward_gates(options(tmp_path, card))] == ["passed"]
    with pytest.raises(RecipeError, match=r"the card is of pocket:judge with .* not of other"):
        reward_gates(options(tmp_path, card, model="other"))
    with pytest.raises(RecipeError, match="report_card does nothing with kind 'function'"):
        RewardSource(kind="function", function="a:b", report_card=card)


def test_a_judge_without_a_card_is_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert reward_gates(options(tmp_path, None)) == []
    assert "has no report card" in caplog.text


def test_a_reward_model_brings_the_record_of_its_labels(tmp_path: Path) -> None:
    failed = {"status": "refused", "accepted": [], "failed": [{"name": "length_bias.excess"}]}
    record = {
        "options": {"accept_bias": ["length_bias.excess"]},
        "data": [
            {"source": "labels", "manifest": {"gate": failed}},
            {"source": "people", "manifest": {}},
            {"source": "file.jsonl"},
        ],
    }
    (tmp_path / "training.json").write_text(json.dumps(record))
    models = RewardSource(kind="model", models=(str(tmp_path), "some/hub-name"))
    made = PpoOptions(prompts=("p",), output=tmp_path / "out", reward=models)
    assert reward_gates(made) == [
        {"source": "labels", "status": "accepted", "accepted": ["length_bias.excess"]}
    ]
