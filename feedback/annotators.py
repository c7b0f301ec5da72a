"""Models of several annotators: who is reliable, who leans, and what the labels are given that.

*Dawid-Skene* (1979, Applied Statistics 28): each annotator has a confusion matrix; EM finds it
together with the probability of each label. With (judge, order) as annotators the matrices absorb
position bias, so even one judge asked in both orders is two annotators.

*Bradley-Terry with judge effects*: P(judge j prefers the first place) = sigma(skill_j * (s1 - s2) +
place_j). Judges that follow quality get a large skill, judges that follow the place a large place,
and the strengths s are what remains. Needs several comparisons per completion to say more than the
mean does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feedback.observations import Pairs
from feedback.regression import sigmoid

__all__ = [
    "DawidSkene",
    "JudgeEffects",
    "bradley_terry_judges",
    "dawid_skene",
    "pair_votes",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class DawidSkene:
    """What EM found."""

    labels: Floats
    """(items, classes): probability of each label."""
    confusion: Floats
    """(annotators, classes, classes): P(says column | truth is row)."""
    prior: Floats
    """(classes,)"""
    steps: int


def dawid_skene(
    item: Ints,
    annotator: Ints,
    label: Ints,
    *,
    classes: int,
    smoothing: float = 1.0,
    steps: int = 200,
    tolerance: float = 1e-7,
) -> DawidSkene:
    """Fit Dawid-Skene by EM, starting from the majority.

    Args:
        item: (n,) which item each vote is about, from 0.
        annotator: (n,) who voted, from 0.
        label: (n,) in [0, classes).
        classes: how many labels.
        smoothing: pseudo-votes per row of a confusion matrix, spread evenly; keeps annotators with
            few votes near ignorance instead of certainty.
        steps: at most.
        tolerance: largest change of a probability at which to stop.
    """
    items, people = int(item.max()) + 1, int(annotator.max()) + 1
    votes = np.zeros((items, classes))
    np.add.at(votes, (item, label), 1.0)
    belief = votes / votes.sum(axis=1, keepdims=True)
    confusion = np.zeros((people, classes, classes))
    prior = np.full(classes, 1 / classes)
    done = 0
    while done < steps:
        done += 1
        confusion = np.full((people, classes, classes), smoothing / classes)
        for column in range(classes):
            rows = label == column
            np.add.at(confusion[:, :, column], annotator[rows], belief[item[rows]])
        confusion /= confusion.sum(axis=2, keepdims=True)
        prior = belief.sum(axis=0) + smoothing / classes
        prior /= prior.sum()
        logs = np.tile(np.log(prior), (items, 1))
        np.add.at(logs, item, np.log(confusion[annotator, :, label]))
        fresh = np.exp(logs - logs.max(axis=1, keepdims=True))
        fresh /= fresh.sum(axis=1, keepdims=True)
        change = float(np.abs(fresh - belief).max())
        belief = fresh
        if change < tolerance:
            break
    return DawidSkene(belief, confusion, prior, done)


@dataclass(frozen=True, slots=True)
class JudgeEffects:
    """Strengths of completions, and each judge's skill and lean."""

    strength: Floats
    """(completions,): log-odds scale; only differences within a prompt mean something."""
    skill: Floats
    """(judges,): weight of the strength difference; their mean is 1."""
    place: Floats
    """(judges,): logits that the first place is worth."""
    converged: bool


def bradley_terry_judges(
    first: Ints,
    second: Ints,
    judge: Ints,
    p: Floats,
    *,
    ridge: float = 0.1,
    steps: int = 300,
) -> JudgeEffects:
    """Fit Bradley-Terry strengths with a skill and a lean for each judge.

    Args:
        first: (n,) completion shown first, from 0.
        second: (n,) completion shown second.
        judge: (n,) who judged, from 0.
        p: (n,) P(first preferred): probabilities, or 1, 0 and 1/2.
        ridge: prior precision of strengths and of log skills; a judge with few verdicts stays
            near the others.
        steps: of L-BFGS at most.
    """
    from scipy import optimize

    completions = int(max(first.max(), second.max())) + 1
    judges = int(judge.max()) + 1

    def unpack(x: Floats) -> tuple[Floats, Floats, Floats]:
        return x[:completions], x[completions : completions + judges], x[completions + judges :]

    def loss(x: Floats) -> tuple[float, Floats]:
        strength, log_skill, place = unpack(x)
        skill = np.exp(log_skill)
        gap = strength[first] - strength[second]
        logit = skill[judge] * gap + place[judge]
        value = float((np.logaddexp(0, logit) - p * logit).sum())
        value += ridge / 2 * float((strength**2).sum()) + ridge / 2 * float((log_skill**2).sum())
        slope = sigmoid(logit) - p
        along = slope * skill[judge]
        gradient = np.concatenate(
            [
                np.bincount(first, along, completions)
                - np.bincount(second, along, completions)
                + ridge * strength,
                np.bincount(judge, slope * skill[judge] * gap, judges) + ridge * log_skill,
                np.bincount(judge, slope, judges),
            ]
        )
        return value, gradient

    start = np.zeros(completions + 2 * judges)
    found = optimize.minimize(
        loss, start, jac=True, method="L-BFGS-B", options={"maxiter": steps, "maxfun": 4 * steps}
    )
    strength, log_skill, place = unpack(found.x)
    skill = np.exp(log_skill)
    scale = float(skill.mean())
    return JudgeEffects(strength * scale, skill / scale, place, bool(found.success))


def pair_votes(arms: Sequence[Pairs]) -> tuple[list[tuple[int, str, str]], Ints, Ints, Ints]:
    """Return pairs, and each verdict as a vote: item, annotator (arm and order), label.

    Labels are 0 (b preferred), 1 (tie) and 2 (a preferred).
    """
    index: dict[tuple[int, str, str], int] = {}
    items, people, labels = [], [], []
    for number, pairs in enumerate(arms):
        for row in range(len(pairs)):
            key = (int(pairs.prompt[row]), pairs.a[row], pairs.b[row])
            place = index.setdefault(key, len(index))
            for order in (0, 1):
                value = pairs.winner[row, order]
                if np.isfinite(value):
                    items.append(place)
                    people.append(2 * number + order)
                    labels.append(int(value) + 1)
    return list(index), np.array(items, int), np.array(people, int), np.array(labels, int)
