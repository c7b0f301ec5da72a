"""vLLM loads a saved reward model as a classifier and gives our scores."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_reward_model import COMPLETIONS, PROMPTS, fresh

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

# A process of its own: the engine leaves distributed groups and seeds behind.
CLASSIFY = """
import json, sys
from vllm import LLM
rows = json.load(open(sys.argv[2]))
engine = LLM(model=sys.argv[1], runner="pooling", dtype="float32", max_model_len=512,
             enforce_eager=True)
outputs = engine.classify([{"prompt_token_ids": row} for row in rows], use_tqdm=False)
json.dump([output.outputs.probs for output in outputs], open(sys.argv[3], "w"))
"""


def wider_heads(folder: Path, target: Path) -> Path:
    """The tiny model with heads of 32, the least that vLLM's CPU attention knows."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(folder).save_pretrained(target)
    config = LlamaConfig.from_pretrained(folder, num_attention_heads=2, num_key_value_heads=1)
    config.head_dim = 32
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(target)
    return target


def test_vllm_gives_the_same_scores(tiny_model: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: make setup installs its CPU build")
    model = fresh(wider_heads(tiny_model, tmp_path / "start"))
    model.save(tmp_path / "model")
    ours = model.score(PROMPTS, COMPLETIONS)
    prompts = model.chat.prompt_ids([model.chat.prompt_text(prompt) for prompt in PROMPTS])
    completions = model.chat.completion_ids(COMPLETIONS)
    rows = [
        [int(token) for token in (*prompt, *completion)]
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    asked, answered = tmp_path / "rows.json", tmp_path / "scores.json"
    asked.write_text(json.dumps(rows))
    done = subprocess.run(
        [sys.executable, "-c", CLASSIFY, tmp_path / "model", asked, answered],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    theirs = torch.tensor(json.loads(answered.read_text()))
    assert theirs.shape == (len(rows), 1)
    torch.testing.assert_close(ours, theirs[:, 0], atol=1e-4, rtol=0)
