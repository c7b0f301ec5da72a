"""The card's part on agreement with gold labels and with people."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from feedback.agreement import (
    accuracy_halves,
    cohen_kappa,
    expected_calibration_error,
    halves,
    krippendorff_alpha,
    leave_one_out,
    three_way,
    unanimous,
    vote_structure,
)
from feedback.figures import CardSection, CardTable, Figure
from feedback.intervals import Estimate, Resampler, average, proportion
from feedback.observations import Pairs
from feedback.records import GoldPair

__all__ = ["agreement_section"]

_CODES = {"a": 1.0, "b": -1.0, "tie": 0.0}
_CONFIDENCE_EDGES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


def agreement_section(pairs: Pairs, resampler: Resampler) -> CardSection | None:
    """Return agreement with gold; None where no pair has a gold label."""
    rows = np.isfinite(pairs.gold)
    if not rows.any():
        return None
    # Repeats of a pair share one merged verdict each; gold is held against each of them.
    part = pairs.take(rows)
    figures = _accuracies(part, resampler) + _chance_corrected(part, resampler)
    tables = [_by_confidence(part)]
    if (gap := _by_gap(part)) is not None:
        tables.append(gap)
    people = _people(part, resampler)
    figures += people[0]
    tables += people[1]
    ties = int((part.gold == 0).sum())
    notes = [f"{ties:,} of {len(part):,} gold labels are ties."] if ties else []
    return CardSection(
        name="agreement",
        title="Agreement with gold",
        lead="How often the judge, asked in both orders, says what gold says.",
        figures=figures,
        tables=tables,
        notes=notes,
    )


def _figure(
    name: str,
    label: str,
    estimate: Estimate,
    meaning: str,
    *,
    fair: float | None = None,
    low_end: float = 0.0,
    percent: bool = True,
) -> Figure:
    return Figure(
        name=f"agreement.{name}",
        label=label,
        estimate=estimate,
        meaning=meaning,
        fair=fair,
        low_end=low_end,
        percent=percent,
    )


def _accuracies(pairs: Pairs, resampler: Resampler) -> list[Figure]:
    decided = np.where(pairs.verdict == 0, np.nan, pairs.verdict)
    single = halves(pairs.winner, np.repeat(pairs.gold[:, None], 2, axis=1))
    known = np.isfinite(single)
    groups = np.repeat(pairs.prompt[:, None], 2, axis=1)
    return [
        _figure(
            "accuracy",
            "Accuracy",
            accuracy_halves(pairs, resampler),
            "Both orders averaged; gold ties left out, a tie by the judge counts one half.",
            fair=0.5,
        ),
        _figure(
            "accuracy_decided",
            "Accuracy where decided",
            accuracy_halves(pairs, resampler, decided),
            "Pairs that either side calls a tie left out.",
            fair=0.5,
        ),
        _figure(
            "accuracy_one_order",
            "Accuracy of a single order",
            average(resampler, groups[known], single[known]),
            "What one call would have given; the gain of asking both orders is the difference.",
            fair=0.5,
        ),
        _figure(
            "three_way",
            "Same label of three",
            three_way(pairs),
            "a, b or tie must match; a judge that never ties loses every gold tie.",
        ),
    ]


def _chance_corrected(pairs: Pairs, resampler: Resampler) -> list[Figure]:
    known = np.isfinite(pairs.verdict)
    units = [
        [float(verdict), *_people_codes(gold, float(label))]
        for verdict, label, gold in zip(
            pairs.verdict[known],
            pairs.gold[known],
            [gold for gold, row in zip(pairs.gold_pairs, known, strict=True) if row],
            strict=True,
        )
    ]
    alpha = krippendorff_alpha(units, pairs.prompt[known], resampler)
    confidence, hit, rows = _confidence(pairs)
    return [
        _figure(
            "kappa",
            "Cohen's kappa",
            cohen_kappa(pairs.verdict, pairs.gold, pairs.prompt, resampler),
            "Agreement beyond chance over a, b and tie; 0 is chance, 1 is perfect.",
            fair=0.0,
            low_end=-1.0,
            percent=False,
        ),
        _figure(
            "alpha",
            "Krippendorff's alpha",
            alpha,
            "Judge and every person (or the gold label) as coders, nominal; 0 is chance.",
            fair=0.0,
            low_end=-1.0,
            percent=False,
        ),
        _figure(
            "ece",
            "Calibration error (ECE)",
            expected_calibration_error(confidence, hit, pairs.prompt[rows], resampler),
            "Mean gap between the judge's probability and the share right, ten bins; noise alone "
            "makes it positive.",
            fair=0.0,
        ),
    ]


def _people_codes(gold: GoldPair | None, label: float) -> list[float]:
    """Return the people's codes as seen from the completion whose id sorts first."""
    if gold is None or len(gold.votes) < 2:
        return [label]
    sign = 1.0 if gold.a <= gold.b else -1.0
    return [sign * _CODES[vote] for vote in gold.votes]


