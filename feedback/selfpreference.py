"""Self-preference: is the judge kinder to its own family's answers than to others'?

With gold it is the equal-opportunity difference of 2410.21819: how often the judge finds the better
answer when it is its own, less how often it finds it when it is somebody else's. Without gold only
the win rate of its own answers can be given, which a family of good models earns honestly.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from feedback.figures import CardSection, Figure
from feedback.intervals import Estimate, Resampler, nothing, proportion
from feedback.observations import Pairs

__all__ = ["model_family", "self_preference_section"]

Mask = npt.NDArray[Any]

_FAMILIES = (
    ("pocket", r"pocket"),
    ("gpt", r"\bgpt|chatgpt|davinci|\bo[134](?:-|$)|openai"),
    ("claude", r"claude|anthropic"),
    ("gemini", r"gemini|palm|bard|gemma"),
    ("llama", r"llama|vicuna|alpaca|guanaco"),
    ("mistral", r"mistral|mixtral|ministral|codestral"),
    ("qwen", r"qwen|qwq"),
    ("deepseek", r"deepseek"),
    ("phi", r"\bphi[-\d]"),
    ("command", r"command-|cohere|aya"),
    ("yi", r"\byi[-\d]"),
    ("glm", r"glm"),
    ("falcon", r"falcon"),
    ("smollm", r"smollm"),
    ("olmo", r"olmo|tulu"),
    ("granite", r"granite"),
    ("grok", r"grok"),
)


def model_family(model: str) -> str:
    """Return the family that a model's name tells of; a name nobody knows is its own family.

    Families go by the weights they descend from, where the name shows it (Vicuna is Llama).
    """
    low = model.lower()
    for family, pattern in _FAMILIES:
        if re.search(pattern, low):
            return family
    return re.split(r"[-_:/.\s]", low.rsplit("/", 1)[-1])[0]


def self_preference_section(
    pairs: Pairs, resampler: Resampler, *, own_models: Sequence[str] = ()
) -> CardSection:
    """Return the card's part on self-preference.

    Args:
        pairs: with texts (their models are read).
        resampler: of the card.
        own_models: names that count as the judge's own; empty: all of the judge's family.
    """
    judge = pairs.arm.judge.model
    family = model_family(judge)

    def own(model: str) -> bool:
        return model in own_models if own_models else model_family(model) == family

    sides = np.array(
        [[side is not None and own(side.model) for side in pair] for pair in pairs.completions]
    ).reshape(-1, 2)
    known = np.array([None not in pair for pair in pairs.completions], bool)
    rows = known & (sides[:, 0] != sides[:, 1]) & np.isfinite(pairs.verdict) & (pairs.verdict != 0)
    if not rows.any():
        return CardSection(
            name="self_preference", title="Self-preference", notes=[_why(pairs, known)]
        )
    part = pairs.take(rows)
    side = np.where(sides[rows, 0], 1.0, -1.0)
    for_own = part.verdict == side
    figures = [
        Figure(
            name="self_preference.own_wins",
            label="Own family's answer preferred",
            estimate=proportion(for_own, part.prompt),
            meaning=f"Of pairs with one answer by the judge's own ({family}) and one by another; "
            "says nothing of quality.",
            fair=0.5,
        )
    ]
    if np.isfinite(part.gold).any():
        figures += _given_gold(part, side, for_own, resampler)
    return CardSection(
        name="self_preference",
        title="Self-preference",
        lead=f"The judge is {judge}; own answers are those of "
        + (", ".join(own_models) if own_models else f"the {family} family")
        + ".",
        figures=figures,
        notes=[]
        if len(figures) > 1
        else ["Without gold, a good family's honest wins and favouritism look alike."],
    )


def _given_gold(
    pairs: Pairs, side: Mask, for_own: Mask, resampler: Resampler
) -> list[Figure]:  # fmt: skip
    own_better = pairs.gold == side
    other_better = pairs.gold == -side
    difference = nothing("gold never prefers one of the two sides")
    if own_better.any() and other_better.any():
        columns = np.stack(
            [own_better & for_own, own_better, other_better & ~for_own, other_better], axis=1
        )
        difference = resampler.estimate(
            pairs.prompt,
            columns.astype(float),
            lambda sums: sums[:, 0] / sums[:, 1] - sums[:, 2] / sums[:, 3],
            n=int(own_better.sum() + other_better.sum()),
        )
    return [
        Figure(
            name="self_preference.equal_opportunity",
            label="Equal-opportunity difference",
            estimate=difference,
            meaning="Right when its own answer is the better one, less right when the other's is; "
            "0 is none, above 0 favours its own.",
            fair=0.0,
            low_end=-1.0,
            percent=False,
        ),
        _recall("recall_own", "Right when its own is better", for_own, own_better, pairs),
        _recall("recall_other", "Right when the other's is better", ~for_own, other_better, pairs),
    ]


def _recall(name: str, label: str, hit: Mask, rows: Mask, pairs: Pairs) -> Figure:
    estimate: Estimate = proportion(hit[rows], pairs.prompt[rows])
    return Figure(
        name=f"self_preference.{name}",
        label=label,
        estimate=estimate,
        meaning="Share of those pairs in which the judge names the better answer.",
    )


def _why(pairs: Pairs, known: Mask) -> str:
    if not known.any():
        return "The candidates' models are not at hand (--candidates), so this cannot be measured."
    return (
        f"No pair sets an answer of the judge's own family ({model_family(pairs.arm.judge.model)}) "
        "against another's: nothing to measure, and nothing to fear."
    )
