"""The judge inside TRL: a reward function for GRPO and RLOO, a win-rate callback for any trainer.

    from train.trl_rewards import JudgeRewards, WinRateCallback

    rewards = JudgeRewards(EngineOptions(model="pocket:judge"), template="pairwise")
    trainer = GRPOTrainer(model=..., reward_funcs=rewards, ...)
    second = EngineOptions(model="pocket:second-judge")
    trainer.add_callback(WinRateCallback(trainer, second, prompts))

Calls are batched and each is asked once; one that fails or holds no verdict is None. Where the
judge is the only reward function TRL leaves that completion out of its group's mean; beside other
functions it adds up those that answered, so that there a None counts as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers import TrainerCallback

from feedback.config import EngineOptions
from feedback.errors import InputError
from feedback.intervals import Estimate, Resampler, mean
from feedback.records import PromptText, normalise_text
from train.chat import ChatFormat
from train.ppo_config import RewardSource
from train.rewards_judge import JudgeReward, open_judge_reward
from train.sampler import CachedSampler, SamplingPlan

__all__ = ["JudgeRewards", "WinRateCallback"]


class JudgeRewards:
    """A judge as an entry of ``reward_funcs``.

    A rating template gives the expected rating, brought to [-1, 1]; a pairwise one compares with a
    reference completion from the data set, in both orders, and gives ``2 P(preferred) - 1``.

    Args:
        judge: engine and model.
        template: rating or pairwise judge template.
        rubric: criteria; None: the template's.
        reference: the data set's column that holds the reference completion (pairwise).
        cache: file of replies to reuse from earlier runs; None: none.
        scorer: an opened judge instead of the above.

    Raises:
        BackendError: the judge's engine cannot do what is asked of it.
    """

    def __init__(
        self,
        judge: EngineOptions | None = None,
        *,
        template: str = "rating",
        rubric: str | None = None,
        reference: str = "gold",
        cache: Path | None = None,
        scorer: JudgeReward | None = None,
    ):
        self.__name__ = "judge"
        self.reference = reference
        if scorer is None:
            scorer = _open(judge, template, rubric, cache)
        self.scorer = scorer

    def __call__(
        self,
        *,
        prompts: Sequence[PromptText],
        completions: Sequence[PromptText],
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return one reward per completion, None where the judge gave none.

        Each row is compared with its own reference, also where a prompt comes twice.

        Raises:
            InputError: a pairwise template, and the data set has no column of references.
        """
        references = None
        if self.scorer.judge.template.kind == "pairwise":
            if self.reference not in columns:
                raise InputError(
                    f"the judge compares with a reference completion, but the data set has no "
                    f"column {self.reference!r}; name it by reference=, or use a rating template"
                )
            references = [_text(entry) for entry in columns[self.reference]]
        texts = [_text(entry) for entry in completions]
        scores = self.scorer.score(prompts, texts, references=references).tolist()
        rewards = [None if math.isnan(score) else score for score in scores]
        if log_metric is not None:
            log_metric("judge/failed", rewards.count(None) / max(len(rewards), 1))
        return rewards


def _open(
    judge: EngineOptions | None, template: str, rubric: str | None, cache: Path | None
) -> JudgeReward:
    source = RewardSource(
        kind="judge",
        judge=judge or EngineOptions(),
        template=template,
        rubric=rubric,
        cache=cache,
    )
    # References come with each batch; here a stand-in says that there will be some.
    return open_judge_reward(source, references={"": ""})


def _text(completion: PromptText) -> str:
    """Return a completion's text: TRL gives text, or a list with one assistant message."""
    if isinstance(completion, str):
        return completion
    return "".join(turn["content"] for turn in completion)


