"""What a report card is made of: figures, tables and sections, as plain data that JSON can hold.

A figure's name (``position_bias.order_consistency``) is how thresholds, recipes and
``--accept-bias`` speak of it; it never changes meaning.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from feedback.intervals import Estimate

__all__ = ["CardSection", "CardTable", "Figure", "plain", "read_section"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of the card."""

    name: str
    label: str
    estimate: Estimate
    meaning: str
    """What the number says, in one line, conventions included."""
    fair: float | None = None
    """The value of a judge without this bias, where there is one."""
    low_end: float = 0.0
    high_end: float = 1.0
    """Ends of the axis that the figure is drawn on."""
    percent: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CardTable:
    """A table of the card; a cell is text, a number, None or an estimate."""

    name: str
    caption: str
    columns: list[str]
    rows: list[list[Any]]
    percent: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class CardSection:
    """Figures and tables that belong together."""

    name: str
    title: str
    lead: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[CardTable] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plain(value: Any) -> Any:
    """Return records as dicts and lists that JSON can hold."""
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, Estimate | Figure | CardTable | CardSection):
        return plain(asdict(value))
    if hasattr(value, "item"):  # numpy scalars
        return value.item()
    return value


def read_section(value: dict[str, Any]) -> CardSection:
    """Return a section that ``plain`` wrote.

    Raises:
        TypeError: a field is missing or unknown.
    """
    figures = [
        Figure(**{**figure, "estimate": Estimate(**figure["estimate"])})
        for figure in value["figures"]
    ]
    tables = [
        CardTable(**{**table, "rows": [[_cell(cell) for cell in row] for row in table["rows"]]})
        for table in value["tables"]
    ]
    return CardSection(**{**value, "figures": figures, "tables": tables})


def _cell(cell: Any) -> Any:
    return Estimate(**cell) if isinstance(cell, dict) else cell
