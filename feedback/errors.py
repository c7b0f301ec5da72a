"""Every error that the toolkit raises on purpose, in one tree.

* RlaifError                   anything of ours
  + InputError                 wrong input; the message names file, line and fix (exit code 2)
    - RecipeError              a recipe or option is wrong
    - TemplateError            a judge template is wrong
    - ShardError               a shard folder is damaged, locked or of another kind
  + BackendError               an engine cannot do what was asked of it (exit code 2)
  + BudgetExceeded             a spending limit was reached; what is done is kept (exit code 3)
  + GateRefused                a shard failed its judge's report card (exit code 4)

A failed judge call is data, not an exception: it becomes a verdict with outcome ``failed``.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = [
    "BackendError",
    "BudgetExceeded",
    "GateRefused",
    "InputError",
    "RecipeError",
    "RlaifError",
    "ShardError",
    "TemplateError",
    "nearest",
]


class RlaifError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code = 1


class InputError(RlaifError):
    """The user's input is wrong. ``path`` and ``line`` (1-based) lead the message when given."""

    exit_code = 2

    def __init__(self, message: str, *, path: Path | str | None = None, line: int | None = None):
        where = "" if path is None else f"{path}:{line}: " if line is not None else f"{path}: "
        super().__init__(where + message)


class RecipeError(InputError):
    """A recipe or a command-line option is wrong."""


class TemplateError(InputError):
    """A judge template is wrong."""


class ShardError(InputError):
    """A shard folder is damaged, in use, or holds another kind of row."""


class BackendError(RlaifError):
    """An engine cannot do what was asked of it (no log-probabilities, labels of several tokens)."""

    exit_code = 2


class BudgetExceeded(RlaifError):
    """A limit on cost, calls or tokens was reached; everything finished so far is on disk."""

    exit_code = 3


class GateRefused(RlaifError):
    """The judge's report card fails a threshold, and nobody accepted that by name."""

    exit_code = 4


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word closest to ``word``, or ``""``."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
