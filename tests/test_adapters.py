"""A LoRA result as the next start: its weights count, and so does what is trained on top of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from feedback.errors import InputError
from tests.packed_helpers import make_model, ragged_groups, relative
from tests.preference_rows import preferences, write_rows
from train.adapters import load_pretrained
from train.attention import with_layout
from train.config import DpoOptions
from train.dpo import run
from train.models import completion_logps, load_model, load_tokenizer
from train.packing import pack_groups
from train.ppo import train as train_ppo
from train.ppo_config import PpoOptions, RewardSource
from train.reference import weights_hash


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an adapter of the tiny model that changes what it says."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def options(model: Path, output: Path, **fields: Any) -> DpoOptions:
    return DpoOptions(
        **{"data": (), "model": str(model), "output": output, "device": "cpu"} | fields
    )


def logps(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return completion_logps(model, with_layout(pack_groups(ragged_groups()), "blocks")).logps


def loaded(model: Path) -> Any:
    return load_model(options(model, model), tokenizer=None)


def test_an_adapter_is_its_base_with_the_adapter_merged(adapter: Path, tiny_model: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from train.models import enable_packing

    model = loaded(adapter)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    enable_packing(adapted)
    assert relative(logps(model), logps(adapted)) < 1e-5
    assert relative(logps(model), logps(loaded(tiny_model))) > 1e-2
    assert all(weight.requires_grad for weight in model.parameters())
    assert not any("lora_" in name for name in model.state_dict())
    reward = load_model(options(adapter, adapter), tokenizer=None, kind="reward")
    assert torch.equal(
        reward.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight
    )


def test_adapters_on_an_adapter_start_from_it_and_are_saved_whole(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", preferences(16))
    fields = {"data": (data,), "lora_rank": 4, "learning_rate": 1e-2, "log_every": 1}
    run(options(adapter, tmp_path / "out", epochs=3.0, batch_size=8, **fields))
    rows = [json.loads(line) for line in (tmp_path / "out" / "loss.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[-2]["loss"] < 0.6
    assert not list((tmp_path / "out").glob("adapter_*"))
    found = logps(loaded(tmp_path / "out"))
    assert (
        1e-3 < relative(found, logps(loaded(adapter))) < relative(found, logps(loaded(tiny_model)))
    )


def test_an_adapter_trains_whole_without_a_rank(adapter: Path, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "rows.jsonl", preferences(8))
    run(options(adapter, tmp_path / "out", data=(data,), max_steps=1))
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_adapters_that_stay_on_count_in_the_hash(adapter: Path, tiny_model: Path) -> None:
    """transformers itself puts an adapter inside the model: nothing switches it off."""
    from transformers import AutoModelForCausalLM

    inside = AutoModelForCausalLM.from_pretrained(adapter)
    assert any("lora_" in name for name in inside.state_dict())
    assert weights_hash(inside) != weights_hash(AutoModelForCausalLM.from_pretrained(tiny_model))
    assert weights_hash(loaded(adapter)) != weights_hash(loaded(tiny_model))
    assert weights_hash(make_model()) == weights_hash(make_model())


def test_quantised_weights_take_no_adapter_in(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="without quantize"):
        load_model(
            options(adapter, tmp_path, quantize="4bit", lora_rank=2),
            tokenizer=load_tokenizer(options(adapter, tmp_path)),
        )


def test_a_missing_base_is_named(adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="gone"):
        load_pretrained(AutoModelForCausalLM, str(tmp_path))


def test_ppo_saves_adapters_on_an_adapter_whole(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Any reader finds the policy that was trained, at the end and on the way."""
    from transformers import AutoModelForCausalLM

    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"say {n}"}) + "\n" for n in range(6)))
    train_ppo(
        PpoOptions(
            prompts=(str(prompts),),
            model=str(adapter),
            output=tmp_path / "out",
            reward=RewardSource(kind="function", function="tests.test_ppo:letters"),
            steps=4,
            prompts_per_step=4,
            completions_per_prompt=2,
            max_tokens=6,
            learning_rate=1e-2,
            lora_rank=4,
            copy_every=2,
            device="cpu",
        )
    )
    start, base = logps(loaded(adapter)), logps(loaded(tiny_model))
    for folder in (tmp_path / "out", *sorted((tmp_path / "out" / "policies").iterdir())):
        assert not list(folder.glob("adapter_*"))
        AutoModelForCausalLM.from_pretrained(folder)
        assert 1e-4 < relative(logps(loaded(folder)), start) < relative(base, start)
