"""What every peer's script shares: rows in, seconds, processor time and answered rows out."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["report", "rows"]


def rows() -> list[dict[str, str]]:
    """Return the pairs: ``prompt``, ``a``, ``b``."""
    return [json.loads(line) for line in Path(sys.argv[2]).read_text().splitlines()]


def report(judge: Callable[[list[dict[str, str]]], int]) -> None:
    """Run ``judge`` on all rows; write what it took. It returns how many rows got a verdict."""
    work = rows()
    before = _cpu_seconds()
    begun = time.perf_counter()
    problem = ""
    try:
        answered = judge(work)
    except Exception as error:  # what a peer raises is its result here
        answered, problem = 0, f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.perf_counter() - begun
    result: dict[str, Any] = {
        "rows": len(work),
        "answered": answered,
        "lost": len(work) - answered,
        "seconds": seconds,
        "pairs_per_s": len(work) / seconds,
        "cpu_ms_per_pair": 1e3 * (_cpu_seconds() - before) / len(work),
        "problem": problem,
    }
    Path(sys.argv[3]).write_text(json.dumps(result))


def _cpu_seconds() -> float:
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total
