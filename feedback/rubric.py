"""Rubrics: what a judge is to look at, as text, and as weighted criteria where a header names them.

A rubric is a Markdown file. A header between two lines ``+++`` may hold criteria in TOML:

    +++
    [[criteria]]
    name = "accuracy"
    weight = 3
    text = "Every statement is true, and nothing is made up."
    +++
    What the criteria have in common, if anything.

A rating template then asks about each criterion on its own (one token each), or about all of them
at once in structured mode; the score is the weighted mean. Other templates show the criteria as a
list.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from feedback.errors import TemplateError, nearest

__all__ = ["Criterion", "Rubric", "parse_rubric"]

_HEADER = re.compile(r"\A\s*\+\+\+[ \t]*\n(?P<header>.*?)\n\+\+\+[ \t]*(?:\n|\Z)", re.DOTALL)
_NAME = re.compile(r"[a-z][a-z0-9_-]{0,39}")
_KEYS = ("name", "weight", "text")


@dataclass(frozen=True, slots=True, kw_only=True)
class Criterion:
    """One thing to rate."""

    name: str
    weight: float
    text: str

    @property
    def shown(self) -> str:
        """What a judge reads where this criterion is rated on its own."""
        return f"{self.name.replace('-', ' ')}: {self.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rubric:
    """What a judge is to look at."""

    text: str
    """As shown to the judge: the body, then the criteria as a list."""
    criteria: tuple[Criterion, ...] = ()

    @property
    def weights(self) -> dict[str, float]:
        """Return the criteria's weights by name; empty without criteria."""
        return {criterion.name: criterion.weight for criterion in self.criteria}


def parse_rubric(source: str, *, path: Path) -> Rubric:
    """Read a rubric file's content.

    Raises:
        TemplateError: the header is not TOML, or a criterion is incomplete or stands there twice.
    """
    found = _HEADER.match(source)
    if found is None:
        if source.lstrip().startswith("+++"):
            raise TemplateError("the header has no closing line '+++'", path=path)
        return Rubric(text=source.strip())
    try:
        table = tomllib.loads(found["header"])
    except tomllib.TOMLDecodeError as error:
        raise TemplateError(f"the header is not valid TOML: {error}", path=path) from error
    for key in table:
        if key != "criteria":
            raise TemplateError(f"unknown key {key!r} in the header; 'criteria'?", path=path)
    entries = table.get("criteria", [])
    if not isinstance(entries, list):
        raise TemplateError("'criteria' must be tables: write [[criteria]]", path=path)
    criteria = tuple(_criterion(entry, path) for entry in entries)
    names = [criterion.name for criterion in criteria]
    if len(set(names)) < len(names):
        raise TemplateError("a criterion stands there twice", path=path)
    listed = [
        f"- {criterion.name} (weight {criterion.weight:g}): {criterion.text}"
        for criterion in criteria
    ]
    body = source[found.end() :].strip()
    return Rubric(text="\n".join([body, *listed] if body else listed), criteria=criteria)


def _criterion(entry: object, path: Path) -> Criterion:
    if not isinstance(entry, dict):
        raise TemplateError("'criteria' must be tables: write [[criteria]]", path=path)
    for key in entry:
        if key not in _KEYS:
            raise TemplateError(
                f"unknown key {key!r} of a criterion{nearest(key, _KEYS)}", path=path
            )
    name, text, weight = entry.get("name"), entry.get("text"), entry.get("weight", 1)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise TemplateError(
            f"criterion name {name!r}: lower-case letters, digits, '-' and '_'", path=path
        )
    if not isinstance(text, str) or not text.strip():
        raise TemplateError(f"criterion {name!r} has no text", path=path)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
        raise TemplateError(
            f"criterion {name!r}: weight {weight!r} is not a positive number", path=path
        )
    return Criterion(name=name, weight=float(weight), text=text.strip())
