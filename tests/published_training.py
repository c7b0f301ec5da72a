"""Run by a test in a process of its own, with HF_ENDPOINT at the test server: publish, load, train.

``python published_training.py SHARDS MODEL FOLDER``
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from train.cli import main

COMMON: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "report_to": "none",
    "save_strategy": "no",
    "use_cpu": True,
    "max_length": 128,
    "disable_tqdm": True,
    "bf16": False,
    "gradient_checkpointing": False,
}


def trl_steps(rows: Any, model: str, folder: Path) -> list[int]:
    """Train one step in each of TRL's trainers; return the steps done."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    scorer = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype="float32"
    )
    trainers: list[Any] = [
        DPOTrainer(
            policy,
            args=DPOConfig(output_dir=str(folder / "dpo"), **COMMON),
            train_dataset=rows,
            processing_class=tokenizer,
        ),
        RewardTrainer(
            scorer,
            args=RewardConfig(output_dir=str(folder / "reward"), **COMMON),
            train_dataset=rows,
            processing_class=tokenizer,
        ),
    ]
    for trainer in trainers:
        trainer.train()
    return [trainer.state.global_step for trainer in trainers]


def run(shards: str, model: str, folder: Path) -> dict[str, Any]:
    """Publish both ways, load from both, and train on what came back."""
    published = ["publish", shards, "--license", "mit", "--splits", "train", "0.7", "test", "0.3"]
    assert main([*published, "--repo", "data"]) == 0
    assert main([*published, "--to", str(folder / "local")]) == 0
    cache = str(folder / "cache")
    remote = load_dataset("ann/data", "preferences", cache_dir=cache)
    local = load_dataset(str(folder / "local"), "preferences", cache_dir=cache)
    assert {name: list(split) for name, split in remote.items()} == {
        name: list(split) for name, split in local.items()
    }
    streamed = load_dataset("ann/data", "preferences", split="train", streaming=True)
    assert next(iter(streamed)) == remote["train"][0]
    found = {"rows": {name: len(split) for name, split in remote.items()}}
    found["trl_steps"] = trl_steps(remote["train"], model, folder)
    back = folder / "back"
    assert main(["import", "ann/data", "--format", "published", "--out", str(back)]) == 0
    ours = ["--data", str(back / "preferences" / "train"), "--model", model, "--device", "cpu"]
    for name in ("dpo", "reward"):
        words = [name, *ours, "--output", str(folder / f"our-{name}"), "--epochs", "1"]
        assert main([*words, "--batch-size", "4"]) == 0
        record = json.loads((folder / f"our-{name}" / "training.json").read_text())
        found[f"our_{name}_steps"] = record["figures"]["steps"]
    policy = str(folder / "our-dpo")
    assert main(["publish", policy, "--repo", "policy", "--license", "mit"]) == 0
    saved = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    pulled = AutoModelForCausalLM.from_pretrained("ann/policy").state_dict()
    assert all((saved[name] == pulled[name]).all() for name in saved)
    return found


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
