"""The A/B test itself: checks, looks, halving, and what is written at the end."""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feedback.abtest import AbtestOptions
from feedback.abtest_arms import Arm, GoldItem, arm_names, arm_pairs, gold_items, open_arms
from feedback.abtest_decisions import Comparison, compare_arms
from feedback.abtest_figures import ArmFigures, arm_figures, arm_scores
from feedback.config import recipe_of
from feedback.errors import InputError
from feedback.installed import package_versions
from feedback.paired import mcnemar_power, needed_items
from feedback.progress import say
from feedback.records import normalise_text, prompt_messages
from feedback.shards import KINDS, folder_kind, read_rows, write_json, write_text

__all__ = ["Result", "abtest"]

Floats = npt.NDArray[np.float64]


class Result(NamedTuple):
    """Everything that the JSON and the page show."""

    figures: list[ArmFigures]
    comparisons: list[Comparison]
    items: list[GoldItem]
    scores: Floats
    """(pairs used, arms): 1, 0.5, 0, NaN."""
    names: list[str]
    notes: list[str]


def abtest(options: AbtestOptions) -> Result | None:
    """Run the test; None after ``--plan``.

    Raises:
        InputError: gold, candidates or arms cannot answer the question.
        RecipeError: fewer than two arms, or identical ones.
    """
    names = arm_names(options.arms)
    items = gold_items(options)
    _check_training(options, items)
    for line in _plan_lines(options, len(items), len(names)):
        say(line)
    if options.plan:
        return None
    with open_arms(options, names) as arms:
        survivors, used, notes = _ask(options, arms, items)
        scores = _scores(options, survivors, used)
        _check_answers(survivors, scores, options)
        comparisons = _compare(options, survivors, used, scores)
        figures = _figures(options, survivors, len(used))
        for arm in arms:
            arm.finish()
    notes += _coin_notes(figures)
    result = Result(figures, comparisons, used, scores, [arm.name for arm in survivors], notes)
    _write(options, result)
    return result


def _check_training(options: AbtestOptions, items: Sequence[GoldItem]) -> None:
    """Refuse gold prompts that training or tuning has seen."""
    mine = {_normal(item.candidates.prompt): item.gold.prompt_id for item in items}
    for source in options.training:
        kind = "prompts" if source.is_file() else folder_kind(source)
        rows: Iterator[Any] = read_rows(source, KINDS[kind])
        shared = {mine[text] for text in map(_normal, (row.prompt for row in rows)) if text in mine}
        if shared:
            raise InputError(
                f"shares {len(shared)} prompts with the gold pairs ({min(shared)!r}, ...): a "
                "template tuned on them would look better than it is; leave them out of one side",
                path=source,
            )


def _normal(prompt: Any) -> str:
    return normalise_text("\n".join(turn["content"] for turn in prompt_messages(prompt)))


def _plan_lines(options: AbtestOptions, pairs: int, arms: int) -> list[str]:
    """Return what the pairs at hand can show, and what the margin needs."""
    pairs, compared = _reach(options, pairs, arms)
    alpha = options.alpha / max(compared - 1, 1)
    rate, margin = options.expected_rate, options.margin
    need = needed_items(rate=rate, difference=margin, alpha=alpha, power=options.power)
    reached = mcnemar_power(pairs, rate=rate, difference=margin, alpha=alpha)
    lines = [
        f"{pairs:,} gold pairs to compare {compared} arms on; if exactly one of two arms is right "
        f"on {rate:.0%} of pairs, a difference of {margin:.1%} is found with probability "
        f"{reached:.0%}; {options.power:.0%} needs {need:,} pairs",
    ]
    if options.plan:
        for difference in (0.02, 0.05, 0.1):
            if difference <= rate:
                count = needed_items(
                    rate=rate, difference=difference, alpha=alpha, power=options.power
                )
                lines.append(f"  a difference of {difference:.0%}: {count:,} pairs")
    elif reached < 0.5:
        lines.append(
            "warning: with so few pairs the likely answer is 'undecided'; more gold pairs "
            "(rlaif annotate) or a wider --margin would change that"
        )
    return lines


