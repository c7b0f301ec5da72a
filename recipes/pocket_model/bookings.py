"""Writes booking conversations with known slots, and replies that are good or bad by construction.

A ``Booking`` is a conversation that ends with the customer's turn, together with what is known about
it: which details were given, which are missing, which were taken back. From that follow good replies
(confirm what was given, ask for what is missing) and replies with one known flaw each. The prompt
sets and part of the pocket model's training text come from here; the values and wordings are the
project's own.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from feedback.records import Message
from recipes.pocket_model.services import SERVICES, Service, Slot
from recipes.pocket_model.values import values_of

__all__ = ["BOOKING_FLAWS", "Booking", "flawed_reply", "good_reply", "make_booking"]

_NO_ON = re.compile(r"\b(?:on|On) (?=tomorrow|today|this |next )")
_WORDS = dict(
    enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
        ]
    )
)
_GREETINGS = ("",) * 12 + ("Hi, ", "Hello, ", "Hey, ", "Hi there. ", "Good morning. ", "Hello. ")
_CLOSES = ("",) * 14 + (" Thanks.", " Thank you.", " Please help.", " Can you do that?")
_ASSISTANT_OPENS = (
    "",
    "",
    "Sure. ",
    "Okay. ",
    "Sure, I can help with that. ",
    "No problem. ",
    "Of course. ",
    "Certainly. ",
)
_CHANGES = (
    "Actually, make that {}.",
    "Sorry, I meant {}.",
    "Wait, change it to {}.",
    "On second thought, {} please.",
)
_FINAL = (
    "Please confirm: {}.",
    "Please confirm the following details: {}.",
    "Just to confirm, {}. Is that correct?",
    "So you would like {}, is that right?",
    "To confirm, you want {}. Is this correct?",
    "Okay, that is {}. Shall I go ahead?",
    "You want {}. Should I book it?",
    "I will book {}. Is that okay?",
)
_PARTIAL = (
    "Okay, {}. {ask}",
    "Sure, {}. {ask}",
    "Got it, {}. {ask}",
    "I have {}. {ask}",
    "Alright, {} so far. {ask}",
    "I can look for {}. {ask}",
)

BOOKING_FLAWS = (
    "wrong_detail",
    "invented_detail",
    "asks_again",
    "omits_detail",
    "too_early",
    "stale_detail",
    "other_request",
)


@dataclass(frozen=True, slots=True)
class Booking:
    """A conversation about one booking, and what is known about it."""

    service: Service
    messages: tuple[Message, ...]
    given: dict[str, str]
    """Slot name to the value that holds now."""
    missing: tuple[str, ...]
    stale: dict[str, str] = field(default_factory=dict)
    """Slot name to a value that the customer took back."""

    def slot(self, name: str) -> Slot:
        """Return the service's slot of that name."""
        return next(slot for slot in self.service.slots if slot.name == name)


def make_booking(rng: random.Random, *, held_out: bool = False) -> Booking:
    """Write one conversation of one, two or three customer turns."""
    service = rng.choice(SERVICES)
    values = _draw_values(service, rng, held_out=held_out)
    names = list(values)
    count = len(names) if rng.random() < 0.2 else rng.randint(1, len(names))
    known = sorted(rng.sample(names, count), key=names.index)
    turns = min(rng.choices((1, 2, 3), (0.6, 0.3, 0.1))[0], len(known))
    # Later turns answer one question each; the first message says all the rest.
    later = rng.sample(known, turns - 1)
    first = [name for name in known if name not in later]
    user = _first_message(service, {name: values[name] for name in first}, rng)
    messages = [Message(role="user", content=user)]
    stale: dict[str, str] = {}
    for place, name in enumerate(later):
        slot = next(slot for slot in service.slots if slot.name == name)
        question = rng.choice(_ASSISTANT_OPENS) + rng.choice(slot.asks)
        answer = _capital(
            _NO_ON.sub("", rng.choice(slot.answers).format(_surface(slot, values[name], rng)))
        )
        if place == len(later) - 1 and rng.random() < 0.25:
            answer, changed, old = _with_change(
                service, values, [*first, *later[:place]], answer, rng, held_out
            )
            stale |= {changed: old} if changed else {}
        messages += [
            Message(role="assistant", content=question),
            Message(role="user", content=answer),
        ]
    if rng.random() < 0.1:
        messages[0] = Message(role="user", content=messages[0]["content"].lower())
    return Booking(
        service=service,
        messages=tuple(messages),
        given={name: values[name] for name in known},
        missing=tuple(name for name in names if name not in known),
        stale=stale,
    )


