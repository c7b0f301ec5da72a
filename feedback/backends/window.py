"""A sliding window of asynchronous requests behind an ordinary generator.

The event loop runs in a thread of its own, so that replies are read and timeouts stay honest while
the consumer writes rows. Calls are read lazily, and only in the consumer's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sys
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

__all__ = ["LoopThread", "stream"]

Call = TypeVar("Call")
Reply = TypeVar("Reply")
Result = TypeVar("Result")
_FEED = 32
"""Calls handed over at a time; one by one, waking the other thread would cost more than a send."""


class LoopThread:
    """An event loop in a daemon thread (uvloop where there is one)."""

    def __init__(self, name: str = "requests"):
        self.loop = _new_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.run_forever()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run a coroutine there and return its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def close(self) -> None:
        """Cancel what still runs there and end the thread."""
        if self.loop.is_closed():
            return
        self.run(_cancel_others())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def _new_loop() -> asyncio.AbstractEventLoop:
    if sys.platform != "win32":
        with contextlib.suppress(ImportError):
            import uvloop

            loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
            return loop
    return asyncio.new_event_loop()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def stream(
    thread: LoopThread,
    calls: Iterable[Call],
    handle: Callable[[Call], Coroutine[Any, Any, Reply]],
    *,
    most: int,
) -> Iterator[Reply]:
    """Yield ``handle(call)`` for every call, as they finish.

    Args:
        thread: where ``handle`` runs.
        calls: read as places become free. If reading raises, what was already begun is finished and
            yielded first, and then the error is raised.
        handle: must not raise for one bad call; what it raises ends the stream.
        most: calls begun and not yet yielded, at most.
    """
    window = _Window(thread.loop, handle)
    source = iter(calls)
    open_calls = 0
    more = True
    problem: BaseException | None = None
    try:
        while True:
            while more and open_calls < most:
                fresh: list[Call] = []
                try:
                    while len(fresh) < min(_FEED, most - open_calls):
                        fresh.append(next(source))
                except StopIteration:
                    more = False
                except Exception as error:
                    more, problem = False, error
                open_calls += len(fresh)
                window.begin(fresh)
                if not window.finished.empty():
                    break
            if open_calls == 0:
                if problem is not None:
                    raise problem
                return
            for reply in window.collect():
                open_calls -= 1
                yield reply
    finally:
        window.cancel()


class _Window:
    """Tasks of one stream, and the queue over which their replies cross threads."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, handle: Callable[[Any], Coroutine[Any, Any, Any]]
    ):
        self._loop = loop
        self._handle = handle
        self._tasks: set[asyncio.Task[Any]] = set()
        self.finished: queue.SimpleQueue[asyncio.Task[Any]] = queue.SimpleQueue()

    def begin(self, calls: list[Any]) -> None:
        """Start tasks for ``calls``, in order."""
        if calls:
            self._loop.call_soon_threadsafe(self._start, calls)

    def _start(self, calls: list[Any]) -> None:
        for call in calls:
            task = self._loop.create_task(self._handle(call))
            self._tasks.add(task)
            task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self.finished.put(task)

    def collect(self) -> Iterator[Any]:
        """Wait for one reply; yield it and all others that are there by then."""
        yield self.finished.get().result()
        for _ in range(self.finished.qsize()):
            yield self.finished.get().result()

    def cancel(self) -> None:
        """Abandon what has not finished."""
        if self._loop.is_closed():
            return
        done = threading.Event()

        def abandon() -> None:
            for task in self._tasks:
                task.cancel()
            done.set()

        self._loop.call_soon_threadsafe(abandon)
        done.wait()
