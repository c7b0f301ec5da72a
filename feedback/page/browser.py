"""The browsable table of verdicts: every pair with both orders side by side, as embedded data.

The page's script draws only the rows in view. Texts are stored once each and cut at a length that
the page states; the shards hold them whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from feedback.page.components import environment
from feedback.page.text import cut, visible

__all__ = ["STATES", "PairView", "VerdictView", "browser"]

STATES = (
    ("consistent", "same winner in both orders"),
    ("conflict", "other winner after the swap"),
    ("tie", "a tie in either order"),
    ("problem", "unparsed, refused, cut off or failed"),
    ("one-order", "asked in one order only"),
    ("wrong", "judge against gold"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerdictView:
    """One verdict as the table shows it."""

    verdict_id: str
    outcome: str
    winner: str | None
    """``a``, ``b`` or None."""
    p: float | None
    """P(a preferred) by this verdict."""
    mass: float | None
    reply: str = ""
    rationale: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairView:
    """One pair with its verdicts: a shown first, then b shown first."""

    pair_id: str
    prompt: str
    a_name: str
    a: str
    b_name: str
    b: str
    judge: int
    """Index into the page's list of judges."""
    verdicts: tuple[VerdictView | None, VerdictView | None]
    p: float | None
    """P(a preferred) over both orders."""
    gold: str | None = None
    """``a``, ``b``, ``tie`` or None."""
    remark: str = ""

    @property
    def states(self) -> list[str]:
        """Which filters of the table let this pair through."""
        given = [verdict for verdict in self.verdicts if verdict is not None]
        states = []
        if len(given) == 1:
            states.append("one-order")
        if any(verdict.outcome not in ("decided", "tie") for verdict in given):
            states.append("problem")
        elif len(given) == 2:
            same = given[0].winner == given[1].winner
            states.append("consistent" if same else "conflict")
        if any(verdict.outcome == "tie" for verdict in given):
            states.append("tie")
        if self.gold in ("a", "b") and self.p is not None and self.p != 0.5:
            states += ["wrong"] if (self.p > 0.5) != (self.gold == "a") else []
        return states


class _Texts:
    """Keeps each text once and hands out its place."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.places: dict[str, int] = {}

    def place(self, text: str) -> int:
        text = cut(visible(text), self.limit)
        return self.places.setdefault(text, len(self.places))


def browser(
    pairs: Sequence[PairView],
    judges: Sequence[str],
    *,
    label: str = "All verdicts",
    characters: int = 4000,
) -> Markup:
    """Return the table of ``pairs``; texts longer than ``characters`` are cut, and say so."""
    texts = _Texts(characters)
    data: dict[str, Any] = {
        "judges": [visible(judge) for judge in judges],
        "rows": [_row(pair, texts) for pair in pairs],
    }
    data["texts"] = list(texts.places)
    template = environment().get_template("browser.html.jinja")
    return Markup(template.render(label=label, states=STATES, judges=judges, data=data))


def _row(pair: PairView, texts: _Texts) -> dict[str, Any]:
    given = [verdict for verdict in pair.verdicts if verdict is not None]
    masses = [verdict.mass for verdict in given if verdict.mass is not None]
    swing = [verdict.p for verdict in given if verdict.p is not None]
    return {
        "id": visible(pair.pair_id),
        "q": texts.place(pair.prompt),
        "a": texts.place(pair.a),
        "b": texts.place(pair.b),
        "an": visible(pair.a_name),
        "bn": visible(pair.b_name),
        "j": pair.judge,
        "p": _short(pair.p),
        "g": pair.gold,
        "m": visible(pair.remark),
        "s": pair.states,
        "ms": _short(min(masses)) if masses else None,
        "d": _short(abs(swing[0] - swing[1])) if len(swing) == 2 else None,
        "v": [_verdict(verdict, texts) for verdict in pair.verdicts],
    }


def _verdict(verdict: VerdictView | None, texts: _Texts) -> dict[str, Any] | None:
    if verdict is None:
        return None
    return {
        "id": visible(verdict.verdict_id),
        "o": verdict.outcome,
        "w": verdict.winner,
        "p": _short(verdict.p),
        "m": _short(verdict.mass),
        "r": texts.place(verdict.reply) if verdict.reply else None,
        "t": texts.place(verdict.rationale) if verdict.rationale else None,
    }


def _short(value: float | None) -> float | None:
    return None if value is None else round(float(value), 4)
