"""The report card of verdict shards: JSON for machines, a page for people, a table in the terminal.

``rlaif report runs/x/verdicts`` reads verdicts, the candidates they speak of and gold where there
is any, makes no call, and writes ``report.json`` and ``report.html``. With ``--probe`` a sample of
the pairs is judged again under scripted perturbations; with ``--drift`` a frozen probe set is.

The work is in ``report_run``, which takes a second to load; the options are here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from feedback.config import EngineOptions
from feedback.gate import GateThresholds

__all__ = ["ReportOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Verdicts -> the judge's report card, in numbers and as a page."""

    verdicts: Path
    """Verdict folder, or a JSONL file of verdicts."""
    also: tuple[Path, ...] = ()
    """More verdict folders on the same candidates: other judges, other templates."""
    candidates: Path | None = None
    """The candidates that were judged; None: the folder beside the verdicts, if there is one.
    Without texts, length, format and self-preference cannot be measured."""
    gold: Path | None = None
    """Gold pairs: a folder or JSONL file of rows prompt_id, a, b, label (a, b or tie), votes."""
    out: Path | None = None
    """Folder for report.json and report.html; None: report-card beside the verdicts."""
    slices: tuple[str, ...] | None = None
    """Fields of meta to slice by; None: every field with 2 to 20 values."""
    own_models: tuple[str, ...] = ()
    """Models whose answers count as the judge's own; empty: all of its family, by name."""
    baseline: str | None = None
    """Model that win rates are against; None: the commonest."""
    thresholds: GateThresholds = field(default_factory=GateThresholds)
    """What the gate demands; recorded in the card, and used by pair and publish."""
    accept_bias: tuple[str, ...] = ()
    """Failing figures that you accept by name."""
    browse_rows: int = 10_000
    """Most pairs in the page's table."""
    most_verdicts: int = 50_000
    """Verdicts to compute from, of prompts drawn by their ids, those with gold always among them;
    the rest is not held in memory. 0: all."""
    replicates: int = 2000
    """Bootstrap resamples."""
    seed: int = 0
    """Seed of the bootstrap and of the probes' sample."""
    probe: bool = False
    """Judge a sample again under scripted perturbations (asks the engine)."""
    probe_pairs: int = 50
    """Pairs in the probes' sample."""
    probes: tuple[str, ...] = ()
    """Perturbations to try; empty: all."""
    template: str | None = None
    """Template for probes and drift; None: the one the verdicts were made with."""
    rubric: str | None = None
    """Criteria for probes and drift; None: the verdicts' own."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """The judge that probes and drift ask."""
    freeze: Path | None = None
    """Write a frozen probe set (pairs and today's verdicts) to this file."""
    drift: Path | None = None
    """Frozen probe set to judge again and compare with."""


def run(options: ReportOptions) -> None:
    """Compute, write and print the card.

    Raises:
        InputError: something is missing or damaged.
        BackendError: ``--probe`` or ``--drift``, and the engine cannot judge.
    """
    from feedback.report_run import run_report

    run_report(options)
