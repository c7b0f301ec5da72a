"""What must not leave: keys, personal data, local paths and credentials inside texts.

Each detector finds spans of one kind; a report counts them and keeps a few examples by row id, with
the found text masked, so that the report itself leaks nothing. ``redact`` replaces spans by their
kind. Secrets are found by detect-secrets, phone numbers by phonenumbers, IBANs and card numbers by
python-stdnum's check digits: a number that merely looks like one does not count.

This module knows nothing of shards or hubs; it takes texts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, NamedTuple

from feedback.errors import InputError

__all__ = ["KINDS", "Example", "ScanReport", "Span", "find", "redact", "scan"]

Kind = Literal["secret", "email", "phone", "iban", "card", "path", "endpoint"]
KINDS: tuple[Kind, ...] = ("secret", "email", "phone", "iban", "card", "path", "endpoint")

_EMAIL = re.compile(r"[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[^\W\d_]{2,24}\b")
_DIGITS = re.compile(r"\d(?:[ \t().\-]{0,2}\d){6,}")
_CARD = re.compile(r"(?<![\d.])\d(?:[ -]?\d){12,18}(?![\d.])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_PATH = re.compile(
    r"(?<![\w/.:])(?:/(?:home|Users|root|mnt|scratch|data|workspace)/[\w.\-]+(?:/[\w.\-]+)*"
    r"|[A-Za-z]:\\(?:Users|Documents and Settings)\\[^\s\"<>|]+)"
)
_ENDPOINT = re.compile(
    r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>]{1,128}:[^\s/@\"'<>]{1,256}@[^\s\"'<>]+"
)
# Tokens that detect-secrets 1.5 does not know.
_MORE_SECRETS = (
    r"\bhf_[A-Za-z0-9]{30,}\b",
    r"\bsk-(?:ant|proj|or|svcacct)-[A-Za-z0-9_\-]{20,}",
    r"\bsk-[A-Za-z0-9]{32,}\b",
    r"\bAIza[0-9A-Za-z_\-]{35}\b",
    r"\bgithub_pat_[A-Za-z0-9_]{40,}\b",
    r"\bgsk_[A-Za-z0-9]{40,}\b",
)
_PLUGINS = (
    "aws:AWSKeyDetector",
    "azure_storage_key:AzureStorageKeyDetector",
    "discord:DiscordBotTokenDetector",
    "github_token:GitHubTokenDetector",
    "gitlab_token:GitLabTokenDetector",
    "jwt:JwtTokenDetector",
    "mailchimp:MailchimpDetector",
    "npm:NpmDetector",
    "openai:OpenAIDetector",
    "private_key:PrivateKeyDetector",
    "pypi_token:PypiTokenDetector",
    "sendgrid:SendGridDetector",
    "slack:SlackDetector",
    "square_oauth:SquareOAuthDetector",
    "stripe:StripeDetector",
    "telegram_token:TelegramBotTokenDetector",
    "twilio:TwilioKeyDetector",
)

# What every one of the patterns above needs: a long run of token characters, or one of these words.
_LONG_RUN = re.compile(r"[\w\-/+=]{20}")
_SECRET_WORDS = ("xox", "eyj", "private key", "_authtoken", "hooks.slack")


class Span(NamedTuple):
    """Something found: its kind and its place in the text."""

    kind: Kind
    start: int
    end: int


class Example(NamedTuple):
    """Where something was found; ``excerpt`` shows no more than its first characters."""

    row_id: str
    field: str
    excerpt: str


@dataclass(slots=True)
class ScanReport:
    """Counts of findings by kind, with a few examples each."""

    rows: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    rows_with: Counter[str] = field(default_factory=Counter)
    """Rows with at least one finding, by kind."""
    examples: dict[str, list[Example]] = field(default_factory=dict)

    def blocking(self, allowed: Iterable[str] = ()) -> list[str]:
        """Return the kinds found that nobody allowed.

        Raises:
            InputError: an allowed kind does not exist.
        """
        from feedback.errors import nearest

        for kind in allowed:
            if kind not in (*KINDS, "evaluation"):
                known = (*KINDS, "evaluation")
                raise InputError(
                    f"--allow {kind!r} is none of {', '.join(known)}{nearest(kind, known)}"
                )
        return [kind for kind in self.counts if kind not in set(allowed)]


@cache
def _secret_patterns() -> tuple[re.Pattern[str], ...]:
    """Return the patterns of detect-secrets' token detectors, and ours; loaded on first use."""
    import importlib

    patterns = [re.compile(pattern) for pattern in _MORE_SECRETS]
    for target in _PLUGINS:
        module, _, name = target.partition(":")
        detector = getattr(importlib.import_module(f"detect_secrets.plugins.{module}"), name)
        patterns += list(detector.denylist)
    return tuple(patterns)


