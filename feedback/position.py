"""Position bias: does the verdict follow the answer, or the place where it stood?

Verdicts are compared in candidate space: a judge that says "A" and, after the swap, "B" means the
same completion both times. Ties: a tie is a verdict of its own unless a figure's name ends in
``decided``, where pairs with a tie in either order are left out. Both conventions are in use, give
different numbers, and are named.

Sources: same-winner and per-slot shares MT-Bench (2306.05685); conflict rate FairEval (2305.17926);
same slot in both orders RLAIF (2309.00267); preference fairness 2406.07791.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from feedback.figures import CardSection, Figure
from feedback.intervals import Estimate, Resampler, difference, mean, nothing, proportion
from feedback.observations import Pairs

__all__ = ["logit_shift", "order_consistency", "position_section", "slot_counts"]

Masks = dict[str, npt.NDArray[np.bool_]]
_TINY = 1e-6


def order_consistency(pairs: Pairs) -> Estimate:
    """Return the share of pairs, asked in both orders, with the same verdict in both; ties kept."""
    rows = pairs.take(pairs.swapped)
    return proportion(rows.winner[:, 0] == rows.winner[:, 1], rows.prompt)


def slot_counts(pairs: Pairs) -> Masks:
    """Return masks over the pairs asked in both orders: which slot was preferred in which way.

    ``first`` and ``second``: the same slot in both orders. ``first_once`` and ``second_once``: that
    slot in one order and a tie in the other. ``same``: the same verdict in candidate space.
    """
    winner = pairs.winner[pairs.swapped]
    first = (winner[:, 0] == 1) & (winner[:, 1] == -1)
    second = (winner[:, 0] == -1) & (winner[:, 1] == 1)
    tie_once = (winner == 0).sum(axis=1) == 1
    for_first = (winner[:, 0] == 1) | (winner[:, 1] == -1)
    return {
        "first": first,
        "second": second,
        "first_once": tie_once & for_first,
        "second_once": tie_once & ~for_first,
        "same": winner[:, 0] == winner[:, 1],
    }


def logit_shift(pairs: Pairs, resampler: Resampler) -> Estimate:
    """Estimate how many logits the first place is worth, whatever the answers' quality.

    The model: P(first place) is sigma(quality + shift) in one order and sigma(-quality + shift) in
    the other. From probabilities, the shift is the mean of the two logits. From bare verdicts, the
    odds of naming the first place twice rather than the second place twice are exp(2 shift)
    whatever the quality; so the shift is half the log odds of those two counts, and its interval is
    that of a binomial share.
    """
    rows = pairs.take(pairs.swapped)
    logits = _first_logits(rows)
    if len(logits) and np.isfinite(logits).all():
        return mean(resampler, rows.prompt, logits.mean(axis=1))
    counts = slot_counts(pairs)
    chosen = counts["first"] | counts["second"]
    share = proportion(counts["first"][chosen], rows.prompt[chosen])
    if share.value is None or share.low is None or share.high is None:
        return nothing("no pair named the same place twice")

    def half_log_odds(value: float) -> float:
        return math.log(value / (1 - value)) / 2 if 0 < value < 1 else math.copysign(9.0, value - 1)

    # A half is added to each count, so that a judge that never chose one place has a finite shift.
    middle = (share.value * share.n + 0.5) / (share.n + 1)
    return Estimate(
        half_log_odds(middle),
        half_log_odds(share.low),
        half_log_odds(share.high),
        share.n,
        share.prompts,
        f"from the share of first among same-place pairs, {share.method}",
    )


def _first_logits(pairs: Pairs) -> npt.NDArray[np.float64]:
    """Return log P(first place) - log P(second place) of each verdict: (n, 2); NaN without."""
    return np.array(
        [
            [
                np.nan
                if verdict is None or verdict.probs is None
                else math.log(max(verdict.probs[0], _TINY) / max(verdict.probs[1], _TINY))
                for verdict in pair
            ]
            for pair in pairs.verdicts
        ],
        float,
    ).reshape(-1, 2)


def position_section(pairs: Pairs, resampler: Resampler) -> CardSection:
    """Return the card's part on position bias."""
    rows = pairs.take(pairs.swapped)
    if not len(rows):
        known = pairs.ordered and pairs.order_known.any()
        return CardSection(
            name="position_bias",
            title="Position",
            figures=[_single_order(pairs)] if known else [],
            notes=[
                "No pair was asked in both orders; the share of first-place verdicts is all that "
                "can be said."
                if known
                else "Which answer stood first is not known (or, for ratings, means nothing)."
            ],
        )
    counts = slot_counts(pairs)
    figures = [
        *_consistency(pairs, rows, counts),
        *_slots(rows, counts),
        *_direction(pairs, rows, counts, resampler),
    ]
    return CardSection(
        name="position_bias",
        title="Position",
        lead="The same pair in both orders. A fair judge names the same answer, not the same "
        "place.",
        figures=figures,
    )


