"""The gate in front of an endpoint, and the retry policy, on a clock that the test owns."""

from __future__ import annotations

import asyncio
import math
import random
import selectors
from collections.abc import Iterator
from typing import Any

import pytest

from feedback.backends.limits import Gate
from feedback.backends.retrying import (
    RequestFailed,
    RetryBudget,
    RetryPolicy,
    failure_of_status,
    retry_after_seconds,
)


class _JumpingSelector(selectors.SelectSelector):
    """Instead of waiting, moves the clock."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only while everybody waits."""

    def __init__(self) -> None:
        self.jumping = _JumpingSelector()
        super().__init__(self.jumping)

    def time(self) -> float:
        return self.jumping.now


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


async def serve(gate: Gate, calls: int, latency: Any) -> list[float]:
    """Push calls through the gate as fast as it lets them; return when each was admitted."""
    admitted = []

    async def one() -> None:
        entered = await gate.enter()
        admitted.append(entered)
        await asyncio.sleep(latency() if callable(latency) else latency)
        gate.leave(entered, good=True)

    await asyncio.gather(*(one() for _ in range(calls)))
    return admitted


def test_concurrency_doubles_until_the_limit(loop: VirtualLoop) -> None:
    """From 4 at a time to 64, in four round trips."""

    async def main() -> tuple[Gate, list[float]]:
        gate = Gate(64, start=4)
        return gate, await serve(gate, 4 + 8 + 16 + 32 + 64, 1.0)

    gate, admitted = loop.run_until_complete(main())
    assert gate.state.most_in_flight == 64
    assert gate.state.decreases == 0
    assert max(admitted) <= 5.0


def test_concurrency_never_exceeds_the_limit(loop: VirtualLoop) -> None:
    """Random latencies, thousands of calls: the gate never lets more in than it says."""
    draw = random.Random(0)

    async def main() -> Gate:
        gate = Gate(17, start=17)
        await serve(gate, 3000, lambda: draw.expovariate(1.0))
        return gate

    assert loop.run_until_complete(main()).state.most_in_flight == 17


def test_one_wave_of_refusals_halves_once(loop: VirtualLoop) -> None:
    """32 requests sent together and all refused say one thing, not 32."""

    async def main() -> Gate:
        gate = Gate(64, start=32)
        entered = [await gate.enter() for _ in range(32)]
        await asyncio.sleep(1.0)
        for moment in entered:
            gate.congested(moment)
            gate.leave(moment, good=False)
        return gate

    gate = loop.run_until_complete(main())
    assert gate.state.limit == 16
    assert gate.state.decreases == 1


def test_after_a_cut_concurrency_grows_by_one_a_round_trip(loop: VirtualLoop) -> None:
    async def main() -> tuple[int, int]:
        gate = Gate(64, start=32)
        gate.congested(await gate.enter())
        gate.leave(0.0, good=False)
        before = gate.state.limit
        await asyncio.sleep(0.1)
        await serve(gate, 16 * 10, 1.0)
        return before, gate.state.limit

    before, after = loop.run_until_complete(main())
    assert before == 16
    assert before + 7 <= after <= before + 10


def test_slow_answers_cut_concurrency(loop: VirtualLoop) -> None:
    """A server whose latency grows with its queue is held near the latency that was asked for."""

    async def main() -> Gate:
        gate = Gate(256, start=8, slow_s=2.0)
        in_flight = 0

        async def one() -> None:
            nonlocal in_flight
            entered = await gate.enter()
            in_flight += 1
            await asyncio.sleep(0.05 * in_flight)  # 2 s at 40 in flight
            in_flight -= 1
            gate.leave(entered, good=True)

        await asyncio.gather(*(one() for _ in range(4000)))
        return gate

    gate = loop.run_until_complete(main())
    assert gate.state.decreases > 0
    assert 20 <= gate.state.limit <= 60


