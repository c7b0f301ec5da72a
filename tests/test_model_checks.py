"""Rows longer than the model's context: refused by every command before it trains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from feedback.errors import InputError
from tests.preference_rows import preferences, write_rows
from train import dpo, reward, rrhf, sft
from train.config import DpoOptions, RewardOptions, RrhfOptions, SftOptions

COMMANDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "sft": (sft.run, SftOptions, {}),
    "reward": (reward.run, RewardOptions, {}),
    "dpo": (dpo.run, DpoOptions, {}),
    "simpo": (dpo.run, DpoOptions, {"loss": "simpo"}),
    "rrhf": (rrhf.run, RrhfOptions, {}),
    "trl": (dpo.run, DpoOptions, {"engine": "trl", "soft_labels": False}),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_rows_past_the_context_are_refused_before_training(
    name: str, tiny_model: Path, tmp_path: Path
) -> None:
    run, options, fields = COMMANDS[name]
    model, output = tmp_path / "model", tmp_path / "out"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 32}))
    data = str(tmp_path / "rows.jsonl")
    if name == "sft":
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": "x" * 40}) + "\n")
    else:
        write_rows(tmp_path / "rows.jsonl", preferences(2))
    settings = options(data=(data,), model=str(model), output=output, device="cpu", **fields)
    with pytest.raises(InputError, match="context 32: set max_length"):
        run(settings)
    assert not (output / "training.json").exists()
    if name == "rrhf":
        run(options(data=(data,), model=str(model), output=output, device="cpu", max_length=32))
