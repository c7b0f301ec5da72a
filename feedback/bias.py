"""Length and format bias: does the verdict follow what the answer says, or how it looks?

Preferring longer answers is a bias only where longer is not better; so beside the raw share stand
the effect with the candidates' models held equal and, with gold, the effect at equal gold and the
share of pairs in which the longer one *is* better.

The 30-character threshold and the raw shares follow alpaca_eval's ``analyze.py``; the tanh form of
length is AlpacaEval's length control (2404.04475); densities are Arena-Hard's style control.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from feedback.figures import CardSection, Figure
from feedback.intervals import Estimate, Resampler, difference, proportion
from feedback.observations import Pairs
from feedback.regression import coefficient, standardise
from feedback.style import ELEMENTS, StyleColumns, style_columns

__all__ = [
    "LENGTH_THRESHOLD",
    "format_section",
    "length_section",
    "model_columns",
    "prefer_longer",
]

LENGTH_THRESHOLD = 30
"""Characters that two texts must differ by before one counts as longer."""

Floats = npt.NDArray[np.float64]
_NO_TEXTS = "The texts are not at hand: give the candidates' folder (--candidates) to measure this."


def prefer_longer(pairs: Pairs, verdict: Floats | None = None) -> Estimate:
    """Return P(longer preferred) among pairs over the threshold; pairs called equal are left out.

    Args:
        pairs: with texts.
        verdict: (n,) 1, -1, 0 or NaN; None: the judge's merged verdict.
    """
    verdict = pairs.verdict if verdict is None else verdict
    lengths = pairs.lengths
    gap = lengths[:, 0] - lengths[:, 1]
    rows = (np.abs(gap) > LENGTH_THRESHOLD) & np.isfinite(verdict) & (verdict != 0)
    return proportion((gap[rows] > 0) == (verdict[rows] > 0), pairs.prompt[rows])


def length_section(pairs: Pairs, resampler: Resampler) -> CardSection:
    """Return the card's part on length."""
    lengths = pairs.lengths
    if not np.isfinite(lengths).all(axis=1).any():
        return CardSection(name="length_bias", title="Length", notes=[_NO_TEXTS])
    figures = [
        Figure(
            name="length_bias.prefer_longer",
            label="Longer answer preferred",
            estimate=prefer_longer(pairs),
            meaning=f"Of pairs more than {LENGTH_THRESHOLD} characters apart and not called "
            "equal (both orders averaged).",
            fair=0.5,
        ),
        _effect("effect", "Pull of length", _slope(pairs), "at equal models"),
    ]
    if np.isfinite(pairs.gold).any():
        figures += _given_gold(pairs, resampler)
    return CardSection(
        name="length_bias",
        title="Length",
        lead="Longer answers may be better answers. What counts is the preference that remains "
        "when quality is equal.",
        figures=figures,
    )


def _effect(name: str, label: str, estimate: Estimate, given: str) -> Figure:
    return Figure(
        name=f"length_bias.{name}",
        label=label,
        estimate=estimate,
        meaning=f"Logits per standard deviation of the length difference (tanh), {given}; 0 is "
        "none.",
        fair=0.0,
        low_end=-2.0,
        high_end=2.0,
        percent=False,
    )


def length_covariate(pairs: Pairs) -> Floats:
    """Return tanh of the standardised length difference a - b, zero where texts are unknown."""
    lengths = pairs.lengths
    gap = np.nan_to_num(lengths[:, 0] - lengths[:, 1])
    return np.tanh(standardise(gap))


def model_columns(pairs: Pairs, limit: int = 40) -> list[Floats]:
    """Return one column per model but the commonest: +1 where it wrote a, -1 where it wrote b.

    With the difference of two such columns a logistic regression is Bradley-Terry on models. Beyond
    ``limit`` models the rarest share the baseline.
    """
    names = [[side.model if side else "" for side in pair] for pair in pairs.completions]
    counts: dict[str, int] = {}
    for a, b in names:
        if a != b:
            counts[a] = counts.get(a, 0) + 1
            counts[b] = counts.get(b, 0) + 1
    common = sorted(counts, key=lambda name: -counts[name])[1 : limit + 1]
    return [np.array([float(a == model) - float(b == model) for a, b in names]) for model in common]


