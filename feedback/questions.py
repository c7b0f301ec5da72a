"""Which questions a judge template asks about a row of candidates.

A pairwise template asks about pairs, a rating template about each completion, a listwise one about
all completions of a prompt at once. Questions of one prompt, and the orders of one pair, stand side
by side: engines compute what they share once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from feedback.constitution import Principle, draw_principle
from feedback.errors import TemplateError
from feedback.judge import Question
from feedback.ordering import (
    Orders,
    PairPolicy,
    choose_pairs,
    distinct_completions,
    pair_questions,
)
from feedback.pair_schedule import SchedulePlan, most_pairs
from feedback.records import Candidates, Completion, content_id
from feedback.templates import Template

__all__ = [
    "QuestionPlan",
    "expected_questions",
    "questions_about",
    "questions_of",
    "schedule_of",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionPlan:
    """How questions are drawn from candidates."""

    template: Template
    orders: Orders = "both"
    pairs: PairPolicy = "all"
    pairs_per_prompt: int | None = None
    repeats: int = 1
    seed: int = 0
    criteria: tuple[str, ...] = ()
    """Names of criteria that are rated one by one."""
    principles: tuple[Principle, ...] = ()
    """Principles of which one is drawn per pair (and per repeat); both orders share it."""

    @property
    def adaptive(self) -> bool:
        """Whether the pairs depend on the answers: ``adaptive.PairRounds`` asks those."""
        return self.template.kind == "pairwise" and self.pairs in _ADAPTIVE


_ADAPTIVE = ("sort", "swiss", "active")


def schedule_of(plan: QuestionPlan) -> SchedulePlan:
    """Return the schedule of a plan whose pairs depend on answers."""
    method: Any = plan.pairs
    return SchedulePlan(method=method, budget=plan.pairs_per_prompt, seed=plan.seed)


def expected_questions(candidates: Candidates, plan: QuestionPlan) -> Iterator[Question]:
    """Yield the questions a prompt will be asked; where answers decide, as many as it can be."""
    if plan.adaptive:
        most = most_pairs(len(distinct_completions(candidates)), schedule_of(plan))
        plan = dataclasses.replace(plan, pairs="random", pairs_per_prompt=most)
    yield from questions_of(candidates, plan)


def questions_of(candidates: Candidates, plan: QuestionPlan) -> Iterator[Question]:
    """Yield the questions about one prompt, always the same ones in the same order.

    Raises:
        TemplateError: a list is longer than the template has labels.
    """
    if plan.template.kind == "pairwise":
        chosen = choose_pairs(
            candidates, plan.pairs, per_prompt=plan.pairs_per_prompt, seed=plan.seed
        )
        yield from questions_about(candidates, chosen, plan)
        return
    completions = distinct_completions(candidates)
    if plan.template.kind == "rating":
        lists: list[Sequence[Completion]] = [[completion] for completion in completions]
    else:
        lists = _orders_of_list(candidates.prompt_id, completions, plan)
    for repeat in range(plan.repeats):
        for shown in lists:
            question = Question(
                prompt_id=candidates.prompt_id,
                prompt=candidates.prompt,
                shown=tuple(completion.completion_id for completion in shown),
                completions=tuple(completion.completion for completion in shown),
                gold=candidates.gold,
                repeat=repeat,
            )
            for criterion in plan.criteria or (None,):
                yield _with_principle(dataclasses.replace(question, criterion=criterion), plan)


def questions_about(
    candidates: Candidates, pairs: Iterable[tuple[Completion, Completion]], plan: QuestionPlan
) -> Iterator[Question]:
    """Yield the questions about some pairs of a prompt, in the orders that the plan asks for."""
    questions = pair_questions(
        candidates, pairs, orders=plan.orders, repeats=plan.repeats, seed=plan.seed
    )
    for question in questions:
        yield _with_principle(question, plan)


def _with_principle(question: Question, plan: QuestionPlan) -> Question:
    if not plan.principles:
        return question
    about = [question.prompt_id, sorted(question.shown), question.repeat]
    principle = draw_principle(plan.principles, plan.seed, *about)
    return dataclasses.replace(question, principle=principle.choose)


def _orders_of_list(
    prompt_id: str, completions: list[Completion], plan: QuestionPlan
) -> list[Sequence[Completion]]:
    """Return the orders in which a list is shown, starting from a seeded one.

    ``both``: that order and its reverse: each pair stands in both orders, and every completion on
    average in the middle. ``rotations``: as many orders as completions, so that each stands once at
    each place. ``one``: that order alone.
    """
    if len(completions) < 2:
        return []
    if len(completions) > len(plan.template.labels):
        raise TemplateError(
            f"prompt {prompt_id!r} has {len(completions)} completions, and template "
            f"{plan.template.name!r} has labels for {len(plan.template.labels)}; add labels to "
            "it, or compare pairs"
        )
    shown = sorted(
        completions,
        key=lambda completion: content_id("list", plan.seed, prompt_id, completion.completion_id),
    )
    if plan.orders == "rotations":
        return [shown[turn:] + shown[:turn] for turn in range(len(shown))]
    return [shown, shown[::-1]] if plan.orders == "both" else [shown]
