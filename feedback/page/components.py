"""Blocks that pages are made of: sections, figures with intervals, tables, plots, notes.

Every function returns escaped HTML. Text that came from a model, a file or a name goes through
``visible`` and autoescape; only what these functions build themselves is markup.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from markupsafe import Markup

from feedback.intervals import Estimate
from feedback.page.text import embed_json, visible

__all__ = [
    "Cell",
    "FigureRow",
    "Section",
    "environment",
    "figure_table",
    "fold",
    "headline",
    "note",
    "number",
    "paragraph",
    "plot",
    "plots",
    "side_by_side",
    "table",
]


@functools.cache
def environment() -> jinja2.Environment:
    """Return the template environment: autoescape on, undefined names are errors."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader("feedback.page", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters["visible"] = visible
    made.filters["embed"] = embed_json
    return made


def _render(name: str, **values: Any) -> Markup:
    macros: Any = environment().get_template("components.html.jinja").module
    return Markup(getattr(macros, name)(**values))


@dataclass(frozen=True, slots=True)
class Section:
    """One part of a page: a heading, a lead sentence, and blocks."""

    name: str
    """Anchor of the section, unique on the page."""
    title: str
    lead: str = ""
    blocks: Sequence[Markup] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureRow:
    """One number as the page shows it."""

    label: str
    estimate: Estimate
    meaning: str
    """What the number says, in one line."""
    scale: tuple[float, float] = (0.0, 1.0)
    """Ends of the little axis that the interval is drawn on."""
    fair: float | None = None
    """Where an unbiased judge would stand; drawn as a tick."""
    percent: bool = True
    state: str = ""
    """``ok``, ``fail``, ``unclear`` or nothing: how the gate sees it."""
    name: str = ""
    """Machine name, shown small."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell that is more than text: an estimate, or text with a state."""

    value: Any
    percent: bool = False
    state: str = ""
    numeric: bool = field(default=False)


def number(value: float | None, *, percent: bool = False, digits: int | None = None) -> str:
    """Return a number as pages print it: percentages with one decimal, else about four digits."""
    if value is None:
        return "\u2013"
    if percent:
        return f"{100 * value:.{1 if digits is None else digits}f}%"
    if digits is None:
        digits = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1
    return f"{value:,.{digits}f}".replace("-", "\u2212")


def headline(figures: Iterable[FigureRow]) -> Markup:
    """Return the few numbers that a reader should take away, large."""
    return _render("headline", figures=[_drawn(figure) for figure in figures])


def figure_table(figures: Iterable[FigureRow], *, caption: str = "") -> Markup:
    """Return rows of value, drawn interval, n and meaning."""
    return _render("figure_table", figures=[_drawn(figure) for figure in figures], caption=caption)


def _drawn(figure: FigureRow) -> dict[str, Any]:
    """Return what the macros need of a figure, the interval placed on a 0 to 100 axis."""
    estimate, (start, end) = figure.estimate, figure.scale

    def place(value: float) -> float:
        return round(100 * min(1.0, max(0.0, (value - start) / (end - start))), 2)

    drawn: dict[str, Any] = {
        "label": figure.label,
        "name": figure.name,
        "meaning": figure.meaning,
        "state": figure.state,
        "value": number(estimate.value, percent=figure.percent),
        "n": f"{estimate.n:,}",
        "prompts": f"{estimate.prompts:,}",
        "method": estimate.method,
        "interval": None,
        "axis": None,
    }
    if estimate.value is None:
        return drawn
    drawn["axis"] = {"at": place(estimate.value), "fair": None}
    if figure.fair is not None:
        drawn["axis"]["fair"] = place(figure.fair)
    if estimate.low is not None and estimate.high is not None:
        drawn["interval"] = (
            f"{number(estimate.low, percent=figure.percent).rstrip('%')} to "
            f"{number(estimate.high, percent=figure.percent)}"
        )
        left, right = place(estimate.low), place(estimate.high)
        drawn["axis"] |= {"left": left, "width": round(max(right - left, 0.6), 2)}
    return drawn


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "") -> Markup:
    """Return a table; numbers align right, estimates carry their interval and n."""
    return _render(
        "table", columns=columns, rows=[[_cell(value) for value in row] for row in rows],
        caption=caption,
    )  # fmt: skip


def _cell(value: Any) -> dict[str, Any]:
    cell = value if isinstance(value, Cell) else Cell(value)
    inner = cell.value
    made = {"text": "", "sub": "", "numeric": False, "state": cell.state, "markup": None}
    if isinstance(inner, Estimate):
        made |= {"text": number(inner.value, percent=cell.percent), "numeric": True}
        if inner.low is not None:
            made["sub"] = (
                f"{number(inner.low, percent=cell.percent).rstrip('%')} to "
                f"{number(inner.high, percent=cell.percent)}, n = {inner.n:,}"
            )
        elif inner.value is not None:
            made["sub"] = f"n = {inner.n:,}"
    elif isinstance(inner, bool) or inner is None:
        made["text"] = {True: "yes", False: "no", None: "\u2013"}[inner]
    elif isinstance(inner, int):
        made |= {"text": f"{inner:,}", "numeric": True}
    elif isinstance(inner, float):
        made |= {"text": number(inner, percent=cell.percent), "numeric": True}
    elif isinstance(inner, Markup):
        made["markup"] = inner
    else:
        made |= {"text": str(inner), "numeric": cell.numeric}
    return made


def paragraph(text: str) -> Markup:
    """Return a paragraph of the page's own prose."""
    return _render("paragraph", text=text)


def note(text: str, *, kind: str = "note") -> Markup:
    """Return a set-off remark; ``kind`` is note, warning or good."""
    return _render("note", text=text, kind=kind)


def fold(title: str, body: Markup) -> Markup:
    """Return a block that opens on a click; it is open in print."""
    return _render("fold", title=title, body=body)


def plot(svg: Markup, *, caption: str, meaning: str = "") -> Markup:
    """Return an inline SVG with its caption and the one line that says what to see in it."""
    return _render("plot", svg=svg, caption=caption, meaning=meaning)


def plots(items: Sequence[Markup]) -> Markup:
    """Return several plots side by side where there is room."""
    return _render("plots", items=items)


def side_by_side(
    prompt: str, sides: Sequence[tuple[str, str]], *, remark: str = "", mark: int | None = None
) -> Markup:
    """Return a prompt with completions next to each other.

    Args:
        prompt: the conversation.
        sides: heading and text of each completion.
        remark: one line under them.
        mark: index of the completion to mark as the better one.
    """
    return _render("side_by_side", prompt=prompt, sides=sides, remark=remark, mark=mark)
