"""Readers for the reply styles of published judges, for importing what they have written.

Our own templates are read by ``feedback.parsing``; these styles were asked for by other people's
prompts, so their labels are fixed here. All readers keep the same promises: the last verdict wins,
only what the style offers counts, and a reply that states no verdict gives none.

| style | what a reply looks like |
|---|---|
| ``three-class`` | a review whose last line is 1, 2 or 3 (3: equal) |
| ``two-scores`` | a first line with two scores, or scores stated for both in the review |
| ``chain`` | prose that ends in "Assistant 2 > Assistant 1 = Assistant 3" |
| ``reason`` | one or two sentences about two responses; the verdict is stored apart |
| ``single-rating`` | a review with [[n]] or "Rating: n", n from 1 to 10 |
| ``feedback`` | a review on a rubric; the score from 1 to 5 is stored apart |
| ``json-score`` | a JSON object with a score from 1 to 10 |
| ``ordered-models`` | a JSON list (or object with one) of models and their ranks |
| ``pair-letters`` | a review with [[A]], [[B]] or [[C]] (C: equal) |
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from typing import Any

from feedback.labels import find_ranking
from feedback.parsing import last_json_object, parse_json, parse_pairwise, parse_rating
from feedback.reading import Reading, last_line, no_verdict, plain_text
from feedback.templates import Mode, Template

__all__ = ["STYLES", "read_reply", "turns_text"]


_LONGEST = 50_000  # a reply longer than this has run away; its verdict stands at the end


def turns_text(reply: Any) -> str:
    """Return the text of a reply that some files store as ``[{"turns": [...]}]``; the last turn."""
    if isinstance(reply, str):
        return reply
    if isinstance(reply, list) and reply and isinstance(reply[-1], dict):
        turns = reply[-1].get("turns")
        if isinstance(turns, list) and turns and isinstance(turns[-1], str):
            return turns[-1]
    return ""


def read_reply(style: str, reply: Any, *, shown: int = 2) -> Reading:
    """Read ``reply`` in the named style, about ``shown`` completions.

    Raises:
        KeyError: the style is none of ``STYLES``.
    """
    text = turns_text(reply)[-_LONGEST:]
    if not plain_text(text).strip():
        return no_verdict("", None, "the reply is empty")
    return read_chain(text, shown) if style == "chain" else STYLES[style](text)


def read_three_class(text: str) -> Reading:
    """Read a review that ends in 1, 2 or 3; 3 means equal."""
    template = _pair(("1", "2"), tie="3")
    return parse_pairwise(text, template)


def read_pair_letters(text: str) -> Reading:
    """Read a review with [[A]], [[B]] or [[C]]; C means equal."""
    return parse_pairwise(text, _pair(("A", "B"), tie="C"))


def _pair(labels: tuple[str, str], tie: str) -> Template:
    return Template(
        name="style", kind="pairwise", mode="rationale", user="", labels=labels, tie=tie
    )


_NUMBER = r"-?\d+(?:\.\d+)?"
_OUT_OF = r"(?:\s*(?:/|out of)\s*10\b)?"
_TWO_NUMBERS = re.compile(rf"^\W*?({_NUMBER}){_OUT_OF}[\s,;]+({_NUMBER}){_OUT_OF}\W*$")
_TUPLE = re.compile(
    rf"(?:output|tuple|scores?)\b[^\d\n(]{{0,40}}\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)", re.I
)
# "Assistant 1: 7/10", "Assistant 1: Score: 7", "Assistant 1's code a score of 7", "a 7 out of 10"
_NAMED = re.compile(
    rf"(?<!to )(?<!for )Assistant (?P<who>[12])(?:\s*[:=]\s*(?:(?:overall )?score\s*[:=]?\s*)?|"
    rf"(?:'s)?[^.\n\d]{{0,60}}?\ba(?:n overall)? (?:score|rating) of |"
    rf"(?:'s)?[^.\n\d]{{0,40}}?\ban? (?=\d+ out of)|'s (?:score|rating) is )"
    rf"(?P<score>{_NUMBER}){_OUT_OF}(?![\w^*=+]|\s*[-+*^=(]\s*\d|\.\d)",
    re.IGNORECASE,
)
_NAMED_AFTER = re.compile(
    rf"(?:score|rating) of (?P<score>{_NUMBER}){_OUT_OF} (?:to|for) Assistant (?P<who>[12])",
    re.IGNORECASE,
)
_NAMES = r"(?: Assistant 1 and Assistant 2)?"
_BOTH = re.compile(
    rf"\b(?:both|each){_NAMES}\b[^.\n\d]{{0,40}}\b(?:score|rating) of ({_NUMBER})|"
    rf"\b(?:both|each){_NAMES}\b[^.\n\d]{{0,40}}\ban? ({_NUMBER}) out of 10",
    re.IGNORECASE,
)
_RESPECTIVELY = re.compile(
    rf"\bscores for{_NAMES} are ({_NUMBER}) and ({_NUMBER}),? respectively", re.IGNORECASE
)


def read_two_scores(text: str) -> Reading:
    """Read the scores of two completions, from the first line or from the review.

    A negative score is how such judges were told to say that they could not score.
    """
    plain = plain_text(text)
    first = next(line for line in plain.splitlines() if line.strip())
    found = _TWO_NUMBERS.match(first) or _TWO_NUMBERS.match(last_line(plain))
    pair = (float(found[1]), float(found[2])) if found else _stated_scores(plain)
    if pair is None:
        return no_verdict(plain, None, "it does not state two scores")
    if min(pair) < 0:
        return no_verdict(plain, None, "a negative score stands for none")
    label = "tie" if pair[0] == pair[1] else "1" if pair[0] > pair[1] else "2"
    return Reading(
        outcome="tie" if label == "tie" else "decided",
        label=label,
        scores={"1": pair[0], "2": pair[1]},
        rationale=plain.strip(),
    )


def _stated_scores(plain: str) -> tuple[float, float] | None:
    """Return the scores last stated for both: by name, as a tuple, or as one score for each."""
    ends: dict[str, tuple[int, float]] = {}
    for found in sorted(
        [*_NAMED.finditer(plain), *_NAMED_AFTER.finditer(plain)], key=lambda match: match.start()
    ):
        ends[found["who"]] = (found.start(), float(found["score"]))
    candidates = []
    if len(ends) == 2:
        candidates.append((max(ends["1"][0], ends["2"][0]), (ends["1"][1], ends["2"][1])))
    candidates += [
        (found.start(), (float(found[1]), float(found[2])))
        for pattern in (_TUPLE, _RESPECTIVELY)
        for found in pattern.finditer(plain)
    ]
    for found in _BOTH.finditer(plain):
        score = float(found[1] or found[2])
        candidates.append((found.start(), (score, score)))
    return max(candidates)[1] if candidates else None


# "all four assistants are equal (=)", "both assistants are equally good".
_ALL_EQUAL = re.compile(
    r"\b(?:all|both|they|two|three|four)\b[^.\n]*\(\s*['\"]?=['\"]?\s*\)|"
    r"\b(?:all|both)(?: (?:two|three|four))? assistants are (?:equal\b(?!ly)|equally \w+)",
    re.IGNORECASE,
)


_SIGNED = re.compile(r"\[?Assistant \d\]?(?:\s*(?:>=|=<|<=|[<>=≥≤])\s*\[?Assistant \d\]?)+")


def read_chain(text: str, shown: int = 2) -> Reading:
    """Read "Assistant 2 > Assistant 1 = Assistant 3" over ``shown`` assistants.

    Only '>' and '=' were offered. A chain that runs the other way ("1 < 2") is turned round, and
    "at least as good" (">=", "=<") puts the one it favours first: a judge with '=' at hand that
    does not use it says so in its prose ("slightly better") nearly always. Where both directions
    stand in one chain it states no order.
    """
    plain = _SIGNED.sub(_offered_signs, plain_text(text))
    labels = [str(number) for number in range(1, shown + 1)]
    chain = find_ranking(plain, labels)
    if chain is not None:
        return Reading(
            outcome="decided", ranking=chain.groups, rationale=plain[: chain.start].strip() or None
        )
    if _ALL_EQUAL.search(last_line(plain)) and ">" not in last_line(plain):
        return Reading(outcome="decided", ranking=[labels], rationale=plain.strip())
    return no_verdict(plain, None, "no chain over all assistants")


def _offered_signs(found: re.Match[str]) -> str:
    """Return a chain in the two signs that were offered; unchanged where it runs both ways."""
    names = re.findall(r"Assistant \d", found[0])
    signs = re.findall(r">=|=<|<=|[<>=≥≤]", found[0])
    upward = [sign in ("<", "=<", "<=", "≤") for sign in signs]
    if any(upward):
        if not all(up or sign == "=" for up, sign in zip(upward, signs, strict=True)):
            return found[0]
        names, signs = names[::-1], signs[::-1]
    parts = [names[0]]
    for sign, name in zip(signs, names[1:], strict=True):
        parts += ["=" if sign == "=" else ">", name]
    return " ".join(parts)


_BETTER = re.compile(
    r"\bResponse (?P<who>[12]) is (?:\w+ )?(?:better|the better|preferable|superior|the best)\b"
    r"(?! (?:if|for|when|in (?:some|terms)))",
    re.IGNORECASE,
)
_NEGATIVE = re.compile(r"\b(?:not|neither|both)\b", re.IGNORECASE)


def read_reason(text: str) -> Reading:
    """Read a reason that says outright which response is better.

    Most reasons praise one response and leave the verdict to a field of its own; those give none.
    """
    plain = plain_text(text)
    named = {found["who"] for found in _BETTER.finditer(plain)}
    if len(named) != 1 or any(
        _NEGATIVE.search(plain[max(0, found.start() - 30) : found.end()])
        for found in _BETTER.finditer(plain)
    ):
        return no_verdict(plain, None, "it gives a reason and no verdict")
    return Reading(outcome="decided", label=named.pop(), rationale=plain.strip())


def read_single_rating(text: str) -> Reading:
    """Read [[n]] or "Rating: n", n a whole number from 1 to 10."""
    return parse_rating(text, _ten_points("rationale"))


def _ten_points(mode: Mode) -> Template:
    labels = tuple(str(point) for point in range(1, 11))
    return Template(name="style", kind="rating", mode=mode, user="", labels=labels)


_FEEDBACK_SCORE = re.compile(
    r"\b(?:overall|final|total) (?:score|rating)(?: of| is| would be|:)(?: an?)? "
    r"(?P<score>[1-5])\b(?!\.\d|-)",
    re.IGNORECASE,
)


def read_feedback(text: str) -> Reading:
    """Read a review that says its score from 1 to 5 outright; most leave it to a field apart."""
    plain = plain_text(text)
    named = {found["score"] for found in _FEEDBACK_SCORE.finditer(plain)}
    if len(named) != 1:
        return no_verdict(plain, None, "it gives feedback and no score")
    return Reading(outcome="decided", score=float(named.pop()), rationale=plain.strip())


def read_json_score(text: str) -> Reading:
    """Read the ``score`` of a JSON object, a whole number from 1 to 10."""
    return parse_json(text, _ten_points("structured"))


def read_ordered_models(text: str) -> Reading:
    """Read a list of ``{"model": ..., "rank": ...}``; equal ranks are a tie."""
    value = last_json_object(text, "ordered_models")
    rows = value["ordered_models"] if value is not None else _literal_list(text)
    try:
        ranks = {str(row["model"]): int(row["rank"]) for row in rows}
    except (TypeError, KeyError, ValueError):
        ranks = {}
    if len(ranks) < 2 or len(ranks) != len(rows):
        return no_verdict(text, None, "no list of models, each with its rank")
    groups = [
        [model for model, rank in ranks.items() if rank == place]
        for place in sorted(set(ranks.values()))
    ]
    tie = len(groups) == 1
    return Reading(
        outcome="tie" if tie else "decided",
        label="tie" if tie else groups[0][0] if len(groups[0]) == 1 else None,
        ranking=groups,
    )


def _literal_list(text: str) -> Any:
    """Return a list that was written as a Python literal, or an empty one."""
    try:
        value = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return []
    return value if isinstance(value, list) else []


STYLES: dict[str, Callable[..., Reading]] = {
    "three-class": read_three_class,
    "two-scores": read_two_scores,
    "chain": read_chain,
    "reason": read_reason,
    "single-rating": read_single_rating,
    "feedback": read_feedback,
    "json-score": read_json_score,
    "ordered-models": read_ordered_models,
    "pair-letters": read_pair_letters,
}
