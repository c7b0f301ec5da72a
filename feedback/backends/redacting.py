"""Keeps keys, credentials and headers out of every message that leaves a backend.

Endpoints and proxies echo what they were sent, and client libraries print request headers in their
exceptions. Error text of a backend therefore passes through a ``Redactor``, which knows the secrets
of its run and the usual shapes of everybody else's.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator
from urllib.parse import SplitResult, quote

__all__ = ["Redactor", "secrets_of"]

_SHAPES = (
    # user:password@ in any URL
    (re.compile(r"(?<=://)[^/\s@'\"]+@"), ""),
    # query parameters that carry keys
    (
        re.compile(r"(?i)\b(api[-_]?key|key|token|access_token|sig|signature)=[^&\s'\"]+"),
        r"\1=[removed]",
    ),
    (re.compile(r"(?i)\b(bearer|basic)\s+[\w.~+/=-]{6,}"), r"\1 [removed]"),
    (
        re.compile(
            r"(?i)([\"']?(?:authorization|x-api-key|api-key|cookie)[\"']?\s*[:=]\s*)[^,}\n]+"
        ),
        r"\1[removed]",
    ),
    (re.compile(r"\b(?:sk|pk|rk|gsk|hf|xai)[-_][\w*.-]{6,}"), "[removed]"),
)


class Redactor:
    """Callable that removes known secrets, and what looks like one, from a text.

    Args:
        secrets: exact strings that must never appear; empty ones are ignored.
        longest: texts are cut to this many characters; an error page is not a message.
    """

    def __init__(self, secrets: Iterable[str | None] = (), *, longest: int = 400):
        forms: set[str] = set()
        for secret in secrets:
            if secret:
                encoded = base64.b64encode(secret.encode()).decode()
                forms |= {secret, quote(secret, safe=""), encoded, encoded.rstrip("=")}
        # Longest first, so that no form survives as the rest of a shorter one.
        self._forms = sorted(forms, key=len, reverse=True)
        self._longest = longest

    def __call__(self, text: str) -> str:
        """Return ``text`` on one line, shortened, without secrets."""
        for form in self._forms:
            text = text.replace(form, "[removed]")
        for shape, replacement in _SHAPES:
            text = shape.sub(replacement, text)
        text = " ".join(text.split())
        return text if len(text) <= self._longest else text[: self._longest - 3] + "..."


def secrets_of(
    url: SplitResult, key: str | None, headers: dict[str, str] | None
) -> Iterator[str | None]:
    """Yield everything about an endpoint that no message may show."""
    yield key
    yield from (headers or {}).values()
    if url.password:
        yield url.password
        yield f"{url.username}:{url.password}"
