"""What a report card's figures say, in sentences.

Each sentence is chosen by where the 95% interval lies: beyond the fair value the bias is stated
with its direction; across it, no bias is claimed and the interval says how large one could still
be. Nothing is said of what was not measured, except that it was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from feedback.intervals import Estimate
from feedback.markdown import code

__all__ = ["bias_sentences", "unmeasured"]

Figures = Mapping[str, Estimate]


class _Lean(NamedTuple):
    """A figure with a fair value, and the words for each side of it."""

    figure: str
    fair: float
    above: str
    below: str
    neither: str
    percent: bool = True


_LEANS = (
    _Lean(
        "position_bias.preference_fairness",
        0.0,
        "leans towards the reply shown second: over all pairs, the share of verdicts that stay "
        "with the second place exceeds that of the first by",
        "leans towards the reply shown first: preference fairness (0 fair, -1 always the first) is",
        "shows no lean towards a place that these data can prove: preference fairness (0 fair, -1 "
        "always first, 1 always second) is",
        percent=False,
    ),
    _Lean(
        "length_bias.excess",
        0.0,
        "prefers the longer reply more often than gold does, by",
        "prefers the longer reply less often than gold does: the difference is",
        "prefers the longer reply as often as gold does, as far as these data can tell: the "
        "difference is",
    ),
    _Lean(
        "length_bias.prefer_longer",
        0.5,
        "prefers the longer reply, be it for its length or its content: of pairs of clearly "
        "different length, the longer won",
        "prefers the shorter reply, be it for its length or its content: of pairs of clearly "
        "different length, the longer won",
        "prefers neither the longer nor the shorter reply provably: of pairs of clearly different "
        "length, the longer won",
    ),
    _Lean(
        "length_bias.effect",
        0.0,
        "is pulled towards length, models held equal; in logits per standard deviation of the "
        "length difference,",
        "is pulled towards brevity, models held equal; in logits per standard deviation of the "
        "length difference,",
        "has no pull of length that these data can prove; in logits per standard deviation of the "
        "length difference,",
        percent=False,
    ),
    _Lean(
        "self_preference.equal_opportunity",
        0.0,
        "favours replies of its own model family; the equal-opportunity difference is",
        "disfavours replies of its own model family; the equal-opportunity difference is",
        "neither favours nor disfavours its own model family provably; the equal-opportunity "
        "difference is",
    ),
    _Lean(
        "agreement.accuracy",
        0.5,
        "agrees with gold more often than chance:",
        "agrees with gold less often than chance:",
        "agrees with gold no more often than chance, as far as these data can tell:",
    ),
    _Lean(
        "agreement.judge_less_human",
        0.0,
        "agrees with people better than one more person would, by",
        "agrees with people less well than one more person would: the difference is",
        "agrees with people about as well as one more person would: the difference is",
    ),
)

_FORMATS = {"list": "lists", "header": "headers", "bold": "bold type", "code": "code"}

_PARTS = {
    "agreement": "agreement with gold or with people (there are no gold labels)",
    "position_bias": "position bias",
    "length_bias": "length bias",
    "format_bias": "bias for lists, headers, bold type or code",
    "self_preference": "preference for its own model family",
    "stability.same_again": "the same answer when asked again",
    "probe": "resistance to scripted perturbations and injected instructions",
}


def bias_sentences(figures: Figures, *, orders: object = None) -> list[str]:
    """Return what one judge's figures say, a sentence each, in markdown.

    Args:
        figures: estimate by figure name.
        orders: how the pairs were asked (``both`` or ``one``), where it is known.
    """
    return [f"{line}" for part in (_calls, _orders, _leans, _formats, _others)
            for line in part(figures, orders)]  # fmt: skip


def unmeasured(figures: Figures) -> list[str]:
    """Return in words which parts of the report card have no figure."""
    return [words for part, words in _PARTS.items() if not any(n.startswith(part) for n in figures)]


def _shown(estimate: Estimate, percent: bool = True) -> str:
    def number(value: float) -> str:
        return f"{value:.1%}" if percent else f"{value:.3f}"

    assert estimate.value is not None
    known = estimate.low is not None and estimate.high is not None
    span = (
        f"95% interval {number(estimate.low or 0)} to {number(estimate.high or 0)}, "
        if known
        else ""
    )
    return f"{number(estimate.value)} ({span}n = {estimate.n:,})"


def _calls(figures: Figures, _: object) -> Iterator[str]:
    rate = figures.get("outcomes.parse_rate")
    if rate is not None and rate.value is not None and rate.value < 1:
        yield (
            f"Not every answer was a verdict: {_shown(rate)} were. The rest became no label, and "
            "what a judge refuses or garbles is rarely missing at random."
        )
    mass = figures.get("outcomes.mass")
    if mass is not None and mass.value is not None and mass.value < 0.9:
        yield (
            "The judge often wanted to say something else than a label: the mean probability on "
            f"the offered labels was {_shown(mass, percent=False)}."
        )


def _orders(figures: Figures, orders: object) -> Iterator[str]:
    same = figures.get("position_bias.order_consistency")
    if same is None or same.value is None:
        return
    line = f"The judge gave the same verdict in both orders of a pair in {_shown(same)} of pairs."
    if same.value < 1 and orders == "both":
        line += " Of the others the label is the mean of two verdicts that disagree."
    yield line


def _leans(figures: Figures, _: object) -> Iterator[str]:
    for lean in _LEANS:
        estimate = figures.get(lean.figure)
        if estimate is None or estimate.value is None:
            continue
        if lean.figure == "length_bias.prefer_longer" and "length_bias.excess" in figures:
            continue
        words = _side(estimate, lean.fair, lean.above, lean.below, lean.neither)
        yield f"The judge {words} {_shown(estimate, lean.percent)}."


def _side(estimate: Estimate, fair: float, above: str, below: str, neither: str) -> str:
    """Return the words for where the interval lies; without an interval nothing is proved."""
    if estimate.low is None or estimate.high is None:
        return neither
    return above if estimate.low > fair else below if estimate.high < fair else neither


def _formats(figures: Figures, _: object) -> Iterator[str]:
    for name, words in _FORMATS.items():
        estimate = figures.get(f"format_bias.prefer_{name}")
        if estimate is None or estimate.value is None:
            continue
        side = _side(
            estimate, 0.5, "prefers", "disfavours", "neither prefers nor disfavours provably"
        )
        yield (
            f"The judge {side} replies with {words}, be it for that or for what they say: where "
            f"only one of the two has them, it won {_shown(estimate)}."
        )


def _others(figures: Figures, _: object) -> Iterator[str]:
    cycles = figures.get("stability.cycles")
    if cycles is not None and cycles.value:
        yield (
            f"The judge contradicts itself in circles (a beats b, b beats c, c beats a) in "
            f"{_shown(cycles)} of the triples it decided; coin flips give 25%."
        )
    error = figures.get("agreement.ece")
    if error is not None and error.value is not None:
        yield (
            "Its probabilities miss the share that is right by "
            f"{_shown(error)} on average (calibration error, before any calibration)."
        )
    for name, estimate in sorted(figures.items()):
        for part, words in _PROBES.items():
            if name.startswith(part) and estimate.value is not None:
                yield f"{words(name.removeprefix(part))} {_shown(estimate)} of verdicts."


_PROBES: dict[str, Callable[[str], str]] = {
    "probe.robustness.": lambda probe: f"Under the scripted change {code(probe)}, the judge kept",
    "probe.injection.": lambda probe: f"The injected instruction {code(probe)} turned",
}
