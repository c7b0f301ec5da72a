"""The report card of a verdict folder: one part per judge and template, and what spans them.

``make_card`` computes, ``read_card`` and ``ReportCard.to_dict`` move it to and from JSON. No call
is made and no model loaded; texts and gold are used where they are given.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from feedback.agreement_section import agreement_section
from feedback.bias import format_section, length_section
from feedback.consistency import entropy, scheme_section, stability_section
from feedback.errors import InputError
from feedback.figures import CardSection, Figure, plain, read_section
from feedback.intervals import Resampler
from feedback.length_control import win_rate_table
from feedback.mitigation import mitigation_section
from feedback.observations import Pairs
from feedback.outcomes import outcome_section
from feedback.position import position_section
from feedback.selfpreference import self_preference_section
from feedback.slices import slice_fields, slice_table

__all__ = ["CARD_VERSION", "ArmCard", "ReportCard", "make_card", "read_card"]

CARD_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmCard:
    """What is known of one judge with one template."""

    name: str
    judge: dict[str, Any]
    template: str
    template_sha256: str
    pairs: int
    prompts: int
    sections: list[CardSection]
    look_first: list[dict[str, Any]] = field(default_factory=list)
    """Pairs that a person should read first: most entropy, then least sure."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportCard:
    """The whole card."""

    source: dict[str, Any]
    """Folders and the hash of the verdicts' manifest."""
    arms: list[ArmCard]
    across: list[CardSection] = field(default_factory=list)
    """Sections that compare arms."""
    created: str = ""

    def figures(self) -> Iterator[tuple[str, Figure]]:
        """Yield (arm's name, figure) for every figure; figures across arms have the name ``""``."""
        for arm in self.arms:
            for section in arm.sections:
                for figure in section.figures:
                    yield arm.name, figure
        for section in self.across:
            for figure in section.figures:
                yield "", figure

    def to_dict(self) -> dict[str, Any]:
        """Return the card as JSON holds it."""
        return {
            "kind": "report_card",
            "card_version": CARD_VERSION,
            "created": self.created,
            "source": self.source,
            "arms": [
                {**asdict(arm), "sections": [plain(section) for section in arm.sections]}
                for arm in self.arms
            ],
            "across": [plain(section) for section in self.across],
        }

    def summary(self) -> dict[str, Any]:
        """Return name -> value, low, high, n of the main figures, for manifests and cards."""
        kept: dict[str, Any] = {}
        for arm, figure in self.figures():
            if figure.estimate.value is not None and figure.name in _SUMMARY:
                estimate = figure.estimate
                kept.setdefault(arm, {})[figure.name] = {
                    "value": estimate.value,
                    "low": estimate.low,
                    "high": estimate.high,
                    "n": estimate.n,
                }
        return kept


_SUMMARY = (
    "outcomes.parse_rate",
    "outcomes.mass",
    "position_bias.order_consistency",
    "position_bias.preference_fairness",
    "length_bias.prefer_longer",
    "length_bias.excess",
    "format_bias.prefer_list",
    "self_preference.equal_opportunity",
    "stability.cycles",
    "agreement.accuracy",
    "agreement.kappa",
    "agreement.alpha",
    "agreement.ece",
    "agreement.judge_less_human",
)


