"""What was read in a judge's reply, and the text cleaning that all readers share.

A ``Reading`` speaks in the template's labels, not in completion ids: which completion a label stood
for is known to whoever chose the order shown.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

from feedback.records import Outcome
from feedback.refusal import is_refusal

__all__ = ["Reading", "last_line", "no_verdict", "plain_text", "split_thinking"]

_THINKING = re.compile(r"<(think|thinking|reasoning)>.*?</\1>", re.DOTALL | re.IGNORECASE)
_OPEN_THINKING = re.compile(r"<(?:think|thinking|reasoning)>", re.IGNORECASE)
_END_THINKING = re.compile(r"</(?:think|thinking|reasoning)>", re.IGNORECASE)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text(?:bf)?\{)?\s*([^{}]*?)\s*\}?\s*\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One reply, read. Without a verdict every label field is None and ``reason`` says why."""

    outcome: Outcome
    label: str | None = None
    """Pairwise: the offered label that was chosen; the tie label where ``outcome`` is ``tie``."""
    ranking: list[list[str]] | None = None
    """Listwise: tied groups of labels, best first, each shown label exactly once."""
    score: float | None = None
    """Rating: the value of the chosen label, or the weighted mean over criteria."""
    scores: dict[str, float] = field(default_factory=dict)
    """Rating on several criteria, or one score per label where the reply scores each."""
    rationale: str | None = None
    reason: str = ""

    @property
    def has_verdict(self) -> bool:
        """Whether the judge decided or called a tie."""
        return self.outcome in ("decided", "tie")


def split_thinking(text: str) -> tuple[str, str, bool]:
    """Return (hidden reasoning, the answer after it, whether the reasoning was left open)."""
    if _OPEN_THINKING.match(text.lstrip()) or _END_THINKING.search(text):
        ends = list(_END_THINKING.finditer(text))
        if not ends:
            return text, "", True
        return text[: ends[-1].start()], text[ends[-1].end() :], False
    return "", text, False


def plain_text(text: str) -> str:
    r"""Return ``text`` without emphasis marks, and with ``\boxed{}`` as ``[[ ]]``.

    Compatibility forms are folded (full-width letters); line breaks stay. Look-alikes of other
    scripts stay what they are: a Cyrillic A is not an A.
    """
    text = unicodedata.normalize("NFKC", text)
    text = _BOXED.sub(r"[[\1]]", text)
    return re.sub(r"\*+|`+|__+", "", text)


def last_line(text: str) -> str:
    """Return the last line that is not blank, stripped; or an empty string."""
    for line in reversed(text.splitlines()):
        if line.strip():
            return line.strip()
    return ""


def no_verdict(text: str, finish_reason: str | None, reason: str) -> Reading:
    """Return the reading of a reply in which no verdict was found.

    A reply that was cut off is ``truncated``; one that opens by declining is ``refused``; so is one
    that the endpoint's own filter stopped; anything else is ``unparsed``.
    """
    rationale = text.strip() or None
    if finish_reason == "content_filter":
        return Reading(outcome="refused", rationale=rationale, reason="stopped by a content filter")
    if is_refusal(text):
        return Reading(outcome="refused", rationale=rationale, reason="the judge declined")
    if finish_reason == "length":
        return Reading(
            outcome="truncated", rationale=rationale, reason="cut off before a verdict; " + reason
        )
    return Reading(outcome="unparsed", rationale=rationale, reason=reason)
