"""What the judge said, as training targets: soft or hard, ties in or out, rankings from pairs.

Works on tokenised groups before they are packed, so that no loss has to ask where a label came
from. What is dropped is counted in the report.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

from feedback.errors import InputError
from train.chat import DataReport
from train.data import Group, Pair
from train.losses_listwise import LARGEST_TIE, TieForm

__all__ = [
    "label_pairs",
    "mean_weight",
    "ranked_from_labels",
    "require_small_ties",
    "with_ranked_pairs",
]


def label_pairs(
    groups: Sequence[Group],
    report: DataReport,
    *,
    soft_labels: bool = True,
    ties: Literal["use", "drop"] = "use",
    label_smoothing: float = 0.0,
) -> list[Group]:
    """Return the groups with the pairs' p as the options want it; groups without pairs go.

    Args:
        groups: with pairs.
        report: gets the counts.
        soft_labels: False makes every p 0, 1 or, for a tie, 1/2.
        ties: ``drop`` leaves out pairs that are a tie or have p = 1/2.
        label_smoothing: chance e of a flipped label: p becomes (1 - 2e) p + e.

    Raises:
        InputError: no pair is left.
    """
    kept, dropped = [], 0
    for group in groups:
        pairs = []
        for pair in group.pairs:
            if ties == "drop" and (pair.tie or pair.p == 0.5):
                dropped += 1
                continue
            p = pair.p if soft_labels or pair.p == 0.5 else float(pair.p > 0.5)
            p = 0.5 if pair.tie else p
            pairs.append(pair._replace(p=(1 - 2 * label_smoothing) * p + label_smoothing))
        if pairs:
            kept.append(dataclasses.replace(group, pairs=tuple(pairs)))
    if dropped:
        report.warn(f"{dropped} tied pairs left out; ties = 'use' trains on them")
    if not kept and not dropped:
        raise InputError("no pair to train on: no prompt has two judged completions")
    if not kept:
        raise InputError(f"no pair to train on: all {dropped} are ties; set ties to 'use'")
    return kept


def ranked_from_labels(groups: Sequence[Group], *, mixed: bool = False) -> list[Group]:
    """Return the groups with a ranking: their own, or one made from scores or pairs.

    Scores make tied groups of equal scores. Two completions with one pair are a ranking of two
    (p = 1/2: tied). With more pairs the completions are ordered by their mean probability of being
    preferred, rows by their weights, which says nothing about two that were never compared: that is
    done only where ``mixed`` says that the caller looks at the compared pairs too.

    Raises:
        InputError: a group has neither ranking nor scores, and its pairs make none.
    """
    return [_ranked(group, mixed) for group in groups]


def _ranked(group: Group, mixed: bool) -> Group:
    if group.ranking:
        return group
    scores = list(group.scores)
    if not scores or None in scores:
        if not mixed and len(group.completions) > 2:
            raise InputError(
                f"prompt {group.prompt_id!r} has {len(group.pairs)} pairs of "
                f"{len(group.completions)} completions but no ranking: give a rankings folder, or "
                "use a loss on pairs"
            )
        scores = _win_rates(group)
    known = [(score, member) for member, score in enumerate(scores) if score is not None]
    tiers = sorted({score for score, _ in known}, reverse=True)
    ranking = tuple(tuple(m for score, m in known if score == tier) for tier in tiers)
    return dataclasses.replace(group, ranking=ranking)


def _win_rates(group: Group) -> list[float | None]:
    """Return each completion's mean probability of being preferred, pairs by their weights.

    None where it was never compared.
    """
    count = len(group.completions)
    won, weight = [0.0] * count, [0.0] * count
    for pair in group.pairs:
        p = 0.5 if pair.tie else pair.p
        for member, share in ((pair.chosen, p), (pair.rejected, 1 - p)):
            won[member] += pair.weight * share
            weight[member] += pair.weight
    return [round(w / total, 9) if total else None for w, total in zip(won, weight, strict=True)]


def require_small_ties(groups: Sequence[Group], form: TieForm = "average") -> None:
    """Refuse rankings whose ties are too large for the exact Plackett-Luce loss.

    Raises:
        InputError: names the prompt.
    """
    for group in groups:
        sizes = [len(tied) for tied in group.ranking]
        size = sum(sizes) if form == "davidson" else max(sizes, default=0)
        if size > LARGEST_TIE:
            what = "ranked" if form == "davidson" else "tied for one place"
            raise InputError(
                f"prompt {group.prompt_id!r}: {size} completions are {what}, and exact "
                f"Plackett-Luce takes {LARGEST_TIE} at most; use a loss on pairs, or drop some"
            )


def mean_weight(group: Group) -> float:
    """Return what a group counts: the mean weight of its pairs that count, 0 without any."""
    weights = [pair.weight for pair in group.pairs if pair.weight > 0]
    return sum(weights) / len(weights) if weights else 0.0


def with_ranked_pairs(groups: Sequence[Group]) -> list[Group]:
    """Return the groups, rankings without compared pairs given the pairs that their order implies.

    Each two ranked completions make a pair: p = 1 for the better one (the margin is the gap of
    their scores, where both have one), or a tie at p = 0.5 within a tied group.
    """
    return [
        group
        if group.pairs or not group.ranking
        else dataclasses.replace(group, pairs=tuple(_implied_pairs(group)))
        for group in groups
    ]


def _implied_pairs(group: Group) -> Iterator[Pair]:
    for place, tied in enumerate(group.ranking):
        for number, better in enumerate(tied):
            yield from (Pair(better, other, 0.5, 1.0, True) for other in tied[number + 1 :])
            for worse in itertools.chain(*group.ranking[place + 1 :]):
                yield Pair(better, worse, margin=_score_gap(group, better, worse))


def _score_gap(group: Group, better: int, worse: int) -> float:
    high, low = (group.scores[i] if group.scores else None for i in (better, worse))
    return max(0.0, high - low) if high is not None and low is not None else 0.0
