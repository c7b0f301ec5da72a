"""A judge's reply to a verdict, by the template that asked for it.

The last verdict wins, only offered labels count, and what cannot be read stays unread: refusal,
truncation and nonsense are outcomes of their own, never a label, a tie or a middle score.

    reading = parse_reply(reply.text, template, shown=2, finish_reason=reply.finish_reason)

This module knows the template and the text, nothing of engines, orders or completion ids.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from feedback.labels import (
    find_ranking,
    is_bare_label,
    is_bare_number,
    read_label,
    read_number,
    read_ranking,
)
from feedback.marks import Found, find_marks, last_verdict
from feedback.reading import Reading, no_verdict, plain_text, split_thinking
from feedback.templates import Template

__all__ = [
    "Reading",
    "last_json_object",
    "parse_json",
    "parse_listwise",
    "parse_pairwise",
    "parse_rating",
    "parse_reply",
    "scale_values",
]

Value = TypeVar("Value")
_LONGEST_REPLY = 50_000
_PAIRWISE_WORDS = "verdict|decision|judge?ment|winner"
_RATING_WORDS = "verdict|rating|score|grade"
_LISTWISE_WORDS = "verdict|ranking|order"


def parse_reply(
    text: str,
    template: Template,
    *,
    shown: int = 2,
    criteria: Mapping[str, float] | None = None,
    finish_reason: str | None = None,
) -> Reading:
    """Read the reply to ``template`` about ``shown`` completions; arguments as ``parse_json``."""
    if template.mode == "structured":
        return parse_json(
            text, template, shown=shown, criteria=criteria, finish_reason=finish_reason
        )
    if template.kind == "pairwise":
        return parse_pairwise(text, template, finish_reason=finish_reason)
    if template.kind == "listwise":
        return parse_listwise(text, template, shown=shown, finish_reason=finish_reason)
    return parse_rating(text, template, finish_reason=finish_reason)


def scale_values(template: Template) -> list[float]:
    """Return the value of each point of a rating template's scale: its number, else its place."""
    try:
        return [float(label) for label in template.labels]
    except ValueError:
        return [float(place) for place in range(1, len(template.labels) + 1)]


def _answer(
    text: str, template: Template, finish_reason: str | None
) -> tuple[str, str | None, Reading | None]:
    """Return (text to read, finish reason to go by, a reading if there is nothing to read)."""
    _, answer, open_thinking = split_thinking(text)
    one_token = template.mode == "label" and template.max_tokens == 1
    if one_token and text.strip():
        finish_reason = None if finish_reason == "length" else finish_reason
    if open_thinking:
        return "", finish_reason, no_verdict(text, finish_reason, "reasoning without an answer")
    # A reply this long has run away; its verdict, if any, stands at the end.
    plain = plain_text(answer[-_LONGEST_REPLY:])
    if not plain.strip():
        return "", finish_reason, no_verdict("", finish_reason, "the reply is empty")
    return plain, finish_reason, None


def _stated(
    plain: str,
    template: Template,
    words: str,
    read: Callable[[str], Value | None],
    *,
    bare: Callable[[str], bool],
) -> Found[Value]:
    """Return the one value that a reply states: by lines that are nothing else, or by a mark."""
    lines = [line for line in plain.splitlines() if line.strip()]
    if all(bare(line) for line in lines):
        values = [read(line) for line in lines]
        if template.mode == "label" and any(value != values[0] for value in values):
            return Found(value=None, reason="several labels stand alone in it")
        reason = "" if values[-1] is not None else "not an offered label"
        return Found(value=values[-1], reason=reason)
    found = last_verdict(plain, words, read, bare=bare)
    if found.value is not None or found.marked or template.mode != "label":
        return found
    # Asked for the label alone, some judges give it first and then talk.
    value = read(lines[0])
    return found if value is None else Found(value=value)


def parse_pairwise(text: str, template: Template, *, finish_reason: str | None = None) -> Reading:
    """Read which of two completions was preferred, or that they tie where a tie is offered."""
    plain, finish_reason, nothing = _answer(text, template, finish_reason)
    if nothing is not None:
        return nothing
    found = _stated(
        plain,
        template,
        _PAIRWISE_WORDS,
        lambda content: read_label(content, template.labels, tie=template.tie),
        bare=lambda line: is_bare_label(line, template.choices),
    )
    if found.value is None:
        return no_verdict(plain, finish_reason, found.reason)
    return Reading(
        outcome="tie" if found.value == template.tie else "decided",
        label=found.value,
        rationale=plain[: found.start].strip() or None,
    )


def parse_rating(text: str, template: Template, *, finish_reason: str | None = None) -> Reading:
    """Read the point of the scale that was chosen; only the scale's own points count."""
    plain, finish_reason, nothing = _answer(text, template, finish_reason)
    if nothing is not None:
        return nothing
    points = dict(zip(template.labels, scale_values(template), strict=True))
    numbers = all(label.lstrip("-").replace(".", "", 1).isdigit() for label in template.labels)

    def read(content: str) -> str | None:
        if not numbers:
            return read_label(content, template.labels)
        return _point(read_number(content, most=max(points.values())), points)

    def bare(line: str) -> bool:
        return is_bare_number(line) if numbers else is_bare_label(line, template.labels)

    found = _stated(plain, template, _RATING_WORDS, read, bare=bare)
    if found.value is None:
        return no_verdict(plain, finish_reason, found.reason)
    return Reading(
        outcome="decided",
        label=found.value,
        score=points[found.value],
        rationale=plain[: found.start].strip() or None,
    )


