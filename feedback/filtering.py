"""Row filters as expressions: ``p_chosen > 0.7 and source["judge"] != "small"``.

An expression sees a row's fields by name, and nothing else: it is evaluated by simpleeval, which
runs no code of the user's machine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from feedback.errors import RecipeError, nearest
from feedback.records import PromptText, prompt_messages

__all__ = ["row_filter"]


def _text(value: PromptText) -> str:
    """Return a prompt or completion as one string."""
    return "\n".join(turn["content"] for turn in prompt_messages(value))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "abs": abs,
    "len": len,
    "lower": str.lower,
    "max": max,
    "min": min,
    "text": _text,
}


def row_filter(expression: str, kind: type[Any]) -> Callable[[Any], bool]:
    """Return a test of rows of ``kind``; an empty expression lets every row pass.

    Raises:
        RecipeError: the expression does not parse, or names a field that such rows do not have.
    """
    if not expression.strip():
        return lambda row: True
    from simpleeval import EvalWithCompoundTypes, InvalidExpression

    known = [entry.name for entry in fields(kind)]
    evaluator = EvalWithCompoundTypes(functions=FUNCTIONS)
    try:
        parsed = evaluator.parse(expression)
    except (SyntaxError, InvalidExpression) as error:
        raise RecipeError(f"--where {expression!r} does not parse: {error}") from error

    def passes(row: Any) -> bool:
        evaluator.names = {name: getattr(row, name) for name in known}
        try:
            return bool(evaluator.eval(expression, previously_parsed=parsed))
        except (InvalidExpression, TypeError, KeyError, ValueError) as error:
            missing = str(getattr(error, "name", ""))
            hint = nearest(missing, known) if missing else ""
            raise RecipeError(
                f"--where {expression!r}: {error}{hint} (fields: {', '.join(known)}; functions: "
                f"{', '.join(FUNCTIONS)})"
            ) from error

    return passes
