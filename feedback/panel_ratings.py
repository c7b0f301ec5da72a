"""Several judges that rate: their scores merged, and which ratings go on to a strong judge.

Pairs made of ratings are merged as all pairs are (``panel.combine``); here is what has no pair: the
score of one completion, and whether the first judge's distribution over the scale says enough.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from feedback.panel import CascadeOptions, Combination, by_member
from feedback.ranking import criterion_of, mean_scores
from feedback.records import Verdict

__all__ = ["is_unsure_rating", "panel_scores", "rating_entropy", "strongest_ratings"]


def rating_entropy(verdict: Verdict) -> float | None:
    """Return the entropy of a rating's probabilities over that of an even spread, in [0, 1].

    None for a rating read from text, which has no probabilities.
    """
    if verdict.probs is None or len(verdict.probs) < 2:
        return None
    total = math.fsum(-p * math.log(p) for p in verdict.probs if p > 0.0)
    return total / math.log(len(verdict.probs))


def is_unsure_rating(verdicts: Sequence[Verdict], options: CascadeOptions) -> bool:
    """Return whether a completion goes on to the strong judge.

    It does where the first judge gave no score, held little mass on the scale, spread its mass over
    it, or scored differently when asked again. A call that failed does not: it is asked again.

    Args:
        verdicts: the first judge's on one completion and one criterion, all repeats.
        options: the limits.
    """
    if any(row.outcome == "failed" for row in verdicts):
        return False
    if any(row.outcome != "decided" for row in verdicts):
        return True
    if any(row.mass is not None and row.mass < options.min_mass for row in verdicts):
        return True
    spread = [share for row in verdicts if (share := rating_entropy(row)) is not None]
    if spread:
        return math.fsum(spread) / len(spread) > options.max_entropy
    scores = {row.scores[0] for row in verdicts if row.scores}
    return options.inconsistent and len(scores) > 1


def strongest_ratings(verdicts: Iterable[Verdict]) -> list[Verdict]:
    """Return the ratings of a cascade that count, completion by completion.

    The strong judge's where it scored; where it failed, its failure (until it is asked again);
    where it declined, the first judge's.
    """
    asked: dict[tuple[str, str], dict[int, list[Verdict]]] = defaultdict(dict)
    for number, rows in by_member(verdicts).items():
        for row in rows:
            asked[row.shown[0], criterion_of(row)].setdefault(number, []).append(row)
    kept: list[Verdict] = []
    for members in asked.values():
        first, strong = members.get(0, []), members.get(1, [])
        declined = any(row.outcome not in ("decided", "failed") for row in strong)
        kept += strong if strong and not (declined and first) else first
    return kept


def panel_scores(
    verdicts: Sequence[Verdict],
    combination: Combination,
    *,
    weights: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return each completion's score by its id, over all judges.

    The weighted mean of the judges' scores; their median under ``majority``, above and below which
    no more than half of them stand; in a cascade the score of the judge that counts. In a panel,
    more than half of the judges must have scored.

    Args:
        verdicts: of kind rating, of all judges on one prompt.
        combination: the rule.
        weights: of criteria that were rated one by one.
    """
    if combination.rule == "cascade":
        return mean_scores(strongest_ratings(verdicts), weights=weights)
    heard: dict[str, dict[int, float]] = defaultdict(dict)
    for number, rows in by_member(verdicts).items():
        for name, score in mean_scores(rows, weights=weights).items():
            heard[name][number] = score
    merged = {}
    for name, scores in heard.items():
        if len(scores) * 2 <= len(combination.weights):
            continue
        if combination.rule == "majority":
            merged[name] = statistics.median(scores.values())
            continue
        shares = {number: combination.weights[number] for number in scores}
        total = math.fsum(shares[number] * scores[number] for number in scores)
        merged[name] = total / math.fsum(shares.values())
    return merged