def test_retry_after_holds_everybody_back(loop: VirtualLoop) -> None:
    async def main() -> float:
        gate = Gate(8, start=8)
        entered = await gate.enter()
        await asyncio.sleep(1.0)
        gate.congested(entered, retry_after=30.0)
        gate.leave(entered, good=False)
        return await gate.enter()

    assert loop.run_until_complete(main()) == pytest.approx(31.0)


def test_requests_per_minute_hold_in_every_minute(loop: VirtualLoop) -> None:
    """Not only in the average: in each window of 60 s, wherever it begins."""

    async def main() -> list[float]:
        gate = Gate(50, start=50, requests_per_minute=120.0)
        return await serve(gate, 400, 0.3)

    admitted = sorted(loop.run_until_complete(main()))
    assert admitted[-1] == pytest.approx(400 / 2.0, rel=0.02)
    for start in admitted:
        # The first second's worth may come at once.
        assert sum(start <= moment < start + 60.0 for moment in admitted) <= 120 + 3


def test_tokens_per_minute_are_corrected_by_what_was_used(loop: VirtualLoop) -> None:
    """Estimates of 100 tokens that turn out to be 400 slow the run down to the true rate."""

    async def main() -> float:
        gate = Gate(4, start=4, tokens_per_minute=24_000.0)

        async def one() -> None:
            entered = await gate.enter(100.0)
            await asyncio.sleep(0.01)
            gate.leave(entered, good=True)
            gate.charge(300.0)

        await asyncio.gather(*(one() for _ in range(200)))
        return asyncio.get_running_loop().time()

    assert loop.run_until_complete(main()) == pytest.approx(200 * 400 / 400.0, rel=0.05)


def test_a_cancelled_waiter_gives_nothing_away(loop: VirtualLoop) -> None:
    async def main() -> int:
        gate = Gate(1, start=1)
        entered = await gate.enter()
        waiting = [asyncio.ensure_future(gate.enter()) for _ in range(3)]
        await asyncio.sleep(0.1)
        waiting[0].cancel()
        gate.leave(entered, good=True)
        waiting[1].cancel()  # admitted in the same turn, and cancelled before it could run
        await asyncio.sleep(0.1)
        assert waiting[2].done()
        gate.leave(waiting[2].result(), good=True)
        await gate.enter()
        return gate.state.most_in_flight

    assert loop.run_until_complete(main()) == 1


def test_retries_go_before_new_requests(loop: VirtualLoop) -> None:
    async def main() -> list[str]:
        gate = Gate(1, start=1)
        order = []

        async def one(name: str, again: bool) -> None:
            entered = await gate.enter(again=again)
            order.append(name)
            gate.leave(entered, good=True)

        held = await gate.enter()
        tasks = [asyncio.ensure_future(one(f"new {place}", False)) for place in range(2)]
        await asyncio.sleep(0.1)
        tasks.append(asyncio.ensure_future(one("retry", True)))
        await asyncio.sleep(0.1)
        gate.leave(held, good=True)
        await asyncio.gather(*tasks)
        return order

    assert loop.run_until_complete(main()) == ["retry", "new 0", "new 1"]


# --- retrying ------------------------------------------------------------------------------------


def run_policy(
    policy: RetryPolicy, failures: list[RequestFailed], loop: VirtualLoop
) -> tuple[Any, list[float]]:
    """Let attempts fail one by one, then succeed; return the result and when each was made."""
    moments = []
    rest = list(failures[1:])

    async def attempt() -> str:
        moments.append(loop.time())
        if rest:
            raise rest.pop(0)
        return "done"

    async def main() -> Any:
        try:
            return await policy.run_again(failures[0], attempt)
        except RequestFailed as error:
            return error

    return loop.run_until_complete(main()), moments


def policy(**settings: Any) -> RetryPolicy:
    return RetryPolicy(**{"retries": 4, "total_s": 1000.0, "budget": RetryBudget(100), **settings})


def failure(kind: Any = "server", **settings: Any) -> RequestFailed:
    return RequestFailed(f"a {kind} failure", kind=kind, **settings)