def _reach(options: AbtestOptions, pairs: int, arms: int) -> tuple[int, int]:
    """Return how many pairs the comparison will have at most, and how many arms."""
    halving = options.halving and arms > 2
    compared = 2 if halving else arms
    pairs = pairs - pairs // 2 if halving else pairs
    if options.max_calls is not None:
        calls = options.max_calls - options.max_calls // 2 if halving else options.max_calls
        pairs = min(pairs, max(calls // (2 * compared), 1))
    return pairs, compared


def _ask(
    options: AbtestOptions, arms: Sequence[Arm], items: list[GoldItem]
) -> tuple[list[Arm], list[GoldItem], list[str]]:
    """Ask the arms; return those that were compared, the pairs they were compared on, and notes."""
    notes: list[str] = []
    calls = options.max_calls
    survivors = list(arms)
    if options.halving and len(arms) > 2:
        half = _boundary(items, len(items) // 2)
        spend = None if calls is None else calls // 2
        survivors = _halve(options, survivors, items[:half], spend, notes)
        items = items[half:]
        calls = None if calls is None else calls - (calls // 2)
    if calls is not None:
        items = items[: max(calls // (2 * len(survivors)), 1)]
    ends = [round(len(items) * look / options.looks) for look in range(1, options.looks + 1)]
    used = items
    for look, end in enumerate(ends, start=1):
        used = items[: _boundary(items, end)]
        for arm in survivors:
            arm.ask(used)
        if look == options.looks:
            break
        found = _compare(options, survivors, used, _scores(options, survivors, used))
        if all(comparison.conclusion != "undecided" for comparison in found):
            notes.append(f"stopped at look {look} of {options.looks}: every arm is decided")
            break
    return survivors, used, notes


def _boundary(items: Sequence[GoldItem], end: int) -> int:
    """Return the end of the prompt that ``end`` falls into: looks never split a prompt."""
    while 0 < end < len(items) and items[end].gold.prompt_id == items[end - 1].gold.prompt_id:
        end += 1
    return end


def _halve(
    options: AbtestOptions,
    arms: list[Arm],
    items: list[GoldItem],
    calls: int | None,
    notes: list[str],
) -> list[Arm]:
    """Successive halving (Jamieson and Talwalkar 2016): each round twice the pairs, half the arms.

    The baseline is never dropped. The pairs used here are not used in the comparison.
    """
    baseline, rivals = arms[0], arms[1:]
    rounds = max(math.ceil(math.log2(len(rivals))), 1)
    budget = 2 * len(items) * len(arms) if calls is None else calls
    for turn in range(rounds):
        share = budget // (rounds * (len(rivals) + 1) * 2)
        used = items[: _boundary(items, max(min(share, len(items)), 1))]
        for arm in (baseline, *rivals):
            arm.ask(used)
        scores = np.nan_to_num(_scores(options, rivals, used), nan=0.0).mean(axis=0)
        keep = np.argsort(-scores, kind="stable")[: math.ceil(len(rivals) / 2)]
        dropped = [arm.name for place, arm in enumerate(rivals) if place not in keep]
        rivals = [rivals[place] for place in sorted(keep)]
        notes.append(f"halving round {turn + 1}, {len(used)} pairs: dropped {', '.join(dropped)}")
        if len(rivals) == 1:
            break
    return [baseline, *rivals]


def _scores(options: AbtestOptions, arms: Sequence[Arm], items: Sequence[GoldItem]) -> Floats:
    keys = [item.key for item in items]
    columns = []
    for arm in arms:
        pairs = arm_pairs(arm, options)
        columns.append(np.full(len(keys), np.nan) if pairs is None else arm_scores(pairs, keys))
    return np.stack(columns, axis=1)


def _check_answers(arms: Sequence[Arm], scores: Floats, options: AbtestOptions) -> None:
    """Refuse arms without any verdict: a comparison with them would say nothing."""
    for place, arm in enumerate(arms):
        if not np.isfinite(scores[:, place]).any():
            raise InputError(
                f"arm {arm.name!r} gave no verdict on any of {len(scores)} pairs; its replies are "
                f"in {arm.folder} (rlaif report shows why)"
            )


def _compare(
    options: AbtestOptions, arms: Sequence[Arm], items: Sequence[GoldItem], scores: Floats
) -> list[Comparison]:
    place: dict[str, int] = {}
    prompts = np.array([place.setdefault(item.gold.prompt_id, len(place)) for item in items])
    return compare_arms(
        [arm.name for arm in arms], scores, prompts, margin=options.margin, alpha=options.alpha,
        power=options.power, sequential=options.looks > 1, seed=options.seed,
    )  # fmt: skip


def _figures(options: AbtestOptions, arms: Sequence[Arm], total: int) -> list[ArmFigures]:
    found = []
    for arm in arms:
        pairs = arm_pairs(arm, options)
        if pairs is not None:
            found.append(arm_figures(arm.name, pairs, total, seed=options.seed))
    return found


def _coin_notes(figures: Sequence[ArmFigures]) -> list[str]:
    """Return what must be said of arms that are no better than a coin: they rank nothing."""
    low = [arm.name for arm in figures if (arm.accuracy.high or 1.0) < 0.5]
    unclear = [arm.name for arm in figures if (arm.accuracy.low or 0.0) <= 0.5]
    unclear = [name for name in unclear if name not in low]
    notes = []
    if low:
        notes.append(f"right less often than a coin on this gold: {', '.join(low)}")
    if unclear:
        notes.append(f"not shown to be better than a coin on this gold: {', '.join(unclear)}")
    return notes


def _write(options: AbtestOptions, result: Result) -> None:
    """Write JSON and page, and print the outcome."""
    from feedback.page.abtest_page import abtest_page

    write_json(
        options.out / "abtest.json",
        {
            "date": datetime.date.today().isoformat(),
            "pairs": len(result.items),
            "arms": [figures.to_dict() for figures in result.figures],
            "comparisons": [comparison.to_dict() for comparison in result.comparisons],
            "notes": result.notes,
            "recipe": recipe_of(options),
            "versions": package_versions(),
        },
    )
    write_text(options.out / "abtest.html", abtest_page(options, result))
    for comparison in result.comparisons:
        say(_sentence(comparison))
    for note in result.notes:
        say(note)
    say(f"page: {options.out / 'abtest.html'}")


def _sentence(found: Comparison) -> str:
    need = ""
    if found.conclusion == "undecided":
        need = "; how many more pairs it needs cannot be told from these"
    if found.need_more is not None:
        need = f"; needs about {found.need_more:,} more pairs like these"
    evidence = f"p = {found.p_adjusted:.3g} ({found.test}, Holm)"
    if found.e_value is not None:
        evidence = f"e = {found.e_value:.3g} ({found.test})"
    return (
        f"{found.arm} is {found.conclusion}{need}: accuracy difference to {found.baseline} "
        f"{found.difference}, right alone {found.counts.only_second} against "
        f"{found.counts.only_first}, {evidence}"
    )
