"""Small invented preference data that a tiny model can learn: one kind of answer is better."""

from __future__ import annotations

import random
from pathlib import Path

from feedback.records import Preference, Ranking, encode

THINGS = ("room", "table", "car", "film", "song", "doctor", "train", "ticket", "lamp", "garden")
TIMES = ("today", "tonight", "tomorrow", "on Monday", "on Friday", "next week")
GOOD = ("Gladly, the {0} is yours.", "Of course, one {0} {1}.", "Yes, the {0} {1} it is.")
MIDDLING = ("Perhaps a {0} {1}.", "Some {0}, maybe.")
BAD = ("No.", "Go away with your {0}.", "I do not care about {1}.")


def _prompt(number: int) -> tuple[str, str, str]:
    thing, time = THINGS[number % len(THINGS)], TIMES[number // len(THINGS) % len(TIMES)]
    return f"I need a {thing} {time}", thing, time


def preferences(count: int, *, seed: int = 0, p: float = 0.9) -> list[Preference]:
    """One pair per prompt: a kind answer beats a rude one."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        prompt, *words = _prompt(number)
        chosen, rejected = draw.choice(GOOD).format(*words), draw.choice(BAD).format(*words)
        rows.append(
            Preference(
                prompt=prompt,
                chosen=chosen,
                rejected=rejected,
                margin=2 * p - 1,
                p_chosen=p,
                prompt_id=f"prompt-{number}",
            )
        )
    return rows


def rankings(count: int, *, seed: int = 0) -> list[Ranking]:
    """Rankings of three to five: kind, then middling (tied where there are two), then rude."""
    draw = random.Random(seed)
    rows = []
    for number in range(count):
        prompt, *words = _prompt(number)
        good = [draw.choice(GOOD).format(*words)]
        middling = [text.format(*words) for text in MIDDLING[: 1 + number % 2]]
        bad = [text.format(*words) for text in draw.sample(BAD, 1 + number % 2)]
        completions = [*good, *middling, *bad]
        sizes = (len(good), len(middling), len(bad))
        starts = (0, sizes[0], sizes[0] + sizes[1])
        ranking = [list(range(s, s + n)) for s, n in zip(starts, sizes, strict=True)]
        rows.append(
            Ranking(
                prompt=prompt,
                completions=completions,
                scores=[None] * len(completions),
                ranking=ranking,
                prompt_id=f"prompt-{number}",
            )
        )
    return rows


def write_rows(path: Path, rows: list[Preference] | list[Ranking]) -> str:
    """Write rows as one JSONL file and return its name."""
    path.write_bytes(b"".join(encode(row) + b"\n" for row in rows))
    return str(path)
