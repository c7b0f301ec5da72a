"""Reward models as objects: scores that other tools reproduce, whatever pad, EOS and batch are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from feedback.errors import InputError
from train.config import TrainOptions
from train.models import load_model, load_tokenizer
from train.reward_model import (
    RewardEnsemble,
    RewardModel,
    combine_rewards,
    ensure_pad_token,
    has_trained_head,
    load_reward_model,
    save_ensemble,
    start_head,
)

PROMPTS: list[Any] = [
    "When do you open?",
    "A table for two, please.",
    "When do you open?",
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
]
COMPLETIONS = ["At nine.", "Booked for seven tonight, by the window.", "", "Hello!"]


def fresh(folder: Path, seed: int = 0) -> RewardModel:
    options = TrainOptions(data=(), output=folder, model=str(folder), device="cpu")
    tokenizer = load_tokenizer(options)
    model = load_model(options, tokenizer=tokenizer, kind="reward")
    assert not has_trained_head(model)
    ensure_pad_token(model, tokenizer)
    start_head(model, seed=seed)
    return RewardModel(model, tokenizer)


@pytest.fixture
def reward_model(tiny_model: Path) -> RewardModel:
    return fresh(tiny_model)


def transformers_scores(folder: Path, *, side: str = "right", batch: int = 8) -> Tensor:
    """Scores by transformers alone: its classes, its chat template, its padding."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert model.config.num_labels == 1
    texts = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        turns = [*turns, {"role": "assistant", "content": completion}]
        texts.append(tokenizer.apply_chat_template(turns, tokenize=False))
    scores = []
    for start in range(0, len(texts), batch):
        inputs = tokenizer(
            texts[start : start + batch],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        with torch.no_grad():
            scores.append(model(**inputs).logits[:, 0])
    return torch.cat(scores)


@pytest.mark.parametrize(("side", "batch"), [("right", 1), ("right", 4), ("left", 4)])
def test_transformers_gives_the_same_scores(
    reward_model: RewardModel, tmp_path: Path, side: str, batch: int
) -> None:
    reward_model.save(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    ours = reward_model.score(PROMPTS, COMPLETIONS)
    assert ours.std() > 0.1
    theirs = transformers_scores(tmp_path, side=side, batch=batch)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    again = RewardModel.load(tmp_path, device="cpu").score(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(ours, again, atol=1e-6, rtol=0)


def make_pad_end(folder: Path, target: Path) -> Path:
    """A copy of the model whose pad token is its EOS token, as many released models have it."""
    from transformers import AutoTokenizer

    shutil.copytree(folder, target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(target)
    return target


def test_pad_equal_to_eos_is_repaired_and_scores_agree(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_pad_end(tiny_model, tmp_path / "pad-is-eos")
    model = fresh(folder)
    assert model.tokenizer.pad_token_id not in model.chat.end_ids
    assert model.model.config.pad_token_id == model.tokenizer.pad_token_id
    model.save(tmp_path / "saved")
    torch.testing.assert_close(
        model.score(PROMPTS, COMPLETIONS),
        transformers_scores(tmp_path / "saved"),
        atol=1e-5,
        rtol=0,
    )


def test_a_new_pad_token_is_added_where_none_is_spare(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.reward_model.PAD_TOKENS", ())
    folder = make_pad_end(tiny_model, tmp_path / "pad-is-eos")
    model = fresh(folder)
    assert model.tokenizer.pad_token == "<|pad|>"
    assert model.model.get_input_embeddings().weight.shape[0] == len(model.tokenizer)
    model.save(tmp_path / "saved")
    torch.testing.assert_close(
        model.score(PROMPTS, COMPLETIONS),
        transformers_scores(tmp_path / "saved"),
        atol=1e-5,
        rtol=0,
    )


def test_saving_with_pad_equal_to_eos_is_refused(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.model.config.pad_token_id = reward_model.tokenizer.eos_token_id
    with pytest.raises(InputError, match="pad token"):
        reward_model.save(tmp_path)


def test_scores_do_not_depend_on_batch_order_or_company(reward_model: RewardModel) -> None:
    together = reward_model.score(PROMPTS, COMPLETIONS)
    alone = torch.cat(
        [reward_model.score([p], [c]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    )
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    backwards = reward_model.score(PROMPTS[::-1], COMPLETIONS[::-1])
    torch.testing.assert_close(together, backwards.flip(0), atol=1e-5, rtol=0)
    reward_model.row_tokens = 48  # rows too small for all completions of a prompt
    many = reward_model.score([PROMPTS[0]] * 9, [f"{n} o'clock" for n in range(9)])
    singly = [reward_model.score([PROMPTS[0]], [f"{n} o'clock"]) for n in range(9)]
    torch.testing.assert_close(many, torch.cat(singly), atol=1e-5, rtol=0)
    assert reward_model.score([], []).shape == (0,)


def test_a_completion_that_was_cut_off_is_scored_without_an_end(reward_model: RewardModel) -> None:
    ended = reward_model.score(["Hi"], ["Hello"])
    cut = reward_model.score(["Hi", "Hi"], ["Hello", "Hello"], ended=[False, True])
    torch.testing.assert_close(cut[1:], ended, atol=1e-5, rtol=0)
    chat = reward_model.chat
    ids = [*chat.prompt_ids([chat.prompt_text("Hi")])[0], *chat.plain_ids(["Hello"])[0]]
    with torch.no_grad():
        plain = reward_model.model(input_ids=torch.tensor([[int(i) for i in ids]])).logits[0, 0]
    assert cut[0].item() == pytest.approx(plain.item(), abs=1e-5)


def test_too_long_for_the_context_is_an_error(reward_model: RewardModel) -> None:
    reward_model.model.config.max_position_embeddings = 20
    with pytest.raises(InputError, match="context 20"):
        reward_model.score(["Hi"], ["Hello " * 20])


def test_half_precision_does_not_round_rewards(reward_model: RewardModel, tmp_path: Path) -> None:
    reward_model.save(tmp_path)
    half = RewardModel.load(tmp_path, device="cpu", precision="bfloat16")
    rewards = half.score(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(
        rewards, reward_model.score(PROMPTS, COMPLETIONS), atol=0.05, rtol=0.05
    )
    assert bool((rewards.bfloat16().float() != rewards).any())


def test_a_language_model_is_no_reward_model(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="rlaif reward"):
        RewardModel.load(tiny_model, device="cpu")


def test_combining_by_hand() -> None:
    """Members 1, 2, 6 and 0, 0, 0: mean 3, min 1, variance (4 + 1 + 9) / 3 = 14/3.

    UWO at lambda 0.3: 3 - 0.3 * 14/3 = 1.6.
    """
    rewards = torch.tensor([[1.0, 0.0], [2.0, 0.0], [6.0, 0.0]])
    assert combine_rewards(rewards).tolist() == [3.0, 0.0]
    assert combine_rewards(rewards, rule="min").tolist() == [1.0, 0.0]
    assert combine_rewards(rewards, rule="uwo", uwo_lambda=0.3).tolist() == pytest.approx([1.6, 0])


def test_ensembles_save_and_load(tiny_model: Path, tmp_path: Path) -> None:
    members = [fresh(tiny_model, seed) for seed in range(2)]
    for number, member in enumerate(members):
        member.save(tmp_path / f"member-{number}")
    names = ["member-0", "member-1"]
    save_ensemble(tmp_path, names, rule="uwo", uwo_lambda=2.0)
    ensemble = load_reward_model(tmp_path, device="cpu")
    assert isinstance(ensemble, RewardEnsemble)
    rewards = torch.stack([member.score(PROMPTS, COMPLETIONS) for member in members])
    assert rewards.var(dim=0).max() > 0.01
    torch.testing.assert_close(
        ensemble.score(PROMPTS, COMPLETIONS),
        rewards.mean(0) - 2.0 * rewards.var(0, correction=0),
        atol=1e-5,
        rtol=0,
    )
    with pytest.raises(InputError, match="at least one"):
        RewardEnsemble([])
