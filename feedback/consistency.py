"""Does the judge agree with itself: over three answers, over repeats, over label schemes?

Transitivity: of three answers to one prompt, all compared, a > b > c > a is a cycle. A pair whose
orders disagree has no winner, and PRP (2306.17563) lets it count half a point for each side; both
ways of counting are given. Entropy is FairEval's BPDE (2305.17926) over all verdicts of a pair.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from feedback.figures import CardSection, Figure
from feedback.intervals import Estimate, Resampler, mean, nothing, proportion, ratio
from feedback.observations import Pairs

__all__ = [
    "entropy",
    "repeat_agreement",
    "scheme_section",
    "stability_section",
    "transitivity",
]

Floats = npt.NDArray[np.float64]


def _pair_scores(pairs: Pairs) -> dict[int, dict[tuple[str, str], list[float]]]:
    """Return, per prompt and pair (both directions), the winner of every verdict."""
    scores: dict[int, dict[tuple[str, str], list[float]]] = {}
    for row in range(len(pairs)):
        values = [float(value) for value in pairs.winner[row] if np.isfinite(value)]
        if values:
            known = scores.setdefault(int(pairs.prompt[row]), {})
            a, b = pairs.a[row], pairs.b[row]
            known.setdefault((a, b), []).extend(values)
            known.setdefault((b, a), []).extend(-value for value in values)
    return scores


def transitivity(pairs: Pairs) -> tuple[Estimate, Estimate]:
    """Return the share of cyclic triples: strict, and with disagreeing orders as half points.

    Strict: only triples whose three pairs were decided the same way in every verdict. Half points:
    a pair's score is its mean verdict; a triple's chance of a cycle is that of drawing one winner
    for each pair.
    """
    strict: list[tuple[int, bool]] = []
    half: list[tuple[int, float]] = []
    for prompt, known in _pair_scores(pairs).items():
        names = sorted({name for pair in known for name in pair})
        for a, b, c in itertools.combinations(names, 3):
            edges = [known.get(edge) for edge in ((a, b), (b, c), (c, a))]
            if any(edge is None for edge in edges):
                continue
            wins = [(float(np.mean(edge or [])) + 1) / 2 for edge in edges]
            cycle = float(np.prod(wins) + np.prod([1 - win for win in wins]))
            half.append((prompt, cycle))
            if all(win in (0.0, 1.0) for win in wins):
                strict.append((prompt, cycle == 1.0))
    return _share(strict), _share(half)


def _share(rows: Sequence[tuple[int, float | bool]]) -> Estimate:
    if not rows:
        return nothing("no three completions of a prompt were all compared")
    groups = np.array([prompt for prompt, _ in rows])
    values = np.array([float(value) for _, value in rows])
    if set(values) <= {0.0, 1.0}:
        return proportion(values, groups)
    _, renumbered = np.unique(groups, return_inverse=True)
    return mean(Resampler(renumbered), renumbered, values)


def repeat_agreement(pairs: Pairs) -> Estimate:
    """Return the chance that two repeats of one question, in one order, end the same way."""
    answers: dict[tuple[int, str, str, int], list[float]] = {}
    for row in range(len(pairs)):
        for order in (0, 1):
            if np.isfinite(pairs.winner[row, order]):
                key = (int(pairs.prompt[row]), pairs.a[row], pairs.b[row], order)
                answers.setdefault(key, []).append(float(pairs.winner[row, order]))
    groups, same, asked = [], [], []
    for key, values in answers.items():
        if len(values) > 1:
            couples = list(itertools.combinations(values, 2))
            groups.append(key[0])
            same.append(sum(left == right for left, right in couples) / len(couples))
            asked.append(1.0)
    if not groups:
        return nothing("no question was repeated")
    _, index = np.unique(groups, return_inverse=True)
    if set(same) <= {0.0, 1.0}:
        return proportion(same, index)
    return ratio(Resampler(index), index, same, asked)


def entropy(pairs: Pairs) -> dict[tuple[int, str, str], float]:
    """Return the BPDE of each pair: bits of the verdicts (win, tie, lose) over repeats and orders.

    With two verdicts it is 0 where they agree and 1 where they do not; pairs with fewer are absent.
    """
    counts: dict[tuple[int, str, str], list[int]] = {}
    for row in range(len(pairs)):
        tally = counts.setdefault((int(pairs.prompt[row]), pairs.a[row], pairs.b[row]), [0, 0, 0])
        for value in pairs.winner[row]:
            if np.isfinite(value):
                tally[int(value) + 1] += 1
    found = {}
    for key, tally in counts.items():
        total = sum(tally)
        if total > 1:
            shares = np.array([count / total for count in tally if count])
            found[key] = float(-(shares * np.log2(shares)).sum()) + 0.0
    return found


def stability_section(pairs: Pairs, resampler: Resampler) -> CardSection:
    """Return the card's part on the judge's agreement with itself."""
    strict, half = transitivity(pairs)
    bits = entropy(pairs)
    groups = np.array([key[0] for key in bits], int)
    figures = [
        _figure(
            "cycles",
            "Cycles among three answers",
            strict,
            "Of triples whose three pairs were each decided the same way in every verdict: a "
            "beats b, b beats c, c beats a.",
            fair=0.0,
        ),
        _figure(
            "cycles_half_points",
            "Cycles, disagreeing orders as half points",
            half,
            "The same over all triples; 25% is what coin flips give.",
            fair=0.0,
        ),
        _figure(
            "repeats",
            "Same answer when asked again",
            repeat_agreement(pairs),
            "Chance that two repeats of a question in the same order agree; the rest is noise.",
            fair=1.0,
        ),
        _figure(
            "entropy",
            "Entropy of a pair's verdicts (BPDE)",
            mean(resampler, groups, list(bits.values())) if bits else nothing(),
            "Mean bits over win, tie and lose of a pair's verdicts; 0 is one voice.",
            fair=0.0,
            high_end=float(np.log2(3)),
            percent=False,
        ),
    ]
    return CardSection(
        name="stability",
        title="Agreement with itself",
        lead="A judge that contradicts itself cannot be right both times.",
        figures=[figure for figure in figures if figure.estimate.value is not None],
        notes=[
            f"{figure.label}: {figure.estimate.method}."
            for figure in figures
            if figure.estimate.value is None
        ],
    )


def _figure(
    name: str,
    label: str,
    estimate: Estimate,
    meaning: str,
    *,
    fair: float | None = None,
    high_end: float = 1.0,
    percent: bool = True,
) -> Figure:
    return Figure(
        name=f"stability.{name}",
        label=label,
        estimate=estimate,
        meaning=meaning,
        fair=fair,
        high_end=high_end,
        percent=percent,
    )


def scheme_section(arms: Sequence[Pairs], resampler: Resampler) -> CardSection | None:
    """Return how verdicts change between the templates (label schemes) of one judge, or None.

    Every two arms of the same judge are compared on the pairs and orders that both answered.
    """
    figures = []
    for left, right in itertools.combinations(arms, 2):
        if left.arm.judge == right.arm.judge:
            figures += _compare(left, right, resampler)
    if not figures:
        return None
    return CardSection(
        name="scheme",
        title="Label scheme and template",
        lead="The same pairs, asked with other labels or words. What changes is not about the "
        "answers.",
        figures=figures,
    )


def _compare(left: Pairs, right: Pairs, resampler: Resampler) -> list[Figure]:
    place = {key: row for row, key in enumerate(_keys(right))}
    rows = [(row, place[key]) for row, key in enumerate(_keys(left)) if key in place]
    if not rows:
        return []
    one, two = (np.array(side, int) for side in zip(*rows, strict=True))
    p, q = left.p[one], right.p[two]
    winner, other = left.winner[one], right.winner[two]
    known = np.isfinite(p) & np.isfinite(q)
    groups = np.repeat(left.prompt[one][:, None], 2, axis=1)
    sign = np.broadcast_to(np.array([1.0, -1.0]), p.shape)
    judge = left.arm.judge.model
    pair = f"{judge}: {left.arm.template}, {right.arm.template}"
    ending = f"{judge}:{left.arm.template}:{right.arm.template}"
    return [
        Figure(
            name=f"scheme.flips:{ending}",
            label=f"Other verdict ({pair})",
            estimate=proportion((winner != other)[known], groups[known]),
            meaning="Share of questions, in the same order, that end differently under the other "
            "template.",
            fair=0.0,
        ),
        Figure(
            name=f"scheme.change:{ending}",
            label=f"Change of probability ({pair})",
            estimate=mean(resampler, groups[known], np.abs(p - q)[known]),
            meaning="Mean absolute change of P(preferred) between the two templates.",
            fair=0.0,
            percent=False,
        ),
        Figure(
            name=f"scheme.first_label:{ending}",
            label=f"First label favoured ({pair})",
            estimate=mean(resampler, groups[known], (sign * (q - p))[known]),
            meaning="How much more the second-named template favours the first place.",
            fair=0.0,
            low_end=-0.5,
            high_end=0.5,
            percent=False,
        ),
    ]


def _keys(pairs: Pairs) -> list[tuple[int, str, str, int]]:
    return [
        (int(pairs.prompt[row]), pairs.a[row], pairs.b[row], int(pairs.repeat[row]))
        for row in range(len(pairs))
    ]
