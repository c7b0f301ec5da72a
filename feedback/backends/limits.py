"""How many requests may be in flight, and how many a minute.

One ``Gate`` per endpoint. The number in flight grows while replies come back well (doubling at
first, then by one a round trip) and shrinks by a factor when the server throttles, times out or
answers too slowly. A ``Retry-After`` holds everybody back. Limits per minute are paced evenly, so
that no minute of the provider's, wherever it begins, sees more than its share.

Lives in one event loop; its clock is the loop's, which is monotonic.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import NamedTuple

__all__ = ["Gate", "GateState"]


class GateState(NamedTuple):
    """What a gate did so far."""

    limit: int
    most_in_flight: int
    decreases: int
    paused_s: float


class _Pace:
    """Evenly spaced allowance: ``per_minute`` units, at most ``burst_s`` seconds' worth at once."""

    def __init__(self, per_minute: float, *, burst_s: float = 1.0):
        self._per_second = per_minute / 60.0
        self._burst_s = burst_s
        self._next = -math.inf

    def delay(self, now: float) -> float:
        """Seconds until the next unit may be taken."""
        return max(self._next - self._burst_s - now, 0.0)

    def take(self, now: float, amount: float) -> None:
        self._next = max(self._next, now) + amount / self._per_second


class Gate:
    """Admits requests to an endpoint.

    Args:
        most: requests in flight at most.
        start: requests in flight at the beginning.
        slow_s: smoothed latency above which the number in flight is cut.
        requests_per_minute: None for no limit.
        tokens_per_minute: None for no limit; counts what ``enter`` and ``charge`` were told.
    """

    def __init__(
        self,
        most: int,
        *,
        start: int = 32,
        slow_s: float = math.inf,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
    ):
        self._loop = asyncio.get_running_loop()
        self._most = max(most, 1)
        self._limit = float(min(start, self._most))
        self._slow_s = slow_s
        self._requests = None if requests_per_minute is None else _Pace(requests_per_minute)
        self._tokens = None if tokens_per_minute is None else _Pace(tokens_per_minute)
        self._in_flight = 0
        self._waiting: deque[tuple[asyncio.Future[None], float]] = deque()
        self._doubling = True
        self._latency = 0.0
        self._cut_at = -math.inf
        self._paused_until = -math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._most_in_flight = 0
        self._decreases = 0
        self._paused_s = 0.0

    @property
    def state(self) -> GateState:
        """A snapshot for the run's last line."""
        return GateState(int(self._limit), self._most_in_flight, self._decreases, self._paused_s)

    async def enter(self, tokens: float = 0.0, *, again: bool = False) -> float:
        """Wait for a place; return the time at which it was given.

        Args:
            tokens: estimate of what the request takes from ``tokens_per_minute``.
            again: a retry; goes before those that have not been sent yet.
        """
        now = self._loop.time()
        if not self._waiting and self._closed_for(now) == 0.0:
            self._admit(now, tokens)
            return now
        place = self._loop.create_future()
        if again:
            self._waiting.appendleft((place, tokens))
        else:
            self._waiting.append((place, tokens))
        self._wake()
        try:
            await place
        except asyncio.CancelledError:
            if place.done() and not place.cancelled():
                self._in_flight -= 1
                self._wake()
            raise
        return self._loop.time()

    def leave(self, entered: float, *, good: bool) -> float:
        """Give the place back; return the latency in seconds. ``good``: a full reply came."""
        now = self._loop.time()
        latency = now - entered
        self._in_flight -= 1
        if good:
            self._latency += 0.1 * (latency - self._latency)
            if self._latency > self._slow_s and entered > self._cut_at:
                self._cut(0.8)
            elif self._limit < self._most and 2 * self._in_flight >= self._limit - 2:
                self._limit = min(
                    self._limit + (1.0 if self._doubling else 1.0 / self._limit), self._most
                )
        if self._waiting:
            self._wake()
        return latency

    def congested(self, entered: float, retry_after: float | None = None) -> None:
        """The server said no to a request that entered at ``entered``, or never answered it.

        One cut per wave: requests sent before the last cut say nothing about the new number.
        """
        if entered > self._cut_at:
            self._cut(0.5)
        if retry_after:
            until = self._loop.time() + retry_after
            if until > self._paused_until:
                self._paused_s += until - max(self._paused_until, self._loop.time())
                self._paused_until = until

    def charge(self, tokens: float) -> None:
        """Correct the estimate given to ``enter`` by ``tokens`` (may be negative)."""
        if self._tokens is not None:
            self._tokens.take(self._loop.time(), tokens)

    def _cut(self, factor: float) -> None:
        self._limit = max(self._limit * factor, 1.0)
        self._cut_at = self._loop.time()
        self._latency *= factor
        self._doubling = False
        self._decreases += 1

    def _closed_for(self, now: float) -> float:
        """Seconds until the next request may enter; infinite while all places are taken."""
        if self._in_flight >= int(self._limit):
            return math.inf
        delay = max(self._paused_until - now, 0.0)
        if self._requests is not None:
            delay = max(delay, self._requests.delay(now))
        if self._tokens is not None:
            delay = max(delay, self._tokens.delay(now))
        return delay

    def _admit(self, now: float, tokens: float) -> None:
        self._in_flight += 1
        self._most_in_flight = max(self._most_in_flight, self._in_flight)
        if self._requests is not None:
            self._requests.take(now, 1.0)
        if self._tokens is not None:
            self._tokens.take(now, tokens)

    def _wake(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting:
            place, tokens = self._waiting[0]
            if place.done():  # cancelled while waiting
                self._waiting.popleft()
                continue
            now = self._loop.time()
            delay = self._closed_for(now)
            if delay == math.inf:
                return
            if delay > 0.0:
                self._timer = self._loop.call_later(delay, self._wake)
                return
            self._waiting.popleft()
            self._admit(now, tokens)
            place.set_result(None)