def _point(number: Any, points: Mapping[str, float]) -> str | None:
    """Return the label whose value ``number`` is; None for a number between two points."""
    if isinstance(number, str):
        return number if number in points else None
    if isinstance(number, bool) or not isinstance(number, int | float):
        return None
    return next((label for label, value in points.items() if value == number), None)


def parse_listwise(
    text: str, template: Template, *, shown: int, finish_reason: str | None = None
) -> Reading:
    """Read a ranking of the first ``shown`` labels; each must occur exactly once."""
    plain, finish_reason, nothing = _answer(text, template, finish_reason)
    if nothing is not None:
        return nothing
    labels = template.labels[:shown]
    if (whole := read_ranking(plain, labels)) is not None:
        return Reading(outcome="decided", ranking=whole)
    marks = [mark for mark in find_marks(plain, _LISTWISE_WORDS) if mark.strong]
    chain = find_ranking(plain, labels)
    if marks and (chain is None or marks[-1].after > chain.start):
        start = marks[-1].start
        ranking = read_ranking(marks[-1].content, labels)
        if ranking is None:
            ranking = read_ranking(_paragraph(plain[marks[-1].after :]), labels)
    elif chain is not None:
        start, ranking = chain.start, chain.groups
    else:
        last = plain.rstrip().rpartition("\n\n")[2]
        start, ranking = plain.rindex(last), read_ranking(last, labels)
    if ranking is None:
        return no_verdict(plain, finish_reason, "no ranking that names each reply exactly once")
    return Reading(outcome="decided", ranking=ranking, rationale=plain[:start].strip() or None)


def _paragraph(text: str) -> str:
    return text.strip().partition("\n\n")[0]


def last_json_object(text: str, key: str) -> dict[str, Any] | None:
    """Return the last top-level JSON object in ``text`` that has ``key``, or None."""
    decoder = json.JSONDecoder()
    result, position = None, text.find("{")
    while position >= 0:
        try:
            value, position = decoder.raw_decode(text, position)
        except ValueError:
            position += 1
        except RecursionError:
            return result  # nested beyond reason; what follows would be no better
        else:
            if isinstance(value, dict) and key in value:
                result = value
        position = text.find("{", position)
    return result


def parse_json(
    text: str,
    template: Template,
    *,
    shown: int = 2,
    criteria: Mapping[str, float] | None = None,
    finish_reason: str | None = None,
) -> Reading:
    """Read a structured reply: ``{"rationale": ..., "verdict" | "ranking" | "score(s)": ...}``.

    Args:
        text: the reply; text around the object (a code fence, say) is allowed.
        template: of any kind; its labels are the only values that count.
        shown: completions shown (listwise).
        criteria: name to weight; with them the reply must hold ``scores`` with each of the names.
        finish_reason: as the engine said; a cut-off reply without a whole object is ``truncated``.
    """
    _, answer, _ = split_thinking(text)
    key = _json_key(template, criteria)
    value = last_json_object(answer, key)
    if value is None:
        return no_verdict(answer, finish_reason, f"no JSON object with the key {key!r}")
    rationale = value.get("rationale")
    rationale = rationale if isinstance(rationale, str) and rationale.strip() else None
    reading = _read_json(value[key], template, shown=shown, criteria=criteria)
    if reading is None:
        return Reading(
            outcome="unparsed",
            rationale=rationale,
            reason=f"the value of {key!r} is not one that was offered",
        )
    return dataclasses.replace(reading, rationale=rationale)


def _json_key(template: Template, criteria: Mapping[str, float] | None) -> str:
    if template.kind == "rating":
        return "scores" if criteria else "score"
    return "ranking" if template.kind == "listwise" else "verdict"


def _read_json(
    value: Any, template: Template, *, shown: int, criteria: Mapping[str, float] | None
) -> Reading | None:
    if template.kind == "pairwise":
        label = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
        if label not in template.choices:
            return None
        return Reading(outcome="tie" if label == template.tie else "decided", label=label)
    if template.kind == "listwise":
        groups = _json_groups(value, template.labels[:shown])
        return None if groups is None else Reading(outcome="decided", ranking=groups)
    points = dict(zip(template.labels, scale_values(template), strict=True))
    if not criteria:
        chosen = _point(value, points)
        if chosen is None:
            return None
        return Reading(outcome="decided", label=chosen, score=points[chosen])
    if not isinstance(value, dict):
        return None
    read = {name: _point(value.get(name), points) for name in criteria}
    if any(point is None for point in read.values()):
        return None
    scores = {name: points[point] for name, point in read.items() if point is not None}
    total = sum(criteria.values())
    mean = sum(weight * scores[name] for name, weight in criteria.items()) / total
    return Reading(outcome="decided", score=mean, scores=scores)


def _json_groups(value: Any, labels: tuple[str, ...]) -> list[list[str]] | None:
    if not isinstance(value, list):
        return None
    groups = [
        [str(item) for item in (part if isinstance(part, list) else [part])] for part in value
    ]
    flat = [label for group in groups for label in group]
    return groups if sorted(flat) == sorted(labels) else None