def _draw_values(service: Service, rng: random.Random, *, held_out: bool) -> dict[str, str]:
    values: dict[str, str] = {}
    for slot in service.slots:
        values[slot.name] = _unused(slot, values, rng, held_out=held_out)
    return values


def _unused(slot: Slot, values: dict[str, str], rng: random.Random, *, held_out: bool) -> str:
    taken = set(values.values())
    offered = values_of(slot.kind, held_out=held_out)
    while (value := rng.choice(offered)) in taken:
        pass
    return value


def _first_message(service: Service, given: dict[str, str], rng: random.Random) -> str:
    opening = rng.choice(service.opens)
    parts = [
        rng.choice(slot.said).format(_surface(slot, given[slot.name], rng))
        for slot in service.slots
        if slot.name in given
    ]
    if rng.random() < 0.5:
        rng.shuffle(parts)
    apart = parts.pop() if len(parts) > 1 and rng.random() < 0.3 else None
    mark = "?" if opening.startswith(("Can", "Could")) else "."
    text = rng.choice(_GREETINGS) + " ".join([opening, *parts]) + mark
    if apart is not None:
        text += " " + rng.choice(
            ("It should be {}.", "I'd like it {}.", "That is {}.", "I need it {}.")
        ).format(apart)
    return _NO_ON.sub("", text) + rng.choice(_CLOSES)


def _with_change(
    service: Service,
    values: dict[str, str],
    before: list[str],
    answer: str,
    rng: random.Random,
    held_out: bool,
) -> tuple[str, str, str]:
    """Let the customer take back one earlier detail; changes ``values``."""
    if not before:
        return answer, "", ""
    name = rng.choice(before)
    slot = next(slot for slot in service.slots if slot.name == name)
    old = values[name]
    values[name] = _unused(slot, values, rng, held_out=held_out)
    changed = _NO_ON.sub("", slot.said[0].format(_surface(slot, values[name], rng)))
    return answer + " " + rng.choice(_CHANGES).format(changed), name, old


def _surface(slot: Slot, value: str, rng: random.Random) -> str:
    """Word a value as a customer might: numbers as words, times of day in words."""
    if slot.kind in ("count", "nights") and rng.random() < 0.3:
        return _WORDS[int(value)]
    if slot.kind == "time" and rng.random() < 0.12:
        clock, half = value.split()
        hour = int(clock.split(":")[0])
        part = (
            "in the morning"
            if half == "am"
            else "in the afternoon"
            if hour < 6
            else "in the evening"
        )
        return f"{clock} {part}"
    return value


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _phrase(booking: Booking, values: dict[str, str]) -> str:
    parts = [
        slot.confirms.format(values[slot.name])
        for slot in booking.service.slots
        if slot.name in values
    ]
    text = " ".join([booking.service.thing, *parts])
    return _NO_ON.sub("", text).replace("for 1 nights", "for 1 night")


def _questions(booking: Booking, names: list[str], rng: random.Random) -> str:
    return " ".join(rng.choice(booking.slot(name).asks) for name in names)


def _final(booking: Booking, values: dict[str, str], rng: random.Random) -> str:
    opening = rng.choice(_ASSISTANT_OPENS) if rng.random() < 0.3 else ""
    return opening + rng.choice(_FINAL).format(_phrase(booking, values))