def _figure(
    name: str,
    label: str,
    estimate: Estimate,
    meaning: str,
    *,
    fair: float | None = None,
    low_end: float = 0.0,
    high_end: float = 1.0,
    percent: bool = True,
) -> Figure:
    return Figure(
        name=f"position_bias.{name}",
        label=label,
        estimate=estimate,
        meaning=meaning,
        fair=fair,
        low_end=low_end,
        high_end=high_end,
        percent=percent,
    )


def _consistency(pairs: Pairs, rows: Pairs, counts: Masks) -> list[Figure]:
    decided = (rows.winner != 0).all(axis=1)
    return [
        _figure(
            "order_consistency",
            "Same verdict in both orders",
            order_consistency(pairs),
            "Of pairs with a verdict in both orders; a tie is a verdict (ties kept).",
            fair=1.0,
        ),
        _figure(
            "order_consistency_decided",
            "The same, ties removed",
            proportion(counts["same"][decided], rows.prompt[decided]),
            "Of pairs decided in both orders (pairs with a tie left out).",
            fair=1.0,
        ),
        _figure(
            "conflict_rate",
            "Conflict rate",
            proportion(~counts["same"], rows.prompt),
            "Another verdict after the swap, ties kept; one minus the first line.",
            fair=0.0,
        ),
    ]


def _slots(rows: Pairs, counts: Masks) -> list[Figure]:
    rest = ~counts["same"]
    made = [
        _figure(
            f"{slot}_slot_both",
            f"{word} slot both times",
            proportion(counts[slot], rows.prompt),
            f"The {word.lower()} place won whichever answer stood there; share of all pairs.",
            fair=0.0,
        )
        for slot, word in (("first", "First"), ("second", "Second"))
    ]
    made += [
        _figure(
            f"{slot}_slot_of_rest",
            f"{word} slot, of the rest",
            proportion(counts[slot][rest], rows.prompt[rest]),
            f"Of pairs whose verdict changed: the {word.lower()} place won both times (the "
            "remainder was a tie in one order).",
        )
        for slot, word in (("first", "First"), ("second", "Second"))
    ]
    return made


def _direction(
    pairs: Pairs,
    rows: Pairs,
    counts: Masks,
    resampler: Resampler,
) -> list[Figure]:
    recency = (counts["second"] | counts["second_once"]).astype(float)
    primacy = (counts["first"] | counts["first_once"]).astype(float)
    # P(first slot) averaged over both orders, less one half.
    bonus = (rows.p[:, 0] + 1 - rows.p[:, 1]) / 2 - 0.5
    figures = [
        _figure(
            "preference_fairness",
            "Preference fairness (PF)",
            difference(resampler, rows.prompt, recency - primacy),
            "Recency minus primacy over all pairs: -1 always the first place, +1 always the "
            "second, 0 no direction.",
            fair=0.0,
            low_end=-1.0,
            percent=False,
        ),
        _single_order(pairs),
        _figure(
            "logit_shift",
            "What the first place is worth",
            logit_shift(pairs, resampler),
            "In logits, whatever the answers' quality; 0 is fair, 1 turns 50% into 73%.",
            fair=0.0,
            low_end=-3.0,
            high_end=3.0,
            percent=False,
        ),
    ]
    if pairs.soft:
        figures += [
            _figure(
                "probability_bonus",
                "Probability gained by the first place",
                mean(resampler, rows.prompt, bonus),
                "Mean of P(first place) less one half, over both orders.",
                fair=0.0,
                low_end=-0.5,
                high_end=0.5,
                percent=False,
            ),
            _figure(
                "swing",
                "Swing of the probability",
                mean(resampler, rows.prompt, np.abs(rows.p[:, 0] - rows.p[:, 1])),
                "Mean change of P(preferred) when the answers change places.",
                fair=0.0,
                percent=False,
            ),
        ]
    return figures


def _single_order(pairs: Pairs) -> Figure:
    """P(prefer the first slot) over single decided verdicts, orders pooled."""
    decided = np.isfinite(pairs.winner) & (pairs.winner != 0) & pairs.order_known
    first = np.where([True, False], pairs.winner == 1, pairs.winner == -1)
    groups = np.repeat(pairs.prompt[:, None], 2, axis=1)
    return _figure(
        "first_slot_share",
        "First place preferred",
        proportion(first[decided], groups[decided]),
        "Share of single decided verdicts for the first place, both orders pooled; one half is "
        "fair.",
        fair=0.5,
    )
