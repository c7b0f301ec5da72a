"""The judge inside TRL's own trainers: GRPO, RLOO, and a win rate while they train."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_stub import between, stub_judge

from feedback.errors import InputError
from train.rewards_judge import JudgeReward
from train.trl_rewards import JudgeRewards, WinRateCallback

PROMPTS = ["say a word", "why", "count", "go on"]


def likes_e(text: str) -> dict[str, float] | str:
    """A rating that grows with the number of e; fails on replies that begin with z."""
    reply = between(text, "<reply>", "</reply>")
    if reply.startswith("z"):
        return "the endpoint was busy"
    p = min(0.1 + 0.2 * reply.count("e"), 0.9)
    return {"1": 1 - p, "5": p}


def prefers_e(text: str) -> dict[str, float] | str:
    first = between(text, "<reply_a>", "</reply_a>").count("e")
    second = between(text, "<reply_b>", "</reply_b>").count("e")
    p = 0.5 + 0.4 * math.tanh(first - second)
    return {"A": p, "B": 1 - p}


def test_rewards_of_text_and_of_messages_are_the_same() -> None:
    """e once: p = 0.3, reward 2 * 0.3 - 1 = -0.4."""
    judge, backend = stub_judge("rating", likes_e)
    rewards = JudgeRewards(scorer=JudgeReward(judge, backend))
    logged: dict[str, float] = {}
    found = rewards(
        prompts=PROMPTS[:3], completions=["e", "zz", "ee"], log_metric=logged.__setitem__
    )
    assert found == [pytest.approx(-0.4), None, pytest.approx(0.0)]
    assert logged == {"judge/failed": pytest.approx(1 / 3)}
    messages = rewards(
        prompts=[[{"role": "user", "content": prompt}] for prompt in PROMPTS[:3]],
        completions=[[{"role": "assistant", "content": text}] for text in ("e", "zz", "ee")],
    )
    assert messages == [pytest.approx(-0.4), None, pytest.approx(0.0)]
    assert rewards.__name__ == "judge"


def test_pairwise_rewards_take_references_from_the_data_set() -> None:
    judge, backend = stub_judge("pairwise", prefers_e)
    rewards = JudgeRewards(scorer=JudgeReward(judge, backend), reference="best")
    found = rewards(prompts=PROMPTS[:2], completions=["eee", "e"], best=["e", "eee"], other=[1, 2])
    gap = 0.8 * math.tanh(2)
    assert found == [pytest.approx(gap), pytest.approx(-gap)]
    with pytest.raises(InputError, match="no column 'best'"):
        rewards(prompts=PROMPTS[:1], completions=["e"])


def test_each_row_is_compared_with_its_own_reference() -> None:
    """One prompt and one completion, other references: in one batch, and in a later one."""
    judge, backend = stub_judge("pairwise", prefers_e)
    rewards = JudgeRewards(scorer=JudgeReward(judge, backend))
    gap = 0.8 * math.tanh(2)
    found = rewards(prompts=["p", "p"], completions=["eee", "eee"], gold=["e", "eeeee"])
    assert found == [pytest.approx(gap), pytest.approx(-gap)]
    assert rewards(prompts=["p"], completions=["eee"], gold=["eee"]) == [pytest.approx(0.0)]
    asked = len(backend.asked)
    assert rewards(prompts=["p"], completions=["eee"], gold=["e"]) == [pytest.approx(gap)]
    assert len(backend.asked) == asked  # known by now


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_trainer_of_trl_learns_from_the_judge(
    kind: str, tiny_model: Path, tmp_path: Path
) -> None:
    """Failed calls are missing rewards there, and the reward that is logged is the judge's."""
    import trl
    from datasets import Dataset

    judge, backend = stub_judge("rating", likes_e)
    rewards = JudgeRewards(scorer=JudgeReward(judge, backend))
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path), max_steps=6, num_generations=4, max_completion_length=8,
        per_device_train_batch_size=16, learning_rate=1e-2, report_to="none", use_cpu=True,
        bf16=False, logging_steps=1, save_strategy="no", gradient_checkpointing=False, seed=1,
        beta=0.0, disable_tqdm=True,
    )  # fmt: skip
    compare, answers = stub_judge("pairwise", prefers_e)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(tiny_model),
        reward_funcs=rewards,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
    )
    callback = WinRateCallback(
        trainer, prompts=["hello", "what now", "tell me"] * 8, every=6, max_tokens=8,
        scorer=JudgeReward(compare, answers),
    )  # fmt: skip
    trainer.add_callback(callback)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logged) == 6
    assert all(math.isfinite(row["reward"]) for row in logged)
    assert rewards.scorer.outcomes["decided"] > 0
    wins = [row for row in trainer.state.log_history if "judge/win_rate" in row]
    assert len(wins) == 1
    assert wins[0]["judge/win_rate_low"] <= wins[0]["judge/win_rate"]
    assert wins[0]["judge/win_rate"] <= wins[0]["judge/win_rate_high"]
    assert answers.asked
    json.dumps(trainer.state.log_history)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
