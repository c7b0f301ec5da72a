"""What makes two rows the same: their content, whatever ids, labels or sources they carry."""

from __future__ import annotations

from typing import Any

from feedback.records import (
    Candidates,
    Comparison,
    GoldPair,
    Preference,
    Prompt,
    PromptText,
    Ranking,
    content_id,
    normalise_text,
    prompt_messages,
)

__all__ = ["content_key", "pair_sides", "prompt_key"]


def _normal(text: PromptText) -> list[tuple[str, str]]:
    return [(turn["role"], normalise_text(turn["content"])) for turn in prompt_messages(text)]


def _completion(text: PromptText) -> str:
    return normalise_text("\n".join(turn["content"] for turn in prompt_messages(text)))


def pair_sides(row: Preference) -> tuple[str, str]:
    """Return (chosen, rejected) as equality sees them."""
    return _completion(row.chosen), _completion(row.rejected)


def prompt_key(prompt: PromptText) -> str:
    """Return what names a prompt's content."""
    return content_id("prompt", _normal(prompt))


def content_key(row: Any) -> str:
    """Return what names a row's content: for a preference, the prompt and its two completions.

    Which of the two was chosen is a label, not content, so that rows that contradict each other
    have the same key. A verdict's key is its id.
    """
    if isinstance(row, Preference):
        return content_id("preference", _normal(row.prompt), sorted(pair_sides(row)))
    if isinstance(row, Ranking):
        texts = sorted(normalise_text(text) for text in row.completions)
        return content_id("ranking", _normal(row.prompt), texts)
    if isinstance(row, Candidates | Prompt):
        return prompt_key(row.prompt)
    if isinstance(row, GoldPair | Comparison):
        return content_id("pair", row.prompt_id, sorted((row.a, row.b)))
    return str(row.verdict_id)
