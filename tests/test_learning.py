"""On the pocket policy: a reward model orders completions of prompts it never saw; DPO and RRHF
write better ones.

Completions are sampled from the policy itself and ordered by the programmatic check, which serves
here as a judge without noise.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from feedback.goldcheck import gold_score
from feedback.pocket import model_path
from feedback.records import Prompt, Ranking, decode
from tests.preference_rows import write_rows
from train import dpo, reward, rrhf
from train.chat import ChatFormat
from train.config import DpoOptions, RewardOptions, RrhfOptions, TrainOptions
from train.models import load_model, load_tokenizer
from train.sampler import CachedSampler, SamplingPlan

pytestmark = pytest.mark.slow

TRAIN, FRESH, HELD, COPIES = 160, 160, 64, 4


class Written(NamedTuple):
    """One sampled completion and its check."""

    completion: str
    score: float


def write(model: str, prompts: list[Prompt], *, n: int, seed: int) -> list[list[Written]]:
    """Sample ``n`` completions of each prompt and check them."""
    options = TrainOptions(data=(), output=Path(), model=model, device="cpu")
    tokenizer = load_tokenizer(options)
    policy = load_model(options, tokenizer=tokenizer)
    chat = ChatFormat(tokenizer)
    ids = chat.prompt_ids([chat.prompt_text(prompt.prompt) for prompt in prompts])
    plan = SamplingPlan(max_tokens=48, stop_ids=frozenset(chat.end_ids), batch_tokens=16_384)
    seeds = [seed * 100_000 + number for number in range(len(prompts))]
    found = CachedSampler(policy).sample([row.tolist() for row in ids], seeds=seeds, n=n, plan=plan)
    written = []
    for prompt, samples in zip(prompts, found, strict=True):
        texts = [tokenizer.decode(s.token_ids, skip_special_tokens=True) for s in samples]
        scores = [
            gold_score(prompt.meta, text, ended=sample.ended)
            for text, sample in zip(texts, samples, strict=True)
        ]
        written.append([Written(*pair) for pair in zip(texts, scores, strict=True)])
    return written


def rank(prompt: Prompt, samples: list[Written]) -> Ranking:
    """Order the distinct completions of a prompt by their check."""
    unique = list({sample.completion: sample for sample in samples if sample.completion}.values())
    tiers = sorted({sample.score for sample in unique}, reverse=True)
    return Ranking(
        prompt=prompt.prompt,
        completions=[sample.completion for sample in unique],
        scores=[sample.score for sample in unique],
        ranking=[[i for i, s in enumerate(unique) if s.score == tier] for tier in tiers],
        prompt_id=prompt.prompt_id,
    )


class Setting(NamedTuple):
    """Rankings to train on, and rankings of other prompts."""

    train: str
    held: str
    prompts: list[Prompt]
    """More requests of the kind trained on, none of them trained on."""
    before: np.ndarray
    """Mean check of the untrained policy's completions of each, (FRESH,)."""


@pytest.fixture(scope="module")
def setting(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    if not (model_path("policy") / "model.safetensors").is_file():
        pytest.skip("needs the embedded model's weights in feedback/pocket")
    folder = tmp_path_factory.mktemp("learning")

    def read(name: str, count: int) -> list[Prompt]:
        lines = (root / "prompts" / "sets" / f"{name}.jsonl").read_bytes().splitlines()
        return [decode(line, Prompt) for line in lines[:count]]

    known, held = read("booking-train", TRAIN + FRESH), read("booking-eval", HELD)
    train, fresh = known[:TRAIN], known[TRAIN:]
    rows = {}
    for name, prompts in (("train", train), ("held", held)):
        written = write("pocket:policy", prompts, n=COPIES, seed=1)
        ranked = [rank(*pair) for pair in zip(prompts, written, strict=True)]
        useful = [row for row in ranked if len(row.ranking) > 1]
        assert len(useful) > len(prompts) / 4  # the policy is neither perfect nor hopeless
        rows[name] = write_rows(folder / f"rankings-{name}.jsonl", useful)
    before = means(write("pocket:policy", fresh, n=COPIES, seed=1))
    return Setting(rows["train"], rows["held"], fresh, before)


def means(written: list[list[Written]]) -> np.ndarray:
    """Return the mean check of each prompt's completions."""
    return np.array([np.mean([sample.score for sample in samples]) for samples in written])


LEARN: dict[str, Any] = {
    "model": "pocket:policy",
    "device": "cpu",
    "batch_size": 16,
    "max_length": 256,
    "log_every": 10,
}


def test_reward_model_orders_unseen_prompts(setting: Setting, tmp_path: Path) -> None:
    settings = {"data": (setting.train,), "eval_data": (setting.held,), "output": tmp_path / "rm"}
    reward.run(RewardOptions(**settings, **LEARN, epochs=3.0, learning_rate=3e-4))  # type: ignore[arg-type]
    report = json.loads((tmp_path / "rm" / "report.json").read_text())
    assert report["data"] == "held-out prompts"
    assert report["accuracy"]["low"] > 0.5
    assert report["invariance"]["holds"], report["invariance"]


@pytest.mark.parametrize("algorithm", ["dpo", "rrhf"])
def test_policies_write_better_completions(
    setting: Setting, tmp_path: Path, algorithm: str
) -> None:
    settings: dict[str, Any] = {"data": (setting.train,), "output": tmp_path / "policy", **LEARN}
    if algorithm == "dpo":
        dpo.run(DpoOptions(**settings, epochs=3.0, learning_rate=2e-4, beta=0.3, nll_weight=3.0))
    else:
        rrhf.run(RrhfOptions(**settings, epochs=3.0, learning_rate=2e-4))
    after = means(write(str(tmp_path / "policy"), setting.prompts, n=COPIES, seed=2))
    gain = after - setting.before
    error = gain.std(ddof=1) / len(gain) ** 0.5
    assert gain.mean() > 1.96 * error, (gain.mean(), error)
