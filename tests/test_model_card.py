"""The model card: made from the run's own records, valid for the Hub, and nowhere twice."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from feedback.errors import InputError
from feedback.records import Preference
from feedback.shards import ShardWriter
from train.config import DpoOptions
from train.model_card import ModelDetails, model_card, write_model_card
from train.ppo_config import PpoOptions, RewardSource
from train.training_curves import CURVES, draw_curves

JUDGING = {
    "manifest_sha256": "v" * 64,
    "stage": "judge",
    "judge": {"model": "vendor/judge", "revision": "abc", "endpoint": "api.vendor.example"},
    "template": {"name": "pairwise", "kind": "pairwise", "mode": "label", "sha256": "t" * 64},
    "templates": [
        {
            "name": "pairwise",
            "sha256": "t" * 64,
            "labels": ["A", "B"],
            "tie": None,
            "system": "",
            "user": "Which is better?\n```\n{completion_a}",
        }
    ],
    "orders": "both",
}
GATE = {
    "status": "accepted",
    "accepted": ["length_bias"],
    "failed": [],
    "unclear": [],
    "card": {
        "summary": {
            "vendor/judge": {"length_bias.excess": {"value": 0.3, "low": 0.2, "high": 0.4, "n": 90}}
        }
    },
}


@pytest.fixture
def trained(trained_once: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder, for one test."""
    return shutil.copytree(trained_once, tmp_path / trained_once.name)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """A folder that ``rlaif dpo`` left behind, beside its preferences."""
    from train.dpo import run

    tmp_path = tmp_path_factory.mktemp("run")
    with ShardWriter[Preference](tmp_path / "preferences", "preferences") as writer:
        for number in range(16):
            writer.append(
                Preference(
                    prompt=f"Question {number}?",
                    chosen="a good answer",
                    rejected="bad",
                    margin=0.8,
                    p_chosen=0.9,
                    prompt_id=f"p{number}",
                )
            )
        writer.finish({"stage": "pair", "gate": GATE, "provenance": {"judging": JUDGING}})
    run(
        DpoOptions(
            data=(str(tmp_path / "preferences"),),
            output=tmp_path / "policy",
            model=str(tiny_model),
            batch_size=8,
            epochs=2.0,
            log_every=1,
            max_length=128,
        )
    )
    return tmp_path / "policy"


def data_of(text: str) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    return ModelCard(text).data.to_dict()


def test_a_run_leaves_its_card(trained: Path) -> None:
    text = (trained / "README.md").read_text()
    assert data_of(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["rlaif", "dpo"],
    }
    assert "direct preference optimisation" in text and "16 pairs" in text
    assert "`vendor/judge` (revision `abc`) at `api.vendor.example`" in text
    assert "````text\nWhich is better?\n```\n{completion_a}\n````" in text
    assert "prefers the longer reply more often than gold does, by 30.0%" in text
    assert "learning_rate" in text and "beta" not in text.split("## Metrics")[0].split("```toml")[1]
    assert (trained / CURVES).read_bytes().startswith(b"\x89PNG")
    assert f"]({CURVES})" in text
    assert str(trained.parent) not in text, "a local path left with the card"
    assert text.count("# policy") == 1


def test_an_evaluation_beside_it_is_in_the_card(trained: Path) -> None:
    path = trained.parent / "evaluation" / "evaluation.json"
    path.parent.mkdir()
    rate = {"value": 0.61, "low": 0.55, "high": 0.67, "n": 200}
    evaluation = {
        "policy": str(trained),
        "start": "/models/start",
        "prompts": 200,
        "win_rate": {
            "second": {"win_rate": rate, "won": 1},
            "vendor/judge": {"win_rate": rate, "won": 1},
        },
        "kl": {"per_token": {"value": None, "low": None, "high": None, "n": 0}},
    }
    path.write_text(json.dumps(evaluation))
    text = model_card(trained)
    assert "Against `start` on 200 prompts" in text
    assert "| win rate, by `second` | 0.610 | 0.550 to 0.670 | 200 |" in text
    assert "by `vendor/judge` (which labelled the training data)" in text
    assert "`second` labelled no training row." in text
    # Weights that are younger than an evaluation were not what it evaluated.
    os.utime(path, (1, 1))
    assert "None is recorded." in model_card(trained)


def test_what_the_publisher_says_is_in_the_card(trained: Path) -> None:
    details = ModelDetails(
        license="apache-2.0",
        language=("en",),
        tags=("booking",),
        datasets=("user/set",),
        judge_terms="No competing.",
        citation="@misc{x}",
    )
    text = model_card(trained, repo="user/model", details=details)
    data = data_of(text)
    assert data["license"] == "apache-2.0" and data["datasets"] == ["user/set"]
    assert 'from_pretrained("user/model")' in text
    assert "> No competing." in text and "```bibtex\n@misc{x}\n```" in text
    with pytest.raises(InputError, match="none that the Hub knows; did you mean"):
        model_card(trained, details=ModelDetails(license="apache-2"))


def test_a_base_model_on_the_hub_is_named_as_one(trained: Path) -> None:
    record = json.loads((trained / "training.json").read_text())
    record["options"]["model"] = "vendor/base"
    data = data_of(model_card(trained, record=record))
    assert data["base_model"] == "vendor/base"
    assert data["base_model_relation"] == "finetune"
    (trained / "adapter_config.json").write_text("{}")
    data = data_of(model_card(trained, record=record))
    assert (data["library_name"], data["base_model_relation"]) == ("peft", "adapter")


def test_ppo_names_where_its_reward_came_from(tmp_path: Path) -> None:
    source = RewardSource(kind="model", models=("/runs/reward-model",))
    options = PpoOptions(prompts=("/data/prompts.jsonl",), output=tmp_path, reward=source)
    manifest = {"kind": "preferences", "rows": 9, "provenance": {"judging": JUDGING}}
    record = {
        "command": "ppo",
        "options": json.loads(json.dumps(dataclasses.asdict(options), default=str)),
        "reward_data": [{"source": "/x/p", "identity": "i", "rows": 9, "manifest": manifest}],
        "stopped": "the KL passed its bound",
        "figures": {"steps": 3, "prompts": 12, "kl": 4.5},
        "versions": {"python": "3"},
    }
    lines = [{"step": n, "objective/scores": n / 3, "objective/kl": n} for n in range(4)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    text = write_model_card(tmp_path, record).read_text()
    assert "Reward: reward model `reward-model`." in text
    assert "Prompts: `prompts.jsonl`; 12 were used." in text
    assert "The run was stopped: the KL passed its bound." in text
    assert "`vendor/judge`" in text
    assert (tmp_path / CURVES).is_file()


def test_a_reward_models_report_is_in_its_card(trained: Path) -> None:
    report = {
        "data": "held-out prompts",
        "pairs": 40,
        "accuracy": {"value": 0.8, "low": 0.7, "high": 0.9, "pairs": 40},
        "calibration": {
            "ece": 0.05,
            "bins": [
                {
                    "confidence": 0.72,
                    "accuracy": {"value": 0.75, "low": 0.6, "high": 0.85, "pairs": 20},
                    "mass": 0.5,
                }
            ],
        },
    }
    (trained / "report.json").write_text(json.dumps(report))
    text = model_card(trained)
    assert "| accuracy | 0.800 | 0.700 to 0.900 | 40 |" in text
    assert "| 0.720 | 0.750 | 0.600 to 0.850 | 20 |" in text


def test_no_run_no_card(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no training\.json"):
        model_card(tmp_path)
    (tmp_path / "loss.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    assert draw_curves(tmp_path) is None, "one point is no curve"
