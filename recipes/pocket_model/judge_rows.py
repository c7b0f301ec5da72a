"""Turns contests into training rows with the project's own judge templates.

A row is ``{"prompt": messages, "completion": text}``: the prompt is what ``feedback.templates.render``
asks any judge, the completion what a right judge answers. Most rows use the template ``pairwise``
with the rubric ``booking``; the rest keep the judge usable with the other templates and rubrics.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

from feedback.templates import Template, load_rubric, load_template, render
from recipes.pocket_model.contests import Contest
from recipes.pocket_model.flaws import FLAWS

__all__ = ["TEMPLATES", "draw_template", "judge_row"]

TEMPLATES = {
    "pairwise": 0.64,
    "pairwise-tie": 0.08,
    "pairwise-numbers": 0.06,
    "pairwise-brief": 0.06,
    "pairwise-rationale": 0.05,
    "rating": 0.06,
    "listwise": 0.05,
}
"""Share of each template among the judge's lessons."""

_RUBRICS = (
    "The better reply fits the conversation, sticks to the details given and is polite.",
    "Prefer the reply that moves the booking forward without making anything up.",
    "Correct details come first, then completeness, then good manners.",
    "A helpful assistant confirms what is known and asks for what is missing.",
    "Choose the reply that a careful agent would send next.",
    "Penalise wrong or invented details, unfinished sentences, repetition and rudeness.",
    "The reply should answer the last message and be accurate.",
)


@cache
def _template(name: str) -> Template:
    return load_template(name)


def _rubric(rng: random.Random) -> str:
    draw = rng.random()
    if draw < 0.74:
        return _load_rubric("booking")
    return _load_rubric("helpfulness") if draw < 0.86 else rng.choice(_RUBRICS)


@cache
def _load_rubric(name: str) -> str:
    return load_rubric(name)


def draw_template(rng: random.Random) -> str:
    """Draw a template by its share."""
    return rng.choices(list(TEMPLATES), list(TEMPLATES.values()))[0]


def judge_row(
    contest: Contest, name: str, rng: random.Random, *, tie: bool = False
) -> dict[str, Any]:
    """Return the row that teaches ``contest`` in the words of template ``name``.

    With ``tie`` the contest's two replies are equally good: the tie label is right where there is
    one, and either label, by a coin, where there is none.
    """
    template = _template(name)
    rubric = _rubric(rng)
    if template.kind == "rating":
        place = 0 if rng.random() < 0.35 else rng.randrange(1, len(contest.replies))
        shown, answer = [contest.replies[place]], _rating(contest, place)
    elif template.kind == "listwise":
        shown, answer = _listwise(contest, template, rng)
    else:
        order = [0, rng.randrange(1, len(contest.replies))]
        rng.shuffle(order)
        shown = [contest.replies[place] for place in order]
        better = template.labels[order.index(0)]
        answer = template.tie if tie and template.tie else better
        if template.mode == "rationale":
            worse = template.labels[1 - order.index(0)]
            flaw = contest.flaws[max(order)]
            reason = "Both replies are equally good." if tie else FLAWS[flaw].reason.format(worse)
            answer = f"{reason}\nVerdict: {better}"
    messages = render(template, prompt=list(contest.prompt), completions=shown, rubric=rubric)
    return {"prompt": list(messages), "completion": answer}


def _rating(contest: Contest, place: int) -> str:
    return "5" if place == 0 else str(FLAWS[contest.flaws[place]].rating)


def _listwise(contest: Contest, template: Template, rng: random.Random) -> tuple[list[str], str]:
    """Rank replies of different ratings; the places shown are shuffled."""
    ratings = {5: contest.replies[0]}
    for text, flaw in zip(contest.replies[1:], contest.flaws[1:], strict=True):
        ratings.setdefault(FLAWS[flaw].rating, text)
    best_first = [ratings[rating] for rating in sorted(ratings, reverse=True)]
    shown = rng.sample(best_first, len(best_first))
    return shown, " > ".join(template.labels[shown.index(text)] for text in best_first)