def _confidence(
    pairs: Pairs,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return the probability of the side named, whether gold agrees, and the mask of such pairs."""
    p = pairs.mean_p
    rows = np.isfinite(p) & (pairs.gold != 0)
    side = np.where(p[rows] >= 0.5, 1.0, -1.0)
    hit = np.where(p[rows] == 0.5, 0.5, (side == pairs.gold[rows]).astype(float))
    return np.maximum(p[rows], 1 - p[rows]), hit, rows


def _by_confidence(pairs: Pairs) -> CardTable:
    confidence, hit, rows = _confidence(pairs)
    groups = pairs.prompt[rows]
    lines: list[list[Any]] = []
    for low, high in itertools.pairwise(_CONFIDENCE_EDGES):
        inside = (confidence >= low) & ((confidence < high) | (high == 1.0))
        inside &= confidence > 0.5
        if inside.any():
            stated = float(confidence[inside].mean())
            lines.append(
                [f"{low:.2f} to {high:.2f}", stated, proportion(hit[inside], groups[inside])]
            )
    return CardTable(
        name="by_confidence",
        caption="Agreement by the judge's confidence",
        columns=["P(preferred), both orders", "Mean stated", "Share right"],
        rows=lines,
    )


def _by_gap(pairs: Pairs) -> CardTable | None:
    """Return accuracy by how far apart gold sees the two; quarters of the known gaps."""
    gaps = np.array([_gap(gold) for gold in pairs.gold_pairs], float)
    score = halves(pairs.verdict, pairs.gold)
    rows = np.isfinite(gaps) & np.isfinite(score)
    if rows.sum() < 8 or len(np.unique(gaps[rows])) < 2:
        return None
    values = np.unique(gaps[rows])
    edges = values if len(values) <= 5 else np.unique(np.quantile(gaps[rows], [0, 0.25, 0.5, 0.75]))
    place = np.searchsorted(edges, gaps, side="right") - 1
    lines: list[list[Any]] = []
    for index, low in enumerate(edges):
        inside = rows & (place == index)
        exact = len(values) <= 5 or index == len(edges) - 1
        high = float(gaps[inside].max())
        words = f"{low:.3g}" if exact and high == low else f"{low:.3g} to {high:.3g}"
        estimate = proportion(score[inside], pairs.prompt[inside])
        lines.append([words, estimate])
    return CardTable(
        name="by_gap",
        caption="Agreement by how far apart gold sees the two",
        columns=["Gap", "Accuracy"],
        rows=lines,
    )


def _gap(gold: GoldPair | None) -> float:
    if gold is None:
        return np.nan
    if gold.gap is not None:
        return gold.gap
    if len(gold.votes) > 1:
        return abs(sum(_CODES[vote] for vote in gold.votes)) / len(gold.votes)
    return np.nan


def _people(pairs: Pairs, resampler: Resampler) -> tuple[list[Figure], list[CardTable]]:
    """Return the human ceiling and what votes there are."""
    gold = _once([row for row in pairs.gold_pairs if row is not None and len(row.votes) > 1])
    if not gold:
        return [], []
    figures = [
        _figure(
            "unanimous",
            "People agree among themselves",
            unanimous(gold),
            "Share of pairs whose votes are all the same.",
        )
    ]
    structure = sorted(vote_structure(gold).items(), key=lambda item: -item[1])
    tables = [
        CardTable(
            name="votes",
            caption="How people voted",
            columns=["For the winner", "Against", "Ties", "Pairs"],
            rows=[[*pattern, count] for pattern, count in structure],
            percent=False,
        )
    ]
    found = leave_one_out(pairs, resampler)
    if found is None:
        return figures, tables
    figures += [
        _figure(
            "human_ceiling",
            "One person against the rest",
            found.human,
            "Mean agreement of each person with the majority of the others (ties half): what a "
            "judge can be expected to reach.",
        ),
        _figure(
            "judge_against_rest",
            "The judge in that person's place",
            found.judge,
            "The judge against the same majorities.",
        ),
        _figure(
            "judge_less_human",
            "Judge less person",
            found.difference,
            "Above 0: the judge agrees with people better than one more person would.",
            fair=0.0,
            low_end=-0.5,
        ),
    ]
    rows = [[name, human, judge] for name, human, judge in found.by_annotator]
    tables.append(
        CardTable(
            name="annotators",
            caption="Each person left out in turn",
            columns=["Person", "Agrees with the rest", "Judge agrees with the same rest"],
            rows=rows[:50],
        )
    )
    return figures, tables


def _once(gold: Sequence[GoldPair]) -> list[GoldPair]:
    """Return each gold pair once, though repeats of a pair carry it several times."""
    return list({(row.prompt_id, row.a, row.b): row for row in gold}.values())
