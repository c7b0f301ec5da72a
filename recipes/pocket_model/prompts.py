"""Writes the project's prompt sets, ``prompts/sets/booking-train.jsonl`` and ``booking-eval.jsonl``.

    python -m recipes.pocket_model.prompts

No conversation of one set occurs in the other, and the training text of the pocket models holds none
of either. The evaluation set also uses names and cities that training text never holds.
"""

from __future__ import annotations

import random
from pathlib import Path

from feedback.records import Prompt, content_id, encode, normalise_text
from feedback.shards import write_text
from recipes.pocket_model.bookings import Booking, make_booking

__all__ = [
    "SETS",
    "banned_openings",
    "draw_prompts",
    "make_sets",
    "opening",
    "prompt_of",
    "write_prompts",
]

SETS = Path(__file__).parents[2] / "prompts" / "sets"
_SIZES = {"booking-train": 480, "booking-eval": 200}
_SEED = 17


def prompt_of(booking: Booking) -> Prompt:
    """Return the prompt row of a booking conversation; its slots stand in ``meta``."""
    messages = [dict(message) for message in booking.messages]
    return Prompt(
        prompt_id="booking-" + content_id(messages, length=12),
        prompt=messages[0]["content"] if len(messages) == 1 else list(booking.messages),
        meta={
            "service": booking.service.name,
            "given": booking.given,
            "missing": list(booking.missing),
            "changed": booking.stale,
        },
    )


def opening(prompt: Prompt) -> str:
    """Return the normalised first message: what tells requests apart."""
    first = prompt.prompt if isinstance(prompt.prompt, str) else prompt.prompt[0]["content"]
    return normalise_text(first)


def draw_prompts(rng: random.Random, count: int, *, held_out: bool, seen: set[str]) -> list[Prompt]:
    """Return requests whose first message is not among ``seen``, and add theirs to it."""
    rows: list[Prompt] = []
    while len(rows) < count:
        prompt = prompt_of(make_booking(rng, held_out=held_out))
        if opening(prompt) not in seen:
            seen.add(opening(prompt))
            rows.append(prompt)
    return rows


def write_prompts(path: Path, rows: list[Prompt]) -> None:
    """Write a prompt set, one row a line."""
    write_text(path, "".join(encode(row).decode() + "\n" for row in rows))


def make_sets() -> dict[str, list[Prompt]]:
    """Return both sets; no two prompts share a first message."""
    rng = random.Random(_SEED)
    seen: set[str] = set()
    return {
        name: draw_prompts(rng, size, held_out=name == "booking-eval", seen=seen)
        for name, size in _SIZES.items()
    }


def banned_openings() -> frozenset[str]:
    """Return the normalised first messages of both sets, which training text must not hold."""
    return frozenset(opening(prompt) for rows in make_sets().values() for prompt in rows)


def main() -> None:
    """Write both files."""
    for name, rows in make_sets().items():
        path = SETS / f"{name}.jsonl"
        write_prompts(path, rows)
        print(f"{path}: {len(rows)} prompts")


if __name__ == "__main__":
    main()
