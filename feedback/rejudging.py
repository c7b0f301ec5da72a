"""What the report asks a judge again: scripted perturbations, and frozen probe sets.

Opens the engine once and puts every question through the same ``Judge`` that labelling uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from feedback.backends import Backend
from feedback.backends.opening import open_backend
from feedback.drift import drift_section, freeze, frozen_questions, read_frozen
from feedback.errors import InputError
from feedback.figures import CardSection
from feedback.intervals import Resampler
from feedback.judge import Asked, Judge, Question
from feedback.observations import Pairs
from feedback.probes import choose_pairs, chosen_probes, probe_section, questions
from feedback.progress import ProgressBar, say
from feedback.records import Verdict
from feedback.shards import MANIFEST, read_manifest
from feedback.templates import load_criteria, load_template

if TYPE_CHECKING:
    from feedback.report import ReportOptions
    from feedback.report_run import Evidence

__all__ = ["ask", "asked_sections"]


def ask(judge: Judge, backend: Backend, asked: Sequence[Question], *, title: str) -> list[Verdict]:
    """Ask questions and return their verdicts in the same order; a lost call is ``failed``."""
    calls: dict[str, tuple[int, Asked]] = {}
    for place, question in enumerate(asked):
        made = judge.ask(question, f"{place:06d}-{judge.verdict_id(question)}")
        calls[made.call.call_id] = (place, made)
    found: dict[int, Verdict] = {}
    with ProgressBar(title, len(calls)) as bar:
        for reply in backend.judge(made.call for _, made in calls.values()):
            place, made = calls[reply.call_id]
            found[place] = judge.read(made, reply)
            bar.advance()
    for place, made in calls.values():
        if place not in found:
            found[place] = judge.lost(made)
    return [found[place] for place in range(len(asked))]


def asked_sections(options: ReportOptions, evidence: Evidence) -> list[CardSection]:
    """Return the sections that ``--probe`` and ``--drift`` ask for; freeze if asked to.

    Raises:
        InputError: there are no texts to ask about, or no probe set.
        BackendError: the engine cannot judge.
    """
    pairs = evidence.arms[0]
    rubric = _rubric(options)
    if options.freeze is not None:
        _need_texts(pairs, options.verdicts)
        count = freeze(
            pairs,
            evidence.material,
            options.freeze,
            count=options.probe_pairs,
            rubric=rubric,
            seed=options.seed,
        )
        say(f"{options.freeze}: {count} questions frozen")
    if not (options.probe or options.drift):
        return []
    sections = []
    frozen = read_frozen(options.drift) if options.drift is not None else []
    if options.probe:
        _need_texts(pairs, options.verdicts)
    with _opened(options) as backend:
        judge = Judge(
            identity=backend.identity,
            template=load_template(options.template or pairs.arm.template),
            rubric=rubric,
            seed=options.seed,
        )
        if judge.reads_choices:
            backend.prepare(judge.template.choices)
        if options.probe:
            sections.append(_probe(options, evidence, judge, backend))
        if frozen:
            verdicts = ask(judge, backend, frozen_questions(frozen), title="frozen questions")
            sections.append(drift_section(frozen, verdicts))
    return sections


@contextlib.contextmanager
def _opened(options: ReportOptions) -> Iterator[Backend]:
    backend = open_backend(options.engine)
    try:
        yield backend
    finally:
        backend.close()


def _rubric(options: ReportOptions) -> str:
    """Return the criteria: named in the options, else those of the verdicts' manifest."""
    if options.rubric is not None:
        return load_criteria(options.rubric).text
    manifest = options.verdicts / MANIFEST
    if manifest.is_file():
        recorded = read_manifest(options.verdicts).get("rubric")
        if isinstance(recorded, str):
            return recorded
    template = load_template(options.template or "pairwise")
    return load_criteria(template.rubric).text


def _need_texts(pairs: Pairs, folder: Path) -> None:
    if not any(a is not None and b is not None for a, b in pairs.completions):
        raise InputError(
            "the completions' texts are needed to ask again: give --candidates", path=folder
        )


def _probe(
    options: ReportOptions, evidence: Evidence, judge: Judge, backend: Backend
) -> CardSection:
    pairs = evidence.arms[0]
    sample = choose_pairs(pairs, options.probe_pairs, seed=options.seed)
    if not sample:
        raise InputError("no decided pair to probe", path=options.verdicts)
    labels = judge.template.labels
    material = evidence.material
    base = ask(judge, backend, questions(sample, material, None, labels), title="as it is")
    again = ask(
        judge, backend, questions(sample, material, None, labels, repeat=1), title="once more"
    )
    probed = {
        probe.name: ask(
            judge, backend, questions(sample, material, probe, labels), title=probe.name
        )
        for probe in chosen_probes(options.probes)
    }
    resampler = Resampler(np.arange(len(pairs.prompt_ids)), seed=options.seed)
    return probe_section(sample, base, again, probed, resampler)
