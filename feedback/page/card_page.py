"""The report card as a page: headline figures, a section per bias, every verdict to browse."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from feedback.card import ArmCard, ReportCard, read_card
from feedback.figures import CardSection, CardTable, Figure
from feedback.gate import GateResult, GateRow
from feedback.intervals import Estimate
from feedback.observations import Material, Pairs
from feedback.page.browser import PairView, VerdictView, browser
from feedback.page.components import (
    Cell,
    FigureRow,
    Section,
    figure_table,
    fold,
    headline,
    note,
    plot,
    plots,
    table,
)
from feedback.page.plots import histogram_plot, interval_plot, reliability_plot
from feedback.page.shell import render_page
from feedback.page.text import conversation
from feedback.records import Verdict

__all__ = [
    "browser_section",
    "card_page",
    "card_sections",
    "figure_row",
    "pair_views",
    "section_blocks",
]

_HEADLINE = (
    "agreement.accuracy",
    "position_bias.order_consistency",
    "length_bias.excess",
    "length_bias.prefer_longer",
    "outcomes.parse_rate",
    "position_bias.preference_fairness",
    "self_preference.equal_opportunity",
)
States = Mapping[tuple[str, str], str]


def card_page(
    card: ReportCard,
    gate: GateResult,
    arms: Sequence[Pairs],
    material: Material,
    *,
    browse_rows: int = 10_000,
) -> str:
    """Return the page's HTML."""
    states = {
        (row.arm, row.name): "accepted"
        if row.state == "fail" and row not in gate.refused
        else row.state
        for row in gate.rows
    }
    several = len(card.arms) > 1
    gate_section = _gate_section(gate, card, states)
    sections = [gate_section] if several else [_overview(card.arms[0], states, ""), gate_section]
    for number, (arm, pairs) in enumerate(zip(card.arms, arms, strict=True)):
        prefix = f"arm{number}-" if several else ""
        if several:
            sections.append(_overview(arm, states, prefix))
        sections += _arm_sections(arm, pairs, states, prefix)
    sections += [_section(section, "", states, "across-") for section in card.across]
    sections.append(browser_section(arms, material, browse_rows))
    judges = ", ".join(dict.fromkeys(str(arm.judge["model"]) for arm in card.arms))
    return render_page(
        title=f"Report card: {judges}",
        kicker="How far can this judge be trusted?",
        subtitle="Every number comes with its 95% interval and the number of observations behind "
        "it. Intervals treat all rows of a prompt as one observation.",
        facts=_facts(card, gate),
        sections=sections,
        footer=f"Computed {card.created} from {', '.join(card.source.get('verdicts', []))}.",
    )


def card_sections(path: Path) -> list[Section]:
    """Return a written card as a part of another page: headline, gate, and figures in short.

    Raises:
        InputError: the file is not a report card.
    """
    card = read_card(path)
    gate = json.loads(path.read_text(encoding="utf-8")).get("gate") or {}
    failed = {(row["arm"], row["name"]) for row in gate.get("failed", [])}
    accepted = set(gate.get("accepted", []))
    states = {
        key: "accepted" if accepted & {key[1], key[1].split(".")[0]} else "fail" for key in failed
    }
    words = {
        "passed": "The judge passes its gate: no threshold is clearly broken.",
        "accepted": "The judge fails thresholds that were accepted by name.",
        "refused": "The judge fails its gate.",
    }
    kinds = {"passed": "good", "refused": "bad"}
    sections = []
    for number, arm in enumerate(card.arms):
        overview = _overview(arm, states, "")
        status = str(gate.get("status", ""))
        blocks = [*overview.blocks]
        if status in words:
            blocks.append(note(words[status], kind=kinds.get(status, "warning")))
        for section in arm.sections:
            if section.figures:
                rows = [figure_row(figure, arm.name, states) for figure in section.figures]
                blocks.append(fold(section.title, figure_table(rows)))
        name = "judge" if not number else f"judge-{number + 1}"
        sections.append(
            Section(
                name,
                f"The judge: {arm.judge['model']}",
                "How far its verdicts can be trusted; report-card/report.html has the whole card.",
                blocks,
            )
        )
    return sections


def _facts(card: ReportCard, gate: GateResult) -> list[tuple[str, str]]:
    arms = card.arms
    facts = [
        ("judge", ", ".join(dict.fromkeys(str(arm.judge["model"]) for arm in arms))),
        ("template", ", ".join(dict.fromkeys(arm.template for arm in arms))),
        ("pairs", f"{sum(arm.pairs for arm in arms):,}"),
        ("prompts", f"{max(arm.prompts for arm in arms):,}"),
        ("gate", gate.status),
    ]
    if sampled := card.source.get("sampled"):
        share = f"{sampled['verdicts']:,} of {sampled['of_verdicts']:,}"
        facts.append(("verdicts used, of prompts drawn by their ids", share))
    if card.source.get("gold"):
        facts.append(("gold", str(card.source["gold"])))
    return facts


