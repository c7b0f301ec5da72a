"""Rewards by text: functions, models with another tokenizer, ensembles, and the judge itself."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_stub import StubBackend, between, stub_judge

from feedback.errors import InputError, RecipeError
from feedback.records import content_id
from train import ppo
from train.ppo_config import PpoOptions, RewardSource
from train.ppo_setup import set_up
from train.reward_model import RewardModel, combine_rewards
from train.rewards import FunctionReward, open_reward
from train.rewards_judge import JudgeReward, open_judge_reward

PROMPTS = ["When do you open?", "A table for two, please."]
COMPLETIONS = ["At nine.", "Booked for seven tonight."]


# --- functions


def test_function_rewards_and_their_gaps() -> None:
    scorer = FunctionReward(lambda prompts, completions: [1, None])
    found = scorer.score(PROMPTS, COMPLETIONS)
    assert found[0] == 1.0
    assert found[1].isnan()
    with pytest.raises(ValueError, match="1 values for 2 completions"):
        FunctionReward(lambda prompts, completions: [1.0]).score(PROMPTS, COMPLETIONS)


# --- models


@pytest.fixture(scope="module")
def other_vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model whose tokenizer has other ids, merges and another chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    folder = tmp_path_factory.mktemp("other") / "reward-model"
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "t"), ("o", "n"), ("e", "r")]
    words = [*letters, *("".join(pair) for pair in merges), "[end]", "[pad]", "[ask]", "[say]"]
    vocabulary = {token: number for number, token in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["[end]", "[pad]", "[ask]", "[say]"])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[pad]", eos_token="[end]")
    fast.chat_template = (
        "{% for m in messages %}{{ '[ask]' if m['role'] == 'user' else '[say]' }}"
        "{{ m['content'] }}[end]{% endfor %}{% if add_generation_prompt %}[say]{% endif %}"
    )
    fast.save_pretrained(folder)
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, num_labels=1, initializer_range=0.3,
        pad_token_id=vocabulary["[pad]"], eos_token_id=vocabulary["[end]"], bos_token_id=None,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


def plain_score(folder: Path, prompt: str, completion: str) -> float:
    """The reward by transformers alone, through the reward model's own tokenizer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return float(model(input_ids=ids).logits[0, 0])


def policy_options(tiny_model: Path, folder: Path, reward: RewardSource, **more: Any) -> PpoOptions:
    prompts = folder / "prompts.jsonl"
    rows = [
        {"prompt_id": f"p{place}", "prompt": text, "gold": "Yes."}
        for place, text in enumerate([*PROMPTS, "why", "go on"])
    ]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values: dict[str, Any] = {
        "prompts": (str(prompts),), "output": folder / "out", "model": str(tiny_model),
        "steps": 2, "prompts_per_step": 4, "completions_per_prompt": 2, "max_tokens": 6,
        "device": "cpu", "missing_eos_penalty": None,
    }  # fmt: skip
    return PpoOptions(reward=reward, **{**values, **more})


