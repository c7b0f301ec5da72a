"""Adapters over weights of 4 bits (QLoRA): the gradients are those of the rounded weights."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from feedback.errors import InputError, RlaifError
from tests.packed_helpers import ragged_groups
from tests.preference_rows import preferences, write_rows
from train.attention import with_layout
from train.config import DpoOptions, RewardOptions
from train.dpo import run
from train.models import add_adapters, completion_logps, load_model
from train.packing import pack_groups
from train.reward import run as run_reward
from train.reward_model import RewardModel

pytestmark = [
    # Importing bitsandbytes says so of its own code, and on a CPU also what it lacks.
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd kernel was not registered:UserWarning"),
]


def options(model: Path, folder: Path, **fields: Any) -> DpoOptions:
    values = {"data": (), "model": str(model), "device": "cpu", "batch_size": 8}
    values |= {"quantize": "4bit", "lora_rank": 4, "learning_rate": 1e-2}
    return DpoOptions(output=folder, **values | fields)


def rounded_twin(model: Any) -> Any:
    """Return a copy whose 4-bit layers are plain ones with the values that they stand for."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Linear4bit):
            weight = dequantize_4bit(module.weight.data, module.weight.quant_state).float()
            plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            plain.weight.data = weight
            owner, _, leaf = name.rpartition(".")
            setattr(twin.get_submodule(owner), leaf, plain)
    return twin


def gradients(model: Any, settings: DpoOptions) -> tuple[float, Tensor]:
    """Return the loss of the packed engine and the gradient of adapters drawn from a seed."""
    torch.manual_seed(0)
    adapted = add_adapters(model, settings)
    generator = torch.Generator().manual_seed(1)
    trained = [p for name, p in sorted(adapted.named_parameters()) if "lora_" in name]
    for parameter in trained:
        parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    batch = with_layout(pack_groups(ragged_groups()), "blocks")
    loss = -completion_logps(adapted, batch).logps.mean()
    loss.backward()
    return float(loss.detach()), torch.cat([p.grad.flatten() for p in trained])


def test_gradients_are_those_of_the_rounded_weights(tiny_model: Path, tmp_path: Path) -> None:
    settings = options(tiny_model, tmp_path)
    quantised = load_model(settings, tokenizer=None)
    assert any(p.dtype == torch.uint8 for p in quantised.parameters())
    twin = rounded_twin(quantised)
    loss, found = gradients(quantised, settings)
    expected_loss, expected = gradients(twin, options(tiny_model, tmp_path, quantize="none"))
    assert loss == pytest.approx(expected_loss, rel=1e-2)  # products are in bfloat16
    assert float((found - expected).norm() / expected.norm()) < 3e-2
    assert float(expected.norm()) > 0


def test_a_pass_without_gradients_leaves_the_gradients_right(
    tiny_model: Path, tmp_path: Path
) -> None:
    """As the one for DPO's reference; some CPUs have weights packed anew for it."""
    settings = options(tiny_model, tmp_path)
    found = []
    for before in (False, True):
        model = load_model(settings, tokenizer=None)
        if before:
            model.eval()
            with torch.no_grad():
                model(input_ids=torch.tensor([[5, 6, 7]]))
            model.train()
        found.append(gradients(model, settings)[1])
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-2


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_it_learns_and_saves_its_adapters(quantize: str, tiny_model: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", preferences(48))
    output = tmp_path / "policy"
    run(options(tiny_model, output, data=(str(data),), epochs=3.0, log_every=1, quantize=quantize))
    rows = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses[-1] < 0.6 < losses[0]
    assert (output / "adapter_model.safetensors").is_file()
    assert not (output / "model.safetensors").exists()


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_a_reward_model_is_saved_as_it_was_trained(
    quantize: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Rounded once more on merging, a model of 4 bits would have lost what it learnt."""
    data = write_rows(tmp_path / "rows.jsonl", preferences(40))
    fields: dict[str, Any] = {"quantize": quantize, "lora_rank": 4, "lora_alpha": 32.0}
    fields |= {"batch_size": 8, "epochs": 4.0, "learning_rate": 5e-3, "log_every": 1}
    output = tmp_path / "rm"
    run_reward(
        RewardOptions(data=(data,), model=str(tiny_model), output=output, device="cpu", **fields)
    )
    assert not list(output.glob("adapter_*"))
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    report = json.loads((output / "report.json").read_text())
    curve = [json.loads(line) for line in (output / "loss.jsonl").read_text().splitlines()]
    trained = [row["rewards/margins"] for row in curve if "rewards/margins" in row][-1]
    saved = RewardModel.load(output, device="cpu")
    rows = preferences(40)
    prompts = [row.prompt for row in rows]
    chosen, rejected = (
        saved.score(prompts, [str(getattr(row, side)) for row in rows])
        for side in ("chosen", "rejected")
    )
    assert trained > 1
    assert float((chosen - rejected).mean()) == pytest.approx(trained, rel=0.15)
    assert report["accuracy"]["value"] > 0.9


def test_a_merge_that_changes_scores_keeps_the_adapters(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.reward_model.apply_adapter", lambda model, folder: model)
    data = write_rows(tmp_path / "rows.jsonl", preferences(40))
    fields: dict[str, Any] = {"quantize": "4bit", "lora_rank": 4, "lora_alpha": 32.0}
    fields |= {"batch_size": 8, "epochs": 2.0, "learning_rate": 5e-3}
    output = tmp_path / "rm"
    with pytest.raises(RlaifError, match="adapters there"):
        run_reward(
            RewardOptions(
                data=(data,), model=str(tiny_model), output=output, device="cpu", **fields
            )
        )
    assert (output / "adapter_model.safetensors").is_file()


def test_without_the_package_the_way_out_is_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'rlaif\[quantize\]'"):
        load_model(options(tiny_model, tmp_path), tokenizer=None)
