"""Chat turns for models and endpoints that know no system role."""

from __future__ import annotations

from collections.abc import Iterable

from feedback.records import Message

__all__ = ["merge_system"]


def merge_system(turns: Iterable[Message]) -> list[Message]:
    """Return the turns with system text put at the head of the first user turn."""
    rest = list(turns)
    system = [turn["content"] for turn in rest if turn["role"] == "system"]
    rest = [turn for turn in rest if turn["role"] != "system"]
    if not system:
        return rest
    if rest and rest[0]["role"] == "user":
        system.append(rest[0]["content"])
        rest = rest[1:]
    return [Message(role="user", content="\n\n".join(system)), *rest]
