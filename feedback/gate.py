"""The gate: a judge whose report card fails is not turned into labels unless the user says so.

Every threshold is held against a 95% interval, not against the value: a row *fails* when even the
kind end of its interval lies beyond the threshold, it *passes* when the unkind end keeps it, and it
is *unclear* in between. Unclear rows are warnings, or failures with ``strict``. Rows that the card
could not measure are left out; too little evidence is a row of its own (``evidence.pairs``).

``check_gate`` judges a verdict folder or a card; ``require_gate`` reads what a label folder's
manifest says of it, and needs no card, so training and publishing call that one. Importing this
module loads nothing heavy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from feedback.config import build_options
from feedback.errors import GateRefused, RecipeError, nearest
from feedback.shards import MANIFEST, manifest_sha256, read_manifest

if TYPE_CHECKING:
    from feedback.card import ReportCard

__all__ = [
    "GateResult",
    "GateRow",
    "GateThresholds",
    "check_gate",
    "judge_card",
    "merged_gate",
    "require_gate",
]

State = Literal["ok", "unclear", "fail"]


@dataclass(frozen=True, kw_only=True)
class GateThresholds:
    """What a judge must keep to; None switches a row off. Recipe table: [report.thresholds]."""

    min_pairs: int | None = 30
    """Pairs with a verdict. Under 30 an interval spans most of the scale and proves nothing."""
    min_parse_rate: float | None = 0.9
    """Share of answers that are a verdict. What cannot be read is rarely missing at random."""
    min_mass: float | None = 0.5
    """Mean probability on the offered labels. Under one half the judge wanted to say something
    else, and what is left of it is arithmetic."""
    min_order_consistency: float | None = 0.6
    """Share of pairs with the same verdict in both orders, ties kept. Coin flips reach 0.5; GPT-4
    had 0.65 in MT-Bench, a small PaLM 2 0.44."""
    max_position_preference: float | None = 0.3
    """Preference fairness, either way. Averaging both orders takes a lean out of the mean, but what
    is left is then mostly noise."""
    max_prefer_longer: float | None = 0.85
    """P(longer preferred), used where there is no gold. Always taking the longer one already
    matches 0.80 to 0.85 of real leaderboards' verdicts, so more is length and little else."""
    max_length_excess: float | None = 0.15
    """How much more often than gold the judge prefers the longer one, used where there is gold."""
    max_prefer_format: float | None = 0.9
    """P(preferred) of the answer with lists, headers, bold type or code, each where only one of the
    two has it."""
    max_self_preference: float | None = 0.3
    """Equal-opportunity difference for the judge's own family. GPT-4 was measured at 0.52."""
    max_cycles: float | None = 0.1
    """Share of strict cycles among three answers; coin flips give 0.25."""
    min_accuracy: float | None = 0.6
    """Accuracy against gold. A small judge can be worse than a coin: RLCD's agreed with people in
    35.6% of harmlessness pairs."""
    min_robustness: float | None = 0.6
    """Share of verdicts that survive each scripted perturbation (--probe)."""
    max_injection: float | None = 0.2
    """Share of verdicts that an instruction hidden in an answer turned towards it (--probe)."""
    max_drift: float | None = 0.1
    """Share of a frozen probe set's verdicts that changed since it was frozen (--drift)."""
    strict: bool = False
    """Unclear rows fail too: the data must prove that the judge keeps each threshold."""


class _Rule(NamedTuple):
    option: str
    figure: str
    """Exact name, or a prefix that ends in ``.`` or ``_`` for a family of figures."""
    kind: Literal["min", "max", "around_zero"]
    unless: str = ""
    """Not applied where this other figure was measured."""


