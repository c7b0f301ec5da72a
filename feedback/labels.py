"""Reading one offered label, number or ranking from the words behind a mark.

Every reader returns None unless the words name exactly one thing that was offered. "A clear win
for B" opens with an article, "A's tone" with a possessive, "A or B" lists, "A is worse" negates:
none of them is a verdict for A.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

__all__ = [
    "Chain",
    "find_ranking",
    "is_bare_label",
    "is_bare_number",
    "read_label",
    "read_number",
    "read_ranking",
]

_NOUN = (
    r"(?:reply|response|answer|assistant|option|completion|output|candidate|model|choice|letter|"
    r"number|label|summary|solution|rating|score)"
)
_FILLER = re.compile(
    r"^(?:(?:[\s\"'“”‘’(\[{:#–—]|-(?=\s))+"
    r"|(?:is|that|therefore|thus|so|clearly|the|to)\b(?=[\s:,])[\s:,]*"
    r"|(?:better|best|preferred|winning|stronger|superior|final)\b\s+"
    r"|" + _NOUN + r"(?:_|\b)(?:\s+(?:is|letter|number)\b)?[\s:#_(\[\"'-]*)",
    re.IGNORECASE,
)
_DONE = re.compile(r"^[\s\])}\"'”’.!,;:*/\\<>|~-]*$")
_COMPARED = re.compile(r"^[\s\])}\"'”’]*(?P<sign>>+|<+|=+|≈|≻|≺)\s*(?P<other>.+)$")
# What may follow a label without changing what it says.
_CONTINUES = re.compile(
    r"^[\])}\"'”’]*\s*(?:[.,;:(–—]|-\s|(?:wins?|because|since|as|over|by|for|due|with|beats)\b"
    r"|(?:is|was)\s+(?:\w+\s+){0,2}?(?:better|best|superior|preferred|preferable|stronger|"
    r"the winner|chosen)\b)",
    re.IGNORECASE,
)
_NEGATION = re.compile(r"\b(?:not|never|no|n't)\b", re.IGNORECASE)
_TIE_WORDS = re.compile(
    r"^[\s\"'(\[]*(?:(?:it(?:'s| is)|this is|they are|both(?: \w+)? are|an?)\s+)*"
    r"(?:tied?|draw|equal(?:ly)?(?: (?:good|bad|strong|helpful))?|"
    r"no (?:clear )?(?:preference|difference))[\s\])}\"'.!]*$",
    re.IGNORECASE,
)
_NUMBER = re.compile(
    r"(?P<value>-?\d+(?:\.\d+)?)(?:\s*(?:/|out of)\s*(?P<most>\d+(?:\.\d+)?))?"
    r"(?P<range>\s*(?:-|–|—|,|to\b|or\b|and\b)\s*\d)?(?![\w%/])(?!\.\d)"
)
_BARE = re.compile(r"^\s*(?:[-#>]+\s+)?[\"'“”‘’(\[{]*(?P<label>[\w-]+?)[\])}\"'“”‘’.!:]*\s*$")
_LONGEST = 300  # characters in which a verdict must be said
_SEPARATORS = re.compile(r"\s*(?:>+|≻|,|;|\n)\s*")


def read_label(content: str, labels: Sequence[str], *, tie: str | None = None) -> str | None:
    """Return the one offered label that ``content`` states, or None.

    Args:
        content: words behind a verdict mark, or a whole reply of a few words.
        labels: offered labels without the tie label.
        tie: the label that means 'equal'; words such as "tie" count only where it is offered.
    """
    choices = [*labels, tie] if tie is not None else list(labels)
    content = content[:_LONGEST]
    if _TIE_WORDS.match(content):
        return tie
    rest = content.strip()
    while True:
        label, after = _leading_label(rest, choices)
        if label is not None:
            return _settle(label, after, choices, tie=tie)
        filler = _FILLER.match(rest)
        if filler is None or not filler[0]:
            return None
        rest = rest[filler.end() :]


def _leading_label(text: str, choices: list[str]) -> tuple[str | None, str]:
    for label in sorted(choices, key=len, reverse=True):
        after = text[len(label) :]
        if text.startswith(label) and not re.match(r"[\w%]|['’]\w|\.\d", after):
            return label, after
    folded = [label.casefold() for label in choices]
    if len(set(folded)) == len(folded):
        for label in choices:
            after = text[len(label) :]
            if text[: len(label)].casefold() == label.casefold() and _DONE.match(after):
                return label, after
    return None, text


def _settle(label: str, after: str, choices: list[str], *, tie: str | None) -> str | None:
    """Return ``label``, or what the words after it make of it."""
    if _DONE.match(after):
        return label
    if compared := _COMPARED.match(after):
        return _compare(label, compared["sign"], compared["other"], choices, tie=tie)
    continued = _CONTINUES.match(after)
    if continued is None or _NEGATION.search(continued[0]):
        return None
    return None if _lists_another(label, after, choices) else label


def _compare(
    label: str, sign: str, rest: str, choices: list[str], *, tie: str | None
) -> str | None:
    """Return the winner of 'A > B', 'A << B' or 'A = B'; None where the sign compares no label."""
    filler = _FILLER.match(rest)
    while filler and filler[0] and _leading_label(rest, choices)[0] is None:
        rest = rest[filler.end() :]
        filler = _FILLER.match(rest)
    other, after = _leading_label(rest, choices)
    if other is None or other == label or not _DONE.match(after):
        return None
    if sign[0] in "=≈":
        return tie
    return label if sign[0] in ">≻" else other


def _lists_another(label: str, after: str, choices: list[str]) -> bool:
    """Return whether ``after`` goes on with 'or B', '/ B', 'and B'."""
    for other in choices:
        if other != label and re.match(
            rf"[\W_]*(?:\b(?:or|and|vs)\b|/|&|,|;)\W*(?:{_NOUN}\W*)?{re.escape(other)}(?!\w)",
            after,
            re.IGNORECASE,
        ):
            return True
    return False


def is_bare_label(line: str, choices: Sequence[str]) -> bool:
    """Return whether ``line`` is one label and nothing else but quotes, brackets or a full stop."""
    found = _BARE.match(line)
    return found is not None and found["label"] in choices


def is_bare_number(line: str) -> bool:
    """Return whether ``line`` is one number, perhaps with its scale ("4/5"), and nothing else."""
    return re.fullmatch(r"[\s\"'(\[]*-?\d+(?:\.\d+)?(?:\s*/\s*\d+)?[\s\"')\].]*", line) is not None


def read_number(content: str, *, most: float | None = None) -> float | None:
    """Return the number that ``content`` opens with, or None.

    "4-5" is a range and "4/10" on a scale that ends at 5 is another scale: neither is read.
    """
    rest = content[:_LONGEST].strip()
    while True:
        found = _NUMBER.match(rest)
        if found is not None:
            wrong_scale = found["most"] and most is not None and float(found["most"]) != most
            return None if found["range"] or wrong_scale else float(found["value"])
        filler = _FILLER.match(rest)
        if filler is None or not filler[0]:
            return None
        rest = rest[filler.end() :]


def read_ranking(content: str, labels: Sequence[str]) -> list[list[str]] | None:
    """Return tied groups, best first, if ``content`` orders each label exactly once; else None.

    Read are chains ("B > A = C"), lists with commas, and numbered lines.
    """
    groups: list[list[str]] = []
    for part in _SEPARATORS.split(content.strip().rstrip(".")):
        part = re.sub(r"^\s*(?:\(?\d{1,2}[.)]|[-•])\s+", "", part)
        if not part.strip():
            continue
        group = [read_label(item, labels) for item in re.split(r"\s*(?:=+|≈)\s*", part)]
        if any(label is None for label in group):
            return None
        groups.append([label for label in group if label is not None])
    flat = [label for group in groups for label in group]
    return groups if sorted(flat) == sorted(labels) else None


class Chain(NamedTuple):
    """A complete ranking found in running text."""

    groups: list[list[str]]
    start: int


def find_ranking(text: str, labels: Sequence[str]) -> Chain | None:
    """Return the last complete chain with '>' or '=' anywhere in ``text``.

    A chain that runs on to a label that was not shown is not complete.
    """
    label = "|".join(re.escape(name) for name in sorted(labels, key=len, reverse=True))
    item = (
        rf"[\"'(\[]{{0,3}}(?:{_NOUN}\s{{0,3}})?[\"'(\[]{{0,3}}"
        rf"(?<!\w)(?:{label})(?!\w)[\"')\]]{{0,3}}"
    )
    sign = r"[ \t]{0,4}(?:>{1,3}|≻|={1,2}|≈)[ \t]{0,4}"
    chain = re.compile(rf"(?<!\w){item}(?:{sign}{item})+(?!{sign}\S)", re.IGNORECASE)
    for found in reversed(list(chain.finditer(text))):
        groups = read_ranking(found[0], labels)
        if groups is not None and not re.search(r"[>=≻≈]\s*$", text[: found.start()]):
            return Chain(groups, found.start())
    return None
