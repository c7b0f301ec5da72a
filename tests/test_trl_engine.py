"""Our engine and TRL's trainers on one recipe: the same loss at every step, or a clear refusal."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from feedback.errors import RecipeError
from tests.preference_rows import preferences, rankings, write_rows
from train import dpo, reward, sft
from train.config import DpoOptions, RewardOptions, SftOptions
from train.trl_engine import run_dpo, run_reward, run_sft

RECIPE: dict[str, Any] = {
    "device": "cpu",
    "precision": "float32",
    "batch_size": 8,
    "epochs": 2.0,
    "learning_rate": 1e-3,
    "weight_decay": 0.1,
    "schedule": "cosine",
    "log_every": 1,
    "seed": 3,
}
PAIRS: dict[str, Any] = {"soft_labels": False, "ties": "drop"}


def losses(folder: Path, key: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def both(run: Any, options: Any, tmp_path: Path) -> tuple[Path, Path]:
    ours, theirs = tmp_path / "packed", tmp_path / "trl"
    run(dataclasses.replace(options, output=ours))
    run(dataclasses.replace(options, output=theirs, engine="trl"))
    assert len(losses(ours)) == 2 * 3  # 20 rows: two full steps and one of 4, twice
    return ours, theirs


def check_equal(ours: Path, theirs: Path) -> None:
    """The same losses and gradient norms at every step: data, order, loss, optimiser, schedule."""
    assert losses(theirs) == pytest.approx(losses(ours), abs=1e-5)
    norms = losses(ours, "grad_norm")
    assert losses(theirs, "grad_norm") == pytest.approx(norms, rel=2e-4, abs=1e-5)
    assert losses(theirs, "learning_rate") == pytest.approx(losses(ours, "learning_rate"))
    assert len(set(losses(ours))) == len(losses(ours))
    record = json.loads((theirs / "training.json").read_text())
    assert record["engine"] == "trl"
    assert record["figures"]["steps"] == 6
    assert (theirs / "model.safetensors").is_file()


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    return write_rows(tmp_path / "preferences.jsonl", preferences(20))


@pytest.mark.parametrize(
    "variant",
    [
        {"centring": 0.0},
        {"centring": 0.05, "margin_scale": 0.5},
    ],
)
def test_reward_equals_trl(
    tiny_model: Path, tmp_path: Path, pairs: str, variant: dict[str, Any]
) -> None:
    fields = {"data": (pairs,), "model": str(tiny_model), "output": tmp_path}
    options = RewardOptions(**fields, **RECIPE, **PAIRS, **variant)  # type: ignore[arg-type]
    check_equal(*both(reward.run, options, tmp_path))


@pytest.mark.parametrize(
    "variant",
    [
        {"loss": "sigmoid"},
        {"loss": "robust", "label_smoothing": 0.2},
        {"loss": "ipo", "ipo_averaged": True, "beta": 0.5},
        {"loss": "sigmoid", "ld_alpha": 0.5},
    ],
)
def test_dpo_equals_trl(
    tiny_model: Path, tmp_path: Path, pairs: str, variant: dict[str, Any]
) -> None:
    fields = {"data": (pairs,), "model": str(tiny_model), "output": tmp_path}
    options = DpoOptions(**fields, **RECIPE, **PAIRS, **variant)  # type: ignore[arg-type]
    check_equal(*both(dpo.run, options, tmp_path))


@pytest.mark.parametrize("completion_only", [True, False])
def test_sft_equals_trl(tiny_model: Path, tmp_path: Path, completion_only: bool) -> None:
    rows = [{"prompt": row.prompt, "completion": row.chosen} for row in preferences(20)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = SftOptions(
        data=(str(data),),
        model=str(tiny_model),
        output=tmp_path,
        completion_only=completion_only,
        **RECIPE,
    )
    check_equal(*both(sft.run, options, tmp_path))


def test_adapters_equal_trl(tiny_model: Path, tmp_path: Path, pairs: str) -> None:
    """The first steps: adapters start as nothing, so loss and gradients agree before they move."""
    fields = {"data": (pairs,), "model": str(tiny_model), "output": tmp_path, "lora_rank": 4}
    options = DpoOptions(**fields, **RECIPE, **PAIRS)  # type: ignore[arg-type]
    ours, theirs = both(dpo.run, options, tmp_path)
    assert losses(theirs)[0] == pytest.approx(losses(ours)[0], abs=1e-6)
    assert losses(theirs)[-1] < losses(theirs)[0]


def test_several_pairs_of_a_prompt_are_taken_apart(tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rankings.jsonl", rankings(4))
    fields: dict[str, Any] = {
        "data": (data,),
        "model": str(tiny_model),
        "engine": "trl",
        **RECIPE,
        "epochs": 1.0,
        "ties": "drop",
    }
    with pytest.raises(RecipeError, match="average = 'pair'"):
        run_reward(RewardOptions(output=tmp_path / "a", **fields))
    run_reward(RewardOptions(output=tmp_path / "b", average="pair", **fields))
    record = json.loads((tmp_path / "b" / "training.json").read_text())
    assert any("in pairs" in warning for warning in record["data_report"]["warnings"])


def test_held_out_rows_are_evaluated_by_trl(tiny_model: Path, tmp_path: Path, pairs: str) -> None:
    fields = {"data": (pairs,), "model": str(tiny_model), "output": tmp_path / "rm"}
    settings = {**RECIPE, **PAIRS, "max_steps": 1, "eval_share": 0.3, "engine": "trl"}
    reward.run(RewardOptions(**fields, **settings))  # type: ignore[arg-type]
    record = json.loads((tmp_path / "rm" / "training.json").read_text())
    assert record["figures"]["eval_loss"] > 0


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"soft_labels": True}, "soft_labels = false"),
    ({"loss": "davidson", "ties": "use"}, "bradley-terry"),
    ({"loss": "plackett-luce", "ties": "use", "soft_labels": True}, "bradley-terry"),
    ({"label_smoothing": 0.1}, "label_smoothing"),
    ({"length_decorrelation": 1.0}, "length_decorrelation"),
    ({"activation_budget": 0.5}, "activation_budget"),
    ({"members": 2}, "members = 1"),
    ({"batch_size": 0}, "batch_size"),
    ({"share_prompt": False}, "share_prompt"),
    ({"row_tokens": 4096}, "row_tokens"),
    ({"precision": "bfloat16"}, "autocast"),
    ({"save_every": 5}, "save_every"),
]


@pytest.mark.parametrize(("variant", "named"), REFUSED)
def test_what_trl_cannot_honour_is_refused_by_name(
    tiny_model: Path, tmp_path: Path, pairs: str, variant: dict[str, Any], named: str
) -> None:
    fields = {"data": (pairs,), "model": str(tiny_model), "output": tmp_path / "rm"}
    options = RewardOptions(**fields, **RECIPE | PAIRS | {"engine": "trl"} | variant)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=named) as refusal:
        run_reward(options)
    assert "engine = 'packed'" in str(refusal.value)


def test_ties_and_weights_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    rows = preferences(4, p=1.0)
    tied = [dataclasses.replace(rows[0], tie=True, p_chosen=0.5), *rows[1:]]
    weighed = [dataclasses.replace(rows[0], weight=0.5), *rows[1:]]
    for name, data, named in (("t", tied, "ties = 'drop'"), ("w", weighed, "weights")):
        path = write_rows(tmp_path / f"{name}.jsonl", data)
        options = RewardOptions(
            data=(path,), model=str(tiny_model), output=tmp_path / "rm", engine="trl", device="cpu"
        )
        with pytest.raises(RecipeError, match=named):
            run_reward(options)


@pytest.mark.parametrize(
    ("variant", "named"),
    [
        ({"loss": "gdpo"}, "sigmoid, robust, ipo"),
        ({"loss": "ipo"}, "ipo_averaged"),
        ({"nll_weight": 0.1}, "nll_weight"),
        ({"drift_warning": 0.2}, "drift_warning"),
        ({"label_smoothing": 0.1}, "robust"),
        ({"loss": "robust"}, "robust"),
        ({"reference_cache": Path("cache")}, "reference_cache"),
    ],
)
def test_dpo_refusals(
    tiny_model: Path, tmp_path: Path, pairs: str, variant: dict[str, Any], named: str
) -> None:
    fields = {"data": (pairs,), "model": str(tiny_model), "output": tmp_path / "p"}
    with pytest.raises(RecipeError, match=named):
        run_dpo(DpoOptions(**fields, **RECIPE | PAIRS | {"engine": "trl"} | variant))  # type: ignore[arg-type]


def test_sft_refusals(tiny_model: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"data": ("x",), "output": tmp_path / "s", "engine": "trl"}
    with pytest.raises(RecipeError, match="scratch"):
        run_sft(SftOptions(model="scratch", **fields))
    with pytest.raises(RecipeError, match="min_learning_rate"):
        run_sft(SftOptions(model=str(tiny_model), min_learning_rate=0.1, **fields))
