"""What a line probably is, where it is not the row that was expected, and how it becomes one."""

from __future__ import annotations

import msgspec

from feedback.records import Candidates, Preference

__all__ = ["row_hint"]

# Expected row -> fields that tell another kind, a field of the expected row that it lacks, and what
# to do.
_OTHERS: dict[type, tuple[set[str], str, str]] = {
    Candidates: ({"prompt"}, "completions", "these are prompts: run rlaif sample first"),
    Preference: (
        {"chosen", "rejected"},
        "p_chosen",
        "rows made elsewhere come in by rlaif import --format trl",
    ),
}


def row_hint(line: bytes, expected: type) -> str:
    """Return ``"; ..."`` where a line is known to be something else, or ``""``."""
    fields, lacks, advice = _OTHERS.get(expected, (set(), "", ""))
    try:
        row = msgspec.json.decode(line)
    except msgspec.DecodeError:
        return ""
    known = fields and isinstance(row, dict) and fields <= row.keys() and lacks not in row
    return f"; {advice}" if known else ""
