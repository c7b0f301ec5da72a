"""Plots as inline SVG that take the page's colours and fonts, light and dark.

matplotlib draws them; colours it was given as marks are replaced by the page's CSS variables, and
every id is made unique, so that several plots share one page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup, escape

from feedback.page.text import visible

__all__ = ["band_plot", "curve_plot", "draw", "histogram_plot", "interval_plot", "reliability_plot"]

# Colours that occur nowhere else stand for the page's own.
_COLOURS = {
    "#010101": "currentColor",
    "#020202": "var(--soft)",
    "#030303": "var(--line)",
    "#040404": "var(--paper)",
    "#110001": "var(--series-1)",
    "#110002": "var(--series-2)",
    "#110003": "var(--series-3)",
    "#110004": "var(--series-4)",
    "#110005": "var(--series-5)",
}
INK, SOFT, LINE, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#110001", "#110002", "#110003", "#110004", "#110005")

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlaif",
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.color": INK,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 1.6,
}


def draw(
    paint: Callable[[Any], None], *, name: str, alt: str, width: float = 4.7, height: float = 2.9
) -> Markup:
    """Return the SVG of what ``paint`` draws on a set of axes.

    Args:
        paint: gets the matplotlib axes.
        name: unique on the page; prefixes every id inside the SVG.
        alt: what a screen reader says.
        width: in inches; at 4.7 the labels stay legible on a phone.
        height: in inches.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        paint(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _adopt(buffer.getvalue(), name, alt)


def _adopt(svg: str, name: str, alt: str) -> Markup:
    """Return matplotlib's SVG as a part of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None, "matplotlib writes a viewBox"
    for mark, colour in _COLOURS.items():
        rest = rest.replace(mark, colour)
    rest = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", rest)
    rest = re.sub(r"font-family: [^;\"]+(; )?", "", rest)
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower())
    rest = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', rest)
    rest = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", rest)
    rest = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{prefix}-\1"', rest)
    style = "font-family: var(--sans)"
    return Markup(
        f'<svg {box[0]} role="img" aria-label="{escape(visible(alt))}" style="{style}">{rest}'
    )


def curve_plot(
    series: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    *,
    name: str,
    x_label: str,
    y_label: str,
    fair: float | None = None,
) -> Markup:
    """Return lines over steps; a long noisy series is drawn faint with its running mean on top."""

    def paint(axes: Any) -> None:
        for index, (label, (steps, values)) in enumerate(series.items()):
            colour = SERIES[index % len(SERIES)]
            smooth = _smooth(values)
            if len(values) > 40:
                axes.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, smooth, color=colour, label=_plain(label))
        if fair is not None:
            axes.axhline(fair, color=SOFT, linewidth=0.7, linestyle=(0, (3, 3)))
        axes.set_xlabel(_plain(x_label))
        axes.set_ylabel(_plain(y_label))
        if len(series) > 1:
            axes.legend()

    return draw(paint, name=name, alt=f"{y_label} over {x_label}: {', '.join(series)}")


def _smooth(values: Sequence[float]) -> np.ndarray[Any, Any]:
    """Return the running mean over a twentieth of the series, centred, ends shortened."""
    array = np.asarray(values, float)
    width = max(1, len(array) // 20)
    if len(array) <= 40:
        return array
    total = np.cumsum(np.concatenate([[0.0], array]))
    index = np.arange(len(array))
    low = np.maximum(index - width, 0)
    high = np.minimum(index + width + 1, len(array))
    return (total[high] - total[low]) / (high - low)


def histogram_plot(
    groups: Mapping[str, Sequence[float]],
    *,
    name: str,
    x_label: str,
    bounds: tuple[float, float] = (0.0, 1.0),
    bins: int = 20,
    y_label: str = "pairs",
) -> Markup:
    """Return stacked counts of values."""

    def paint(axes: Any) -> None:
        values = [np.asarray(group, float) for group in groups.values()]
        edges = np.linspace(*bounds, bins + 1)
        axes.hist(
            values,
            bins=edges,
            stacked=True,
            color=[SERIES[index % len(SERIES)] for index in range(len(values))],
            label=[_plain(label) for label in groups],
            edgecolor=PAPER,
            linewidth=0.6,
        )
        axes.set_xlabel(_plain(x_label))
        axes.set_ylabel(_plain(y_label))
        axes.set_xlim(*bounds)
        if len(groups) > 1:
            axes.legend()

    return draw(paint, name=name, alt=f"counts of {x_label}")


def interval_plot(
    rows: Sequence[tuple[str, float, float | None, float | None]],
    *,
    name: str,
    x_label: str,
    fair: float | None = None,
    bounds: tuple[float, float] | None = None,
) -> Markup:
    """Return one dot with its interval per row, top to bottom."""

    def paint(axes: Any) -> None:
        places = list(range(len(rows)))[::-1]
        for place, (_, value, low, high) in zip(places, rows, strict=True):
            if low is not None and high is not None:
                axes.plot([low, high], [place, place], color=SERIES[0], alpha=0.45, linewidth=3)
            axes.plot([value], [place], "o", color=SERIES[0], markersize=5)
        if fair is not None:
            axes.axvline(fair, color=SOFT, linewidth=0.7, linestyle=(0, (3, 3)))
        axes.set_yticks(places, [_plain(row[0]) for row in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(_plain(x_label))
        if bounds is not None:
            axes.set_xlim(*bounds)

    height = 0.9 + 0.3 * len(rows)
    return draw(paint, name=name, alt=f"{x_label}, with 95% intervals", height=height)


def reliability_plot(
    points: Sequence[tuple[float, float, float | None, float | None, int]],
    *,
    name: str,
    x_label: str = "the judge's probability",
    y_label: str = "share right",
    bounds: tuple[float, float] = (0.5, 1.0),
) -> Markup:
    """Return stated probability against observed share: (stated, observed, low, high, n) a bin."""

    def paint(axes: Any) -> None:
        axes.plot(bounds, bounds, color=SOFT, linewidth=0.7, linestyle=(0, (3, 3)))
        largest = max((point[4] for point in points), default=1)
        for stated, observed, low, high, count in points:
            if low is not None and high is not None:
                axes.plot([stated, stated], [low, high], color=SERIES[0], alpha=0.45, linewidth=2.5)
            size = 16 + 60 * (count / largest)
            axes.scatter([stated], [observed], s=size, color=SERIES[0], zorder=3)
        axes.set_xlim(bounds[0] - 0.02, bounds[1] + 0.02)
        axes.set_xlabel(_plain(x_label))
        axes.set_ylabel(_plain(y_label))

    return draw(paint, name=name, alt=f"{y_label} against {x_label}", height=3.4)


def band_plot(
    x: Sequence[float],
    middle: Sequence[float],
    low: Sequence[float],
    high: Sequence[float],
    *,
    name: str,
    x_label: str,
    y_label: str,
    fair: float | None = None,
) -> Markup:
    """Return a line with its interval as a band."""

    def paint(axes: Any) -> None:
        axes.fill_between(x, low, high, color=SERIES[0], alpha=0.18, linewidth=0)
        axes.plot(x, middle, color=SERIES[0])
        if fair is not None:
            axes.axhline(fair, color=SOFT, linewidth=0.7, linestyle=(0, (3, 3)))
        axes.set_xlabel(_plain(x_label))
        axes.set_ylabel(_plain(y_label))

    return draw(paint, name=name, alt=f"{y_label} over {x_label}")


def _plain(text: str) -> str:
    """Return a label that matplotlib does not read as mathematics, or leave out of a legend."""
    text = visible(text).replace("$", "\\$")
    return f" {text}" if text.startswith("_") else text
