"""The file that a benchmark leaves behind: what ran, on what, when, and what came out."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from feedback.installed import package_versions
from feedback.shards import write_json

__all__ = ["RESULTS", "cpu", "gpu", "write_result"]

RESULTS = Path(__file__).resolve().parent / "results"


def cpu() -> str:
    """Return what a benchmark without a GPU runs on."""
    return f"{os.cpu_count()} CPU cores ({platform.machine()})"


def gpu(count: int = 1) -> str:
    """Return what a benchmark on ``count`` GPUs runs on; a rehearsal without one says so."""
    import torch

    return f"{count} x {torch.cuda.get_device_name()}" if torch.cuda.is_available() else cpu()


def write_result(
    path: Path,
    bench: str,
    *,
    hardware: str,
    figures: Mapping[str, float],
    runs: Any,
    command: str = "",
    versions: Mapping[str, str] | None = None,
    **more: Any,
) -> None:
    """Write one result file, whole or not at all.

    Args:
        path: of the file.
        bench: name that README's table and later comparisons read.
        hardware: from ``cpu`` or ``gpu``, and what else matters.
        figures: flat, name to number.
        runs: the raw table.
        command: that makes the file again, where it is not the one being run.
        versions: of packages that ``package_versions`` does not find.
        more: further entries, such as the proof of equal work.
    """
    write_json(
        path,
        {
            "bench": bench,
            "command": command or shlex.join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "hardware": hardware,
            "versions": package_versions() | dict(versions or {}),
            **more,
            "figures": dict(figures),
            "runs": runs,
        },
    )