def make_card(
    arms: Sequence[Pairs],
    *,
    source: dict[str, Any] | None = None,
    slices: Sequence[str] | None = None,
    own_models: Sequence[str] = (),
    baseline: str | None = None,
    replicates: int = 2000,
    seed: int = 0,
    extra: Sequence[CardSection] = (),
) -> ReportCard:
    """Compute the card.

    Args:
        arms: from ``observations.collect``.
        source: what to say of where the verdicts come from.
        slices: meta fields to slice by; None: every field with 2 to 20 values.
        own_models: models that count as the judge's own; empty: by family.
        baseline: model that win rates are against; None: the commonest.
        replicates: bootstrap resamples.
        seed: of the bootstrap.
        extra: sections made elsewhere (probes, drift, mitigations).

    Raises:
        InputError: there is no verdict, or a slice names a field that no row has.
    """
    if not arms or not any(arm.calls for arm in arms):
        raise InputError("no verdicts to report on")
    prompts = np.arange(len(arms[0].prompt_ids))
    resampler = Resampler(prompts, replicates=replicates, seed=seed)
    made = [
        _arm(pairs, resampler, slices=slices, own_models=own_models, baseline=baseline)
        for pairs in arms
    ]
    spanning = (scheme_section(arms, resampler), mitigation_section(arms, resampler))
    across = [section for section in spanning if section is not None]
    return ReportCard(
        source=source or {},
        arms=made,
        across=[*across, *extra],
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _arm(
    pairs: Pairs,
    resampler: Resampler,
    *,
    slices: Sequence[str] | None,
    own_models: Sequence[str],
    baseline: str | None,
) -> ArmCard:
    length = length_section(pairs, resampler)
    table = win_rate_table(pairs, resampler, baseline=baseline)
    if table is not None:
        length.tables.append(table)
    sections = [outcome_section(pairs, resampler)]
    if (gold := agreement_section(pairs, resampler)) is not None:
        sections.append(gold)
    sections += [
        position_section(pairs, resampler),
        length,
        format_section(pairs),
        self_preference_section(pairs, resampler, own_models=own_models),
        stability_section(pairs, resampler),
    ]
    fields = slice_fields(pairs) if slices is None else list(slices)
    if fields:
        tables = [slice_table(pairs, field, resampler) for field in fields]
        sections.append(CardSection(name="slices", title="Slices", tables=tables))
    return ArmCard(
        name=pairs.arm.name,
        judge=asdict(pairs.arm.judge),
        template=pairs.arm.template,
        template_sha256=pairs.arm.template_sha256,
        pairs=len({key[:3] for key in zip(pairs.prompt, pairs.a, pairs.b, strict=True)}),
        prompts=len(np.unique(pairs.prompt)),
        sections=sections,
        look_first=look_first(pairs),
    )


def look_first(pairs: Pairs, count: int = 30) -> list[dict[str, Any]]:
    """Return the pairs a person should read first: most entropy, then closest to one half.

    FairEval sends the highest-entropy rows to people; ties in entropy, which are many with two
    verdicts, go by the averaged probability.
    """
    bits = entropy(pairs)
    middle = pairs.mean_p
    rows = []
    for row in np.flatnonzero(np.isfinite(middle)):
        key = (int(pairs.prompt[row]), pairs.a[row], pairs.b[row])
        rows.append((-bits.get(key, 0.0), abs(float(middle[row]) - 0.5), int(row)))
    found: list[dict[str, Any]] = []
    for negative, _, row in sorted(rows)[:count]:
        found.append(
            {
                "prompt_id": pairs.prompt_ids[pairs.prompt[row]],
                "a": pairs.a[row],
                "b": pairs.b[row],
                "entropy": round(-negative, 4) + 0.0,
                "p": round(float(middle[row]), 4),
                "p_orders": [
                    None if np.isnan(value) else round(float(value), 4) for value in pairs.p[row]
                ],
            }
        )
    return found


def read_card(path: Path | str) -> ReportCard:
    """Read ``report.json``.

    Raises:
        InputError: the file is missing or is not a report card of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError("no such report card", path=path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value.get("kind") != "report_card" or value.get("card_version") != CARD_VERSION:
            raise InputError(f"not a report card of version {CARD_VERSION}", path=path)
        return ReportCard(
            source=value["source"],
            created=value["created"],
            across=[read_section(section) for section in value["across"]],
            arms=[
                ArmCard(
                    **{**arm, "sections": [read_section(section) for section in arm["sections"]]}
                )
                for arm in value["arms"]
            ],
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"not a report card: {error!r}", path=path) from error
