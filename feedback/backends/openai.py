"""Any OpenAI-compatible chat endpoint as a judge or a policy.

Hosted APIs go through the ``openai`` package, servers of one's own through a lean HTTP path
(``extra.transport`` decides otherwise). A sliding window of requests adapts to what the endpoint
bears; what fails for a reason that may pass is tried again within limits, and what fails for good
is a reply with ``error``. A ``BackendError`` ends the stream only when nothing gets through any
more, so that a dead endpoint does not turn a million calls into a million failures.

Keys come from the environment alone and appear in no message.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar
from urllib.parse import SplitResult

from feedback.backends import Capabilities, JudgeCall, JudgeReply, SampleCall, SampleReply
from feedback.backends.chat_bodies import Bodies, Dialect
from feedback.backends.chat_replies import SampleReading, read_judge, read_sample
from feedback.backends.extras import HostedExtra, extra_of, load_tokenizer
from feedback.backends.http import OPENAI_URL, HttpTransport, Transport, needs_proxy, split_url
from feedback.backends.identity import identity_of
from feedback.backends.limits import Gate, GateState
from feedback.backends.probing import probe, served_length
from feedback.backends.redacting import Redactor, secrets_of
from feedback.backends.retrying import RequestFailed, RetryBudget, RetryPolicy
from feedback.backends.window import LoopThread, stream
from feedback.config import EngineOptions, above, at_least
from feedback.errors import BackendError
from feedback.records import Usage

__all__ = ["EndpointExtra", "OpenAIBackend", "open_engine"]

Reading = TypeVar("Reading")
_NO_USAGE = Usage()
_HOSTED = (
    "openai.com",
    "azure.com",
    "anthropic.com",
    "googleapis.com",
    "openrouter.ai",
    "together.xyz",
    "together.ai",
    "fireworks.ai",
    "mistral.ai",
    "deepseek.com",
    "groq.com",
    "x.ai",
    "deepinfra.com",
)


@dataclass(frozen=True, kw_only=True)
class EndpointExtra(HostedExtra):
    """Keys of ``extra`` that endpoints understand, besides those that the Batch API does too."""

    transport: Literal["auto", "sdk", "http"] = "auto"
    """The openai package or the lean path; auto: the package for known hosted APIs and where the
    environment names a proxy."""
    total_s: float = 900.0
    """Seconds after its first failure at which a call is given up, waits included."""
    first_wait_s: float = 0.5
    """Ceiling of the first random wait before a retry; doubles each time."""
    start_concurrency: int = 32
    """Requests in flight at the beginning; doubles every round trip while all goes well."""
    slow_s: float | None = None
    """Smoothed latency at which fewer requests are kept in flight; None: half of timeout_s."""
    split_n: bool = False
    """Ask for n completions in n requests, for servers that ignore ``n``."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least(self, 1, "start_concurrency")
        at_least(self, 0, "first_wait_s", "total_s")
        above(self, 0, "slow_s")


class Exchange(NamedTuple, Generic[Reading]):
    """A reading and what it took."""

    reading: Reading
    attempts: int
    latency_s: float
    usage: Usage
    """Of all attempts."""


