"""Rollouts by real vLLM beside the trainer: its weights are the policy's, at every step."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from train.vllm_sampler import full_weights

# A process of its own: the engine leaves distributed groups and seeds behind.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from train import ppo
from train.ppo_config import PpoOptions, RewardSource
from train.ppo_setup import set_up
from feedback.errors import RlaifError

def main():
    model, prompts, folder = sys.argv[1:]
    options = dict(
        prompts=(prompts,), model=model, steps=3, prompts_per_step=4, completions_per_prompt=3,
        max_tokens=8, max_prompt_tokens=40, learning_rate=3e-3, device="cpu", sampler="vllm",
        temperature=0.8, reward=RewardSource(kind="function", function="tests.test_ppo:letters"),
    )
    this = set_up(PpoOptions(output=Path(folder) / "a", **options))
    found = {"gaps": [], "lengths": [], "ended": []}
    def gap(rollout):
        return float((rollout.sampler_logprobs - rollout.logprobs).abs().max())
    first = ppo.roll_out(this, 0)
    found["gaps"].append(gap(first))
    again = ppo.roll_out(this, 0)
    found["repeats"] = first.texts == again.texts
    other = ppo.roll_out(this, 1)
    found["differs"] = first.texts[:3] != other.texts[:3]
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in this.networks.module.policy.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    sync, this.sampler.sync = this.sampler.sync, lambda policy: None
    try:
        ppo.roll_out(this, 1)
    except RlaifError as error:
        found["stale"] = str(error)
    this.sampler.sync = sync
    moved = ppo.roll_out(this, 1)
    found["gaps"].append(gap(moved))
    try:
        this.sampler.sample([[5] * 500], seeds=[0], n=1, plan=this.plan)
    except RlaifError as error:
        found["refused"] = str(error)
    found["moved"] = float((moved.logprobs - moved.ref_logprobs).abs().max())
    found["ended"] = [
        [ids[-1] == 1 for group in moved.groups for ids in group.completions],
        moved.ended.tolist(),
    ]
    this.sampler.close()
    trained = ppo.train(PpoOptions(output=Path(folder) / "b", **options))
    found["steps"] = trained.figures["steps"]
    curve = (Path(folder) / "b" / "metrics.jsonl").read_text().splitlines()
    found["curve_gaps"] = [json.loads(line)["sampler/gap"] for line in curve]
    (Path(folder) / "found.json").write_text(json.dumps(found))

if __name__ == "__main__":
    main()
"""


def wider(folder: Path, target: Path) -> Path:
    """The tiny model with heads of 32, the least that vLLM's CPU attention knows."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    config = LlamaConfig.from_pretrained(folder, num_attention_heads=2, num_key_value_heads=1)
    config.head_dim = 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(target)
    return target


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_vllm_samples_from_the_policy_as_it_stands(
    tiny_model: Path, tmp_path: Path, root: Path
) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: make setup installs its CPU build")
    model = wider(tiny_model, tmp_path / "model")
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt_id": f"p{i}", "prompt": f"say {i} words"} for i in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, model, prompts, tmp_path],
        capture_output=True,
        text=True,
        cwd=root,
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    assert max(found["gaps"]) < 2e-3
    assert found["moved"] > 0.1  # the second rollout came from weights far from the first's
    assert "weights are not the policy's" in found["stale"]
    assert found["refused"].startswith("vLLM failed to sample")
    assert found["repeats"]
    assert found["differs"]
    assert found["ended"][0] == found["ended"][1]
    assert found["steps"] == 3
    assert max(found["curve_gaps"]) < 2e-3


def test_adapters_reach_the_engine_merged(tiny_model: Path) -> None:
    """The weights handed over equal those of a merged copy, and nothing is left changed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert {name: p.tolist() for name, p in full_weights(model)} == {
        name: p.tolist() for name, p in plain.items()
    }
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    found = dict(full_weights(adapted))
    merged = dict(adapted.merge_and_unload().named_parameters())
    assert found.keys() == merged.keys() == plain.keys()
    for name, parameter in merged.items():
        torch.testing.assert_close(found[name], parameter)
    changed = [name for name in plain if not torch.equal(found[name], plain[name])]
    assert len(changed) == 2 * 7
