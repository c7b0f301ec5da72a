"""``rlaif calibrate``: fit a map on some gold pairs, and show on others what it is worth.

Prompts are split: the map is fitted on one part, and every figure comes from the other, which the
fit has not seen. ``rlaif pair --calibration`` applies the file.
"""

from __future__ import annotations

import datetime
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from feedback.errors import InputError, RecipeError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from feedback.calibration import Calibration
    from feedback.intervals import Estimate
    from feedback.observations import Pairs

__all__ = ["CalibrateOptions", "Fitted", "calibrate", "run"]

# Below so many pairs on either side the figures say too little to act on.
_FEW = 50
# Isotonic maps follow noise below about so many (Niculescu-Mizil and Caruana 2005, figure 8).
_FEW_ISOTONIC = 1000


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions:
    """Fit calibrated probabilities on gold pairs."""

    verdicts: Path
    """Verdict folder of the judge, asked about the gold pairs."""
    gold: Path
    """Gold pairs: a folder or a JSONL file."""
    out: Path
    """File for the maps, such as calibration.json; a page of the same name is written beside it."""
    method: Literal["temperature", "isotonic"] = "temperature"
    """temperature: two numbers, for tens of labels; isotonic: a rising curve, for thousands."""
    held_out: float = 0.5
    """Share of the prompts that the figures come from and the fit does not see."""
    seed: int = 0
    """Seed of the split and of resamples."""

    def __post_init__(self) -> None:
        """Refuse to fit and report on the same rows."""
        if not 0 < self.held_out < 1:
            raise RecipeError(
                f"held_out is {self.held_out}; it must be in (0, 1): figures from the rows that "
                "were fitted would flatter the map"
            )


class Fitted(NamedTuple):
    """One judge's map, and its figures on held-out pairs before and after."""

    calibration: Calibration
    before: dict[str, Estimate]
    after: dict[str, Estimate]
    points: dict[str, list[tuple[float, float, float | None, float | None, int]]]
    """Reliability: (stated, observed, low, high, n) per bin, before and after."""
    held_out: int
    needed: int
    """Gold pairs, both sides of the split together, that would do: to pin the temperature down to a
    quarter (or for an isotonic map not to follow noise), and to see what it is worth."""

    @property
    def warning(self) -> str | None:
        """Say that the slice is too small, and what would do; None where it is not."""
        pairs = self.calibration.pairs
        if pairs + self.held_out >= self.needed:
            return None
        return (
            f"{pairs} pairs to fit and {self.held_out} to check are few; about {self.needed:,} "
            "pairs would do"
        )


def run(options: CalibrateOptions) -> None:
    """Fit, write, and say what changed."""
    from feedback.progress import say

    for fitted in calibrate(options):
        one = fitted.calibration
        detail = f"temperature {one.temperature:.3g}, position bias {one.bias:+.3g} logits"
        if one.method == "isotonic":
            detail = f"isotonic, {len(one.knots)} knots"
        say(f"{one.judge.model}, {one.template}: {detail}, from {one.pairs} pairs")
        for name in fitted.before:
            say(f"  {name}: {fitted.before[name]} -> {fitted.after[name]}")
        if fitted.warning is not None:
            say(f"  warning: {fitted.warning}")
    say(f"calibration: {options.out} (rlaif pair --calibration {options.out})")


def calibrate(options: CalibrateOptions) -> list[Fitted]:
    """Fit one map per judge and template of the folder, and write file and page.

    Raises:
        InputError: no pair has both probabilities and a gold label, on either side of the split.
    """
    from feedback.calibration import save_calibrations
    from feedback.observations import collect, load_gold
    from feedback.records import Verdict
    from feedback.shards import file_sha256, read_rows, write_text

    arms = collect(read_rows(options.verdicts, Verdict), gold=load_gold(options.gold))
    fitted = [_fit(pairs, options) for pairs in arms if pairs.soft]
    if not fitted:
        raise InputError("no judge here gave probabilities", path=options.verdicts)
    report = [
        {
            "judge": entry.calibration.judge.model,
            "template": entry.calibration.template,
            "held_out_pairs": entry.held_out,
            "warning": entry.warning,
            "before": {name: value.to_dict() for name, value in entry.before.items()},
            "after": {name: value.to_dict() for name, value in entry.after.items()},
        }
        for entry in fitted
    ]
    gold = options.gold
    save_calibrations(
        options.out,
        [entry.calibration for entry in fitted],
        date=datetime.date.today().isoformat(),
        report=report,
        gold=file_sha256(gold) if gold.is_file() else str(gold),
        held_out=options.held_out,
        seed=options.seed,
    )
    write_text(options.out.with_suffix(".html"), _page(fitted))
    return fitted


