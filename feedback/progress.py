"""What a run shows while it works: a bar on the terminal, a line now and then anywhere else."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["ProgressBar", "say"]

_SECONDS_BETWEEN_LINES = 20.0


class ProgressBar:
    """Progress on stderr.

    Args:
        title: what is being done.
        total: steps in all; None: unknown.
    """

    def __init__(self, title: str, total: int | None):
        self.title = title
        self.total = total
        self.done = 0
        self._console = Console(stderr=True)
        self._bar: Progress | None = None
        self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self._console,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.title, total=self.total, note="")
        return self

    def advance(self, steps: int = 1, note: str = "") -> None:
        """Count steps; ``note`` stands behind the bar."""
        self.done += steps
        if self._bar is not None:
            self._bar.update(self._task, advance=steps, note=note)
        elif time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            total = "" if self.total is None else f" of {self.total}"
            sys.stderr.write(f"{self.title}: {self.done}{total} {note}".rstrip() + "\n")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def say(text: str) -> None:
    """Print one line of result on stdout."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