def test_backoff_is_full_jitter(loop: VirtualLoop) -> None:
    """The n-th wait is uniform on [0, 0.5 * 2^n): its mean over many runs is half the ceiling."""
    waits: list[list[float]] = []
    for _ in range(400):
        start = loop.time()
        _, moments = run_policy(policy(), [failure()] * 4, loop)
        waits.append([b - a for a, b in zip([start, *moments], moments, strict=False)])
    for place, ceiling in enumerate((0.5, 1.0, 2.0, 4.0)):
        column = [row[place] for row in waits]
        assert max(column) <= ceiling
        # Standard error of the mean of 400 uniforms: ceiling / sqrt(12 * 400).
        assert abs(sum(column) / 400 - ceiling / 2) < 5 * ceiling / math.sqrt(12 * 400)


def test_retry_after_is_a_lower_bound(loop: VirtualLoop) -> None:
    start = loop.time()
    result, moments = run_policy(policy(), [failure("throttled", retry_after=7.0)], loop)
    assert result == ("done", 2)
    assert 7.0 <= moments[0] - start <= 8.0


def test_final_failures_and_exhausted_retries_are_raised(loop: VirtualLoop) -> None:
    error, moments = run_policy(policy(retries=4), [failure()] * 9, loop)
    assert isinstance(error, RequestFailed)
    assert error.attempts == 5
    assert len(moments) == 4
    error, moments = run_policy(policy(), [failure(), failure("refused"), failure()], loop)
    assert isinstance(error, RequestFailed)
    assert (error.kind, error.attempts) == ("refused", 2)


def test_throttling_does_not_use_up_retries(loop: VirtualLoop) -> None:
    """30 answers of 429 in a row are patience, not failure, within the total time."""
    result, _ = run_policy(policy(retries=2), [failure("throttled")] * 30, loop)
    assert result == ("done", 31)
    error, moments = run_policy(policy(), [failure("throttled", retry_after=2000.0)], loop)
    assert isinstance(error, RequestFailed)
    assert moments == []


def test_the_retry_budget_is_shared_and_earned_back(loop: VirtualLoop) -> None:
    budget = RetryBudget(3, per_success=0.5)
    error, moments = run_policy(policy(retries=9, budget=budget), [failure()] * 9, loop)
    assert isinstance(error, RequestFailed)
    assert len(moments) == 3
    error, moments = run_policy(policy(retries=9, budget=budget), [failure()] * 9, loop)
    assert moments == []
    for _ in range(4):
        budget.earn()
    _, moments = run_policy(policy(retries=9, budget=budget), [failure()] * 9, loop)
    assert len(moments) == 2


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        (
            {
                "retry-after": "Fri, 31 Dec 1999 23:59:59 GMT",
                "date": "Fri, 31 Dec 1999 23:59:49 GMT",
            },
            10.0,
        ),
        (
            {
                "retry-after": "Fri, 31 Dec 1999 23:59:49 GMT",
                "date": "Fri, 31 Dec 1999 23:59:59 GMT",
            },
            0.0,
        ),
        ({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "-5"}, 0.0),
        ({}, None),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_seconds(headers) == seconds


def test_what_statuses_mean() -> None:
    assert failure_of_status(429, "slow down").kind == "throttled"
    assert str(failure_of_status(404, "404: Not Found")) == "HTTP 404: Not Found"
    assert failure_of_status(429, "You exceeded your quota insufficient_quota").fatal
    assert failure_of_status(503, "").congestion
    assert failure_of_status(529, "").congestion
    assert failure_of_status(500, "").transient
    assert not failure_of_status(500, "").congestion
    assert failure_of_status(408, "").transient
    for status in (400, 413, 422):
        assert not failure_of_status(status, "").transient
        assert not failure_of_status(status, "").fatal
    for status in (401, 403, 404):
        assert failure_of_status(status, "").fatal
