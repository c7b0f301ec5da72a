"""How far the judges of a panel agree, and how many independent judges they are worth.

The effective number of judges is k / (1 + (k - 1) r) with r the mean correlation between two
judges (the design effect of Kish, Survey Sampling, 1965, for k equally correlated measurements):
judges that always err together are worth one, independent ones are worth k. Between probabilities
as given, r counts shared truth as redundancy too, so this is a lower bound; between errors against
known answers (``effective_number`` of p - gold) it is what averaging the judges can gain.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from feedback.comparing import member_comparisons, prompt_comparisons
from feedback.ordering import Orders
from feedback.panel import Combination, by_member
from feedback.ranking import mean_scores
from feedback.records import Verdict
from feedback.verdict_index import VerdictIndex

__all__ = [
    "agreement_matrix",
    "effective_number",
    "panel_lines",
    "panel_report",
    "score_agreement",
]

Floats = npt.NDArray[np.float64]


def agreement_matrix(p: Floats) -> Floats:
    """Return (k, k): the share of pairs on which two judges point the same way.

    Args:
        p: (n, k) P(a preferred) by judge; NaN where a judge gave no verdict. A tie points nowhere,
            and agrees with another tie.
    """
    side = np.sign(np.round(p - 0.5, 12))
    both = np.isfinite(p)[:, :, None] & np.isfinite(p)[:, None, :]
    same = (side[:, :, None] == side[:, None, :]) & both
    counts = both.sum(axis=0)
    return np.divide(same.sum(axis=0), counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def effective_number(values: Floats) -> float:
    """Return how many independent judges k correlated ones are worth.

    Args:
        values: (n, k) probabilities, or errors against known answers; rows with a NaN are left out.
            NaN if fewer than 3 rows are left, or a judge never varies.
    """
    known = values[np.isfinite(values).all(axis=1)]
    count = values.shape[1]
    if len(known) < 3 or (known.std(axis=0) < 1e-12).any():
        return math.nan
    correlation = np.corrcoef(known, rowvar=False)
    mean = (correlation.sum() - count) / (count * (count - 1))
    # Judges that contradict each other are still not worth more than their number.
    return float(count / (1 + (count - 1) * max(mean, 0.0)))


def score_agreement(scores: Floats) -> Floats:
    """Return (k, k): the share of completions that two judges give the same point of the scale.

    Args:
        scores: (n, k) score by judge; NaN where a judge gave none. Scores between points are
            rounded to the nearest.
    """
    points = np.floor(scores + 0.5)
    both = np.isfinite(scores)[:, :, None] & np.isfinite(scores)[:, None, :]
    same = (points[:, :, None] == points[:, None, :]) & both
    counts = both.sum(axis=0)
    return np.divide(same.sum(axis=0), counts, out=np.full(counts.shape, np.nan), where=counts > 0)


def panel_report(
    folder: Path,
    combination: Combination,
    *,
    orders: Orders,
    weights: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Return what a manifest says of several judges: agreement, effective number, calls, cost.

    Agreement is between the ways in which judges point on pairs; of judges that rate, between their
    scores of a completion.
    """
    judges = len(combination.weights)
    rows: list[list[float]] = []
    calls: dict[int, int] = defaultdict(int)
    cost: dict[int, float] = defaultdict(float)
    outcomes: dict[str, int] = defaultdict(int)
    rated = False
    with VerdictIndex(folder) as index:
        for prompt_id in index.prompts():
            verdicts = index.verdicts(prompt_id)
            rated = rated or verdicts[0].kind == "rating"
            for verdict in verdicts:
                number = verdict.meta.get("member", 0)
                calls[number] += 1
                cost[number] += verdict.cost
            merged = prompt_comparisons(
                verdicts, orders=orders, weights=weights, combination=combination
            )
            for row in merged:
                outcomes[row.outcome] += 1
            said = _scores(verdicts, weights) if rated else _chances(verdicts, orders)
            rows += [[found.get(number, math.nan) for number in range(judges)] for found in said]
    values = np.array(rows, dtype=np.float64).reshape(-1, judges)
    number = effective_number(values)
    return {
        "rule": combination.rule,
        "of": "ratings" if rated else "pairs",
        "pairs": len(rows),
        "asked": np.isfinite(values).sum(axis=0).tolist(),
        "agreement": _rounded(score_agreement(values) if rated else agreement_matrix(values)),
        "effective_judges": None if math.isnan(number) else round(number, 3),
        "outcomes": dict(outcomes),
        "calls": [calls[place] for place in range(judges)],
        "cost": [round(cost[place], 6) for place in range(judges)],
    }


def _chances(verdicts: Sequence[Verdict], orders: Orders) -> list[dict[int, float]]:
    """Return P(a preferred) by judge, for each pair of a prompt."""
    pairs: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for number, comparisons in member_comparisons(verdicts, orders=orders).items():
        for row in comparisons:
            pairs[row.a, row.b][number] = math.nan if row.p is None else row.p
    return list(pairs.values())


def _scores(
    verdicts: Sequence[Verdict], weights: Mapping[str, float] | None
) -> list[dict[int, float]]:
    """Return the score by judge, for each completion of a prompt."""
    found: dict[str, dict[int, float]] = {verdict.shown[0]: {} for verdict in verdicts}
    for number, rows in by_member(verdicts).items():
        for name, score in mean_scores(rows, weights=weights).items():
            found[name][number] = score
    return list(found.values())


def _rounded(matrix: Floats) -> list[list[float | None]]:
    return [
        [None if math.isnan(value) else round(float(value), 4) for value in row] for row in matrix
    ]


def panel_lines(report: dict[str, Any], models: Sequence[str]) -> list[str]:
    """Return the report in words."""
    lines = []
    for place, model in enumerate(models):
        lines.append(
            f"{model}: {report['asked'][place]} of {report['pairs']} {report['of']}, "
            f"{report['calls'][place]} calls, ${report['cost'][place]:.4f}"
        )
    for first in range(len(models)):
        for second in range(first + 1, len(models)):
            share = report["agreement"][first][second]
            if share is not None:
                lines.append(f"{models[first]} and {models[second]} agree on {share:.1%}")
    if report["effective_judges"] is not None and report["rule"] != "cascade":
        lines.append(
            f"the {len(models)} judges are worth {report['effective_judges']:.2f} independent ones"
        )
    return lines
