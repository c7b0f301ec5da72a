"""The work behind ``rlaif report``: read what there is, compute the card, write and print it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feedback.card import ReportCard, make_card
from feedback.figures import CardSection
from feedback.gate import GateResult, judge_card
from feedback.intervals import Estimate
from feedback.observations import Material, Pairs, collect, load_gold, load_material
from feedback.progress import say
from feedback.prompt_sample import PromptSample
from feedback.records import GoldPair, Verdict
from feedback.shards import (
    MANIFEST,
    manifest_sha256,
    read_manifest,
    read_rows,
    write_json,
    write_text,
)

if TYPE_CHECKING:
    from feedback.report import ReportOptions

__all__ = [
    "MOST_VERDICTS",
    "Evidence",
    "card_of_folder",
    "print_card",
    "read_evidence",
    "run_report",
    "sample_words",
    "write_report",
]

MOST_VERDICTS = 50_000
"""Verdicts that a card holds in memory (about 4 KiB each) when nobody says otherwise."""
MOST_GOLD_PROMPTS = 5000
"""More gold than this needs no favour in a sample."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a card is computed from."""

    arms: list[Pairs]
    material: Material
    source: dict[str, Any]


def read_evidence(
    verdicts: Sequence[Path],
    *,
    candidates: Path | str | None = None,
    gold: Path | str | None = None,
    most: int | None = MOST_VERDICTS,
) -> Evidence:
    """Read verdict folders with their texts and gold.

    Memory is bounded by ``most``, however many verdicts there are.

    Args:
        verdicts: folders or JSONL files.
        candidates: folder or file; None: what was judged, ``revised`` or ``candidates`` beside the
            first verdict folder, if there.
        gold: folder or file of gold pairs; None: ``gold`` beside the first folder, if there.
        most: about so many verdicts are used, of prompts drawn by their ids; those with gold are
            all in (while there are fewer than ``MOST_GOLD_PROMPTS``). None: all verdicts.

    Raises:
        InputError: something is missing or damaged.
    """
    texts = _beside(verdicts[0], candidates, _judged_folder(verdicts[0]))
    labels = _beside(verdicts[0], gold, "gold")
    known = load_gold(labels) if labels is not None else {}
    sample = PromptSample(sys.maxsize if most is None else most, always=_gold_prompts(known))
    sample.read(_stream(verdicts))
    material = load_material([texts], keep=sample.holds) if texts is not None else Material()
    arms = collect(sample.verdicts(), material=material, gold=known)
    hashes = [manifest_sha256(path) for path in verdicts if (path / MANIFEST).is_file()]
    source = {
        "verdicts": [str(path) for path in verdicts],
        "manifest_sha256": hashes,
        "candidates": None if texts is None else str(texts),
        "gold": None if labels is None else str(labels),
        "sampled": sample.record(),
    }
    return Evidence(arms, material, source)


def _gold_prompts(gold: Mapping[tuple[str, str, str], GoldPair]) -> frozenset[str]:
    """Return the prompts that a sample keeps whatever its size."""
    prompts = frozenset(prompt_id for prompt_id, _, _ in gold)
    return prompts if len(prompts) <= MOST_GOLD_PROMPTS else frozenset()


def _beside(verdicts: Path, given: Path | str | None, name: str) -> Path | None:
    if given is not None:
        return Path(given)
    guess = verdicts.parent / name
    return guess if verdicts.is_dir() and guess.is_dir() else None


def _judged_folder(verdicts: Path) -> str:
    """Return which folder beside a verdict folder was judged: the revised candidates, or all."""
    if (verdicts / MANIFEST).is_file() and (verdicts.parent / "revised" / MANIFEST).is_file():
        judged = read_manifest(verdicts).get("candidates_sha256")
        if judged == manifest_sha256(verdicts.parent / "revised"):
            return "revised"
    return "candidates"


def _stream(folders: Iterable[Path]) -> Iterable[Verdict]:
    for folder in folders:
        yield from read_rows(folder, Verdict)


def card_of_folder(
    verdicts: Path | str, *, candidates: Path | str | None = None, gold: Path | str | None = None
) -> ReportCard:
    """Compute the card of one verdict folder without writing it.

    Raises:
        InputError: something is missing or damaged.
    """
    evidence = read_evidence([Path(verdicts)], candidates=candidates, gold=gold)
    return make_card(evidence.arms, source=evidence.source)