def _partial(booking: Booking, values: dict[str, str], ask: str, rng: random.Random) -> str:
    return rng.choice(_PARTIAL).format(_phrase(booking, values), ask=ask)


def good_reply(booking: Booking, rng: random.Random) -> str:
    """Return a reply that asks for what is missing, or confirms everything when nothing is."""
    if not booking.missing:
        return _final(booking, booking.given, rng)
    ask = _questions(
        booking,
        rng.sample(booking.missing, min(len(booking.missing), rng.choice((1, 1, 1, 2)))),
        rng,
    )
    if rng.random() < 0.5:
        return rng.choice(_ASSISTANT_OPENS) + ask
    return _partial(booking, booking.given, ask, rng)


def flawed_reply(booking: Booking, flaw: str, rng: random.Random) -> str | None:
    """Return a reply with that flaw, or None where the conversation does not allow it."""
    given, missing = booking.given, list(booking.missing)
    said = " ".join(message["content"] for message in booking.messages).lower()
    ask = _questions(booking, rng.sample(missing, 1), rng) if missing else ""
    if flaw == "wrong_detail":
        altered = _altered(booking, said, rng)
        return None if altered == given else _confirm(booking, altered, ask, rng)
    if flaw == "stale_detail":
        return _confirm(booking, {**given, **booking.stale}, ask, rng) if booking.stale else None
    if flaw == "invented_detail":
        if not missing:
            return None
        invented = rng.sample(missing, rng.randint(1, len(missing)))
        added = {
            name: value
            for name in invented
            if (value := _other_value(booking.slot(name), said, rng))
        }
        if not added:
            return None
        left = [name for name in missing if name not in added]
        return _confirm(booking, {**given, **added}, _questions(booking, left[:1], rng), rng)
    if flaw == "asks_again":
        again = _questions(
            booking, rng.sample(sorted(given), min(len(given), rng.choice((1, 1, 2)))), rng
        )
        if rng.random() < 0.3:
            return _partial(booking, given, again, rng)
        return rng.choice(_ASSISTANT_OPENS) + again
    if flaw == "omits_detail":
        if missing or len(given) < 2:
            return None
        kept = rng.sample(sorted(given), rng.randint(1, len(given) - 1))
        return _final(booking, {name: given[name] for name in kept}, rng)
    if flaw == "too_early":
        return rng.choice(_ASSISTANT_OPENS) + booking.service.done if missing else None
    if flaw == "other_request":
        other = make_booking(rng)
        # A bare question could belong to this request, too; so the other request is always named.
        other_ask = _questions(other, list(other.missing[:1]), rng)
        return (
            _confirm(other, other.given, other_ask, rng)
            if other.service.name != booking.service.name
            else None
        )
    raise ValueError(f"no booking flaw named {flaw!r}")


def _confirm(booking: Booking, values: dict[str, str], ask: str, rng: random.Random) -> str:
    return _partial(booking, values, ask, rng) if ask else _final(booking, values, rng)


def _altered(booking: Booking, said: str, rng: random.Random) -> dict[str, str]:
    """Return the given values with one, sometimes two, replaced."""
    values = dict(booking.given)
    for name in rng.sample(sorted(values), min(len(values), rng.choice((1, 1, 1, 2)))):
        values[name] = _other_value(booking.slot(name), said, rng) or values[name]
    return values


def _other_value(slot: Slot, said: str, rng: random.Random) -> str | None:
    """Return a value of the slot's kind that the conversation does not hold, if there is one."""
    spoken = f" {said} "
    offered = values_of(slot.kind, held_out=False)
    for _ in range(20):
        value = rng.choice(offered)
        word = _WORDS[int(value)] if slot.kind in ("count", "nights") else value
        clock = value.split()[0] if slot.kind == "time" else value
        forms = {form.lower() for form in (value, word, clock)}
        if not any(f" {form}{end}" in spoken for form in forms for end in (" ", ".", ",", "?")):
            return value
    return None