class OpenAIBackend:
    """One model behind one OpenAI-compatible endpoint.

    Args:
        options: ``model``, ``base_url``, ``api_key_env``, the limits, and ``extra`` as in
            ``EndpointExtra``.

    Raises:
        BackendError: the key that a hosted API needs is not in the environment, or ``base_url`` is
            no http(s) URL.
        RecipeError: ``extra`` holds an unknown key, or one that does nothing.
    """

    def __init__(self, options: EngineOptions):
        self.options = options
        self.extra, url, self._key, hosted = settings_of(options)
        self.redact = Redactor(secrets_of(url, self._key, self.extra.headers))
        host = url.hostname or ""
        self._endpoint = host if url.port is None else f"{host}:{url.port}"
        proxied = options.base_url is not None and needs_proxy(options.base_url)
        self.uses_sdk = self.extra.transport == "sdk" or (
            self.extra.transport == "auto" and (hosted or proxied)
        )
        self.identity = identity_of(options)
        self.bodies = Bodies(options.model, dialect=Dialect(), extra=self.extra.body)
        # Room for every open call to be retried once over; a long outage exceeds it.
        self._budget = RetryBudget(max(1000.0, 8.0 * options.concurrency))
        self._policy = RetryPolicy(
            retries=options.max_retries,
            total_s=self.extra.total_s,
            budget=self._budget,
            first_wait_s=self.extra.first_wait_s,
        )
        self.chat = load_tokenizer(self.extra)
        self.max_length = self.extra.max_length
        self.on_waste: Callable[[str, Usage], bool] = lambda call_id, usage: True
        self._failures_in_a_row = 0
        self._thread: LoopThread | None = None
        self._transport: Transport | None = None
        self._gate: Gate | None = None

    # --- opening and closing -------------------------------------------------------------------

    def open(self) -> LoopThread:
        """Start the event loop and the connection pool, unless they run already."""
        if self._thread is None:
            self._thread = LoopThread()
            self._thread.run(self._connect())
        return self._thread

    async def _connect(self) -> None:
        options, extra = self.options, self.extra
        headers = extra.headers
        if self.uses_sdk:
            # A second of imports that servers of one's own do not need.
            from feedback.backends.sdk import SdkTransport

            self._transport = SdkTransport(
                options.base_url,
                key=self._key or "none",
                timeout_s=options.timeout_s,
                headers=headers,
                redact=self.redact,
            )
        else:
            self._transport = HttpTransport(
                options.base_url or OPENAI_URL,
                key=self._key,
                timeout_s=options.timeout_s,
                headers=headers,
                redact=self.redact,
            )
        self._gate = Gate(
            options.concurrency,
            start=extra.start_concurrency,
            slow_s=options.timeout_s / 2 if extra.slow_s is None else extra.slow_s,
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
        )

    def close(self) -> None:
        """Close the connections and end the event loop."""
        if self._thread is not None:
            assert self._transport is not None
            self._thread.run(self._transport.close())
            self._thread.close()
            self._thread = None

    @property
    def gate_state(self) -> GateState | None:
        """Concurrency reached so far; None before the first request."""
        return None if self._gate is None else self._gate.state

    # --- the protocol --------------------------------------------------------------------------

    def prepare(self, labels: tuple[str, ...]) -> Capabilities:
        """Ask the endpoint what it can do, with a handful of one-token requests.

        Raises:
            BackendError: it cannot be reached, does not know the model, gives no log-probabilities,
                or a label is not a single token there.
        """
        thread = self.open()
        assert self._transport is not None
        path = split_url(self.options.base_url or OPENAI_URL).path
        found = thread.run(
            probe(self._transport, self.bodies, labels, endpoint=self._endpoint, path=path)
        )
        self.bodies.dialect = found.dialect
        if self.chat is not None and self.max_length is None:
            self.max_length = thread.run(served_length(self._transport, self.options.model))
        return found.capabilities

    def judge(self, calls: Iterable[JudgeCall]) -> Iterator[JudgeReply]:
        """Yield one reply per call, as they finish.

        Raises:
            BackendError: nothing gets through any more.
        """
        return stream(self.open(), calls, self._judge, most=self._open_calls())

    def sample(self, calls: Iterable[SampleCall]) -> Iterator[SampleReply]:
        """Yield one reply per call, as they finish.

        Raises:
            BackendError: nothing gets through any more.
        """
        return stream(self.open(), calls, self._sample, most=self._open_calls())

    def _open_calls(self) -> int:
        """Calls taken ahead: enough that a place never stays free while the consumer writes."""
        return self.options.concurrency + min(self.options.concurrency, 128)

    # --- one call ------------------------------------------------------------------------------

    async def _judge(self, call: JudgeCall) -> JudgeReply:
        ids = self.bodies.token_ids(call.choices)
        try:
            body = self.bodies.judge(call)
            reading, attempts, latency, usage = await self._exchange(
                call, body, lambda raw: read_judge(raw, call, ids), allowance=call.max_tokens
            )
        except ValueError as error:
            return JudgeReply(call_id=call.call_id, error=str(error), attempts=0)
        except RequestFailed as failure:
            self._note_failure(failure)
            return JudgeReply(
                call_id=call.call_id,
                error=str(failure),
                attempts=failure.attempts,
                usage=failure.usage,
            )
        return JudgeReply(
            call_id=call.call_id,
            text=reading.text,
            finish_reason=reading.finish_reason,
            choice_logprobs=reading.choice_logprobs,
            usage=usage,
            latency_s=latency,
            attempts=attempts,
        )

    async def _sample(self, call: SampleCall) -> SampleReply:
        try:
            parts = await self._sample_parts(call)
        except ValueError as error:
            return SampleReply(call_id=call.call_id, error=str(error), attempts=0)
        except RequestFailed as failure:
            self._note_failure(failure)
            return SampleReply(
                call_id=call.call_id,
                error=str(failure),
                attempts=failure.attempts,
                usage=failure.usage,
            )
        readings = [part.reading for part in parts]
        return SampleReply(
            call_id=call.call_id,
            texts=tuple(text for reading in readings for text in reading.texts),
            finish_reasons=tuple(item for reading in readings for item in reading.finish_reasons),
            logps=tuple(logp for reading in readings for logp in reading.logps),
            usage=sum((part.usage for part in parts), Usage()),
            latency_s=max(part.latency_s for part in parts),
            attempts=max(part.attempts for part in parts),
        )

    async def _sample_parts(self, call: SampleCall) -> list[Exchange[SampleReading]]:
        if not self.extra.split_n or call.n == 1:
            return [
                await self._exchange(
                    call,
                    self.bodies.sample(call),
                    lambda raw: read_sample(raw, call),
                    allowance=call.n * call.max_tokens,
                )
            ]
        bodies = [
            # Equal seeds would give n equal completions.
            self.bodies.sample(call, n=1, seed=None if call.seed is None else call.seed + index)
            for index in range(call.n)
        ]
        return await asyncio.gather(
            *(
                self._exchange(
                    call, body, lambda raw: read_sample(raw, call, n=1), allowance=call.max_tokens
                )
                for body in bodies
            )
        )

    async def _exchange(
        self,
        call: JudgeCall | SampleCall,
        body: bytes,
        read: Callable[[bytes], Any],
        *,
        allowance: int,
    ) -> Exchange[Any]:
        # Four bytes a token, the usual rule of thumb; corrected by what the reply reports.
        tokens = len(body) / 4.0 + allowance if self.options.tokens_per_minute else 0.0
        wasted = Usage()

        async def attempt(*, again: bool) -> Exchange[Any]:
            nonlocal wasted
            try:
                return await self._attempt(body, read, tokens, again=again)
            except RequestFailed as failure:
                if failure.usage != _NO_USAGE:
                    wasted += failure.usage
                    failure.unaffordable = not self.on_waste(call.call_id, failure.usage)
                failure.usage = wasted
                raise

        try:
            exchange = await attempt(again=False)
        except RequestFailed as failure:
            if not failure.transient:
                raise
            exchange, attempts = await self._policy.run_again(failure, lambda: attempt(again=True))
            exchange = exchange._replace(attempts=attempts, usage=exchange.usage + wasted)
        self._budget.earn()
        self._failures_in_a_row = 0
        return exchange

    async def _attempt(
        self, body: bytes, read: Callable[[bytes], Any], tokens: float, *, again: bool = False
    ) -> Exchange[Any]:
        gate, transport = self._gate, self._transport
        assert gate is not None and transport is not None
        entered = await gate.enter(tokens, again=again)
        good = False
        try:
            reading = read(await transport.send(body))
            good = True
        except RequestFailed as failure:
            if failure.congestion:
                gate.congested(entered, failure.retry_after)
            raise
        finally:
            latency = gate.leave(entered, good=good)
        if tokens:
            used = reading.usage.prompt_tokens + reading.usage.completion_tokens
            if used:
                gate.charge(used - tokens)
        return Exchange(reading, 1, latency, reading.usage)

    def _note_failure(self, failure: RequestFailed) -> None:
        """Count a call that failed for good; raise when nothing gets through any more."""
        if not (failure.transient or failure.fatal):
            return  # this call's own fault
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= max(32, self.options.concurrency // 4):
            raise BackendError(
                f"{self._endpoint} failed {self._failures_in_a_row} calls in a row, the "
                f"last with: {failure}. What is finished is kept; run the command again to go on"
            )


class EndpointSettings(NamedTuple):
    """What the options say of an endpoint."""

    extra: EndpointExtra
    url: SplitResult
    key: str | None
    hosted: bool
    """A known hosted API."""


def settings_of(options: EngineOptions) -> EndpointSettings:
    """Read and check the options; nothing is loaded or sent.

    Raises:
        BackendError: the key that a hosted API needs is not in the environment, or ``base_url`` is
            no http(s) URL.
        RecipeError: ``extra`` holds an unknown key, or one that does nothing.
    """
    extra = extra_of(EndpointExtra, options)
    url = split_url(options.base_url or OPENAI_URL)
    key = os.environ.get(options.api_key_env) or None
    host = url.hostname or ""
    hosted = any(host == name or host.endswith(f".{name}") for name in _HOSTED)
    if hosted and key is None:
        raise BackendError(
            f"{host} needs a key: set the environment variable {options.api_key_env} "
            "(or name another one with api_key_env)"
        )
    return EndpointSettings(extra, url, key, hosted)


def check_options(options: EngineOptions) -> None:
    """Raise what opening would raise, without opening; see ``settings_of``."""
    settings_of(options)


def open_engine(options: EngineOptions, path: str) -> OpenAIBackend:
    """Return the backend; ``path`` is not used, since the endpoint holds the model."""
    return OpenAIBackend(options)
