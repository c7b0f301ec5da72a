"""How calls ended, and how much of the probability stood on the offered labels."""

from __future__ import annotations

import numpy as np

from feedback.figures import CardSection, CardTable, Figure
from feedback.intervals import Resampler, mean, nothing, proportion
from feedback.observations import Pairs
from feedback.rounding import rounding_note

__all__ = ["LOW_MASS", "outcome_section"]

LOW_MASS = 0.5
"""Below this verdict mass the judge mostly wanted to say something else."""


def outcome_section(pairs: Pairs, resampler: Resampler) -> CardSection:
    """Return counts by outcome, parse rate and verdict mass."""
    place = {name: index for index, name in enumerate(pairs.prompt_ids)}
    groups = np.array([place[call.prompt_id] for call in pairs.calls], int)
    ended = np.array([call.outcome for call in pairs.calls], object)
    answered = ended != "failed"
    parsed = np.isin(ended, ("decided", "tie"))
    mass = np.array([np.nan if call.mass is None else call.mass for call in pairs.calls], float)
    known = np.isfinite(mass)
    figures = [
        Figure(
            name="outcomes.parse_rate",
            label="Answers that are a verdict",
            estimate=proportion(parsed[answered], groups[answered]),
            meaning="Decided or tie, of all calls that got an answer; the rest is never a label.",
            fair=1.0,
        ),
        Figure(
            name="outcomes.failed",
            label="Failed calls",
            estimate=proportion(~answered, groups),
            meaning="No answer at all; asked again by the next run.",
            fair=0.0,
        ),
        Figure(
            name="outcomes.ties",
            label="Ties",
            estimate=proportion(ended[parsed] == "tie", groups[parsed]),
            meaning="Of verdicts; a judge without a tie label has none.",
        ),
    ]
    if known.any():
        figures += [
            Figure(
                name="outcomes.mass",
                label="Verdict mass",
                estimate=mean(resampler, groups[known], mass[known]) if known.any() else nothing(),
                meaning="Mean probability on the offered labels before renormalising.",
                fair=1.0,
                percent=False,
            ),
            Figure(
                name="outcomes.low_mass",
                label=f"Mass under {LOW_MASS}",
                estimate=proportion(mass[known] < LOW_MASS, groups[known]),
                meaning="Share of calls in which the judge mostly wanted to say something else.",
                fair=0.0,
            ),
        ]
    note = rounding_note(call.probs for call in pairs.calls if call.probs is not None)
    total = len(pairs.calls)
    rows = [[name, count, count / total] for name, count in pairs.outcomes.most_common() if count]
    return CardSection(
        name="outcomes",
        title="Outcomes",
        lead="How the calls ended. A failure, a refusal and a tie are three different things.",
        figures=figures,
        tables=[
            CardTable(
                name="outcomes",
                caption="Calls by outcome",
                columns=["Outcome", "Calls", "Share"],
                rows=rows,
            )
        ],
        notes=[note] if note is not None else [],
    )