def run_report(options: ReportOptions) -> None:
    """Compute, write and print the card.

    Raises:
        InputError: something is missing or damaged.
        BackendError: ``--probe`` or ``--drift``, and the engine cannot judge.
    """
    folders = [options.verdicts, *options.also]
    evidence = read_evidence(
        folders,
        candidates=options.candidates,
        gold=options.gold,
        most=options.most_verdicts or None,
    )
    card = make_card(
        evidence.arms,
        source=evidence.source,
        slices=options.slices,
        own_models=options.own_models,
        baseline=options.baseline,
        replicates=options.replicates,
        seed=options.seed,
        extra=_asked(options, evidence),
    )
    gate = judge_card(card, options.thresholds, accept=options.accept_bias)
    out = options.out or options.verdicts.parent / "report-card"
    write_report(card, gate, evidence, out, browse_rows=options.browse_rows)
    print_card(card, gate)
    if (sampled := evidence.source["sampled"]) is not None:
        say(sample_words(sampled))
    print_paths(out)


def sample_words(sampled: Mapping[str, Any]) -> str:
    """Return in words which part of the verdicts a card is of."""
    return (
        f"computed from {sampled['verdicts']:,} of {sampled['of_verdicts']:,} verdicts: "
        f"all those of {sampled['prompts']:,} prompts drawn by their ids (--most-verdicts)"
    )


def _asked(options: ReportOptions, evidence: Evidence) -> list[CardSection]:
    """Return the sections that need an engine, and freeze a probe set if asked to."""
    if not (options.probe or options.drift or options.freeze):
        return []
    from feedback.rejudging import asked_sections

    return asked_sections(options, evidence)


def write_report(
    card: ReportCard, gate: GateResult, evidence: Evidence, out: Path, *, browse_rows: int = 10_000
) -> None:
    """Write report.json, report.html and llm-comparator.json into ``out``."""
    from feedback.page.card_page import card_page
    from feedback.page.comparator import comparator_json

    write_json(out / "report.json", {**card.to_dict(), "gate": gate.manifest()})
    write_text(
        out / "report.html",
        card_page(card, gate, evidence.arms, evidence.material, browse_rows=browse_rows),
    )
    compared = comparator_json(evidence.arms, evidence.material, limit=browse_rows)
    if compared is not None:
        write_text(out / "llm-comparator.json", json.dumps(compared, ensure_ascii=False) + "\n")


def print_card(card: ReportCard, gate: GateResult) -> None:
    """Print one table: each arm's figures with interval, n and the gate's view."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    states = {(row.arm, row.name): row.state for row in gate.rows}
    words = {"fail": "[red]fails[/red]", "unclear": "unclear", "ok": "passes"}
    for arm in [*card.arms, None]:
        name = "" if arm is None else arm.name
        sections = card.across if arm is None else arm.sections
        if not any(section.figures for section in sections):
            continue
        table = Table(box=None, pad_edge=False, title_justify="left")
        table.title = f"[bold]{escape(name or 'Further measurements')}[/bold]"
        for column in ("", "value", "95% interval", "n"):
            table.add_column(column, justify="right" if column else "left", no_wrap=bool(column))
        table.add_column("gate", no_wrap=True)
        for section in sections:
            figures = [figure for figure in section.figures if figure.estimate.value is not None]
            if figures:
                table.add_row(f"[bold]{escape(section.title)}[/bold]")
            for figure in figures:
                state = states.get((name, figure.name), "")
                table.add_row(
                    f"  {escape(figure.label)}", *_cells(figure.estimate), words.get(state, "")
                )
        console.print(table)
        console.print()
    for row in gate.rows:
        if row.state == "fail":
            console.print(f"[red]fails[/red]  {escape(str(row))}", highlight=False)
    console.print(f"gate: {gate.status}", highlight=False)


def _cells(estimate: Estimate) -> tuple[str, str, str]:
    known = estimate.low is not None and estimate.high is not None
    span = f"{estimate.low:.3f} to {estimate.high:.3f}" if known else ""
    return f"{estimate.value:.3f}", span, f"{estimate.n:,}"


def print_paths(out: Path) -> None:
    """Print where the card was written."""
    from feedback.progress import say

    say(f"report card: {out / 'report.html'}")
