"""The data set card's part on trust: outcomes, the report card's tables, biases in words.

The sentences on bias are made from the figures: a bias is named only where the 95% interval leaves
the fair value out, its absence is claimed only as far as the interval reaches, and what was not
measured is listed as such.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from feedback.bias_words import bias_sentences, unmeasured
from feedback.card import ReportCard, read_card
from feedback.figures import CardSection, CardTable, Figure
from feedback.intervals import Estimate
from feedback.markdown import code, plain, table
from feedback.provenance import Origin

__all__ = ["bias_sections", "trust_sections"]


def trust_sections(origins: Sequence[Origin], *, accepted: Sequence[str] = ()) -> list[str]:
    """Return outcomes, report cards, human agreement and biases, for every judging."""
    judged = [origin for origin in origins if origin.judging]
    if not judged:
        return [
            "## How far to trust the labels\n\nNo judge's verdicts are recorded behind these rows, "
            "so nothing was measured."
        ]
    parts = ["## How far to trust the labels", _outcomes(judged)]
    for origin in judged:
        if len(judged) > 1:
            parts.append(f"### Of {plain(origin.name)}")
        parts += [*bias_sections(origin, accepted=accepted), *_report(origin)]
    return [part for part in parts if part]


def _outcomes(origins: Sequence[Origin]) -> str:
    """Return calls by outcome and what pairing made of them."""
    calls: Counter[str] = Counter()
    pairs: Counter[str] = Counter()
    for origin in origins:
        calls.update(origin.judging.get("counts") or {})
        pairs.update(origin.pairing.get("comparisons") or {})
    total = sum(calls.values())
    rows = [[name, f"{n:,}", f"{n / total:.1%}"] for name, n in calls.most_common()]
    parts = [table(["judge calls that ended as", "calls", "share"], rows)] if rows else []
    if pairs:
        kept = [[name, f"{n:,}"] for name, n in pairs.most_common()]
        parts.append(table(["comparisons", "pairs"], kept))
    return "\n\n".join(parts)


def _card(origin: Origin) -> ReportCard | None:
    return None if origin.report is None else read_card(origin.report)


def _summary(origin: Origin) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
    """Return arm -> figure -> value, low, high, n, from the manifest's gate record."""
    return (origin.gate.get("card") or {}).get("summary") or {}


def _measured(origin: Origin) -> Iterator[tuple[str, str, Estimate]]:
    """Yield (arm, figure's name, estimate) of the full card, else of the manifest's summary."""
    card = _card(origin)
    if card is not None:
        for arm, figure in card.figures():
            if figure.estimate.value is not None:
                yield arm, figure.name, figure.estimate
        return
    for arm, figures in _summary(origin).items():
        for name, known in figures.items():
            yield (
                arm,
                name,
                Estimate(known["value"], known["low"], known["high"], known["n"], 0, ""),
            )


def bias_sections(origin: Origin, *, accepted: Sequence[str] = ()) -> list[str]:
    """Return the known biases of one judging's judge in words, and what the gate said of it."""
    by_arm: dict[str, dict[str, Estimate]] = {}
    for arm, name, estimate in _measured(origin):
        by_arm.setdefault(arm, {})[name] = estimate
    arms = [arm for arm in by_arm if arm]
    parts = ["### Known biases"]
    for arm in arms:
        lines = bias_sentences(
            by_arm[arm] | by_arm.get("", {}), orders=origin.judging.get("orders")
        )
        lead = [f"{plain(arm)}:"] if len(arms) > 1 else []
        parts.append("\n\n".join([*lead, "\n".join(f"- {line}" for line in lines)]))
        if missing := unmeasured(by_arm[arm]):
            parts.append("Not measured: " + "; ".join(missing) + ".")
    if not arms:
        parts.append("No report card of this judge is recorded: its biases are unknown.")
    return [*parts, _gate(origin, accepted)]