def _may_hold_secret(text: str) -> bool:
    """Return False where no token pattern can match: most texts, in a tenth of the time."""
    if _LONG_RUN.search(text):
        return True
    lower = text.lower()
    return any(word in lower for word in _SECRET_WORDS)


def find(text: str, region: str = "US") -> list[Span]:
    """Return what must not leave, in order of place; spans do not overlap.

    Args:
        text: any text.
        region: country whose phone numbers may be written without a country code.
    """
    spans = list(_find_all(text, region))
    spans.sort(key=lambda span: (span.start, -span.end))
    kept: list[Span] = []
    for span in spans:
        if not kept or span.start >= kept[-1].end:
            kept.append(span)
    return kept


def _find_all(text: str, region: str) -> Iterator[Span]:
    if _may_hold_secret(text):
        for pattern in _secret_patterns():
            for found in pattern.finditer(text):
                yield Span("secret", found.start(), found.end())
    if "://" in text:
        for found in _ENDPOINT.finditer(text):
            yield Span("endpoint", found.start(), found.end())
    if "@" in text:
        for found in _EMAIL.finditer(text):
            yield Span("email", found.start(), found.end())
    if "/" in text or "\\" in text:
        for found in _PATH.finditer(text):
            yield Span("path", found.start(), found.end())
    if _DIGITS.search(text):
        yield from _find_numbers(text, region)


def _find_numbers(text: str, region: str) -> Iterator[Span]:
    import phonenumbers
    from stdnum import iban, luhn

    taken: list[tuple[int, int]] = []
    for found in _IBAN.finditer(text):
        if iban.is_valid(found[0]):
            taken.append(found.span())
            yield Span("iban", *found.span())
    for found in _CARD.finditer(text):
        digits = re.sub(r"\D", "", found[0])
        if luhn.is_valid(digits) and len(set(digits)) > 1 and digits[0] in "23456":
            taken.append(found.span())
            yield Span("card", *found.span())
    for match in phonenumbers.PhoneNumberMatcher(text, region):
        if not any(start < match.end and match.start < end for start, end in taken):
            yield Span("phone", match.start, match.end)


def redact(text: str, spans: Iterable[Span]) -> str:
    """Return ``text`` with each span replaced by its kind in brackets, such as ``[EMAIL]``."""
    parts, place = [], 0
    for span in spans:
        parts += [text[place : span.start], f"[{span.kind.upper()}]"]
        place = span.end
    return "".join([*parts, text[place:]])


def scan(
    rows: Iterable[tuple[str, Mapping[str, str]]], *, examples: int = 5, region: str = "US"
) -> ScanReport:
    """Scan rows, each an id and its texts by field name; reads lazily and keeps only counts."""
    report = ScanReport()
    for row_id, texts in rows:
        report.rows += 1
        kinds: set[str] = set()
        for name, text in texts.items():
            for span in find(text, region):
                kinds.add(span.kind)
                report.counts[span.kind] += 1
                shown = report.examples.setdefault(span.kind, [])
                if len(shown) < examples:
                    shown.append(Example(row_id, name, _masked(text[span.start : span.end])))
        report.rows_with.update(kinds)
    return report


def _masked(found: str) -> str:
    """Return the first three characters and the length: enough to find it, too little to use it."""
    return f"{found[:3]}... ({len(found)} characters)"
