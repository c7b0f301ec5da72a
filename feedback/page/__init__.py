"""Pages: one self-contained HTML file each, that loads nothing from anywhere.

``components``, ``plots`` and ``browser`` make the blocks, ``shell`` puts them into a page; the
report of a run, the judge's report card, comparisons and A/B tests are built from those.
``rlaif page RUN`` writes the report of a whole run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["PageOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class PageOptions:
    """One HTML file that shows a whole run."""

    run: Path
    """Folder of the run: whatever stages it holds are shown."""
    out: Path | None = None
    """File to write; None: report.html in the run's folder."""
    examples: int = 3
    """Pairs to show in full."""
    browse_rows: int = 10_000
    """Most pairs in the browsable table."""


def run(options: PageOptions) -> None:
    """Write the page and say where it is."""
    from feedback.page.run_report import write_run_report

    path = write_run_report(
        options.run, out=options.out, examples=options.examples, browse_rows=options.browse_rows
    )
    import rich

    rich.print(f"report: {path}")