def _gate_section(gate: GateResult, card: ReportCard, states: States) -> Section:
    words = {
        "passed": "No threshold is clearly broken: labels may be made from these verdicts.",
        "accepted": "Some thresholds are broken, and were accepted by name.",
        "refused": "Some thresholds are clearly broken: no labels are made from these verdicts "
        "unless the figures below are accepted by name.",
    }
    kinds = {"passed": "good", "refused": "bad"}
    blocks = [note(words[gate.status], kind=kinds.get(gate.status, "warning"))]
    several = len(card.arms) > 1
    rows = [
        [
            Cell("", state=states[row.arm, row.name]),
            *([row.arm] if several else []),
            row.name,
            _gate_value(row),
            row.rule,
        ]
        for row in gate.rows
    ]
    columns = ["", *(["Judge"] if several else []), "Figure", "Value", "Must be"]
    if rows:
        blocks.append(table(columns, rows))
    if gate.unclear:
        blocks.append(
            note("Unclear: the interval reaches across the threshold. More pairs would decide it.")
        )
    return Section("gate", "The gate", "", blocks)


def _gate_value(row: GateRow) -> Any:
    if row.low is None and row.value == row.n:
        return row.n
    return Cell(Estimate(row.value, row.low, row.high, row.n, row.n, ""))


def _overview(arm: ArmCard, states: States, prefix: str) -> Section:
    known = {
        figure.name: figure
        for section in arm.sections
        for figure in section.figures
        if figure.estimate.value is not None
    }
    if "length_bias.excess" in known:
        known.pop("length_bias.prefer_longer", None)
    chosen = [known[name] for name in _HEADLINE if name in known][:4]
    title = arm.name if prefix else "At a glance"
    blocks = [headline([figure_row(figure, arm.name, states) for figure in chosen])]
    return Section(f"{prefix}overview", title, "", blocks)


def figure_row(figure: Figure, arm: str = "", states: States | None = None) -> FigureRow:
    """Return a card's figure as pages show it."""
    return FigureRow(
        label=figure.label,
        estimate=figure.estimate,
        meaning=figure.meaning,
        scale=(figure.low_end, figure.high_end),
        fair=figure.fair,
        percent=figure.percent,
        state=(states or {}).get((arm, figure.name), ""),
        name=figure.name,
    )


def _arm_sections(arm: ArmCard, pairs: Pairs, states: States, prefix: str) -> list[Section]:
    sections = []
    for part in arm.sections:
        made = _section(part, arm.name, states, prefix)
        extra = _plots(part, pairs, prefix)
        if extra:
            made = Section(made.name, made.title, made.lead, [*made.blocks, plots(extra)])
        sections.append(made)
    if arm.look_first:
        sections.append(_look_first(arm, prefix))
    return sections


def _section(section: CardSection, arm: str, states: States, prefix: str) -> Section:
    return Section(
        f"{prefix}{section.name}", section.title, section.lead, section_blocks(section, arm, states)
    )


def section_blocks(
    section: CardSection, arm: str = "", states: States | None = None
) -> list[Markup]:
    """Return a card section's figures, tables and notes as blocks."""
    blocks = []
    if section.figures:
        blocks.append(figure_table([figure_row(figure, arm, states) for figure in section.figures]))
    blocks += [_card_table(part) for part in section.tables if part.rows]
    blocks += [note(text) for text in section.notes]
    return blocks


def _card_table(part: CardTable) -> Markup:
    rows = [
        [
            Cell(cell, percent=part.percent and isinstance(cell, Estimate | float))
            for cell in row
        ]
        for row in part.rows
    ]  # fmt: skip
    return table(part.columns, rows, caption=part.caption)


def _plots(section: CardSection, pairs: Pairs, prefix: str) -> list[Markup]:
    """Return the plots that go with a section."""
    if section.name == "position_bias" and pairs.soft and pairs.both.any():
        rows = pairs.take(pairs.both)
        both = {"same winner": rows.winner[:, 0] == rows.winner[:, 1]}
        both["other winner"] = ~both["same winner"]
        svg = histogram_plot(
            {name: rows.mean_p[mask].tolist() for name, mask in both.items() if mask.any()},
            name=f"{prefix}mean-p",
            x_label="P(a preferred), both orders averaged",
        )
        words = "Where the orders disagree the mean falls near one half, as it should."
        return [plot(svg, caption="The averaged probability.", meaning=words)]
    if section.name == "agreement":
        return _agreement_plots(section, prefix)
    return []


