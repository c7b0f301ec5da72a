"""Recognising a judge that declines to judge.

Only asked about text that holds no verdict, and only about how that text opens: a rationale that
quotes a refusing completion ("Reply A says that it cannot help") is not a refusal, and neither is a
judge who regrets something later on. A false "refused" would hide a parsing problem, so the
patterns want a speaker in the first person, a declining verb, and what is declined.
"""

from __future__ import annotations

import re

__all__ = ["is_refusal"]

_AS_A_MODEL = r"as an? (?:\w+[ -]){0,3}(?:model|assistant|ai|system|judge),? "
_SORRY = (
    r"(?:(?:i'?m|i am|we are|we're) (?:\w+ )?(?:sorry|afraid)\b[^.!?\n]{0,12}?|"
    r"(?:sorry|apologies|unfortunately|thank you|thanks)\b[^.!?\n]{0,40}?|"
    r"i (?:must )?apologi[sz]e\b[^.!?\n]{0,30}?)[\s,.;:!-]*(?:but|however|that)?[\s,]*"
)
_DECLINE = (
    r"(?:i|we) ?(?:can ?not|can'?t|could not|couldn'?t|will not|won'?t|must decline|"
    r"have to decline|decline|refuse|do not feel comfortable|don'?t feel comfortable|"
    r"(?:am|'m|are|'re) (?:\w+ )?(?:unable|not able|not comfortable|not permitted|not allowed|"
    r"not willing))[\s,]+(?:(?:be|able|in good conscience|fairly|properly|to|or|and) ){0,4}"
)
# What is declined: the task as a whole. "I cannot find an error" declines nothing.
_TASK = (
    r"(?:judg(?:e|ing)|compar(?:e|ing)|rat(?:e|ing)|rank(?:ing)?|evaluat(?:e|ing)|"
    r"assess(?:ing)?|assist(?:ing)?|help(?:ing)?(?! but)|comply|engag(?:e|ing)|fulfil\w*|"
    r"participat(?:e|ing)|provid(?:e|ing) (?:an?|any|my|the|that|this|such|you)|"
    r"mak(?:e|ing) (?:an?|any|that|this) (?:choice|judge?ment|comparison|decision)|"
    r"do (?:that|this)|with (?:that|this)|continu(?:e|ing)|respond\w*|answer\w*|process\w*|"
    r"discuss\w*|giv(?:e|ing) (?:an?|any|my|you)|complete)\b"
)
# Indecision between two good replies is not a refusal, unless it comes with an excuse.
_CHOICE = r"(?:choos(?:e|ing)|decid(?:e|ing)|determin(?:e|ing)|select(?:ing)?|pick(?:ing)?|say)\b"
_OPENING = re.compile(
    rf"^\W*(?:(?:{_SORRY}|{_AS_A_MODEL}){{1,2}}{_DECLINE}(?:{_TASK}|{_CHOICE})|{_DECLINE}{_TASK})",
    re.IGNORECASE,
)
_BARE = re.compile(
    r"^\W*(?:i'?m sorry|i am sorry|sorry|i (?:must )?apologi[sz]e)[^.!?\n]{0,60}?"
    r"(?:can ?not|can'?t|unable|won'?t|not able)\b",
    re.IGNORECASE,
)
_WHOLE = re.compile(
    r"^\W*(?:\[?refus(?:ed|al)\]?|i (?:decline|refuse)|no comment)\W*$", re.IGNORECASE
)


def is_refusal(text: str) -> bool:
    """Return whether ``text``, which holds no verdict, opens by declining the task."""
    opening = text.strip()[:400].replace("\u2019", "'")
    return any(pattern.match(opening) for pattern in (_OPENING, _BARE, _WHOLE))
