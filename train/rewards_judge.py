"""The judge as the reward, without a reward model in between (direct RLAIF).

A rating template gives the expected value over its scale, from the probabilities of the labels,
brought to [-1, 1] (Lee et al., arXiv 2309.00267, section 2.2.2). A pairwise template compares with
a known-good answer of the prompt, in both orders, and gives ``2 P(preferred) - 1``. Whatever is no
verdict is NaN, never a middle score.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from feedback.backends import Backend, JudgeCall, JudgeReply
from feedback.backends.opening import open_backend
from feedback.cache import ReplyCache
from feedback.errors import InputError, RecipeError
from feedback.judge import Judge, Question
from feedback.ordering import merge_orders
from feedback.parsing import scale_values
from feedback.records import PromptText, Verdict, content_id, prompt_messages
from feedback.templates import load_rubric, load_template
from train.ppo_config import RewardSource

__all__ = ["JudgeReward", "excerpt", "open_judge_reward"]

_ANSWER, _REFERENCE = "completion", "reference"
_KEEP_EVERY_S = 5.0
_EXCERPT = 40


def excerpt(prompt: PromptText) -> str:
    """Return the first words of what a prompt asks, quoted, by which its author knows it."""
    text = " ".join(prompt_messages(prompt)[-1]["content"].split())
    return repr(text if len(text) <= _EXCERPT else text[:_EXCERPT].rstrip() + "…")


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
    return JudgeReward(judge, backend, references=references, cache=source.cache)


class JudgeReward:
    """A judge as a scorer.

    Args:
        judge: with a rating or pairwise template.
        backend: the engine that answers its calls.
        references: known-good answers by ``content_id`` of the prompt (pairwise templates).
        cache: file of replies of earlier runs; None: none are kept. It is open only while it is
            read or written, so that several processes share it and a kill loses seconds of replies.

    Raises:
        InputError: the file is not a cache of ours.
    """

    def __init__(
        self,
        judge: Judge,
        backend: Backend,
        *,
        references: Mapping[str, str] | None = None,
        cache: Path | None = None,
    ):
        self.judge = judge
        self.backend = backend
        self.cache = cache
        self._cached([])  # a file that is no cache is an error before the first call is paid for
        self.references = dict(references or {})
        self.outcomes: Counter[str] = Counter()
        """How the calls so far ended."""
        self._known: dict[str, float] = {}

    @property
    def needs_gold(self) -> bool:
        """Whether every prompt must have a known-good answer."""
        template = self.judge.template
        return template.kind == "pairwise" or "{gold}" in template.user + template.system

    def score(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[str],
        *,
        ended: Sequence[bool] | None = None,
        references: Sequence[str] | None = None,
    ) -> Tensor:
        """Return one reward per completion, (N,) float32 on the CPU; NaN without a verdict.

        A completion that was scored before, with the same known-good answer, is not asked about
        again.

        Args:
            prompts: texts or chat messages, one per completion.
            completions: texts.
            ended: not read.
            references: known-good answers, one per completion; None: each prompt's own.

        Raises:
            InputError: pairwise, and a prompt has no known-good answer.
        """
        if references is None:
            golds = [self.references.get(content_id(prompt)) for prompt in prompts]
        else:
            golds = list(references)
        rows = list(zip(prompts, completions, golds, strict=True))
        keys = [content_id(*row) for row in rows]
        new = {key: row for key, row in zip(keys, rows, strict=True) if key not in self._known}
        questions = {key: self._questions(*row) for key, row in new.items()}
        verdicts = self._ask([question for group in questions.values() for question in group])
        scores = dict(self._known)
        for key, group in questions.items():
            found = [verdicts.get(self.judge.verdict_id(question)) for question in group]
            scores[key] = self._score([verdict for verdict in found if verdict is not None])
            if not math.isnan(scores[key]):  # a failed call is worth another try
                self._known[key] = scores[key]
        return torch.tensor([scores[key] for key in keys])

    def _questions(self, prompt: PromptText, completion: str, gold: str | None) -> list[Question]:
        prompt_id = content_id(prompt)
        if self.judge.template.kind == "rating":
            return [
                Question(
                    prompt_id=prompt_id,
                    prompt=prompt,
                    shown=(_ANSWER,),
                    completions=(completion,),
                    gold=gold,
                )
            ]
        if gold is None:
            raise InputError(
                f"prompt {excerpt(prompt)} has no gold answer to compare a completion with; add "
                "'gold' to it, or use a rating template"
            )
        texts = {_ANSWER: completion, _REFERENCE: gold}
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
        replies = self._cached([item.call for item in asked.values()])
        verdicts = {
            key: self.judge.read(asked[key], reply, cached=True) for key, reply in replies.items()
        }
        missing = [item.call for key, item in asked.items() if key not in replies]
        unkept: list[tuple[JudgeCall, JudgeReply]] = []
        kept = time.monotonic()
        try:
            for reply in self.backend.judge(missing) if missing else ():
                item = asked[reply.call_id]
                unkept.append((item.call, reply))
                verdicts[reply.call_id] = self.judge.read(item, reply)
                if time.monotonic() - kept > _KEEP_EVERY_S:
                    self._keep(unkept)
                    kept = time.monotonic()
        finally:
            self._keep(unkept)
        self.outcomes.update(verdict.outcome for verdict in verdicts.values())
        return verdicts

    def _cached(self, calls: Sequence[JudgeCall]) -> dict[str, JudgeReply]:
        """Return the replies that the cache has, by call id."""
        if self.cache is None:
            return {}
        with ReplyCache(self.cache, self.judge.identity) as cache:
            found = {call.call_id: cache.get(call) for call in calls}
        return {key: reply for key, reply in found.items() if reply is not None}

    def _keep(self, replies: list[tuple[JudgeCall, JudgeReply]]) -> None:
        """Put replies into the cache, and empty the list."""
        if self.cache is not None and replies:
            with ReplyCache(self.cache, self.judge.identity) as cache:
                for call, reply in replies:
                    cache.put(call, reply)
        replies.clear()

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
