"""How a vLLM engine in this process fails: what its errors mean, and one that never comes."""

from __future__ import annotations

import contextlib
import multiprocessing.connection
import threading
from typing import Any, NamedTuple

__all__ = ["EngineErrors", "engine_errors", "wake_if_killed"]


class EngineErrors(NamedTuple):
    """vLLM's exceptions by what they mean."""

    refused: tuple[type[Exception], ...]
    """This call is wrong; others may be right."""
    died: tuple[type[Exception], ...]
    """The engine is gone, with all calls that it holds."""


def engine_errors() -> EngineErrors:
    """Return the exceptions of the installed version."""
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        from vllm.exceptions import VLLMClientError, VLLMError
    except ImportError:  # earlier versions: refusals are ValueErrors, and there is no common base
        return EngineErrors((ValueError,), (EngineDeadError, RuntimeError))
    # RuntimeError: out of memory or a failed kernel, where the engine is in this very process.
    return EngineErrors((ValueError, VLLMClientError), (VLLMError, RuntimeError))


def wake_if_killed(core: Any) -> None:
    """Let a step end that waits for an engine process which was killed (out of memory, say).

    vLLM's monitor notes the death without waking the queue that ``step`` waits at, for ever
    (``SyncMPClient`` of 0.32; its asynchronous client wakes its own).
    """
    from vllm.v1.engine.exceptions import EngineDeadError

    # An engine in this process has none of these; another version may name them otherwise, and
    # runs as well without.
    with contextlib.suppress(AttributeError):
        queue = core.outputs_queue
        ends = [process.sentinel for process in core.resources.engine_manager.processes]

        def wait() -> None:
            multiprocessing.connection.wait(ends)
            queue.put_nowait(EngineDeadError())

        threading.Thread(target=wait, name="engine-end", daemon=True).start()
