"""Text of unknown origin, made safe to look at and safe to embed.

Escaping of markup is jinja's work (autoescape) and the browser's (``textContent``). What is left
is text that is harmless as markup but lies to the eye: terminal escapes, direction overrides,
invisible tag characters that hide instructions. Those become visible names.
"""

from __future__ import annotations

import json
import re
from typing import Any

from markupsafe import Markup

from feedback.records import PromptText, prompt_messages

__all__ = ["conversation", "cut", "embed_json", "visible"]

# C0 and C1 controls but tab and line feed; direction marks, embeddings, overrides and isolates;
# invisible operators and the byte-order mark; lone surrogates; the tag characters, in which a whole
# sentence can be hidden. Zero-width joiners stay: Persian and emoji need them.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028\u2029\u202a-\u202e"
    "\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff\U000e0000-\U000e007f]"
)


def _name(found: re.Match[str]) -> str:
    return f"\u2039U+{ord(found[0]):04X}\u203a"


def visible(text: object) -> str:
    """Return ``text`` with every character that hides or reorders other text spelled out."""
    return _HIDDEN.sub(_name, str(text).replace("\r\n", "\n"))


def cut(text: str, limit: int) -> str:
    """Return ``text``, or its first ``limit`` characters and a note of how many are missing."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]} \u2026 [{len(text) - limit:,} more characters]"


def embed_json(value: Any) -> Markup:
    """Return ``value`` as JSON that is safe inside a ``<script type="application/json">`` block."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def conversation(prompt: PromptText) -> str:
    """Return messages as a reader sees them; plain text and a single turn without a role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt_messages(prompt))
