"""The page of an A/B test: what was concluded, the arms side by side, the disagreements to read."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

import numpy as np
from markupsafe import Markup

from feedback.page.components import (
    Cell,
    FigureRow,
    Section,
    figure_table,
    note,
    paragraph,
    side_by_side,
    table,
)
from feedback.page.shell import render_page
from feedback.templates import render_prompt

if TYPE_CHECKING:
    from feedback.abtest import AbtestOptions
    from feedback.abtest_decisions import Comparison
    from feedback.abtest_run import Result

__all__ = ["abtest_page"]

_DISAGREEMENTS = 12
_WORDS = {
    "better": "The arm is right more often than the baseline.",
    "worse": "The arm is right less often than the baseline.",
    "equivalent": "The difference lies within the margin that does not matter.",
    "undecided": "These pairs do not tell.",
}
_FIGURES = (
    ("accuracy", "Accuracy", "Share of gold winners named; ties by the judge count one half.", 0.5),
    ("kappa", "Cohen's kappa", "Agreement with gold beyond chance.", 0.0),
    ("order_consistency", "Same verdict in both orders", "1 is a judge that order never moves.", 1),
    ("prefers_longer", "Longer answer preferred", "One half is no pull of length.", 0.5),
    ("ece", "Calibration error", "Mean gap between stated confidence and share right.", 0.0),
    ("answered", "Pairs answered", "Pairs with a verdict that could be read.", 1.0),
)


def abtest_page(options: AbtestOptions, result: Result) -> str:
    """Return the page as text."""
    return render_page(
        title="Judges, compared",
        kicker="A/B test",
        subtitle=f"{len(result.names)} arms on the same {len(result.items):,} gold pairs",
        facts=[
            ("baseline", result.names[0]),
            ("margin", f"{options.margin:.1%}"),
            ("level", f"{options.alpha:g} over all arms"),
            ("looks", str(options.looks)),
            ("date", datetime.date.today().isoformat()),
        ],
        sections=[_conclusions(result), _arms(result), _costs(result), _disagreements(result)],
    )


def _conclusions(result: Result) -> Section:
    blocks = [_conclusion_table(result.comparisons)]
    blocks += [note(text) for text in result.notes]
    return Section("conclusions", "What can be said", blocks=blocks)


def _conclusion_table(comparisons: list[Comparison]) -> Markup:
    rows = []
    for found in comparisons:
        evidence = f"p = {found.p_adjusted:.3g}"
        if found.e_value is not None:
            evidence = f"e = {found.e_value:.3g}"
        need = ""
        if found.need_more is not None:
            need = f" About {found.need_more:,} more pairs like these would."
        rows.append(
            [
                found.arm,
                found.conclusion,
                Cell(found.difference, percent=True),
                f"{found.counts.only_second} : {found.counts.only_first}",
                f"{evidence} ({found.test})",
                _WORDS[found.conclusion] + need,
            ]
        )
    columns = ["arm", "conclusion", "accuracy difference", "right alone", "evidence", "meaning"]
    return table(columns, rows, caption="Each arm against the baseline")


def _arms(result: Result) -> Section:
    blocks = []
    for field, label, meaning, fair in _FIGURES:
        figures = [
            FigureRow(
                label=arm.name, estimate=getattr(arm, field), meaning=meaning, fair=fair,
                percent=field != "kappa", name=field,
                scale=(-1.0, 1.0) if field == "kappa" else (0.0, 1.0),
            )
            for arm in result.figures
        ]  # fmt: skip
        blocks.append(figure_table(figures, caption=label))
    return Section("arms", "The arms side by side", blocks=blocks)


def _costs(result: Result) -> Section:
    rows = [
        [
            arm.name,
            f"{arm.calls:,}",
            f"{arm.prompt_tokens / max(arm.calls, 1):,.0f}",
            f"{arm.completion_tokens / max(arm.calls, 1):,.1f}",
            f"{arm.cost:.4f}",
            f"{arm.seconds:,.1f}",
        ]
        for arm in result.figures
    ]
    columns = ["arm", "calls", "prompt tokens a call", "reply tokens a call", "US dollars",
               "seconds of calls"]  # fmt: skip
    return Section("costs", "What the arms cost", blocks=[table(columns, rows)])


def _disagreements(result: Result) -> Section:
    """Show pairs on which an arm and the baseline differ, the arm's wins and losses in turn."""
    blocks: list[Markup] = []
    spread = np.nanmax(result.scores, axis=1) - np.nanmin(
        np.where(np.isfinite(result.scores), result.scores, np.inf), axis=1
    )
    for place in np.argsort(-spread, kind="stable")[:_DISAGREEMENTS]:
        if not spread[place] > 0:
            break
        item = result.items[place]
        right = [name for name, score in zip(result.names, result.scores[place], strict=True)
                 if score == 1]  # fmt: skip
        wrong = [name for name, score in zip(result.names, result.scores[place], strict=True)
                 if score < 1]  # fmt: skip
        blocks.append(
            side_by_side(
                render_prompt(item.candidates.prompt),
                [("first", item.first.completion), ("second", item.second.completion)],
                remark=f"gold names the marked one; right: {', '.join(right) or 'none'}; "
                f"not right: {', '.join(wrong) or 'none'}",
                mark=0 if item.gold.label == "a" else 1,
            )
        )
    if not blocks:
        blocks = [paragraph("The arms agree on every pair.")]
    return Section("disagreements", "Disagreements to read", blocks=blocks)
