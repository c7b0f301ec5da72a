"""Which questions a judge template asks about a row of candidates.

A pairwise template asks about pairs, a rating template about each completion, a listwise one about
all completions of a prompt at once. Questions of one prompt, and the orders of one pair, stand side
by side: engines compute what they share once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from feedback.judge import Question
from feedback.ordering import (
    Orders,
    PairPolicy,
    choose_pairs,
    distinct_completions,
    pair_questions,
)
from feedback.records import Candidates, Completion, content_id
from feedback.templates import Template

__all__ = ["QuestionPlan", "questions_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionPlan:
    """How questions are drawn from candidates."""

    template: Template
    orders: Orders = "both"
    pairs: PairPolicy = "all"
    pairs_per_prompt: int | None = None
    repeats: int = 1
    seed: int = 0


def questions_of(candidates: Candidates, plan: QuestionPlan) -> Iterator[Question]:
    """Yield the questions about one prompt, always the same ones in the same order."""
    if plan.template.kind == "pairwise":
        chosen = choose_pairs(
            candidates, plan.pairs, per_prompt=plan.pairs_per_prompt, seed=plan.seed
        )
        yield from pair_questions(
            candidates, chosen, orders=plan.orders, repeats=plan.repeats, seed=plan.seed
        )
        return
    completions = distinct_completions(candidates)
    if plan.template.kind == "rating":
        lists: list[Sequence[Completion]] = [[completion] for completion in completions]
    else:
        lists = _orders_of_list(candidates.prompt_id, completions, plan)
    for repeat in range(plan.repeats):
        for shown in lists:
            yield Question(
                prompt_id=candidates.prompt_id,
                prompt=candidates.prompt,
                shown=tuple(completion.completion_id for completion in shown),
                completions=tuple(completion.completion for completion in shown),
                gold=candidates.gold,
                repeat=repeat,
            )


def _orders_of_list(
    prompt_id: str, completions: list[Completion], plan: QuestionPlan
) -> list[Sequence[Completion]]:
    """Return a seeded order of the list, and its reverse where both orders are asked.

    Over the two, every completion stands on average in the middle, and each pair in both orders.
    """
    shown = sorted(
        completions[: len(plan.template.labels)],
        key=lambda completion: content_id("list", plan.seed, prompt_id, completion.completion_id),
    )
    if len(shown) < 2:
        return []
    return [shown, shown[::-1]] if plan.orders == "both" else [shown]
