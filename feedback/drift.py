"""Judge drift: a frozen set of questions with yesterday's answers, asked again today.

A frozen probe set is a JSONL file that holds everything needed to ask again: prompts, both texts in
the order shown, the template's hash, and what the judge said then. A model behind an endpoint can
change under the same name; this is how one finds out before a shard is labelled by two judges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from feedback.errors import InputError
from feedback.figures import CardSection, Figure
from feedback.intervals import Resampler, mean, nothing, proportion
from feedback.judge import Question
from feedback.observations import Material, Pairs
from feedback.ordering import first_probability
from feedback.probes import choose_pairs
from feedback.records import JudgeIdentity, PromptText, Verdict
from feedback.shards import write_text

__all__ = ["FrozenQuestion", "drift_section", "freeze", "frozen_questions", "read_frozen"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenQuestion:
    """One question and what the judge said when it was frozen."""

    prompt_id: str
    prompt: PromptText
    shown: list[str]
    """Completion ids."""
    completions: list[str]
    """Their texts, in the order shown."""
    outcome: str
    winner: str | None
    p_first: float | None
    judge: JudgeIdentity
    template: str
    template_sha256: str
    rubric: str = ""


def freeze(
    pairs: Pairs, material: Material, path: Path, *, count: int, rubric: str = "", seed: int = 0
) -> int:
    """Write a probe set of ``count`` pairs in both orders; return the number of questions.

    Raises:
        InputError: the file exists (a frozen set is never overwritten), or no pair can be frozen.
    """
    if path.exists():
        raise InputError("exists already; a frozen probe set is never overwritten", path=path)
    wanted = {
        (pair.prompt_id, pair.better, pair.worse) for pair in choose_pairs(pairs, count, seed=seed)
    }
    lines = []
    for row in range(len(pairs)):
        prompt_id = pairs.prompt_ids[pairs.prompt[row]]
        a, b = pairs.a[row], pairs.b[row]
        if pairs.repeat[row] or not {(prompt_id, a, b), (prompt_id, b, a)} & wanted:
            continue
        known = material.prompts[prompt_id]
        for verdict in pairs.verdicts[row]:
            if verdict is None or first_probability(verdict) is None:
                continue
            frozen = FrozenQuestion(
                prompt_id=prompt_id,
                prompt=known.prompt,
                shown=verdict.shown,
                completions=[known.completions[name].completion for name in verdict.shown],
                outcome=verdict.outcome,
                winner=verdict.winner,
                p_first=first_probability(verdict),
                judge=verdict.judge,
                template=verdict.template,
                template_sha256=verdict.template_sha256,
                rubric=rubric,
            )
            lines.append(msgspec.json.encode(frozen).decode())
    if not lines:
        raise InputError("no decided pair with texts to freeze (--candidates?)", path=path)
    write_text(path, "\n".join(lines) + "\n")
    return len(lines)


def read_frozen(path: Path) -> list[FrozenQuestion]:
    """Read a frozen probe set.

    Raises:
        InputError: the file is missing, empty, or a line is no frozen question.
    """
    if not path.is_file():
        raise InputError("no such probe set; make one with --freeze", path=path)
    decoder = msgspec.json.Decoder(FrozenQuestion)
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            rows.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise InputError(f"not a frozen question: {error}", path=path, line=number) from error
    if not rows:
        raise InputError("holds no question", path=path)
    return rows


def frozen_questions(frozen: Sequence[FrozenQuestion]) -> list[Question]:
    """Return the questions as they are to be asked again."""
    return [
        Question(
            prompt_id=row.prompt_id,
            prompt=row.prompt,
            shown=tuple(row.shown),
            completions=tuple(row.completions),
        )
        for row in frozen
    ]


def drift_section(frozen: Sequence[FrozenQuestion], verdicts: Sequence[Verdict]) -> CardSection:
    """Compare today's verdicts, in the order of ``frozen``, with the frozen ones."""
    names: dict[str, int] = {}
    groups = np.array([names.setdefault(row.prompt_id, len(names)) for row in frozen], int)
    now = [first_probability(verdict) for verdict in verdicts]
    answered = np.array([value is not None for value in now], bool)
    changed = np.array(
        [
            (row.outcome, row.winner) != (verdict.outcome, verdict.winner)
            for row, verdict in zip(frozen, verdicts, strict=True)
        ],
        bool,
    )
    then = np.array([np.nan if row.p_first is None else row.p_first for row in frozen], float)
    today = np.array([np.nan if value is None else value for value in now], float)
    moved = np.abs(today - then)
    rows = np.isfinite(moved)
    resampler = Resampler(groups)
    figures = [
        Figure(
            name="drift.changed",
            label="Verdicts that changed",
            estimate=proportion(changed[answered], groups[answered]),
            meaning="Share of the frozen questions that end differently today.",
            fair=0.0,
        ),
        Figure(
            name="drift.unanswered",
            label="No verdict today",
            estimate=proportion(~answered, groups),
            meaning="Share of questions, all of them answered when frozen, without a verdict now.",
            fair=0.0,
        ),
        Figure(
            name="drift.shift",
            label="Change of probability",
            estimate=mean(resampler, groups[rows], moved[rows]) if rows.any() else nothing(),
            meaning="Mean absolute change of P(first preferred).",
            fair=0.0,
            percent=False,
        ),
    ]
    return CardSection(
        name="drift",
        title="Drift",
        lead=f"{len(frozen):,} frozen questions, asked again today.",
        figures=figures,
        notes=_differences(frozen, verdicts),
    )


def _differences(frozen: Sequence[FrozenQuestion], verdicts: Sequence[Verdict]) -> list[str]:
    """Return what is not the same as when the set was frozen, in words."""
    notes = []
    then, now = frozen[0], verdicts[0]
    if then.judge != now.judge:
        notes.append(f"The judge's name or revision differs: {then.judge} then, {now.judge} now.")
    if then.template_sha256 != now.template_sha256:
        notes.append(f"The template differs: {then.template} then, {now.template} now.")
    return notes
