"""The judge as the reward, without a reward model in between (direct RLAIF).

A rating template gives the expected value over its scale, from the probabilities of the labels,
brought to [-1, 1] (Lee et al., arXiv 2309.00267, section 2.2.2). A pairwise template compares with
a known-good answer of the prompt, in both orders, and gives ``2 P(preferred) - 1``. Whatever is no
verdict is NaN, never a middle score.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from feedback.backends import Backend, JudgeCall, JudgeReply
from feedback.backends.opening import open_backend
from feedback.cache import ReplyCache
from feedback.errors import InputError, RecipeError
from feedback.judge import Judge, Question
from feedback.ordering import merge_orders
from feedback.parsing import scale_values
from feedback.records import PromptText, Verdict, content_id
from feedback.templates import load_rubric, load_template
from train.ppo_config import RewardSource

__all__ = ["JudgeReward", "open_judge_reward"]

_ANSWER, _REFERENCE = "completion", "reference"


def open_judge_reward(source: RewardSource, *, references: Mapping[str, str]) -> JudgeReward:
    """Open the judge's engine and return it as a scorer.

    Raises:
        RecipeError: the template is listwise, or pairwise and no prompt has a known-good answer.
        BackendError: the engine cannot give the labels' probabilities.
    """
    template = load_template(source.template)
    if template.kind == "listwise":
        raise RecipeError(
            f"template {template.name!r} is listwise; a reward needs a rating template, or a "
            "pairwise one with gold answers"
        )
    if template.kind == "pairwise" and not references:
        raise RecipeError(
            f"template {template.name!r} is pairwise, which compares with known-good answers, but "
            "no prompt has 'gold'; use a rating template, or add gold to the prompts"
        )
    backend = open_backend(source.judge)
    judge = Judge(
        identity=backend.identity,
        template=template,
        rubric=load_rubric(source.rubric or template.rubric),
    )
    if judge.reads_choices:
        backend.prepare(template.choices)
    cache = ReplyCache(source.cache, backend.identity) if source.cache is not None else None
    return JudgeReward(judge, backend, references=references, cache=cache)


class JudgeReward:
    """A judge as a scorer.

    Args:
        judge: with a rating or pairwise template.
        backend: the engine that answers its calls.
        references: known-good answers by ``content_id`` of the prompt (pairwise templates).
        cache: replies of earlier runs; None: none are kept.
    """

    def __init__(
        self,
        judge: Judge,
        backend: Backend,
        *,
        references: Mapping[str, str] | None = None,
        cache: ReplyCache | None = None,
    ):
        self.judge = judge
        self.backend = backend
        self.cache = cache
        self.references = dict(references or {})
        self.outcomes: Counter[str] = Counter()
        """How the calls so far ended."""
        self._known: dict[str, float] = {}

    def score(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[str],
        *,
        ended: Sequence[bool] | None = None,
    ) -> Tensor:
        """Return one reward per completion, (N,) float32 on the CPU; NaN without a verdict.

        A completion that was scored before is not asked about again.

        Raises:
            InputError: pairwise, and a prompt has no known-good answer.
        """
        keys = [content_id(prompt, text) for prompt, text in zip(prompts, completions, strict=True)]
        new = {key: place for place, key in enumerate(keys) if key not in self._known}
        questions = {
            key: self._questions(prompts[place], completions[place]) for key, place in new.items()
        }
        verdicts = self._ask([question for group in questions.values() for question in group])
        scores = dict(self._known)
        for key, group in questions.items():
            found = [verdicts.get(self.judge.verdict_id(question)) for question in group]
            scores[key] = self._score([verdict for verdict in found if verdict is not None])
            if not math.isnan(scores[key]):  # a failed call is worth another try
                self._known[key] = scores[key]
        return torch.tensor([scores[key] for key in keys])

    def _questions(self, prompt: PromptText, completion: str) -> list[Question]:
        prompt_id = content_id(prompt)
        if self.judge.template.kind == "rating":
            return [
                Question(
                    prompt_id=prompt_id,
                    prompt=prompt,
                    shown=(_ANSWER,),
                    completions=(completion,),
                    gold=self.references.get(prompt_id),
                )
            ]
        if prompt_id not in self.references:
            raise InputError(
                f"prompt {prompt_id!r} has no gold answer to compare a completion with; add 'gold' "
                "to it, or use a rating template"
            )
        texts = {_ANSWER: completion, _REFERENCE: self.references[prompt_id]}
        return [
            Question(
                prompt_id=prompt_id,
                prompt=prompt,
                shown=order,
                completions=(texts[order[0]], texts[order[1]]),
            )
            for order in ((_ANSWER, _REFERENCE), (_REFERENCE, _ANSWER))
        ]

    def _ask(self, questions: Sequence[Question]) -> dict[str, Verdict]:
        """Return the verdict on each question, by its id."""
        asked = {call.call.call_id: call for call in map(self.judge.ask, questions)}
        replies = {key: reply for key, item in asked.items() if (reply := self._cached(item.call))}
        verdicts = {
            key: self.judge.read(asked[key], reply, cached=True) for key, reply in replies.items()
        }
        missing = [item.call for key, item in asked.items() if key not in replies]
        for reply in self.backend.judge(missing) if missing else ():
            item = asked[reply.call_id]
            if self.cache is not None:
                self.cache.put(item.call, reply)
            verdicts[reply.call_id] = self.judge.read(item, reply)
        self.outcomes.update(verdict.outcome for verdict in verdicts.values())
        return verdicts

    def _cached(self, call: JudgeCall) -> JudgeReply | None:
        return None if self.cache is None else self.cache.get(call)

    def _score(self, verdicts: Sequence[Verdict]) -> float:
        if not verdicts:
            return math.nan
        if self.judge.template.kind == "rating":
            scores = verdicts[0].scores
            if not scores:
                return math.nan
            scale = scale_values(self.judge.template)
            low, high = min(scale), max(scale)
            return 2.0 * (scores[0] - low) / (high - low) - 1.0
        merged = merge_orders(verdicts)
        if merged.p is None:
            return math.nan
        p = merged.p if merged.a == _ANSWER else 1.0 - merged.p
        return 2.0 * p - 1.0
