"""A picture of a training run: what was logged, over steps, as one PNG beside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from feedback.page.curves import Curve, read_curves

__all__ = ["CURVES", "draw_curves"]

CURVES = "training-curves.png"
_MOST = 4


class _Panel(NamedTuple):
    title: str
    curves: tuple[str, ...]


_PANELS = (
    _Panel("loss", ("loss", "eval_loss")),
    _Panel("score", ("objective/scores",)),
    _Panel("KL to the reference, nats", ("objective/kl",)),
    _Panel("reward margin", ("rewards/margins",)),
    _Panel("accuracy of rewards", ("rewards/accuracies",)),
    _Panel("log-probability of chosen", ("logps/chosen",)),
    _Panel("tokens of a completion", ("completion/length",)),
)


def draw_curves(folder: Path) -> Path | None:
    """Draw up to four curves of the run in ``folder``; None where it logged fewer than two steps.

    Raises:
        InputError: the run's log is damaged.
    """
    curves = {name: curve for name, curve in read_curves(folder).items() if len(curve[0]) > 1}
    panels = [panel for panel in _PANELS if any(name in curves for name in panel.curves)][:_MOST]
    if not panels:
        return None
    path = folder / CURVES
    temporary = path.with_name(f".{CURVES}.tmp.png")
    _draw(panels, curves, temporary)
    temporary.replace(path)
    return path


def _draw(panels: Sequence[_Panel], curves: Mapping[str, Curve], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(panels), 2.4), layout="constrained")
    FigureCanvasAgg(figure)
    for place, panel in enumerate(panels, start=1):
        axes: Any = figure.add_subplot(1, len(panels), place)
        shown = [name for name in panel.curves if name in curves]
        for name in shown:
            axes.plot(*curves[name], linewidth=1.2, label=name)
        if len(shown) > 1:
            axes.legend(frameon=False, fontsize=7)
        axes.set_title(panel.title, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
