"""The row types: what every shard holds, and the one place where their fields are named.

Both halves of the toolkit import this module, and nothing here knows about files, engines or
losses. A record becomes a JSON line by ``encode`` and comes back by ``decode``; unknown fields,
missing fields and wrong types are errors that name the field.
"""

from __future__ import annotations

import hashlib
import unicodedata
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, TypeVar

import msgspec

__all__ = [
    "ORDER_UNKNOWN",
    "OUTCOMES",
    "Candidates",
    "Comparison",
    "Completion",
    "GoldPair",
    "JudgeIdentity",
    "Message",
    "Outcome",
    "Preference",
    "Prompt",
    "PromptText",
    "Ranking",
    "Usage",
    "Verdict",
    "content_id",
    "decode",
    "encode",
    "normalise_text",
    "prompt_messages",
]

Outcome = Literal["decided", "tie", "unparsed", "refused", "truncated", "failed"]
OUTCOMES: tuple[Outcome, ...] = ("decided", "tie", "unparsed", "refused", "truncated", "failed")


class Message(TypedDict):
    """One chat message."""

    role: str
    content: str


PromptText = str | list[Message]
"""A prompt: plain text (one user turn), or chat messages."""


ORDER_UNKNOWN = "order_unknown"
"""Flag of an imported verdict whose file does not say which completion stood first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt of a prompt set."""

    prompt_id: str
    prompt: PromptText
    gold: str | None = None
    """Known-good answer, shown only to judges whose template asks for it."""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """One completion of a prompt, and how it was sampled."""

    completion_id: str
    completion: str
    model: str
    sampling: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    """``stop`` (ended by itself), ``length`` (cut off), or what the endpoint said."""
    logp: float | None = None
    """Sum of the sampler's log-probabilities of the completion's tokens, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidates:
    """The completions of one prompt that are to be judged together."""

    prompt_id: str
    prompt: PromptText
    completions: list[Completion]
    gold: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeIdentity:
    """Who judged. ``endpoint`` is a host name without user, password, query or key."""

    model: str
    revision: str | None = None
    endpoint: str | None = None
    setup: str | None = None
    """Fingerprint of what else shapes the replies: the server's port, request fields, an adapter,
    the engine and its number type (``run.json`` and the manifest spell it out)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one judge call, replies that could not be used included."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=self.cached_tokens + other.cached_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One judge call and what came of it."""

    verdict_id: str
    prompt_id: str
    kind: Literal["pairwise", "listwise", "rating"]
    shown: list[str]
    """Completion ids in the order shown to the judge."""
    outcome: Outcome
    judge: JudgeIdentity
    template: str
    template_sha256: str
    probs: list[float] | None = None
    """Probability of each offered choice (labels in the template's order, then the tie label if
    there is one), renormalised over them. For a rating: over the scale's points."""
    mass: float | None = None
    """Sum of the choices' probabilities before renormalising; low mass means that the judge wanted
    to say something else."""
    winner: str | None = None
    """Completion id of the preferred one (pairwise, outcome ``decided``)."""
    ranking: list[list[str]] | None = None
    """Tied groups of completion ids, best first (listwise)."""
    scores: list[float] | None = None
    """One score per shown completion (rating: expected value over the scale)."""
    rationale: str | None = None
    reply: str = ""
    """The judge's raw text."""
    sampling: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    repeat: int = 0
    """Which repetition of the same question this is (0 unless repeats were asked for)."""
    usage: Usage = field(default_factory=Usage)
    cost: float = 0.0
    """Price of the call in US dollars, by the price table; 0 for local engines and the cache."""
    latency_s: float = 0.0
    attempts: int = 1
    cached: bool = False
    """True when the reply came from the cache and no call was made."""
    flags: list[str] = field(default_factory=list)
    """What a reader must know: ``truncated_prompt``, ``truncated_completions``, ``neutralised``."""
    principle: str | None = None
    """Constitution principle drawn for this call, if any."""
    error: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Both orders of one pair, merged. ``p`` is P(a preferred); None when nothing was decided."""

    prompt_id: str
    a: str
    b: str
    p: float | None
    p_orders: list[float | None]
    """P(a preferred) in each order asked, in the order (a first, b first); None where undecided."""
    consistent: bool | None
    """Same winner in both orders; None when one order is missing or undecided."""
    outcome: Outcome
    votes: list[str]
    """Verdict ids behind this comparison."""
    mass: float | None = None
    """Smallest verdict mass among the orders."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preference:
    """A training pair; loads in TRL unchanged, with the judge's probability beside it."""

    prompt: PromptText
    chosen: PromptText
    rejected: PromptText
    margin: float
    """Strength of the preference, >= 0: ``2 * p_chosen - 1``, or a gap of scores, if any."""
    p_chosen: float
    """P(chosen preferred) in [0.5, 1]; with ``tie`` true the judge called it a tie."""
    prompt_id: str
    tie: bool = False
    weight: float = 1.0
    p_raw: float | None = None
    """``p_chosen`` as the judge gave it, where calibration or a correction changed it."""
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """A ranked group of completions of one prompt."""

    prompt: PromptText
    completions: list[str]
    scores: list[float | None]
    """Higher is better: Bradley-Terry strengths (log-odds) or rubric scores; null if unrated."""
    ranking: list[list[int]]
    """Tied groups of indices into ``completions``, best first."""
    prompt_id: str
    comparisons: list[tuple[int, int, float]] = field(default_factory=list)
    """(i, j, p): P(completion i preferred to completion j)."""
    source: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class GoldPair:
    """Which of two completions people (or a construction) say is better; judges are held to it."""

    prompt_id: str
    a: str
    b: str
    """Completion ids."""
    label: Literal["a", "b", "tie"]
    votes: list[Literal["a", "b", "tie"]] = field(default_factory=list)
    """One label per person, where several were asked."""
    annotators: list[str] = field(default_factory=list)
    """Who gave each vote; empty: unknown."""
    gap: float | None = None
    """How far apart the two are, >= 0, where a scale exists (scores, votes)."""
    meta: dict[str, Any] = field(default_factory=dict)


Record = TypeVar("Record")
_encoder = msgspec.json.Encoder()
_decoders: dict[type, msgspec.json.Decoder[Any]] = {
    kind: msgspec.json.Decoder(kind)
    for kind in (Prompt, Candidates, Verdict, Comparison, Preference, Ranking, GoldPair)
}


def encode(record: object) -> bytes:
    """Return the record as one line of JSON (UTF-8, no newline)."""
    return _encoder.encode(record)


def decode(line: bytes | str, kind: type[Record]) -> Record:
    """Read one JSON line as a record of ``kind``.

    Raises:
        ValueError: the line is not JSON, or a field is missing or has the wrong type.
    """
    try:
        record: Record = _decoders[kind].decode(line)
    except msgspec.DecodeError as error:
        raise ValueError(str(error)) from error
    return record


def content_id(*parts: object, length: int = 24) -> str:
    """Return a stable id for ``parts``: the head of the sha256 of their canonical JSON."""
    text = msgspec.json.encode(parts, order="deterministic")
    return hashlib.sha256(text).hexdigest()[:length]


def normalise_text(text: str) -> str:
    """Return ``text`` as equality sees it: NFKC, case-folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_messages(prompt: PromptText) -> list[Message]:
    """Return a prompt as chat messages; a plain string is one user turn."""
    return [Message(role="user", content=prompt)] if isinstance(prompt, str) else list(prompt)
