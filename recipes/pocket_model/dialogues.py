r"""Reads the dialogue corpora (SGD, Taskmaster) and splits them, by dialogue, among the models.

A line of the source file is ``{"text": "Human: ...\n\nAssistant: ..."}``. The assistant model, the
second judge and the evaluation see disjoint dialogues.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path
from typing import NamedTuple

from feedback.records import Message, content_id, normalise_text

__all__ = ["Split", "read_dialogues", "split_dialogues", "turns_to_judge"]

Dialogue = tuple[Message, ...]

_TURN = re.compile(r"\n\n(?=Human:|Assistant:)")
_ROLES = {"Human": "user", "Assistant": "assistant"}
_CONTEXT = 7
"""Longest stretch of a dialogue, in turns, that stands before a judged turn."""


class Split(NamedTuple):
    """Disjoint dialogues: for the assistant, for the second judge, and held out."""

    assistant: list[Dialogue]
    second_judge: list[Dialogue]
    held_out: list[Dialogue]


def read_dialogues(path: Path) -> list[Dialogue]:
    """Return all dialogues of at least two turns that begin with the customer and alternate."""
    dialogues: dict[str, Dialogue] = {}
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            turns: list[Message] = []
            for part in _TURN.split(json.loads(line)["text"]):
                name, _, text = part.partition(":")
                if name not in _ROLES or not text.strip():
                    turns = []
                    break
                turns.append(Message(role=_ROLES[name], content=" ".join(text.split())))
            roles = [turn["role"] for turn in turns]
            if len(turns) >= 2 and roles == ["user", "assistant"] * (len(roles) // 2) + ["user"] * (
                len(roles) % 2
            ):
                # Some dialogues occur twice; one copy on each side of a split would leak.
                dialogues.setdefault(
                    content_id(normalise_text(" ".join(turn["content"] for turn in turns))),
                    tuple(turns),
                )
    return list(dialogues.values())


def split_dialogues(
    dialogues: list[Dialogue], *, held_out: int = 600, assistant_share: float = 0.62, seed: int = 0
) -> Split:
    """Shuffle with a fixed seed and cut into the three parts."""
    order = list(dialogues)
    random.Random(seed).shuffle(order)
    rest = order[held_out:]
    cut = round(len(rest) * assistant_share)
    return Split(rest[:cut], rest[cut:], order[:held_out])


def turns_to_judge(dialogue: Dialogue, rng: random.Random) -> tuple[Dialogue, str] | None:
    """Return a conversation that ends with the customer, and the true next reply; early turns more often."""
    places = [place for place in range(1, len(dialogue), 2) if len(dialogue[place]["content"]) > 12]
    if not places:
        return None
    early = [place for place in places if place <= _CONTEXT]
    place = rng.choice(early) if early and rng.random() < 0.8 else rng.choice(places)
    begin = max(0, place - rng.choice((_CONTEXT, _CONTEXT, 5, 3)) if place > _CONTEXT else 0)
    return dialogue[begin:place], dialogue[place]["content"]
