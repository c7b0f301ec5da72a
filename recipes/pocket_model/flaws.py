"""The flaws that the judge's lessons are built from: what each does, how bad it is, how to say so.

``spoil`` turns a good reply into one with a known flaw. ``FLAWS`` holds for every flaw, those of the
booking conversations included, the rating a reply with it deserves (a sound reply deserves 5) and the
sentence that a rationale says about it.
"""

from __future__ import annotations

import random
from typing import NamedTuple

from feedback.records import Message, normalise_text
from recipes.pocket_model.details import DetailPools, add_detail, swap_detail

__all__ = ["FLAWS", "TEXT_FLAWS", "Flaw", "Material", "spoil"]


class Flaw(NamedTuple):
    """One kind of flaw."""

    rating: int
    """1 (useless) to 4 (sound but for a small matter)."""
    reason: str
    """What a rationale says of the reply; ``{}`` is its label."""


class Material(NamedTuple):
    """What flaws are made from."""

    replies: list[str]
    """True assistant turns of other dialogues."""
    pools: DetailPools


FLAWS: dict[str, Flaw] = {
    "wrong_detail": Flaw(2, "Reply {} has a detail that differs from what the customer said."),
    "stale_detail": Flaw(2, "Reply {} uses a detail that the customer has changed since."),
    "invented_detail": Flaw(2, "Reply {} adds a detail that the customer never gave."),
    "asks_again": Flaw(3, "Reply {} asks for something that the customer has already said."),
    "omits_detail": Flaw(3, "Reply {} leaves out details that the customer gave."),
    "too_early": Flaw(2, "Reply {} says it is done while details are still missing."),
    "other_request": Flaw(1, "Reply {} is about another request."),
    "other_turn": Flaw(1, "Reply {} does not answer the last message."),
    "repeats_turn": Flaw(2, "Reply {} only repeats what was said before."),
    "cut_off": Flaw(2, "Reply {} breaks off in the middle."),
    "padded": Flaw(3, "Reply {} adds sentences that have nothing to do with the request."),
    "repeated": Flaw(3, "Reply {} says the same thing twice."),
    "rude": Flaw(1, "Reply {} is rude."),
    "off_topic": Flaw(1, "Reply {} is off topic."),
    "closes": Flaw(1, "Reply {} ends the conversation without helping."),
    "sampled": Flaw(3, "Reply {} fits the conversation less well."),
}

TEXT_FLAWS = {
    "longer": ("wrong_detail",) * 4
    + ("invented_detail",) * 3
    + ("padded", "padded", "repeated", "rude", "off_topic", "other_turn", "repeats_turn"),
    "shorter": ("wrong_detail",) * 5
    + (
        "cut_off",
        "cut_off",
        "closes",
        "rude",
        "off_topic",
        "other_turn",
        "other_turn",
        "repeats_turn",
    ),
}
"""Flaws that ``spoil`` knows, as often as they are drawn to make a reply longer or shorter."""

_RUDE = (
    "I do not care about that.",
    "Figure it out yourself.",
    "That is a stupid question.",
    "No idea, ask someone else.",
    "Stop bothering me.",
    "Why should I do that for you?",
    "You are wasting my time.",
    "Whatever. Do it on your own.",
    "What a dumb request.",
    "I told you already, learn to read.",
    "Not my problem.",
    "Go away.",
    "You never know what you want.",
    "Do not expect any help from me, I have better things to do today.",
    "How hard can it be to look that up by yourself? Honestly.",
)
_OFF_TOPIC = (
    "My favorite color is green.",
    "The moon is smaller than the earth.",
    "Cats sleep most of the day.",
    "I had soup for lunch.",
    "Water boils at a hundred degrees.",
    "Chess is an old game.",
    "There are many stars in the sky.",
    "Bread is made from flour and water.",
    "Did you know that whales can sing?",
    "It is nice to walk in the woods in the autumn when the leaves are falling.",
    "A violin has four strings and is played with a bow.",
    "The history of the bicycle is longer than most people think it is.",
)
_CLOSES = (
    "Have a great day!",
    "Goodbye.",
    "Is there anything else I can help you with?",
    "Enjoy your day.",
    "You are welcome. Have a nice day.",
    "Thank you for calling, goodbye and have a wonderful day.",
    "Glad I could help. Is there anything else you need today?",
)
_PADDING = (
    "We are always happy to help all of our customers with all of their needs.",
    "Thank you so much for choosing our service today.",
    "Please note that many people ask about this every day.",
    "As you may know, there are many options for this.",
    "I am an assistant and I can do many different things for you.",
    "This is a very good choice and I like it very much.",
)


def spoil(
    flaw: str, reply: str, prompt: tuple[Message, ...], material: Material, rng: random.Random
) -> str | None:
    """Return ``reply`` with one flaw, or None where the flaw does not fit it.

    Raises:
        ValueError: no such flaw.
    """
    said = " ".join(message["content"] for message in prompt)
    words = reply.split()
    spoiled: str | None
    if flaw == "other_turn":
        spoiled = rng.choice(material.replies)
    elif flaw == "wrong_detail":
        spoiled = swap_detail(reply, said, material.pools, rng)
    elif flaw == "invented_detail":
        spoiled = add_detail(reply, said, material.pools, rng)
    elif flaw == "cut_off":
        spoiled = (
            " ".join(words[: rng.randint(1, max(1, 2 * len(words) // 3))]).rstrip(".,?!")
            if len(words) > 4
            else None
        )
    elif flaw == "padded":
        extra = rng.choice(_PADDING) if rng.random() < 0.4 else rng.choice(material.replies)
        spoiled = f"{extra} {reply}" if rng.random() < 0.3 else f"{reply} {extra}"
    elif flaw == "repeated":
        spoiled = (
            f"{reply} {reply}"
            if rng.random() < 0.6
            else " ".join([*words, *words[-min(len(words), 6) :] * rng.randint(1, 3)])
        )
    elif flaw == "repeats_turn":
        spoiled = rng.choice(prompt[-3:])["content"]
    elif flaw == "rude":
        insult = rng.choice(_RUDE)
        spoiled = rng.choice((insult, insult, f"{reply} {insult}", f"{insult} {reply}"))
    elif flaw == "off_topic":
        fact = rng.choice(_OFF_TOPIC)
        spoiled = fact if rng.random() < 0.6 else f"{fact} {rng.choice(_OFF_TOPIC)}"
    elif flaw == "closes":
        # At the end of a dialogue such a turn is the right one.
        spoiled = rng.choice(_CLOSES) if not _is_closing(reply, prompt) else None
    else:
        raise ValueError(f"no flaw named {flaw!r}")
    return None if spoiled is None or normalise_text(spoiled) == normalise_text(reply) else spoiled


def _is_closing(reply: str, prompt: tuple[Message, ...]) -> bool:
    last = prompt[-1]["content"].lower()
    words = (
        "anything else",
        "day",
        "bye",
        "welcome",
        "glad",
        "enjoy",
        "pleasure",
        "more help",
        "what else",
        "take care",
        "have a",
        "something else",
    )
    return any(word in reply.lower() for word in words) or any(
        word in last for word in ("thank", "bye", "that's all", "no,")
    )
