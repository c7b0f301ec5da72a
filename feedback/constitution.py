"""Constitutions: principles of which one is drawn for each question, and recorded with it.

A constitution is a TOML file with ``[[principles]]``: ``choose`` is shown to a judge that compares
two replies (template ``principle``), ``critique`` and ``revise`` to a model that improves its own
reply (``feedback.revision``). Constitutional AI, arXiv 2212.08073.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback.errors import TemplateError, nearest
from feedback.records import content_id
from feedback.templates import prompts_folder

__all__ = ["Constitution", "Principle", "draw_principle", "load_constitution"]

_KEYS = ("id", "choose", "critique", "revise")
_TOP_KEYS = ("name", "compare_with", "principles")


@dataclass(frozen=True, slots=True, kw_only=True)
class Principle:
    """One principle, in the forms in which it is used; a form may be empty."""

    id: str
    choose: str = ""
    critique: str = ""
    revise: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Constitution:
    """Principles under one name."""

    name: str
    principles: tuple[Principle, ...]
    sha256: str
    """Hash of all principles."""
    compare_with: str = ""

    def having(self, *forms: str) -> tuple[Principle, ...]:
        """Return the principles that have all these forms (``choose``, ``critique``, ``revise``).

        Raises:
            TemplateError: none has.
        """
        found = tuple(
            principle
            for principle in self.principles
            if all(getattr(principle, form) for form in forms)
        )
        if not found:
            raise TemplateError(
                f"constitution {self.name!r} has no principle with {' and '.join(forms)}"
            )
        return found

    def describe(self) -> dict[str, Any]:
        """Return what a manifest records of it."""
        return {"name": self.name, "principles": len(self.principles), "sha256": self.sha256}


def load_constitution(name: str) -> Constitution:
    """Load a constitution by the name of a shipped one, or by the path of a TOML file.

    Raises:
        TemplateError: not found, or a field is unknown or missing; names the way out.
    """
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise TemplateError("no such constitution file", path=path)
    else:
        folder = prompts_folder() / "constitutions"
        path = folder / f"{name}.toml"
        if not path.is_file():
            known = sorted(file.stem for file in folder.glob("*.toml"))
            raise TemplateError(
                f"no constitution named {name!r}{nearest(name, known)} "
                f"(there are: {', '.join(known)}; or give the path of a .toml file)"
            )
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise TemplateError(f"not valid TOML: {error}", path=path) from error
    for key in table:
        if key not in _TOP_KEYS:
            raise TemplateError(f"unknown field {key!r}{nearest(key, _TOP_KEYS)}", path=path)
    entries = table.get("principles", [])
    if not isinstance(entries, list):
        raise TemplateError("'principles' must be tables: write [[principles]]", path=path)
    principles = tuple(_principle(entry, path) for entry in entries)
    if not principles:
        raise TemplateError("it has no [[principles]]", path=path)
    ids = [principle.id for principle in principles]
    if len(set(ids)) < len(ids):
        raise TemplateError("a principle id stands there twice", path=path)
    return Constitution(
        name=table.get("name", path.stem),
        principles=principles,
        compare_with=table.get("compare_with", ""),
        sha256=content_id(
            [[entry.id, entry.choose, entry.critique, entry.revise] for entry in principles],
            length=64,
        ),
    )


def _principle(entry: Any, path: Path) -> Principle:
    if not isinstance(entry, dict):
        raise TemplateError("'principles' must be tables: write [[principles]]", path=path)
    for key, value in entry.items():
        if key not in _KEYS:
            raise TemplateError(
                f"unknown field {key!r} of a principle{nearest(key, _KEYS)}", path=path
            )
        if not isinstance(value, str) or not value.strip():
            raise TemplateError(f"a principle's {key!r} is empty or no text", path=path)
    if "id" not in entry:
        raise TemplateError("a principle has no 'id'", path=path)
    if bool(entry.get("critique")) != bool(entry.get("revise")):
        raise TemplateError(
            f"principle {entry['id']!r}: 'critique' and 'revise' belong together", path=path
        )
    return Principle(**{key: value.strip() for key, value in entry.items()})


def draw_principle(principles: Sequence[Principle], seed: int, *parts: object) -> Principle:
    """Return the principle that ``seed`` and ``parts`` (ids of what it is for) draw, uniformly."""
    return principles[int(content_id("principle", seed, parts, length=12), 16) % len(principles)]