def _slope(pairs: Pairs, extra: list[Floats] | None = None) -> Estimate:
    target = pairs.mean_p
    rows = np.isfinite(target) & np.isfinite(pairs.lengths).all(axis=1)
    for column in extra or []:
        rows &= np.isfinite(column)
    part = pairs.take(rows)
    columns = [
        length_covariate(part),
        *(column[rows] for column in extra or []),
        *model_columns(part),
    ]
    return coefficient(columns, target[rows], part.prompt, which=0)


def _given_gold(pairs: Pairs, resampler: Resampler) -> list[Figure]:
    gold = pairs.gold
    both = np.isfinite(gold) & (gold != 0) & np.isfinite(pairs.verdict) & (pairs.verdict != 0)
    lengths = pairs.lengths
    gap = lengths[:, 0] - lengths[:, 1]
    rows = both & (np.abs(gap) > LENGTH_THRESHOLD)
    longer = np.sign(gap[rows])
    judge, people = pairs.verdict[rows] == longer, gold[rows] == longer
    excess = difference(resampler, pairs.prompt[rows], judge.astype(float) - people)
    return [
        Figure(
            name="length_bias.gold_prefers_longer",
            label="Longer answer is better (gold)",
            estimate=prefer_longer(pairs, gold),
            meaning="What the share above would be for a judge that is always right.",
        ),
        Figure(
            name="length_bias.excess",
            label="Judge less gold",
            estimate=excess,
            meaning="How much more often the judge prefers the longer one than gold does, on the "
            "same pairs.",
            fair=0.0,
            low_end=-0.5,
            high_end=0.5,
        ),
        _effect("effect_given_gold", "Pull of length at equal gold", _slope(pairs, [gold]), 
                "with the gold label held equal"),
        Figure(
            name="length_bias.accuracy_longer_is_worse",
            label="Right where the longer is worse",
            estimate=proportion(~judge[~people], pairs.prompt[rows][~people]),
            meaning="Accuracy on pairs whose better answer is the shorter one.",
        ),
    ]  # fmt: skip


# --- format ----------------------------------------------------------------------------------


def format_section(pairs: Pairs) -> CardSection:
    """Return the card's part on lists, headers, bold and code."""
    style = style_columns(pairs)
    if not style.rows.any():
        return CardSection(name="format_bias", title="Format", notes=[_NO_TEXTS])
    part = pairs.take(style.rows)
    figures = [figure for name in ELEMENTS for figure in _element(part, style, name)]
    notes = []
    if missing := [name for name in ELEMENTS if not style.has(name).any()]:
        notes.append(f"No candidate uses {', '.join(missing)}: nothing to measure there.")
    return CardSection(
        name="format_bias",
        title="Format",
        lead="Lists, headers, bold type and code where only one of the two answers uses them, and "
        "the pull of each with length and models held equal.",
        figures=figures,
        notes=notes,
    )


def _element(pairs: Pairs, style: StyleColumns, name: str) -> list[Figure]:
    has = style.has(name)
    if not has.any():
        return []
    verdict = pairs.verdict
    rows = (has[:, 0] != has[:, 1]) & np.isfinite(verdict) & (verdict != 0)
    words = {"list": "a list", "header": "headers", "bold": "bold type", "code": "code"}[name]
    figures = [
        Figure(
            name=f"format_bias.prefer_{name}",
            label=f"Answer with {words} preferred",
            estimate=proportion(has[rows, 0] == (verdict[rows] > 0), pairs.prompt[rows]),
            meaning=f"Of pairs in which exactly one answer has {words}, not called equal.",
            fair=0.5,
        )
    ]
    known = np.isfinite(pairs.mean_p) & np.isfinite(style.contrast(name))
    part = pairs.take(known)
    columns = [standardise(style.contrast(other)[known]) for other in ("words", *ELEMENTS)]
    effect = coefficient(
        [*columns, *model_columns(part)],
        part.mean_p,
        part.prompt,
        which=1 + ELEMENTS.index(name),
    )
    figures.append(
        Figure(
            name=f"format_bias.effect_{name}",
            label=f"Pull of {words}",
            estimate=effect,
            meaning="Logits per standard deviation of its density, length, models and the other "
            "elements held equal.",
            fair=0.0,
            low_end=-2.0,
            high_end=2.0,
            percent=False,
        )
    )
    return figures
