"""Remedies that ``pair`` applies to soft labels: what the report card measured, put to use.

``length`` takes the judge's pull of length out of each probability; ``annotators`` replaces it by
what Dawid-Skene makes of all verdicts, every judge and order being an annotator. The judge's own
probability stays in ``p_raw``, and the manifest records what was fitted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from feedback.annotators import dawid_skene, pair_votes
from feedback.errors import InputError
from feedback.mitigation import LengthCorrection
from feedback.records import Comparison
from feedback.report_run import Evidence, read_evidence

__all__ = ["Remedy", "RemedyName", "load_remedy"]

RemedyName = Literal["none", "length", "annotators"]
Stated = Mapping[tuple[str, str], float]
"""(a, b) -> P(a preferred)."""


class Remedy(NamedTuple):
    """A fitted remedy."""

    apply: Callable[[Sequence[Comparison], Stated], dict[tuple[str, str], float]]
    """From one prompt's comparisons, and probabilities that replace theirs, to the remedied."""
    record: dict[str, Any]
    """What the manifest says of it."""


def load_remedy(
    name: RemedyName, verdicts: Path, candidates: Path, *, gold: Path | None = None
) -> Remedy:
    """Fit a remedy on a verdict folder.

    Args:
        name: ``none``, ``length`` or ``annotators``.
        verdicts: the folder that is being paired.
        candidates: its texts.
        gold: gold pairs for the length correction; None: the folder ``gold`` beside the verdicts.

    Raises:
        InputError: the verdicts cannot carry it (several judges, no difference in length, no
            pairwise verdicts).
    """
    if name == "none":
        return Remedy(lambda _, stated: dict(stated), {"name": "none"})
    evidence = read_evidence([verdicts], candidates=candidates, gold=gold)
    return (_length if name == "length" else _annotators)(evidence, verdicts)


def _length(evidence: Evidence, verdicts: Path) -> Remedy:
    if len(evidence.arms) != 1:
        raise InputError("the length correction is of one judge, and these verdicts are of several")
    try:
        correction = LengthCorrection.fit(evidence.arms[0])
    except ValueError as error:
        raise InputError(
            f"the length correction cannot be fitted: {error}", path=verdicts
        ) from error
    material = evidence.material

    def apply(rows: Sequence[Comparison], stated: Stated) -> dict[tuple[str, str], float]:
        made = dict(stated)
        for row in rows:
            p = stated.get((row.a, row.b), row.p)
            a = material.completion(row.prompt_id, row.a)
            b = material.completion(row.prompt_id, row.b)
            if p is not None and a is not None and b is not None:
                lengths = len(a.completion), len(b.completion)
                made[row.a, row.b] = float(correction.apply(p, *lengths))
        return made

    return Remedy(apply, {"name": "length", **dataclasses.asdict(correction)})


def _annotators(evidence: Evidence, verdicts: Path) -> Remedy:
    keys, item, annotator, label = pair_votes(evidence.arms)
    if not len(item):
        raise InputError("holds no pairwise verdict to fit annotators on", path=verdicts)
    used, renumbered = np.unique(item, return_inverse=True)
    fit = dawid_skene(renumbered, annotator, label, classes=3)
    names = evidence.arms[0].prompt_ids
    believed = {
        (names[keys[place][0]], *keys[place][1:]): float(row[2] + row[1] / 2)
        for place, row in zip(used, fit.labels, strict=True)
    }

    def apply(rows: Sequence[Comparison], stated: Stated) -> dict[tuple[str, str], float]:
        made = dict(stated)
        for row in rows:
            first, second = sorted((row.a, row.b))
            p = believed.get((row.prompt_id, first, second))
            if row.p is not None and p is not None:
                made[row.a, row.b] = p if row.a == first else 1 - p
        return made

    confusion = {
        f"{arm.arm.name}, {order}": fit.confusion[2 * number + place].tolist()
        for number, arm in enumerate(evidence.arms)
        for place, order in enumerate(("a first", "b first"))
        if 2 * number + place < len(fit.confusion)
    }
    return Remedy(apply, {"name": "annotators", "confusion": confusion})
