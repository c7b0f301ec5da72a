"""Engines that run a judge or a policy, behind one protocol; one file per engine.

A backend takes an iterable of calls and yields replies as they finish, in any order; ``call_id``
ties them together. It never raises for one bad call: that call's reply carries ``error``.
Heavy packages (torch, vllm) load when a backend is opened, never when this package is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from feedback.records import JudgeIdentity, Message, Usage

__all__ = [
    "Backend",
    "Capabilities",
    "Charging",
    "JudgeCall",
    "JudgeReply",
    "SampleCall",
    "SampleReply",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeCall:
    """One question to a judge."""

    call_id: str
    messages: tuple[Message, ...]
    choices: tuple[str, ...] | None = None
    """Labels whose log-probabilities at the first generated position are wanted; None: text."""
    max_tokens: int = 1
    temperature: float = 0.0
    seed: int | None = None
    schema: dict[str, Any] | None = None
    """JSON schema that the reply must follow (structured output)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeReply:
    """What came back for one ``JudgeCall``."""

    call_id: str
    text: str = ""
    finish_reason: str | None = None
    choice_logprobs: dict[str, float] | None = None
    """Natural logarithm of each offered label's probability; a label that the engine did not report
    is absent. None when log-probabilities were not asked for or not returned."""
    usage: Usage = field(default_factory=Usage)
    """Of all attempts: a reply that arrived and could not be used was billed too."""
    latency_s: float = 0.0
    attempts: int = 1
    error: str | None = None
    """Why the call failed; the text holds no key, URL credentials or request headers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleCall:
    """One request for ``n`` completions of a prompt."""

    call_id: str
    messages: tuple[Message, ...]
    n: int = 1
    max_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReply:
    """The completions of one ``SampleCall``: parallel lists of length n, empty when it failed."""

    call_id: str
    texts: tuple[str, ...] = ()
    finish_reasons: tuple[str | None, ...] = ()
    logps: tuple[float | None, ...] = ()
    """Sum of the sampler's token log-probabilities (nats), where the engine reports it."""
    usage: Usage = field(default_factory=Usage)
    latency_s: float = 0.0
    attempts: int = 1
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Capabilities:
    """What an engine can do, found by asking it."""

    logprobs: bool
    max_logprobs: int | None = None
    """Most alternatives returned per position; None: any label's probability can be had."""
    structured_output: bool = False
    note: str = ""


class Backend(Protocol):
    """One engine with one model."""

    identity: JudgeIdentity

    def prepare(self, labels: tuple[str, ...]) -> Capabilities:
        """Check that the engine can give log-probabilities of ``labels``, and say what it can do.

        Raises:
            BackendError: no log-probabilities, or a label is not a single token in context.
        """
        ...

    def judge(self, calls: Iterable[JudgeCall]) -> Iterator[JudgeReply]:
        """Yield one reply per call, as they finish; ``calls`` is read lazily."""
        ...

    def sample(self, calls: Iterable[SampleCall]) -> Iterator[SampleReply]:
        """Yield one reply per call, as they finish; ``calls`` is read lazily."""
        ...

    def close(self) -> None:
        """Free the engine."""
        ...


@runtime_checkable
class Charging(Protocol):
    """An engine that asks again what it could not read, while both are billed."""

    on_waste: Callable[[str, Usage], bool]
    """Told, from any thread, of a call's attempt that was billed and could not be used; False: the
    call is not tried again, because of a spending limit."""