def _agreement_plots(section: CardSection, prefix: str) -> list[Markup]:
    made = []
    tables = {part.name: part for part in section.tables}
    points = [
        (float(stated), share.value, share.low, share.high, share.n)
        for _, stated, share in tables["by_confidence"].rows
        if share.value is not None
    ]
    if len(points) > 1:
        made.append(
            plot(
                reliability_plot(points, name=f"{prefix}reliability"),
                caption="Stated against observed.",
                meaning="On the dashed line the judge's probability is honest; under it, it is "
                "overconfident. Larger dots hold more pairs.",
            )
        )
    if "by_gap" in tables and len(tables["by_gap"].rows) > 1:
        rows = [
            (str(gap), share.value, share.low, share.high)
            for gap, share in tables["by_gap"].rows
            if share.value is not None
        ]
        made.append(
            plot(
                interval_plot(rows, name=f"{prefix}gap", x_label="accuracy", fair=0.5),
                caption="Accuracy by gap.",
                meaning="A sound judge is surer to be right where people see a clear difference.",
            )
        )
    return made


def _look_first(arm: ArmCard, prefix: str) -> Section:
    rows = [
        [
            row["prompt_id"],
            row["a"],
            row["b"],
            row["entropy"],
            *(row["p_orders"]),
            row["p"],
        ]
        for row in arm.look_first[:15]
    ]
    return Section(
        f"{prefix}look-first",
        "Rows to look at first",
        "Most entropy, then closest to one half: an hour of a person's time is best spent here.",
        [
            table(
                ["Prompt", "a", "b", "Bits", "P(a), a first", "P(a), b first", "Mean"],
                rows,
            )
        ],
    )


# --- the browsable table ---------------------------------------------------------------------


def browser_section(arms: Sequence[Pairs], material: Material, limit: int) -> Section:
    """Return the browsable table of every arm's pairs, at most ``limit``, drawn at random."""
    views = [
        view for number, pairs in enumerate(arms) for view in pair_views(pairs, material, number)
    ]
    total = len(views)
    lead = "Both orders of every pair side by side. Click a row to read it."
    if total > limit:
        picked = np.random.default_rng(0).choice(total, limit, replace=False)
        views = [views[place] for place in sorted(picked.tolist())]
        lead += f" A random {limit:,} of {total:,} pairs are embedded here; the shards hold all."
    blocks = [browser(views, [pairs.arm.name for pairs in arms])]
    return Section("verdicts", "All verdicts", lead, blocks)


def pair_views(pairs: Pairs, material: Material, number: int = 0) -> list[PairView]:
    """Return an arm's pairs as the browsable table shows them."""
    middle = pairs.mean_p
    views = []
    for row in range(len(pairs)):
        prompt_id = pairs.prompt_ids[pairs.prompt[row]]
        found = material.prompts.get(prompt_id)
        a, b = pairs.completions[row]
        gold = pairs.gold[row]
        first, second = pairs.verdicts[row]
        views.append(
            PairView(
                pair_id=prompt_id,
                prompt=prompt_id if found is None else conversation(found.prompt),
                a_name=_side_name(pairs.a[row], "" if a is None else a.model),
                a="" if a is None else a.completion,
                b_name=_side_name(pairs.b[row], "" if b is None else b.model),
                b="" if b is None else b.completion,
                judge=number,
                verdicts=(
                    _verdict_view(first, pairs, row, 0),
                    _verdict_view(second, pairs, row, 1),
                ),
                p=None if np.isnan(middle[row]) else float(middle[row]),
                gold=None if np.isnan(gold) else {1.0: "a", -1.0: "b"}.get(float(gold), "tie"),
                remark=f"repeat {pairs.repeat[row]}" if pairs.repeat[row] else "",
            )
        )
    return views


def _side_name(completion_id: str, model: str) -> str:
    return f"{completion_id} ({model})" if model and model != completion_id else completion_id


def _verdict_view(
    verdict: Verdict | None, pairs: Pairs, row: int, order: int
) -> VerdictView | None:
    if verdict is None:
        return None
    winner, p = pairs.winner[row, order], pairs.p[row, order]
    return VerdictView(
        verdict_id=verdict.verdict_id,
        outcome=verdict.outcome,
        winner={1.0: "a", -1.0: "b"}.get(float(winner)) if np.isfinite(winner) else None,
        p=None if np.isnan(p) else float(p),
        mass=verdict.mass,
        reply=verdict.reply if verdict.reply != verdict.rationale else "",
        rationale=verdict.rationale or "",
    )
