"""The JSON schema that a structured reply must follow, from the template that asks for it.

The rationale comes first, so that a model writes its reasons before its verdict. What this
describes is read by ``parsing.parse_json``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from feedback.templates import Template

__all__ = ["reply_schema"]


def reply_schema(
    template: Template, *, shown: int = 2, criteria: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the schema of a reply about ``shown`` completions.

    Args:
        template: its labels are the only values allowed.
        shown: completions shown (listwise).
        criteria: names to score one by one (rating); none for one score.
    """
    if template.kind == "pairwise":
        return _object(verdict={"type": "string", "enum": list(template.choices)})
    if template.kind == "listwise":
        label = {"type": "string", "enum": list(template.labels[:shown])}
        return _object(ranking={"type": "array", "items": {"type": "array", "items": label}})
    point = _point(template)
    if not criteria:
        return _object(score=point)
    return _object(scores=_closed({name: point for name in criteria}))


def _point(template: Template) -> dict[str, Any]:
    if all(label.isdigit() for label in template.labels):
        return {"type": "integer", "enum": [int(label) for label in template.labels]}
    return {"type": "string", "enum": list(template.labels)}


def _object(**verdict: Any) -> dict[str, Any]:
    return _closed({"rationale": {"type": "string"}, **verdict})


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