def test_a_reward_model_with_another_tokenizer_reads_the_text(
    tiny_model: Path, other_vocabulary: Path, tmp_path: Path, caplog: Any
) -> None:
    source = RewardSource(kind="model", models=(str(other_vocabulary),))
    options = policy_options(tiny_model, tmp_path, source)
    this = set_up(options)
    assert "another tokenizer than the policy" in caplog.text
    assert not this.networks.module.value_model.score.weight.any()  # starts from the policy
    rollout = ppo.roll_out(this, 0)
    wanted = [
        # A completion that was cut off is scored as it stands: see the next test.
        plain_score(other_vocabulary, prompt.prompt, text)
        for prompt, text in zip(
            [p for p in _prompts_of(this, rollout) for _ in range(2)], rollout.texts, strict=True
        )
    ]
    ended = rollout.ended
    whole = this.scorer.score(
        [p.prompt for p in _prompts_of(this, rollout) for _ in range(2)], rollout.texts
    )
    torch.testing.assert_close(whole, torch.tensor(wanted), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(rollout.scores[ended], whole[ended])
    assert ppo.train(options).figures["steps"] == 2


def _prompts_of(this: Any, rollout: Any) -> list[Any]:
    known = {item.prompt_id: item for item in this.prompts}
    return [known[group.prompt_id] for group in rollout.groups]


def test_a_reward_model_of_the_policys_vocabulary_starts_the_value_model(
    tiny_model: Path, tmp_path: Path
) -> None:
    from test_reward_model import fresh

    fresh(tiny_model, seed=3).save(tmp_path / "reward-model")
    source = RewardSource(kind="model", models=(str(tmp_path / "reward-model"),))
    this = set_up(policy_options(tiny_model, tmp_path, source))
    scorer = this.scorer
    assert isinstance(scorer, RewardModel)
    assert torch.equal(this.networks.module.value_model.score.weight, scorer.model.score.weight)
    assert this.networks.module.value_model is not scorer.model


def test_reward_models_are_loaded_in_the_precision_asked_for(
    tiny_model: Path, tmp_path: Path
) -> None:
    from test_reward_model import fresh

    fresh(tiny_model).save(tmp_path / "reward-model")
    source = RewardSource(
        kind="model", models=(str(tmp_path / "reward-model"),), precision="bfloat16"
    )
    rounded = open_reward(source, device="cpu")
    assert isinstance(rounded, RewardModel)
    assert rounded.model.dtype == torch.bfloat16
    exact = open_reward(dataclasses.replace(source, precision="auto"), device="cpu")
    assert isinstance(exact, RewardModel)
    assert exact.model.dtype == torch.float32


@pytest.mark.parametrize("rule", ["mean", "min", "uwo"])
def test_ensembles_of_models_with_different_tokenizers(
    rule: Any, tiny_model: Path, other_vocabulary: Path, tmp_path: Path
) -> None:
    from test_reward_model import fresh

    fresh(tiny_model).save(tmp_path / "one")
    names = (str(tmp_path / "one"), str(other_vocabulary))
    source = RewardSource(kind="model", models=names, ensemble=rule, uwo_weight=0.3)
    found = open_reward(source, device="cpu").score(PROMPTS, COMPLETIONS)
    alone = torch.stack(
        [
            open_reward(RewardSource(kind="model", models=(name,)), device="cpu").score(
                PROMPTS, COMPLETIONS
            )
            for name in names
        ]
    )
    torch.testing.assert_close(found, combine_rewards(alone, rule=rule, uwo_lambda=0.3))


# --- the judge


def rate(text: str) -> dict[str, float] | str:
    """Rates short replies 1 to 5 with known probabilities; has no answer to 'mute'."""
    reply = between(text, "<reply>", "</reply>")
    if reply == "mute":
        return "the endpoint was busy"
    if reply == "odd":
        return {}
    return {"1": 0.1, "2": 0.0, "3": 0.2, "4": 0.3, "5": 0.4} if "nine" in reply else {"1": 1.0}


def test_the_expected_rating_is_the_reward() -> None:
    """0.1 * 1 + 0.2 * 3 + 0.3 * 4 + 0.4 * 5 = 3.9 on 1 to 5: (3.9 - 1) / 4 * 2 - 1 = 0.45."""
    judge, backend = stub_judge("rating", rate)
    scorer = JudgeReward(judge, backend)
    found = scorer.score(PROMPTS, COMPLETIONS)
    torch.testing.assert_close(found, torch.tensor([0.45, -1.0]))


def test_failed_and_unreadable_calls_are_no_score_and_are_asked_again() -> None:
    judge, backend = stub_judge("rating", rate)
    scorer = JudgeReward(judge, backend)
    found = scorer.score([PROMPTS[0]] * 3, ["mute", "odd", "At nine."])
    assert found[:2].isnan().all()
    assert found[2] == pytest.approx(0.45)
    assert scorer.outcomes == {"failed": 1, "unparsed": 1, "decided": 1}
    asked = len(backend.asked)
    scorer.score([PROMPTS[0]] * 3, ["mute", "At nine.", "At nine."])
    assert len(backend.asked) == asked + 1  # only the failed one; what is known is known


def prefer_more_e(text: str) -> dict[str, float] | str:
    """Prefers more e, and the first place a little."""
    first = between(text, "<reply_a>", "</reply_a>")
    second = between(text, "<reply_b>", "</reply_b>")
    if "mute" in first:  # fails in one of the two orders
        return "busy"
    gap = first.count("e") - second.count("e")
    p = 0.6 if not gap else 0.9 if gap > 0 else 0.3
    return {"A": p, "B": 1 - p}


def test_pairwise_rewards_ask_both_orders_against_the_gold_answer() -> None:
    """More e: P = (0.9 + (1 - 0.3)) / 2 = 0.8, reward 0.6; equal: (0.6 + 0.4) / 2, reward 0."""
    judge, backend = stub_judge("pairwise", prefer_more_e)
    references = {content_id(prompt): "Yes." for prompt in PROMPTS}
    scorer = JudgeReward(judge, backend, references=references)
    found = scorer.score(
        [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], ["eee", "yes?", "no", "mute"]
    )
    torch.testing.assert_close(found[:3], torch.tensor([0.6, 0.0, -0.6]))
    assert found[3].isnan()  # half an answer is not a score
    assert len(backend.asked) == 8
    with pytest.raises(InputError, match="has no gold answer"):
        scorer.score(["another"], ["x"])


def test_replies_are_cached_across_runs(tmp_path: Path) -> None:
    for expected in (2, 0):
        judge, backend = stub_judge("rating", rate)
        scorer = JudgeReward(judge, backend, cache=tmp_path / "replies.sqlite")
        found = scorer.score(PROMPTS, COMPLETIONS)
        torch.testing.assert_close(found, torch.tensor([0.45, -1.0]))
        assert len(backend.asked) == expected


def test_replies_are_on_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    """Nobody closes a reward: another process finds its replies at once, and can add its own."""
    path = tmp_path / "replies.sqlite"
    judge, backend = stub_judge("rating", rate)
    first = JudgeReward(judge, backend, cache=path)
    first.score(PROMPTS, COMPLETIONS)
    with contextlib.closing(sqlite3.connect(path, timeout=0.1)) as database:
        assert database.execute("SELECT count(*) FROM reply").fetchone() == (2,)
        with database:
            database.execute("INSERT INTO reply VALUES (?, ?)", (b"key", b"value"))


def test_a_judge_that_breaks_off_leaves_the_replies_it_gave(tmp_path: Path) -> None:
    def breaks(text: str) -> dict[str, float] | str:
        if "Booked" in text:
            raise KeyboardInterrupt
        return rate(text)

    judge, backend = stub_judge("rating", breaks)
    with pytest.raises(KeyboardInterrupt):
        JudgeReward(judge, backend, cache=tmp_path / "c").score(PROMPTS, COMPLETIONS)
    judge, backend = stub_judge("rating", rate)
    JudgeReward(judge, backend, cache=tmp_path / "c").score(PROMPTS, COMPLETIONS)
    assert len(backend.asked) == 1


def test_a_file_that_is_no_cache_is_an_error_at_once(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("notes" * 200)
    judge, backend = stub_judge("rating", rate)
    with pytest.raises(InputError, match="not a reply cache"):
        JudgeReward(judge, backend, cache=tmp_path / "c")


def test_prompts_that_the_reward_cannot_score_are_named_before_the_first_step(
    tiny_model: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    from test_reward_model import fresh
    from transformers import AutoConfig

    monkeypatch.setattr(
        "train.rewards_judge.open_backend", lambda options: StubBackend(prefer_more_e)
    )
    source = RewardSource(kind="judge", template="pairwise")
    options = policy_options(tiny_model, tmp_path, source)
    assert set_up(options)
    prompts = tmp_path / "prompts.jsonl"
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    for place in (1, 3):
        del rows[place]["gold"]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = (
        r"prompt_id p1 \('A table .*'\) has no gold answer .* and 1 more of 4: .*--reward.template"
    )
    with pytest.raises(InputError, match=words):
        set_up(options)
    folder = tmp_path / "reward-model"
    fresh(tiny_model).save(folder)
    config = AutoConfig.from_pretrained(folder)
    config.max_position_embeddings = 30
    config.save_pretrained(folder)
    source = RewardSource(kind="model", models=(str(folder),))
    with pytest.raises(InputError, match=r"1 of 4 prompts .* the reward model's context of 30"):
        set_up(policy_options(tiny_model, tmp_path, source, value_model=str(tiny_model)))


def test_a_judge_that_fails_on_some_calls_costs_those_samples_not_the_run(
    tiny_model: Path, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    def answer(text: str) -> dict[str, float] | str:
        reply = between(text, "<reply>", "</reply>")
        if len(reply) % 3 == 0:
            return "the endpoint was busy"
        return {"1": 0.2, "5": 0.8}

    monkeypatch.setattr("train.rewards_judge.open_backend", lambda options: StubBackend(answer))
    options = policy_options(tiny_model, tmp_path, RewardSource(kind="judge"), steps=4)
    trained = ppo.train(options)
    assert trained.figures["steps"] == 4
    assert 0 < trained.figures["failed_share"] < 1
    assert caplog.text.count("has no report card") == 1
    rows = [json.loads(line) for line in (options.output / "metrics.jsonl").read_text().split("\n")
            if line]  # fmt: skip
    for row in rows:
        assert row["completions"] == 8 * (1 - row["completion/failed"])
        assert row["objective/scores"] == pytest.approx(0.6)
        assert math.isfinite(row["loss/policy_avg"])


def test_judges_that_cannot_be_a_reward_are_refused() -> None:
    with pytest.raises(RecipeError, match="listwise"):
        open_judge_reward(RewardSource(kind="judge", template="listwise"), references={})
    with pytest.raises(RecipeError, match="no prompt has 'gold'"):
        open_judge_reward(RewardSource(kind="judge", template="pairwise"), references={})