def _fit(pairs: Pairs, options: CalibrateOptions) -> Fitted:
    import numpy as np

    from feedback.calibration import apply, fit_isotonic, fit_temperature
    from feedback.records import content_id

    known = np.isfinite(pairs.mean_p) & np.isfinite(pairs.gold)
    place = [
        int(content_id("calibrate", options.seed, name, length=12), 16) / 16**12
        for name in pairs.prompt_ids
    ]
    checked = np.array([place[prompt] < options.held_out for prompt in pairs.prompt])
    fit, check = known & ~checked, known & checked
    if not fit.any() or not check.any():
        raise InputError(
            f"{pairs.arm.name}: {int(known.sum())} pairs have both a probability and a gold label, "
            "too few to fit on some and report on others"
        )
    label = (pairs.gold + 1) / 2
    method = fit_temperature if options.method == "temperature" else fit_isotonic
    one = method(
        pairs.p[fit],
        label[fit],
        judge=pairs.arm.judge,
        template=pairs.arm.template,
        template_sha256=pairs.arm.template_sha256,
        prompts=len(np.unique(pairs.prompt[fit])),
    )
    stated = {"before": pairs.mean_p[check], "after": apply(one, pairs.p[check])}
    figures = {
        name: _figures(p, label[check], pairs.prompt[check], options.seed)
        for name, p in stated.items()
    }
    return Fitted(
        calibration=one,
        before=figures["before"],
        after=figures["after"],
        points={name: _points(p, label[check], pairs.prompt[check]) for name, p in stated.items()},
        held_out=int(check.sum()),
        needed=_needed(one, options),
    )


def _needed(one: Calibration, options: CalibrateOptions) -> int:
    from feedback.calibration import labels_needed

    to_fit = _FEW_ISOTONIC if one.method == "isotonic" else max(labels_needed(one) or 0, _FEW)
    return math.ceil(max(to_fit / (1 - options.held_out), _FEW / options.held_out))


def _figures(
    p: npt.NDArray[np.float64],
    label: npt.NDArray[np.float64],
    prompts: npt.NDArray[np.int64],
    seed: int,
) -> dict[str, Estimate]:
    """Return ECE, Brier score and NLL with 95% intervals; a gold tie is a label of one half."""
    from feedback.agreement import expected_calibration_error
    from feedback.calibration import scores
    from feedback.intervals import Resampler, mean

    confidence, hit = _named(p, label)
    resampler = Resampler(prompts, seed=seed)
    found = scores(p, label)
    return {
        "ECE": expected_calibration_error(confidence, hit, prompts, resampler),
        "Brier": mean(resampler, prompts, found.brier),
        "NLL": mean(resampler, prompts, found.nll),
    }


def _named(
    p: npt.NDArray[np.float64], label: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the confidence in the side that was named, and whether gold names it too."""
    import numpy as np

    return np.maximum(p, 1 - p), np.where(p >= 0.5, label, 1 - label)


def _points(
    p: npt.NDArray[np.float64], label: npt.NDArray[np.float64], prompts: npt.NDArray[np.int64]
) -> list[tuple[float, float, float | None, float | None, int]]:
    import numpy as np

    from feedback.intervals import Resampler, mean

    confidence, hit = _named(p, label)
    edges = np.linspace(0.5, 1.0, 6)
    bins = np.clip(np.digitize(confidence, edges) - 1, 0, len(edges) - 2)
    points = []
    for number in np.unique(bins):
        rows = bins == number
        share = mean(Resampler(prompts, replicates=500), prompts[rows], hit[rows])
        points.append(
            (float(confidence[rows].mean()), float(hit[rows].mean()), share.low, share.high,
             int(rows.sum()))
        )  # fmt: skip
    return points


def _page(fitted: list[Fitted]) -> str:
    from feedback.page.components import FigureRow, Section, figure_table, note, plot, plots
    from feedback.page.plots import reliability_plot
    from feedback.page.shell import render_page

    meanings = {
        "ECE": "Mean gap between stated confidence and share right; 0 is calibrated.",
        "Brier": "Mean squared error of the probability.",
        "NLL": "Cross-entropy with the gold label in nats; what soft-label losses feel.",
    }
    sections = []
    for number, entry in enumerate(fitted):
        rows: list[Any] = [
            FigureRow(
                label=f"{name}, {when}", estimate=values[name], meaning=meanings[name],
                percent=name == "ECE", fair=0.0, name=f"{name.lower()}_{when}",
            )
            for name in meanings
            for when, values in (("before", entry.before), ("after", entry.after))
        ]  # fmt: skip
        drawn = [
            plot(
                reliability_plot(points, name=f"reliability-{number}-{when}"),
                caption=f"Reliability {when}, on {entry.held_out} held-out pairs",
            )
            for when, points in entry.points.items()
        ]
        one = entry.calibration
        lead = (
            f"Fitted on {one.pairs} pairs of {one.prompts} prompts: temperature "
            f"{one.temperature:.3g}, position bias {one.bias:+.3g} logits."
            if one.method == "temperature"
            else f"Fitted on {one.pairs} pairs of {one.prompts} prompts: {len(one.knots)} knots."
        )
        title = f"{one.judge.model}, {one.template}"
        blocks = [figure_table(rows), plots(drawn)]
        if entry.warning is not None:
            blocks.insert(0, note(f"{entry.warning}.", kind="warning"))
        sections.append(Section(f"arm-{number}", title, lead, blocks))
    return render_page(
        title="Probabilities that keep their word",
        kicker="calibration",
        subtitle="Figures come from prompts that the fit has not seen",
        sections=sections,
    )
