"""The training rows: dialogues for the policy, contests for the judge."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from feedback.records import Message
from recipes.pocket_model.bookings import good_reply
from recipes.pocket_model.chat import chat_text
from recipes.pocket_model.contests import (
    Contest,
    Sampled,
    booking_contest,
    dialogue_contest,
    fresh_booking,
    sampled_contest,
)
from recipes.pocket_model.dialogues import Dialogue
from recipes.pocket_model.flaws import Material
from recipes.pocket_model.judge_rows import draw_template, judge_row

__all__ = ["Source", "judge_rows", "policy_rows"]

_SYSTEMS = (
    "You are a booking assistant.",
    "You are a helpful assistant.",
    "Help the customer with bookings and services.",
    "You are a polite assistant who books tables, trips and tickets.",
    "Answer briefly and politely.",
)


@dataclass(frozen=True)
class Source:
    """Everything that one model's lessons are made from."""

    dialogues: list[Dialogue]
    material: Material
    banned: frozenset[str]
    """Normalised first messages of the prompt sets: no training text may hold them."""
    sampled: list[Sampled]
    booking_share: float = 0.4
    """Share of booking conversations among constructed contests."""
    sampled_share: float = 0.0
    """Share of contests that hold a policy's own sample."""


def policy_rows(source: Source, *, bookings: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield each dialogue as chat text, then ``bookings`` short ones with a constructed reply."""
    rng = random.Random(seed)
    for dialogue in source.dialogues:
        messages = list(dialogue)
        if rng.random() < 0.3 and len(messages) > 4:
            # Judged and sampled conversations may begin in mid-dialogue; so do some of these.
            messages = messages[2 * rng.randrange(len(messages) // 2 - 1) :]
        if rng.random() < 0.08:
            messages.insert(0, Message(role="system", content=rng.choice(_SYSTEMS)))
        yield {"text": chat_text(messages)}
    for _ in range(bookings):
        booking = fresh_booking(source.banned, rng)
        reply = Message(role="assistant", content=good_reply(booking, rng))
        yield {"text": chat_text([*booking.messages, reply])}


def _tie(source: Source, rng: random.Random) -> Contest:
    """Two replies that are equal by construction: the same text, or two sound wordings."""
    if rng.random() < 0.3:
        contest = dialogue_contest(source.dialogues, source.material, rng)
        reply = rng.choice(contest.replies)
        return Contest(contest.prompt, (reply, reply), ("", ""))
    booking = fresh_booking(source.banned, rng)
    return Contest(booking.messages, (good_reply(booking, rng), good_reply(booking, rng)), ("", ""))


def _judge_row(source: Source, rng: random.Random) -> dict[str, Any]:
    name = draw_template(rng)
    pairwise = name.startswith("pairwise")
    tie_share = 0.3 if name == "pairwise-tie" else 0.03
    if pairwise and rng.random() < tie_share:
        return judge_row(_tie(source, rng), name, rng, tie=True)
    rivals = 3 if name == "listwise" else 1
    if source.sampled and rivals == 1 and name != "rating" and rng.random() < source.sampled_share:
        for _ in range(20):
            sampled = rng.choice(source.sampled)
            contest = sampled_contest(
                sampled, source.material, rng, spoil_sample=rng.random() < 0.3
            )
            if contest is not None:
                return judge_row(contest, name, rng)
    if rng.random() < source.booking_share:
        contest = booking_contest(source.material, source.banned, rng, rivals=rivals)
    else:
        contest = dialogue_contest(source.dialogues, source.material, rng, rivals=rivals)
    return judge_row(contest, name, rng)


def judge_rows(source: Source, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield ``count`` rows; the same seed gives the same rows."""
    rng = random.Random(seed)
    for _ in range(count):
        yield _judge_row(source, rng)
