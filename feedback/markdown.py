"""Markdown for cards, safe against what is put into it.

Texts of models, templates and users are data: they go through ``fence`` (a block that nothing
inside can end), ``code`` (the same within a line) or ``plain`` (no character of theirs is markup).
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

__all__ = ["code", "fence", "plain", "quote", "table"]

_MARKUP = re.compile(r"([\\`*_{}\[\]#|~$])")
_BLOCK_START = re.compile(r"^(\s*\d*)([-+=.)])(?=\s|$|[-=]+$)", re.MULTILINE)
_ADDRESS = re.compile(r"(?<=\w)(?=://)|(?<=\bwww)(?=\.)", re.IGNORECASE)


def fence(text: str, language: str = "text") -> str:
    """Return ``text`` as a code block whose fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return f"{marks}{language}\n{text}\n{marks}"


def code(text: object) -> str:
    """Return ``text`` as code within a line; line ends become spaces."""
    words = " ".join(str(text).split())
    longest = max((len(run) for run in re.findall(r"`+", words)), default=0)
    marks = "`" * (longest + 1)
    gap = " " if words.startswith("`") or words.endswith("`") or not words else ""
    return f"{marks}{gap}{words}{gap}{marks}"


def plain(text: object) -> str:
    """Return ``text`` so that it is shown as it is: no markup, no HTML, no link comes of it."""
    escaped = html.escape(str(text), quote=False)
    escaped = _MARKUP.sub(r"\\\1", escaped)
    escaped = _ADDRESS.sub("&#8203;", escaped)
    return _BLOCK_START.sub(r"\1\\\2", escaped)


def quote(text: str) -> str:
    """Return a user's own words as a block quote, shown as they are."""
    return "\n".join(f"> {line}".rstrip() for line in plain(text.strip()).split("\n"))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; cells are markdown already, and may hold no line end or bare bar."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    """Return a cell that cannot end early; a bar must be escaped even within code."""
    return re.sub(r"(?<!\\)\|", r"\\|", text.replace("\n", " "))