def _gate(origin: Origin, accepted: Sequence[str]) -> str:
    gate = origin.gate
    if not gate:
        return ""
    names = sorted({*gate.get("accepted", []), *accepted})
    parts = [f"The judge {_GATE[str(gate.get('status'))]} the thresholds of its report card."]
    for row in gate.get("failed", []):
        span = "" if row["low"] is None else f" ({row['low']:.3f} to {row['high']:.3f})"
        parts.append(
            f"- fails: {code(row['name'])} is {row['value']:.3f}{span}, n = {row['n']:,}; it must "
            f"be {plain(row['rule'])}"
        )
    if gate.get("unclear"):
        unclear = ", ".join(map(code, gate["unclear"]))
        parts.append(f"- too little data to tell: {unclear}")
    if names:
        parts.append(f"- accepted by name all the same: {', '.join(map(code, names))}")
    return "\n".join(parts[:1]) + ("\n\n" + "\n".join(parts[1:]) if parts[1:] else "")


_GATE = {
    "passed": "keeps to",
    "accepted": "fails, and was accepted in spite of,",
    "refused": "fails",
    "failed": "fails",
}


def _report(origin: Origin) -> Iterator[str]:
    """Yield the report card's tables; of a folder without its card, the summary's."""
    card = _card(origin)
    if card is None:
        rows = [
            [plain(arm), code(name), *_estimate(known)] for arm, name, known in _measured(origin)
        ]
        if rows:
            yield "### Report card, main figures"
            yield table(["judge", "figure", "value", "95% interval", "n"], rows)
        return
    states = _states(origin)
    yield "### Report card"
    yield (
        "Every figure has its 95% interval; rows of one prompt count as one observation. "
        f"Computed {plain(card.created)}."
    )
    for arm in card.arms:
        if len(card.arms) > 1:
            yield f"**{plain(arm.name)}**"
        for section in arm.sections:
            yield from _section(section, arm.name, states)
    for section in card.across:
        yield from _section(section, "", states)


def _states(origin: Origin) -> dict[tuple[str, str], str]:
    """Return the gate's view of each figure that it held against a threshold."""
    assert origin.report is not None
    gate = json.loads(origin.report.read_text(encoding="utf-8")).get("gate") or {}
    states = {(row["arm"], row["name"]): "fails" for row in gate.get("failed", [])}
    return states | {("", name): "unclear" for name in gate.get("unclear", [])}


def _section(
    section: CardSection, arm: str, states: Mapping[tuple[str, str], str]
) -> Iterator[str]:
    figures = [figure for figure in section.figures if figure.estimate.value is not None]
    tables = [shown for shown in section.tables if shown.rows]
    if not figures and not tables and not section.notes:
        return
    yield f"#### {plain(section.title)}"
    if section.lead:
        yield plain(section.lead)
    if figures:
        rows = [_figure_row(figure, arm, states) for figure in figures]
        yield table(["figure", "value", "95% interval", "n", "what it says"], rows)
    for shown in tables:
        yield _table(shown)
    for note in section.notes:
        yield plain(note)


def _figure_row(figure: Figure, arm: str, states: Mapping[tuple[str, str], str]) -> list[str]:
    state = states.get((arm, figure.name)) or states.get(("", figure.name))
    label = plain(figure.label) + (f" ({state})" if state else "")
    fair = "" if figure.fair is None else f" Fair: {_number(figure.fair, figure.percent)}."
    cells = _estimate(figure.estimate, percent=figure.percent)
    return [label, *cells, plain(figure.meaning) + fair]


def _estimate(known: Estimate, *, percent: bool = False) -> list[str]:
    span = "" if known.low is None or known.high is None else (
        f"{_number(known.low, percent)} to {_number(known.high, percent)}"
    )  # fmt: skip
    assert known.value is not None
    return [_number(known.value, percent), span, f"{known.n:,}"]


def _number(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.3f}"


def _table(shown: CardTable) -> str:
    caption = f"{plain(shown.caption)}:\n\n" if shown.caption else ""
    rows = [[_table_cell(cell, shown.percent) for cell in row] for row in shown.rows]
    return caption + table([plain(column) for column in shown.columns], rows)


def _table_cell(cell: Any, percent: bool) -> str:
    if cell is None:
        return ""
    if isinstance(cell, Estimate):
        if cell.value is None:
            return ""
        value, span, n = _estimate(cell, percent=percent)
        return f"{value} ({span}), n = {n}" if span else f"{value}, n = {n}"
    if isinstance(cell, float):
        return _number(cell, percent)
    return f"{cell:,}" if isinstance(cell, int) else plain(cell)
