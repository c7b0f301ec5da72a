"""Finds the details of a reply (times, dates, amounts, numbers, names) and swaps or adds some.

The key skill of the pocket judge is to compare details with the conversation. Its lessons come from
here: a detail that the conversation holds is replaced by one of the same kind that it does not hold.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["Detail", "DetailPools", "add_detail", "collect_details", "find_details", "swap_detail"]

_MONTH = (
    r"(?:January|February|March|April|May|June|July|August|September|October|November|December)"
)
_DAY = r"(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day"
# Order matters: a piece of text belongs to the first kind that matches it.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = (
    (
        "time",
        re.compile(r"\b\d{1,2}(?::\d{2})? ?(?:[ap]\.?m\b\.?)|\b\d{1,2}:\d{2}\b", re.IGNORECASE),
    ),
    (
        "date",
        re.compile(
            rf"\b{_MONTH} \d{{1,2}}(?:st|nd|rd|th)?\b|\b(?:next |this )?{_DAY}\b|\btomorrow\b",
            re.IGNORECASE,
        ),
    ),
    ("money", re.compile(r"\$ ?\d[\d,]*(?:\.\d+)?")),
    ("phone", re.compile(r"\+?\d[\d-]{6,}(?: \d[\d-]+)*")),
    ("number", re.compile(r"\b\d+(?:\.\d+)?\b")),
    (
        "name",
        re.compile(
            r"(?<![.?!] )(?<!^)\b[A-Z][\w']+(?: (?:[A-Z&][\w']*|of|the|de|and(?= [A-Z])))*(?<! of)(?<! the)(?<! de)"
        ),
    ),
)
_NOT_NAMES = {
    "I",
    "I'm",
    "I've",
    "I'll",
    "I'd",
    "Ok",
    "Okay",
    "Sure",
    "Yes",
    "No",
    "Please",
    "What",
    "Is",
    "Do",
    "The",
    "Your",
    "You",
    "And",
    "It",
}
_FORMS = {
    "time": (" at {}",),
    "date": (" on {}", " for {}"),
    "name": (" at {}", " in {}"),
    "number": (" for {}", " for {} people"),
    "money": (" for {}",),
}


class Detail(NamedTuple):
    """One detail: its kind and where it stands in the text."""

    kind: str
    begin: int
    end: int
    text: str


DetailPools = dict[str, list[str]]
"""Kind to the values seen, as often as seen."""


def find_details(text: str) -> list[Detail]:
    """Return the details of a text, none overlapping another."""
    taken = [False] * len(text)
    found = []
    for kind, pattern in _KINDS:
        for match in pattern.finditer(text):
            begin, end = match.span()
            if any(taken[begin:end]) or match[0] in _NOT_NAMES:
                continue
            taken[begin:end] = [True] * (end - begin)
            found.append(Detail(kind, begin, end, match[0]))
    return found


def collect_details(texts: Iterable[str]) -> DetailPools:
    """Return all details of the texts, by kind."""
    pools: DetailPools = {kind: [] for kind, _ in _KINDS}
    for text in texts:
        for detail in find_details(text):
            pools[detail.kind].append(detail.text)
    return pools


def _holds(said: str, value: str) -> bool:
    """Say whether ``value`` stands in ``said`` as whole words, whatever its case."""
    said, value = said.lower(), value.lower()
    begin = said.find(value)
    while begin >= 0:
        end = begin + len(value)
        before, after = said[begin - 1 : begin], said[end : end + 1]
        if not (before.isalnum() or after.isalnum()):
            return True
        begin = said.find(value, begin + 1)
    return False


def _unheard(
    kind: str, pools: DetailPools, said: str, rng: random.Random, *, like: str = ""
) -> str | None:
    for _ in range(12):
        value = rng.choice(pools[kind])
        # A five-digit party size would give itself away.
        if kind == "number" and len(value) > max(1, len(like)):
            continue
        # "6:30 pm" is not news where the customer said "6:30".
        if not _holds(said, value) and not _holds(said, value.split(" ")[0]):
            return value
    return None


def swap_detail(reply: str, said: str, pools: DetailPools, rng: random.Random) -> str | None:
    """Replace a detail that the conversation holds by one that it does not; None if there is none."""
    grounded = [detail for detail in find_details(reply) if _holds(said, detail.text)]
    if not grounded:
        return None
    detail = rng.choice(grounded)
    value = _unheard(detail.kind, pools, f"{said} {reply}", rng, like=detail.text)
    return None if value is None else reply[: detail.begin] + value + reply[detail.end :]


def add_detail(reply: str, said: str, pools: DetailPools, rng: random.Random) -> str | None:
    """Add a detail that the conversation does not hold, before the reply's closing mark."""
    kind = rng.choice(("time", "date", "name", "name", "number", "money"))
    value = _unheard(kind, pools, f"{said} {reply}", rng)
    if value is None or find_details(reply[-14:]):
        return None
    body, mark = (reply[:-1], reply[-1]) if reply[-1] in ".?!" else (reply, "")
    return body + rng.choice(_FORMS[kind]).format(value) + mark
