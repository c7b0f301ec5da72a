"""What went wrong with a request, whether to try again, and when.

Waiting is full-jitter exponential backoff (a random time up to a doubling ceiling), never shorter
than what the server's ``Retry-After`` asks. No wall clock is read: an HTTP date is measured against
the reply's own ``Date`` header, so neither a wrong nor a jumping local clock changes a wait.
"""

from __future__ import annotations

import email.utils
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import tenacity

from feedback.records import Usage

__all__ = [
    "Attempted",
    "RequestFailed",
    "RetryBudget",
    "RetryPolicy",
    "failure_of_status",
    "retry_after_seconds",
]

Kind = Literal["throttled", "overloaded", "server", "network", "timeout", "invalid", "refused"]
_DECREASING: frozenset[Kind] = frozenset({"throttled", "overloaded", "timeout"})
_NO_USAGE = Usage()
Result = TypeVar("Result")


class RequestFailed(Exception):
    """One attempt failed. The text is already redacted.

    Args:
        message: what happened, for the verdict's ``error``.
        kind: ``refused`` is final; every other kind may succeed when tried again.
        status: HTTP status, where there was one.
        retry_after: seconds that the server asked to wait.
        fatal: the next call would fail in the same way (wrong key, unknown model, no credit).
        usage: tokens that were billed all the same: of a reply that arrived and cannot be used.
    """

    def __init__(
        self,
        message: str,
        *,
        kind: Kind,
        status: int | None = None,
        retry_after: float | None = None,
        fatal: bool = False,
        usage: Usage = _NO_USAGE,
    ):
        super().__init__(message)
        self.kind = kind
        self.status = status
        self.retry_after = retry_after
        self.fatal = fatal
        self.usage = usage
        self.attempts = 1
        self.unaffordable = False
        """Another attempt might exceed a spending limit."""

    @property
    def transient(self) -> bool:
        """Whether the same request may succeed later."""
        return self.kind != "refused" and not self.unaffordable

    @property
    def congestion(self) -> bool:
        """Whether fewer requests in flight would help."""
        return self.kind in _DECREASING


def failure_of_status(
    status: int, message: str, *, retry_after: float | None = None
) -> RequestFailed:
    """Return the failure that an HTTP error status means."""
    message = message.removeprefix(f"{status}: ")  # as some servers begin it
    text = f"HTTP {status}: {message}" if message else f"HTTP {status}"
    # A spent account answers 429 too, and no waiting helps.
    if status == 429 and "insufficient_quota" not in message:
        return RequestFailed(text, kind="throttled", status=status, retry_after=retry_after)
    if status in (503, 529):
        return RequestFailed(text, kind="overloaded", status=status, retry_after=retry_after)
    if status >= 500 or status in (408, 409, 425):
        return RequestFailed(text, kind="server", status=status, retry_after=retry_after)
    fatal = status in (401, 402, 403, 404, 429)
    return RequestFailed(text, kind="refused", status=status, fatal=fatal)


def retry_after_seconds(headers: Mapping[str, str]) -> float | None:
    """Return the wait that reply headers ask for, in seconds, or None.

    Reads ``retry-after-ms``, and ``Retry-After`` as seconds or as an HTTP date. Names are looked up
    in lower case.
    """
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name)
        if value is None:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            seconds = _until(value, headers.get("date"))
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None


def _until(date: str, now: str | None) -> float:
    """Seconds from the server's own ``now`` to ``date``; NaN where either cannot be read."""
    try:
        then = email.utils.parsedate_to_datetime(date)
        if now is None:
            return math.nan
        return (then - email.utils.parsedate_to_datetime(now)).total_seconds()
    except (ValueError, TypeError):
        return math.nan


class RetryBudget:
    """Keeps retries of a whole run in proportion to its successes.

    Every retry takes one from a reserve; every success puts a share of one back. When an endpoint
    is broken for good, calls then fail at their first error instead of multiplying its load.
    """

    def __init__(self, reserve: float, *, per_success: float = 0.5):
        self._most = self._left = reserve
        self._per_success = per_success

    def earn(self) -> None:
        """Note a success."""
        self._left = min(self._left + self._per_success, self._most)

    def spend(self) -> bool:
        """Take one retry; False when none is left."""
        if self._left < 1:
            return False
        self._left -= 1
        return True


class Attempted(NamedTuple, Generic[Result]):
    """A result and how many attempts it took."""

    result: Result
    attempts: int


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """When one call is tried again.

    A throttled call waits its turn and is not counted against ``retries``; ``total_s`` bounds it.
    """

    retries: int
    """Tries after the first."""
    total_s: float
    """Seconds since the first failure, waits included, after which a call counts as failed."""
    budget: RetryBudget
    first_wait_s: float = 0.5
    longest_wait_s: float = 60.0

    async def run_again(
        self, failure: RequestFailed, attempt: Callable[[], Awaitable[Result]]
    ) -> Attempted[Result]:
        """Repeat a failed attempt as the policy allows; return its result and number of attempts.

        The first attempt is made by the caller without this machinery, which costs more than a
        request that succeeds.

        Raises:
            RequestFailed: the last failure, with ``attempts`` set.
        """
        first: list[RequestFailed] = [failure]
        counted = 0

        async def next_attempt() -> Result:
            if first:
                raise first.pop()
            return await attempt()

        def give_up(state: tenacity.RetryCallState) -> bool:
            nonlocal counted
            problem = _failure(state)
            asked = problem.retry_after or 0.0
            if (state.seconds_since_start or 0.0) + asked > self.total_s:
                return True
            if problem.kind == "throttled":
                return False
            counted += 1
            return counted > self.retries or not self.budget.spend()

        jitter = tenacity.wait_random_exponential(
            multiplier=self.first_wait_s, max=self.longest_wait_s
        )

        def wait(state: tenacity.RetryCallState) -> float:
            asked = _failure(state).retry_after
            # Jitter on top of Retry-After, or all that were told the same second come back at once.
            return jitter(state) if asked is None else asked + min(jitter(state), 1.0)

        retrying = tenacity.AsyncRetrying(
            stop=give_up,
            wait=wait,
            retry=tenacity.retry_if_exception(
                lambda error: isinstance(error, RequestFailed) and error.transient
            ),
            reraise=True,
        )
        try:
            result: Result = await retrying(next_attempt)
        except RequestFailed as error:
            error.attempts = retrying.statistics["attempt_number"]
            raise
        return Attempted(result, retrying.statistics["attempt_number"])


def _failure(state: tenacity.RetryCallState) -> RequestFailed:
    assert state.outcome is not None
    error = state.outcome.exception()
    assert isinstance(error, RequestFailed)
    return error
