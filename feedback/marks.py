"""Finding where a reply announces its verdict: ``Verdict: A``, ``[[A]]``, ``<answer>A</answer>``.

Two strengths. A strong mark announces the verdict and nothing else; the last one in the text
decides, and if what follows it cannot be read, there is no verdict: falling back on an earlier mark
would be a guess. A weak mark ("the better reply is ...") also occurs in passing, so weak marks
count only where no strong one stands, and only if all that can be read agree.

What stands behind a mark is read by a function of the caller (``feedback.labels``).
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Generic, TypeVar

from feedback.reading import last_line

__all__ = ["Found", "Mark", "find_marks", "last_verdict"]

_BRACKETS = re.compile(r"\[\[(?P<content>[^\[\]\n]{0,80})\]\]")
_TAGS = re.compile(
    r"<(?P<tag>verdict|answer|decision|choice|score|rating|ranking|winner|output)>"
    r"(?P<content>[^<]{0,400})</(?P=tag)>",
    re.IGNORECASE,
)
_WEAK = re.compile(
    r"(?<![\w-])(?:(?:the|my|final|better|best|preferred|stronger|superior) ){1,4}"
    r"(?:answer|choice|pick|preference|reply|response|completion|option|output|candidate|"
    r"assistant|one|verdict|decision|winner|rating|score|ranking)\b[ \t]*(?::|=|is\b:?)"
    r"|^[ \t#>-]*(?:answer|choice|result|preference|output)[ \t]*[:=]"
    r"|\bi (?:would )?(?:choose|prefer|pick|select|vote for)\b",
    re.IGNORECASE | re.MULTILINE,
)
# Between two marks of one line: "Verdict: A' or 'Verdict: B'" restates the instruction.
_LISTED = re.compile(r"(?:\bor|\band|/|,)[\s\"'“”‘’(]*$", re.IGNORECASE)
_BARE_LENGTH = 40
Value = TypeVar("Value")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A place where a verdict is announced; ``content`` is the text that should be one."""

    start: int
    after: int
    """Where the content begins, for verdicts that run over several lines."""
    content: str
    strong: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Found(Generic[Value]):
    """The deciding verdict and where its mark starts; or None and the reason."""

    value: Value | None
    start: int = 0
    marked: bool = False
    """Whether a strong mark stands in the text, readable or not."""
    reason: str = ""


@lru_cache
def _strong_pattern(words: str) -> re.Pattern[str]:
    lead = r"(?:(?:final|overall|my|total)[ \t]{1,3}){0,3}"
    return re.compile(
        rf"(?<![\w-]){lead}(?:{words})\b[ \t]*(?:\([^()\n]{{0,30}}\))?[ \t]*[:=]"
        rf"|^[ \t#>-]*{lead}(?:{words})[ \t.]*$",
        re.IGNORECASE | re.MULTILINE,
    )


def find_marks(text: str, words: str) -> list[Mark]:
    """Return all marks of ``text`` in order.

    Args:
        text: has been through ``plain_text``.
        words: alternatives, joined by ``|``, that announce a verdict when a colon follows.
    """
    marks = [
        Mark(
            start=found.start(),
            after=found.start("content"),
            content=found["content"],
            strong=True,
        )
        for pattern in (_BRACKETS, _TAGS)
        for found in pattern.finditer(text)
    ]
    strong = [(found.start(), found.end()) for found in _strong_pattern(words).finditer(text)]
    marks += _behind(text, strong, strong=True)
    weak = [
        (found.start(), found.end())
        for found in _WEAK.finditer(text)
        if not _inside(found.end() - 1, strong)
    ]
    marks += _behind(text, weak, strong=False)
    return sorted(marks, key=lambda mark: mark.start)


def _inside(place: int, spans: list[tuple[int, int]]) -> bool:
    """Return whether ``place`` lies in one of ``spans``, which are sorted and apart."""
    at = bisect.bisect_right(spans, (place, len(spans) + place)) - 1
    return at >= 0 and spans[at][0] <= place < spans[at][1]


def _behind(text: str, heads: list[tuple[int, int]], *, strong: bool) -> list[Mark]:
    """Return a mark per head; its content runs to the next head or the end of the line."""
    marks = []
    listed = False
    for place, (start, end) in enumerate(heads):
        stop = text.find("\n", end)
        stop = len(text) if stop < 0 else stop
        following = heads[place + 1][0] if place + 1 < len(heads) else len(text)
        if following < stop:
            content = text[end:following]
            lists_on = bool(_LISTED.search(content))
        else:
            content, lists_on = text[end:stop], False
            if not content.strip(" \t:#>-"):
                content = _first_line(text[stop:])
        if not (listed or lists_on):
            marks.append(Mark(start=start, after=end, content=content, strong=strong))
        listed = lists_on
    return marks


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")


def last_verdict(
    text: str, words: str, read: Callable[[str], Value | None], *, bare: Callable[[str], bool]
) -> Found[Value]:
    """Return the verdict that decides ``text``.

    Args:
        text: has been through ``plain_text``.
        words: as in ``find_marks``.
        read: reads the content of a mark; None where it holds no single verdict.
        bare: whether a last line is a verdict and nothing else, without any mark.
    """
    marks = find_marks(text, words)
    tail = last_line(text)
    if tail and len(tail) <= _BARE_LENGTH and bare(tail):
        start = text.rindex(tail)
        marks.append(Mark(start=start, after=start, content=tail, strong=True))
    strong = [mark for mark in marks if mark.strong]
    if strong:
        mark = strong[-1]
        value = read(mark.content)
        reason = "" if value is not None else "the last verdict is not one offered label"
        return Found(value=value, start=mark.start, marked=True, reason=reason)
    weak = [(read(mark.content), mark.start) for mark in marks]
    readable = [(value, start) for value, start in weak if value is not None]
    if not readable:
        return Found(value=None, reason="no verdict in it")
    if any(value != readable[0][0] for value, _ in readable):
        return Found(value=None, reason="it names several answers and marks none as the verdict")
    return Found(value=readable[-1][0], start=readable[-1][1])