def test_a_trainer_of_trl_runs_with_the_embedded_policy_and_judges(
    kind: str, tmp_path: Path
) -> None:
    """One judge rewards against reference replies in both orders, another says who wins."""
    import trl
    from datasets import Dataset

    from feedback.config import EngineOptions
    from feedback.pocket import model_path
    from feedback.records import Prompt, prompt_messages
    from feedback.sampling import prompt_source
    from feedback.shards import read_rows

    requests = list(read_rows(prompt_source(Path("booking-train")), Prompt))
    # Messages, so that TRL applies the chat template that the policy was trained with.
    asked: Any = [prompt_messages(row.prompt) for row in requests[:8]]
    rows = [{"prompt": prompt, "answer": "What time would you like?"} for prompt in asked]
    rewards = JudgeRewards(
        EngineOptions(model="pocket:judge", device="cpu"),
        template="pairwise", rubric="booking", reference="answer", cache=tmp_path / "replies",
    )  # fmt: skip
    settings = getattr(trl, f"{kind}Config")(
        output_dir=str(tmp_path / "out"), max_steps=2, num_generations=4, max_completion_length=24,
        per_device_train_batch_size=16, learning_rate=1e-4, report_to="none", use_cpu=True,
        bf16=False, logging_steps=1, save_strategy="no", gradient_checkpointing=False, seed=1,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = getattr(trl, f"{kind}Trainer")(
        model=str(model_path("pocket:policy")), reward_funcs=rewards, args=settings,
        train_dataset=Dataset.from_list(rows),
    )  # fmt: skip
    judge = EngineOptions(model="pocket:second-judge", device="cpu")
    callback = WinRateCallback(
        trainer, judge, asked, rubric="booking", every=2, max_tokens=24
    )  # fmt: skip
    trainer.add_callback(callback)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logged) == 2
    for row in logged:
        assert -1 <= row["reward"] <= 1
        assert row["reward_std"] > 0
        assert row["judge/failed"] == 0
    # Two orders of each of 32 completions, less those that were written twice.
    assert 32 <= rewards.scorer.outcomes["decided"] <= 64
    assert callback.latest is not None
    assert callback.latest.n == 8


class _Trainer:
    """What the callback needs of a trainer."""

    def __init__(self, folder: Path):
        from accelerate import Accelerator
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.accelerator = Accelerator(cpu=True)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.processing_class = AutoTokenizer.from_pretrained(folder)
        self.logged: list[dict[str, float]] = []

    def log(self, figures: dict[str, float]) -> None:
        self.logged.append(figures)


def test_the_win_rate_by_hand(tiny_model: Path) -> None:
    """Against given texts: more e wins, equal texts are level without a call, a failure is out."""
    judge, backend = stub_judge(
        "pairwise", lambda text: "busy" if "mute" in text else prefers_e(text)
    )
    trainer: Any = _Trainer(tiny_model)
    callback = WinRateCallback(
        trainer, prompts=["a", "b", "c", "d"], baseline=["", "same", "eee", "mute"],
        scorer=JudgeReward(judge, backend),
    )  # fmt: skip
    callback._sample = lambda seed: ["e", "same", "e", "e"]  # type: ignore[method-assign]
    callback.on_evaluate(None, None, None)
    found = trainer.logged[0]
    assert found["judge/win_rate"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert found["judge/undecided"] == 0.25
    assert len(backend.asked) == 2 * 3
    assert callback.latest is not None
    assert callback.latest.n == 3


def test_a_prompt_that_comes_twice_meets_both_of_its_baselines(tiny_model: Path) -> None:
    """The same text wins against "" and loses against "eee": 0.5, not the last one's 0."""
    judge, backend = stub_judge("pairwise", prefers_e)
    trainer: Any = _Trainer(tiny_model)
    callback = WinRateCallback(
        trainer, prompts=["a", "a"], baseline=["", "eee"], scorer=JudgeReward(judge, backend)
    )
    callback._sample = lambda seed: ["e", "e"]  # type: ignore[method-assign]
    callback.on_evaluate(None, None, None)
    assert trainer.logged[0]["judge/win_rate"] == 0.5


def test_a_baseline_is_sampled_from_the_starting_model(tiny_model: Path) -> None:
    judge, backend = stub_judge("pairwise", prefers_e)
    trainer: Any = _Trainer(tiny_model)
    callback = WinRateCallback(
        trainer, prompts=PROMPTS, max_tokens=6, scorer=JudgeReward(judge, backend)
    )
    callback.on_train_begin(None, None, None)
    first = list(callback.baseline or [])
    assert len(first) == 4
    assert callback._sample(callback.seed + 1) == first
    assert callback._sample(callback.seed + 2) != first
    with torch.no_grad():
        trainer.model.get_output_embeddings().weight[70:80] += 2.0
    callback.on_evaluate(None, None, None)
    assert set(trainer.logged[0]) >= {"judge/win_rate", "judge/undecided"}
    assert any(first[0] in text for text in backend.asked)  # what later texts are compared with
    with pytest.raises(InputError, match="needs prompts"):
        WinRateCallback(trainer, prompts=[], scorer=JudgeReward(judge, backend))
