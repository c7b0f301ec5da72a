"""Writes the project's gold pairs: ``prompts/gold/booking-candidates.jsonl``, ``booking-gold.jsonl``.

    python -m recipes.pocket_model.gold_pairs

Each is a conversation with a sound reply and one that is worse by construction, as often longer as
shorter. The conversations use names and cities that the pocket judges' training text never holds,
and none of them begins like one of the prompt sets.
"""

from __future__ import annotations

import random
from pathlib import Path

from feedback.records import Candidates, Completion, GoldPair, content_id, encode, normalise_text
from feedback.shards import write_text
from recipes.pocket_model.bookings import BOOKING_FLAWS, Booking, flawed_reply, good_reply
from recipes.pocket_model.contests import fresh_booking
from recipes.pocket_model.prompts import banned_openings, prompt_of

__all__ = ["GOLD", "make_gold"]

GOLD = Path(__file__).parents[2] / "prompts" / "gold"
_SIZE = 320
_SEED = 29
_TRIES = 20


def make_gold() -> tuple[list[Candidates], list[GoldPair]]:
    """Return the conversations with their two replies, and which one is sound."""
    rng = random.Random(_SEED)
    seen = set(banned_openings())
    candidates: list[Candidates] = []
    gold: list[GoldPair] = []
    while len(candidates) < _SIZE:
        booking = fresh_booking(frozenset(seen), rng, held_out=True)
        # Flaws and lengths in turn, so that every flaw is there and length tells nothing.
        flaw = BOOKING_FLAWS[len(candidates) % len(BOOKING_FLAWS)]
        replies = _replies(booking, flaw, longer=len(candidates) // len(BOOKING_FLAWS) % 2 == 0,
                           rng=rng)  # fmt: skip
        if replies is None:
            continue
        seen.add(normalise_text(booking.messages[0]["content"]))
        row, pair = _rows(booking, flaw, replies, rng)
        candidates.append(row)
        gold.append(pair)
    return candidates, gold


def _replies(
    booking: Booking, flaw: str, *, longer: bool, rng: random.Random
) -> tuple[str, str] | None:
    """Return a sound reply and a flawed one that is longer (or shorter), if there are such."""
    for _ in range(_TRIES):
        good, bad = good_reply(booking, rng), flawed_reply(booking, flaw, rng)
        if bad is not None and len(bad) != len(good) and (len(bad) > len(good)) == longer:
            return good, bad
    return None


def _rows(
    booking: Booking, flaw: str, replies: tuple[str, str], rng: random.Random
) -> tuple[Candidates, GoldPair]:
    prompt = prompt_of(booking)
    named = [
        Completion(
            completion_id=content_id(prompt.prompt_id, text, length=12),
            completion=text,
            model="constructed",
            finish_reason="stop",
        )
        for text in replies
    ]
    good, bad = (one.completion_id for one in named)
    rng.shuffle(named)
    return (
        Candidates(
            prompt_id=prompt.prompt_id,
            prompt=prompt.prompt,
            completions=named,
            meta={**prompt.meta, "flaw": flaw},
        ),
        GoldPair(prompt_id=prompt.prompt_id, a=good, b=bad, label="a", meta={"flaw": flaw}),
    )


def main() -> None:
    """Write both files."""
    for name, rows in zip(("candidates", "gold"), make_gold(), strict=True):
        path = GOLD / f"booking-{name}.jsonl"
        write_text(path, "".join(encode(row).decode() + "\n" for row in rows))
        print(f"{path}: {len(rows)} rows")


if __name__ == "__main__":
    main()