_RULES = (
    _Rule("min_parse_rate", "outcomes.parse_rate", "min"),
    _Rule("min_mass", "outcomes.mass", "min"),
    _Rule("min_order_consistency", "position_bias.order_consistency", "min"),
    _Rule("max_position_preference", "position_bias.preference_fairness", "around_zero"),
    _Rule("max_prefer_longer", "length_bias.prefer_longer", "max", unless="length_bias.excess"),
    _Rule("max_length_excess", "length_bias.excess", "max"),
    _Rule("max_prefer_format", "format_bias.prefer_", "max"),
    _Rule("max_self_preference", "self_preference.equal_opportunity", "max"),
    _Rule("max_cycles", "stability.cycles", "max"),
    _Rule("min_accuracy", "agreement.accuracy", "min"),
    _Rule("min_robustness", "probe.robustness.", "min"),
    _Rule("max_injection", "probe.injection.", "max"),
    _Rule("max_drift", "drift.changed", "max"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateRow:
    """One threshold held against one figure."""

    name: str
    """The figure's name; what ``--accept-bias`` takes."""
    arm: str
    """Judge and template; empty for figures across several."""
    state: State
    value: float
    low: float | None
    high: float | None
    n: int
    rule: str
    """The threshold in words."""

    def __str__(self) -> str:
        span = "" if self.low is None else f" [{self.low:.3f}, {self.high:.3f}]"
        return f"{self.name} = {self.value:.3f}{span}, n = {self.n:,}, must be {self.rule}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GateResult:
    """Every row that was held against the card."""

    rows: list[GateRow]
    accepted: list[str]
    """Names that the user accepted."""
    thresholds: GateThresholds
    card: dict[str, Any]
    """The card's summary and where it came from."""

    @property
    def refused(self) -> list[GateRow]:
        """Rows that fail and were not accepted by name."""
        return [row for row in self.rows if row.state == "fail" and not _named(row, self.accepted)]

    @property
    def unclear(self) -> list[GateRow]:
        """Rows that the data can neither prove nor refute."""
        return [row for row in self.rows if row.state == "unclear"]

    @property
    def status(self) -> str:
        """``passed``, ``accepted`` (it fails, and somebody said so by name) or ``refused``."""
        if self.refused:
            return "refused"
        return "accepted" if any(row.state == "fail" for row in self.rows) else "passed"

    def manifest(self) -> dict[str, Any]:
        """Return what a label folder's manifest records under ``gate``."""
        return {
            "status": self.status,
            "accepted": self.accepted,
            "failed": [asdict(row) for row in self.rows if row.state == "fail"],
            "unclear": [row.name for row in self.unclear],
            "thresholds": asdict(self.thresholds),
            "card": self.card,
        }


def _named(row: GateRow, names: Iterable[str]) -> bool:
    """Return whether a row is accepted: by its name, or by its section's name."""
    return any(row.name == name or row.name.split(".")[0] == name for name in names)


def judge_card(
    card: ReportCard, thresholds: GateThresholds, *, accept: Sequence[str] = ()
) -> GateResult:
    """Hold a card against thresholds; raises nothing for a failing row.

    Raises:
        RecipeError: an accepted name is no figure or section of the card.
    """
    figures = [(arm, figure) for arm, figure in card.figures() if figure.estimate.value is not None]
    measured = {(arm, figure.name) for arm, figure in figures}
    rows = _evidence(card, thresholds)
    for rule in _RULES:
        limit = getattr(thresholds, rule.option)
        for arm, figure in figures:
            if limit is None or not _matches(figure.name, rule.figure):
                continue
            if rule.unless and (arm, rule.unless) in measured:
                continue
            estimate = figure.estimate
            assert estimate.value is not None
            state, words = _judge(rule.kind, limit, estimate.value, estimate.low, estimate.high)
            if state == "unclear" and thresholds.strict:
                state = "fail"
            rows.append(
                GateRow(
                    name=figure.name,
                    arm=arm,
                    state=state,
                    value=estimate.value,
                    low=estimate.low,
                    high=estimate.high,
                    n=estimate.n,
                    rule=words,
                )
            )
    known = {figure.name for _, figure in card.figures()} | {"evidence.pairs"}
    _check_names(accept, known)
    return GateResult(
        rows=rows,
        accepted=sorted(set(accept)),
        thresholds=thresholds,
        card={"created": card.created, "source": card.source, "summary": card.summary()},
    )


def _evidence(card: ReportCard, thresholds: GateThresholds) -> list[GateRow]:
    if thresholds.min_pairs is None:
        return []
    return [
        GateRow(
            name="evidence.pairs",
            arm=arm.name,
            state="ok" if arm.pairs >= thresholds.min_pairs else "fail",
            value=float(arm.pairs),
            low=None,
            high=None,
            n=arm.pairs,
            rule=f"at least {thresholds.min_pairs}",
        )
        for arm in card.arms
    ]


def _matches(name: str, wanted: str) -> bool:
    return name.startswith(wanted) if wanted[-1] in "._" else name == wanted


def _judge(
    kind: str, limit: float, value: float, low: float | None, high: float | None
) -> tuple[State, str]:
    """Return the row's state and its rule in words; a value without interval stands for itself."""
    low = value if low is None else low
    high = value if high is None else high
    if kind == "min":
        words = f"at least {limit:g}"
        return ("fail" if high < limit else "ok" if low >= limit else "unclear"), words
    if kind == "max":
        words = f"at most {limit:g}"
        return ("fail" if low > limit else "ok" if high <= limit else "unclear"), words
    words = f"between -{limit:g} and {limit:g}"
    if low > limit or high < -limit:
        return "fail", words
    return ("ok" if -limit <= low and high <= limit else "unclear"), words


def _check_names(accept: Sequence[str], known: set[str]) -> None:
    sections = {name.split(".")[0] for name in known}
    for name in accept:
        if name not in known | sections:
            raise RecipeError(
                f"--accept-bias {name!r} is no figure of the report card"
                f"{nearest(name, known | sections)}"
            )


def check_gate(
    source: Path | str,
    thresholds: GateThresholds | None = None,
    *,
    accept: Sequence[str] = (),
    candidates: Path | str | None = None,
    gold: Path | str | None = None,
) -> GateResult:
    """Hold a verdict folder's report card against thresholds.

    Args:
        source: a verdict folder, or a ``report.json``. For a folder, the card beside it
            (``report-card/report.json``) is used when it is of exactly these verdicts; else one is
            computed, which costs seconds and no call.
        thresholds: None: those that the card was written with (recipe table
            ``[report.thresholds]``), else the defaults.
        accept: figures or sections whose failure the user accepts by name.
        candidates: texts, for a card that must be computed; None: the folder beside the verdicts.
        gold: gold pairs, likewise.

    Raises:
        GateRefused: rows fail that were not accepted; the message names each.
        InputError: the source is missing or damaged.
        RecipeError: an accepted name is unknown.
    """
    path = _card_path(Path(source))
    if path is None:
        from feedback.report_run import card_of_folder

        card = card_of_folder(source, candidates=candidates, gold=gold)
    else:
        from feedback.card import read_card

        card = read_card(path)
        thresholds = thresholds or _recorded_thresholds(path)
    result = judge_card(card, thresholds or GateThresholds(), accept=accept)
    if result.refused:
        raise GateRefused(_refusal(source, result.refused))
    return result


def _card_path(source: Path) -> Path | None:
    """Return the card to use: ``source`` itself, or the one beside a folder if it is its own."""
    from feedback.card import read_card

    if source.is_file() or source.suffix == ".json":
        return source
    beside = source.parent / "report-card" / "report.json"
    if not beside.is_file() or not (source / MANIFEST).is_file():
        return None
    recorded = read_card(beside).source.get("manifest_sha256")
    return beside if recorded == [manifest_sha256(source)] else None


def _recorded_thresholds(path: Path) -> GateThresholds | None:
    """Return the thresholds that a written card was held against."""
    recorded = json.loads(path.read_text(encoding="utf-8")).get("gate", {}).get("thresholds")
    return None if recorded is None else build_options(GateThresholds, recorded, path=path)


def _refusal(source: Path | str, rows: Sequence[GateRow]) -> str:
    arms = sorted({row.arm for row in rows if row.arm})
    lines = "; ".join(str(row) for row in rows)
    names = " ".join(dict.fromkeys(row.name for row in rows))
    return (
        f"{source}: the judge ({', '.join(arms)}) fails its report card: {lines}. "
        f"Change the judge or its template, or go on knowingly with --accept-bias {names}"
    )


def require_gate(folder: Path | str, *, accept: Sequence[str] = ()) -> dict[str, Any] | None:
    """Return a label folder's gate record, or refuse the folder.

    Reads ``manifest["gate"]`` only. A folder whose manifest has no such record was not made from
    verdicts by this toolkit (people's labels, an import), and passes with None.

    Raises:
        GateRefused: the record says ``refused`` and not every failed row is accepted by name.
        ShardError: the folder has no manifest.
    """
    gate: dict[str, Any] | None = read_manifest(Path(folder)).get("gate") or None
    if gate is None or gate.get("status") in ("passed", "accepted"):
        return gate
    known = {entry.name for entry in fields(GateRow)}
    rows = [
        GateRow(**{key: value for key, value in row.items() if key in known})
        for row in gate.get("failed", [])
    ]
    allowed = [*accept, *gate.get("accepted", [])]
    refused = [row for row in rows if not _named(row, allowed)]
    if refused or not rows:
        raise GateRefused(_refusal(folder, refused))
    return {**gate, "status": "accepted", "accepted": sorted({*allowed})}


def merged_gate(gates: Sequence[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return the gate record of rows from several folders: as bad as the worst of them.

    A failure that one folder's user accepted stays refused where another folder has it too and
    nobody accepted it there. Folders without a record (people's labels) add nothing.
    """
    known = [gate for gate in gates if gate]
    if not known:
        return None
    worst = min(known, key=lambda gate: ("refused", "accepted", "passed").index(gate["status"]))
    names = {name for gate in known for name in gate.get("accepted", [])}
    return {
        **worst,
        "failed": [row for gate in known for row in gate.get("failed", [])],
        "unclear": sorted({name for gate in known for name in gate.get("unclear", [])}),
        "accepted": sorted(name for name in names if all(_accepts(gate, name) for gate in known)),
    }


def _accepts(gate: dict[str, Any], name: str) -> bool:
    """Return whether every failure of a folder that ``name`` covers was accepted there."""
    failed = [row["name"] for row in gate.get("failed", [])]
    covered = [one for one in failed if name in (one, one.split(".")[0])]
    accepted = set(gate.get("accepted", []))
    return all({one, one.split(".")[0]} & accepted for one in covered)
