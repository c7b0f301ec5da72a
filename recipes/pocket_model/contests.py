"""Builds contests: one conversation, one sound reply, and replies that are worse by construction.

Three sources: real dialogues, booking conversations written by ``bookings``, and pairs in which a
trained policy's own sample stands against the true turn, or a spoiled sample against the sample. Of
two replies the longer one is the better one as often as the shorter one, as far as the flaws allow.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from feedback.records import Message, normalise_text
from recipes.pocket_model.bookings import (
    BOOKING_FLAWS,
    Booking,
    flawed_reply,
    good_reply,
    make_booking,
)
from recipes.pocket_model.dialogues import Dialogue, turns_to_judge
from recipes.pocket_model.flaws import TEXT_FLAWS, Material, spoil

__all__ = ["Contest", "Sampled", "booking_contest", "dialogue_contest", "sampled_contest"]

_TRIES = 12
_BOOKING_MIX = {
    side: BOOKING_FLAWS * 2 + ("wrong_detail", "invented_detail") * 2 + tuple(sorted(set(flaws)))
    for side, flaws in TEXT_FLAWS.items()
}
_SAMPLE_MIX = {
    side: tuple(flaw for flaw in flaws if flaw not in ("other_turn", "closes", "repeats_turn"))
    for side, flaws in TEXT_FLAWS.items()
}


class Contest(NamedTuple):
    """``replies[0]`` is sound; each other one has the flaw named at its place in ``flaws``."""

    prompt: tuple[Message, ...]
    replies: tuple[str, ...]
    flaws: tuple[str, ...]
    """Same length as ``replies``; the first is ``""``."""


class Sampled(NamedTuple):
    """A conversation with its true (or constructed) next reply and one that a policy sampled."""

    prompt: tuple[Message, ...]
    truth: str
    sample: str
    ended: bool
    is_booking: bool


def dialogue_contest(
    dialogues: list[Dialogue], material: Material, rng: random.Random, *, rivals: int = 1
) -> Contest:
    """Take a true turn of a dialogue and spoil it in ``rivals`` ways."""
    plan = _draw_plan(TEXT_FLAWS, rivals, rng)
    attempt = 0
    while True:
        attempt += 1
        found = turns_to_judge(rng.choice(dialogues), rng)
        if found is None:
            continue
        prompt, truth = found
        contest = _contest(
            prompt,
            truth,
            plan,
            lambda flaw: spoil(flaw, truth, prompt, material, rng),  # noqa: B023
        )
        if contest is not None:
            return contest
        if attempt % _TRIES == 0:
            plan = _draw_plan(TEXT_FLAWS, rivals, rng)


def booking_contest(
    material: Material,
    banned: frozenset[str],
    rng: random.Random,
    *,
    rivals: int = 1,
    held_out: bool = False,
) -> Contest:
    """Write a booking conversation with a sound reply and flawed ones.

    ``banned`` holds normalised first messages that training text must not contain.
    """
    plan = _draw_plan(_BOOKING_MIX, rivals, rng)
    attempt = 0
    while True:
        attempt += 1
        booking = fresh_booking(banned, rng, held_out=held_out)
        good = good_reply(booking, rng)
        contest = _contest(
            booking.messages,
            good,
            plan,
            lambda flaw: _spoil_booking(flaw, booking, good, material, rng),  # noqa: B023
        )
        if contest is not None:
            return contest
        if attempt % _TRIES == 0:
            plan = _draw_plan(_BOOKING_MIX, rivals, rng)


def _spoil_booking(
    flaw: str, booking: Booking, good: str, material: Material, rng: random.Random
) -> str | None:
    if flaw in BOOKING_FLAWS:
        return flawed_reply(booking, flaw, rng)
    return spoil(flaw, good, booking.messages, material, rng)


def fresh_booking(banned: frozenset[str], rng: random.Random, *, held_out: bool = False) -> Booking:
    """Return a booking conversation that no prompt set holds."""
    while True:
        booking = make_booking(rng, held_out=held_out)
        if normalise_text(booking.messages[0]["content"]) not in banned:
            return booking


def sampled_contest(
    sampled: Sampled, material: Material, rng: random.Random, *, spoil_sample: bool
) -> Contest | None:
    """Return truth against sample, or (``spoil_sample``) sample against the same sample spoiled."""
    if not spoil_sample:
        if normalise_text(sampled.truth) == normalise_text(sampled.sample) or not sampled.sample:
            return None
        return Contest(sampled.prompt, (sampled.truth, sampled.sample), ("", "sampled"))
    if not sampled.ended or len(sampled.sample) < 12:
        return None
    for _ in range(_TRIES):
        plan = _draw_plan(_SAMPLE_MIX, 1, rng)
        contest = _contest(
            sampled.prompt,
            sampled.sample,
            plan,
            lambda flaw: spoil(flaw, sampled.sample, sampled.prompt, material, rng),
        )
        if contest is not None:
            return contest
    return None


def _draw_plan(
    mix: dict[str, tuple[str, ...]], rivals: int, rng: random.Random
) -> list[tuple[str, bool]]:
    """Draw the flaws of ``rivals`` replies, and for each whether it makes the reply longer."""
    plan: list[tuple[str, bool]] = []
    while len(plan) < rivals:
        longer = rng.random() < 0.5
        flaw = rng.choice(mix["longer" if longer else "shorter"])
        if flaw not in (drawn for drawn, _ in plan):
            plan.append((flaw, longer))
    return plan


def _contest(
    prompt: tuple[Message, ...],
    good: str,
    plan: list[tuple[str, bool]],
    spoiled: Callable[[str], str | None],
) -> Contest | None:
    """Carry out a plan on one reply; None when a flaw does not fit it, or not with that length."""
    replies, flaws = [good], [""]
    for flaw, longer in plan:
        for _ in range(4):
            text = spoiled(flaw)
            if (
                text
                and text not in replies
                and len(text) != len(good)
                and (len(text) > len(good)) == longer
            ):
                replies.append(text)
                flaws.append(flaw)
                break
        else:
            return None
    return Contest(tuple(prompt), tuple(replies), tuple(flaws))
