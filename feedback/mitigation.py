"""What each remedy would do to the labels: measured before and after, on the same pairs.

A remedy turns the verdicts into P(a preferred), or into nothing where it abstains. The table sets
each beside *one order*, which is what a labeller without remedies has. ``LengthCorrection`` is also
what ``pair`` applies when it is asked for length-corrected soft labels.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import logit

from feedback.agreement import halves
from feedback.annotators import bradley_terry_judges, dawid_skene, pair_votes
from feedback.bias import model_columns, prefer_longer
from feedback.figures import CardSection, CardTable
from feedback.intervals import Resampler, average, proportion
from feedback.observations import Pairs
from feedback.records import content_id
from feedback.regression import fit_logistic, sigmoid

__all__ = ["LengthCorrection", "mitigation_section", "remedies"]

Floats = npt.NDArray[np.float64]
_TINY = 1e-6
BAND = 0.1
"""Half width of the abstaining band around one half in the table."""


@dataclass(frozen=True, slots=True)
class LengthCorrection:
    """Takes the pull of length out of a soft label: subtracts it on the logit scale."""

    coefficient: float
    """Logits per unit of tanh(difference in characters / scale)."""
    scale: float
    """Standard deviation of the difference in characters where this was fitted."""
    at_equal: tuple[str, ...] = ()
    """What was held equal besides: ``gold``, ``models``. With neither, all association with length
    goes, also the part that was right."""

    @classmethod
    def fit(cls, pairs: Pairs) -> LengthCorrection:
        """Estimate the pull from a judge's pairs, at equal gold or, without it, at equal models.

        The coefficient is the one that leaves nothing to find: a logistic regression of the
        corrected labels gives length the weight 0. The weight that the labels have uncorrected is
        too small a pull wherever the judge sees more than length: averaging over what else moved
        its logits flattens the curve (Gail, Wieand and Piantadosi 1984, Biometrika 71).

        Raises:
            ValueError: no pair has texts and a verdict.
        """
        target = pairs.mean_p
        lengths = pairs.lengths
        gap = lengths[:, 0] - lengths[:, 1]
        rows = np.isfinite(target) & np.isfinite(gap)
        gold = np.isfinite(pairs.gold)
        if (rows & gold).sum() >= 30:
            rows &= gold
        scale = float(np.std(gap[rows])) if rows.any() else 0.0
        if scale == 0:
            raise ValueError("no pair of different length has texts and a verdict")
        part = pairs.take(rows)
        held = {"models": [column for column in model_columns(part) if np.any(column)]}
        if np.isfinite(part.gold).all():
            held["gold"] = [part.gold]
        columns = [np.tanh(gap[rows] / scale), *(c for kind in held.values() for c in kind)]
        pull = _pull(np.stack(columns, axis=1), target[rows], part.prompt)
        return cls(pull, scale, tuple(sorted(kind for kind, those in held.items() if those)))

    def apply(self, p: npt.ArrayLike, length_a: npt.ArrayLike, length_b: npt.ArrayLike) -> Floats:
        """Return P(a preferred) without the pull of length; 1/2 stays 1/2 at equal lengths."""
        gap = np.asarray(length_a, float) - np.asarray(length_b, float)
        pull = self.coefficient * np.tanh(gap / self.scale)
        return sigmoid(_logits(p) - pull)


def _logits(p: npt.ArrayLike) -> Floats:
    """Return the log-odds of probabilities, those of 0 and 1 kept finite."""
    return np.asarray(logit(np.clip(np.asarray(p, float), _TINY, 1 - _TINY)))


def _pull(design: Floats, p: Floats, prompts: npt.NDArray[np.int64]) -> float:
    """Return what to take off the logits, per unit of column 0, so that its weight becomes 0."""
    logits = _logits(p)

    @functools.cache  # the search asks for both ends again
    def weight_left(pull: float) -> float:
        labels = sigmoid(logits - pull * design[:, 0])
        return float(fit_logistic(design, labels, prompts, ridge=1e-4).coefficients[0])

    # Beyond this a label of probability 0 or 1 says the opposite at a middling difference.
    most = 2 * float(np.log(1 / _TINY))
    if weight_left(-most) < 0 or weight_left(most) > 0:
        return most if weight_left(0.0) > 0 else -most
    return float(brentq(weight_left, -most, most, xtol=1e-4))


def _one_order(pairs: Pairs) -> Floats:
    """Return P(a) of one order per pair, drawn by a hash so that every run draws the same."""
    side = np.array(
        [int(content_id(a, b, length=4), 16) % 2 for a, b in zip(pairs.a, pairs.b, strict=True)],
        int,
    )
    return np.asarray(pairs.p[np.arange(len(pairs)), side])


def remedies(arms: Sequence[Pairs]) -> dict[str, Floats]:
    """Return P(a preferred) under each remedy, for the pairs of the first arm; NaN: no label."""
    pairs = arms[0]
    middle = pairs.mean_p
    both = np.where(pairs.both, middle, np.nan)
    found = {"one order (before)": _one_order(pairs), "both orders averaged": both}
    same = pairs.winner[:, 0] == pairs.winner[:, 1]
    found["consistent pairs only"] = np.where(pairs.both & same, middle, np.nan)
    found[f"abstain within {BAND} of one half"] = np.where(np.abs(both - 0.5) >= BAND, both, np.nan)
    lengths = pairs.lengths
    if np.isfinite(lengths).all(axis=1).any():
        try:
            correction = LengthCorrection.fit(pairs)
        except ValueError:
            pass
        else:
            found["length-corrected"] = correction.apply(both, lengths[:, 0], lengths[:, 1])
    found["annotator model (Dawid-Skene)"] = _by_dawid_skene(arms)
    if len(arms) > 1:
        found["panel mean"] = _panel(arms)
    found["annotator model (Bradley-Terry)"] = _by_bradley_terry(arms)
    return found


def _keys(pairs: Pairs) -> list[tuple[int, str, str]]:
    return [(int(pairs.prompt[row]), pairs.a[row], pairs.b[row]) for row in range(len(pairs))]


def _panel(arms: Sequence[Pairs]) -> Floats:
    """Return the mean probability of all judges; NaN where one of them has none."""
    tables = []
    for arm in arms[1:]:
        known = dict(zip(_keys(arm), arm.mean_p.tolist(), strict=True))
        tables.append(np.array([known.get(key, np.nan) for key in _keys(arms[0])]))
    return np.asarray(np.mean([arms[0].mean_p, *tables], axis=0))


def _by_dawid_skene(arms: Sequence[Pairs]) -> Floats:
    keys, item, annotator, label = pair_votes(arms)
    if not len(item):
        return np.full(len(arms[0]), np.nan)
    used, renumbered = np.unique(item, return_inverse=True)
    fit = dawid_skene(renumbered, annotator, label, classes=3)
    p = fit.labels[:, 2] + fit.labels[:, 1] / 2
    known = {keys[place]: float(value) for place, value in zip(used, p, strict=True)}
    return np.array([known.get(key, np.nan) for key in _keys(arms[0])])


def _by_bradley_terry(arms: Sequence[Pairs]) -> Floats:
    names: dict[tuple[int, str], int] = {}
    first, second, judge, p = [], [], [], []
    for number, pairs in enumerate(arms):
        for row, (prompt, a, b) in enumerate(_keys(pairs)):
            for order in (0, 1):
                value = float(pairs.p[row, order])
                if np.isfinite(value):
                    one, two = (names.setdefault((prompt, side), len(names)) for side in (a, b))
                    first.append(one if order == 0 else two)
                    second.append(two if order == 0 else one)
                    judge.append(number)
                    p.append(value if order == 0 else 1 - value)
    if not p:
        return np.full(len(arms[0]), np.nan)
    fit = bradley_terry_judges(np.array(first), np.array(second), np.array(judge), np.array(p))
    strength = {key: float(fit.strength[place]) for key, place in names.items()}
    gaps = [
        strength.get((prompt, a), np.nan) - strength.get((prompt, b), np.nan)
        for prompt, a, b in _keys(arms[0])
    ]
    return np.where(np.isfinite(arms[0].mean_p), sigmoid(np.array(gaps)), np.nan)


def mitigation_section(arms: Sequence[Pairs], resampler: Resampler) -> CardSection | None:
    """Return the table of remedies, or None where no pair was asked in both orders."""
    pairs = arms[0]
    if not pairs.ordered or not pairs.both.any():
        return None
    gold = np.isfinite(pairs.gold).any()
    texts = np.isfinite(pairs.lengths).all(axis=1).any()
    rows: list[list[Any]] = []
    for name, p in remedies(arms).items():
        labelled = np.isfinite(p)
        verdict = np.where(labelled, np.sign(np.round(p - 0.5, 12)), np.nan)
        row: list[Any] = [name, proportion(labelled, pairs.prompt)]
        if gold:
            score = halves(verdict, pairs.gold)
            known = np.isfinite(score)
            row.append(average(resampler, pairs.prompt[known], score[known]))
        if texts:
            row.append(prefer_longer(pairs, verdict))
        rows.append(row)
    columns = ["Remedy", "Pairs with a label"]
    columns += ["Accuracy"] if gold else []
    columns += ["Longer preferred"] if texts else []
    return CardSection(
        name="mitigation",
        title="Remedies, before and after",
        lead=f"The same verdicts of {pairs.arm.name} turned into labels in different ways.",
        tables=[
            CardTable(name="mitigation", caption="", columns=columns, rows=rows),
        ],
        notes=[
            "A remedy that abstains trades pairs for accuracy; compare it with another at the same "
            "share of pairs."
        ],
    )