class WinRateCallback(TrainerCallback):
    """Logs how often the model in training is preferred to the one that training started from.

    Both answer the same prompts, each completion pair is judged in both orders, and equal texts are
    level. Logs ``judge/win_rate`` with ``judge/win_rate_low`` and ``_high`` (95%, by prompt) and
    ``judge/undecided`` at every evaluation, or every ``every`` steps.

    Args:
        trainer: a transformers or TRL trainer.
        judge: engine and model.
        prompts: texts or chat messages that training does not see.
        template: pairwise judge template.
        rubric: criteria; None: the template's.
        baseline: completions to compare with, one per prompt; None: sampled before training.
        every: steps between comparisons; 0: at every evaluation.
        max_tokens: longest completion.
        temperature: of the samples.
        seed: of the samples.
        scorer: an opened judge instead of ``judge``, ``template`` and ``rubric``.
    """

    def __init__(
        self,
        trainer: Any,
        judge: EngineOptions | None = None,
        prompts: Sequence[PromptText] = (),
        *,
        template: str = "pairwise",
        rubric: str | None = None,
        baseline: Sequence[str] | None = None,
        every: int = 0,
        max_tokens: int = 128,
        temperature: float = 1.0,
        seed: int = 0,
        scorer: JudgeReward | None = None,
    ):
        if not prompts:
            raise InputError("the win-rate callback needs prompts to compare on")
        self.trainer = trainer
        self.prompts: list[PromptText] = list(prompts)
        self.baseline = None if baseline is None else list(baseline)
        self.every = every
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.seed = seed
        self.scorer = scorer if scorer is not None else _open(judge, template, rubric, None)
        self.latest: Estimate | None = None
        """The newest win rate."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Sample what later completions are compared with."""
        if self.baseline is None:
            # Other seeds than the comparisons': with the same draws a policy that has hardly
            # moved writes the same texts.
            self.baseline = self._sample(self.seed + 1)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare at an evaluation."""
        if not self.every:
            self._compare()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Compare after every so many steps."""
        if self.every and state.global_step % self.every == 0:
            self._compare()

    def _sample(self, seed: int) -> list[str]:
        """Return one completion per prompt of the model as it stands."""
        accelerator = self.trainer.accelerator
        tokenizer = self.trainer.processing_class
        chat = ChatFormat(tokenizer)
        plan = SamplingPlan(
            max_tokens=self.max_tokens,
            stop_ids=frozenset({chat.end_ids[-1], tokenizer.eos_token_id} - {None}),
            pad_id=tokenizer.pad_token_id or 0,
            temperature=self.temperature,
        )
        mine = range(accelerator.process_index, len(self.prompts), accelerator.num_processes)
        prompts = [chat.prompt_text(self.prompts[place]) for place in mine]
        ids = [row.tolist() for row in chat.prompt_ids(prompts)]
        sampler = CachedSampler(accelerator.unwrap_model(self.trainer.model))
        seeds = [seed * len(self.prompts) + place for place in mine]
        drawn = sampler.sample(ids, seeds=seeds, n=1, plan=plan)
        part = [
            (place, tokenizer.decode(samples[0].token_ids, skip_special_tokens=True))
            for place, samples in zip(mine, drawn, strict=True)
        ]
        everyone = dict(gather_object(part))
        return [everyone[place] for place in range(len(self.prompts))]

    def _compare(self) -> None:
        assert self.baseline is not None
        texts = self._sample(self.seed + 2)
        figures: dict[str, float] = {}
        if self.trainer.accelerator.is_main_process:
            figures = self._judge(texts, dict(enumerate(self.baseline)))
        self.trainer.log(figures)

    def _judge(self, texts: Sequence[str], baseline: Mapping[int, str]) -> dict[str, float]:
        places = [
            place
            for place, text in enumerate(texts)
            if normalise_text(text) != normalise_text(baseline[place])
        ]
        scores = self.scorer.score(
            [self.prompts[place] for place in places],
            [texts[place] for place in places],
            references=[baseline[place] for place in places],
        ).tolist()
        wins = dict.fromkeys(range(len(texts)), 0.5)
        wins |= {place: _win(score) for place, score in zip(places, scores, strict=True)}
        known = [value for value in wins.values() if not math.isnan(value)]
        groups = np.arange(len(known), dtype=np.int64)
        self.latest = mean(Resampler(groups, seed=self.seed), groups, np.array(known))
        estimate = self.latest
        return {
            "judge/win_rate": _number(estimate.value),
            "judge/win_rate_low": _number(estimate.low),
            "judge/win_rate_high": _number(estimate.high),
            "judge/undecided": (len(texts) - len(known)) / len(texts),
        }


def _win(score: float) -> float:
    if math.isnan(score):
        return math.nan
    return 1.0 if score > 0 else 0.5 if score == 0 else 0.0


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
