"""The report of a run: what was asked, what was judged, what was learnt, and what came of it.

Shows whichever stages the run's folder holds; a stage that did not run is simply absent. Everything
comes from the files of the run; no model is loaded and nothing is fetched.
"""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from feedback.errors import InputError
from feedback.intervals import Estimate, proportion
from feedback.page.components import (
    FigureRow,
    Section,
    figure_table,
    headline,
    note,
    plot,
    plots,
    side_by_side,
    table,
)
from feedback.page.curves import Curve, read_curves
from feedback.page.plots import curve_plot, histogram_plot
from feedback.page.shell import render_page
from feedback.records import Preference, PromptText, prompt_messages
from feedback.shards import MANIFEST, folder_kind, read_rows, write_text

__all__ = ["conversation", "write_run_report"]

TRAINED = {
    "policy-dpo": "DPO",
    "policy-rrhf": "RRHF",
    "policy-ppo": "PPO",
    "reward-model": "reward model",
    "policy-sft": "SFT",
}
# Which curves are worth a plot, in this order, with what a reader should see in them.
CURVES = {
    "loss": "Falls while there is something left to learn from the labels.",
    "rewards/margins": "How far apart the model holds chosen and rejected; above 0 is agreement.",
    "rewards/accuracies": "Share of training pairs that the model ranks as the judge did.",
    "objective/rlhf_reward": "Reward less the price of moving away from the reference.",
    "objective/scores": "What the reward source says of fresh completions.",
    "objective/kl": "Distance from the starting policy, in nats per completion.",
    "eval_loss": "Loss on prompts that training never saw.",
    "eval_rewards/accuracies": "Agreement with the labels on prompts that training never saw.",
}


def write_run_report(
    run_folder: Path, *, out: Path | None = None, examples: int = 3, browse_rows: int = 10_000
) -> Path:
    """Write the report of a run's folder and return its path.

    Raises:
        InputError: the folder is missing or holds nothing that can be shown.
    """
    if not run_folder.is_dir():
        raise InputError("no such folder", path=run_folder)
    sections = [
        section
        for section in (
            _result(run_folder),
            _examples(run_folder, examples),
            _labels(run_folder),
            *_training(run_folder),
            *_verdicts(run_folder, browse_rows),
            _provenance(run_folder),
        )
        if section is not None
    ]
    if not sections:
        raise InputError("holds no finished stage of a run", path=run_folder)
    path = out or run_folder / "report.html"
    page = render_page(
        title=_title(run_folder),
        kicker="AI feedback, one run",
        subtitle="From prompts to a policy: candidates, verdicts, labels, training, and the check "
        "by judges that took no part.",
        facts=_facts(run_folder),
        sections=sections,
        footer=f"Written {datetime.date.today().isoformat()} from the files in this run's folder.",
    )
    write_text(path, page)
    return path


def conversation(prompt: PromptText) -> str:
    """Return messages as a reader sees them; a single turn without its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in prompt_messages(prompt))


def _title(run_folder: Path) -> str:
    return f"Run {run_folder.resolve().name}"


def _load(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"not valid JSON: {error}", path=path) from error
    return value if isinstance(value, dict) else None


def _manifest(run_folder: Path, name: str) -> dict[str, Any] | None:
    return _load(run_folder / name / MANIFEST)


def _facts(run_folder: Path) -> list[tuple[str, str]]:
    facts = []
    for name in ("candidates", "verdicts", "preferences", "rankings"):
        manifest = _manifest(run_folder, name)
        if manifest is not None:
            facts.append((name, f"{manifest['rows']:,}"))
    seconds = [
        record["seconds"]
        for path in sorted((run_folder / "stages").glob("*.json"))
        if (record := _load(path)) and "seconds" in record
    ]
    if seconds:
        facts.append(("wall time", f"{sum(seconds) / 60:.1f} minutes"))
    return facts


# --- what came of it -------------------------------------------------------------------------


def _result(run_folder: Path) -> Section | None:
    evaluation = _load(run_folder / "evaluation" / "evaluation.json")
    if evaluation is None:
        return None
    figures = list(_estimates(evaluation))
    if not figures:
        return None
    top = [row for row in figures if "win" in row.label.lower()][:4]
    blocks = [headline(top)] if top else []
    rest = [row for row in figures if row not in top]
    if rest:
        blocks.append(figure_table(rest))
    return Section(
        "result",
        "What came of it",
        "The new policy against the one it started from, on prompts that training never saw.",
        blocks,
    )


def _estimates(value: Any, words: tuple[str, ...] = ()) -> Iterator[FigureRow]:
    """Yield every number with an interval inside an evaluation, named by its path."""
    if isinstance(value, list):
        return
    if not isinstance(value, dict):
        return
    if _is_number(value.get("value")) and "low" in value and "high" in value:
        yield _figure(value, words)
        return
    for key, inner in value.items():
        yield from _estimates(inner, (*words, str(key)))


def _figure(value: dict[str, Any], words: tuple[str, ...]) -> FigureRow:
    name = ".".join(words)
    share = "rate" in name or "share" in name or "win" in name or "accuracy" in name
    low, high, middle = value.get("low"), value.get("high"), float(value["value"])
    known = [middle, *(float(bound) for bound in (low, high) if bound is not None)]
    scale = (0.0, 1.0) if min(known) >= 0 and max(known) <= 1 else _scale(min(known), max(known))
    estimate = Estimate(
        middle,
        low,
        high,
        int(value.get("n", 0)),
        int(value.get("prompts", value.get("n", 0))),
        str(value.get("method", "")),
    )
    label = " ".join(words).replace("_", " ").strip()
    return FigureRow(
        label=label[:1].upper() + label[1:],
        estimate=estimate,
        meaning=str(value.get("meaning", "")),
        scale=scale,
        fair=0.5 if "win" in name else (0.0 if scale[0] < 0 < scale[1] else None),
        percent=share and scale == (0.0, 1.0),
        name=name,
    )


def _scale(low: float, high: float) -> tuple[float, float]:
    reach = max(abs(low), abs(high)) * 1.25 or 1.0
    return (-reach, reach) if low < 0 else (0.0, reach)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- labels ----------------------------------------------------------------------------------


def _preferences(run_folder: Path) -> list[Preference]:
    folder = run_folder / "preferences"
    if not (folder / MANIFEST).is_file():
        return []
    return list(read_rows(folder, Preference))


def _examples(run_folder: Path, count: int) -> Section | None:
    rows = [row for row in _preferences(run_folder) if not row.tie]
    if not rows or not count:
        return None
    # The surest, the median and the least sure say more than a random handful.
    ordered = sorted(rows, key=lambda row: -row.p_chosen)
    places = sorted({int(place) for place in np.linspace(0, len(ordered) - 1, count)})
    words = {0: "The surest label of the run", len(ordered) - 1: "The least sure label of the run"}
    blocks = [_example(ordered[place], words.get(place, "")) for place in places]
    return Section(
        "examples",
        "A few labels to read",
        "Real rows, chosen by how sure the judge was. Read them before believing any number.",
        blocks,
    )


def _example(row: Preference, words: str) -> Markup:
    said = f"P(chosen preferred) = {row.p_chosen:.3f}, the mean of both orders."
    return side_by_side(
        conversation(row.prompt),
        [("chosen", conversation(row.chosen)), ("rejected", conversation(row.rejected))],
        remark=f"{words}. {said}" if words else said,
        mark=0,
    )


def _labels(run_folder: Path) -> Section | None:
    rows = _preferences(run_folder)
    if not rows:
        return None
    ids = {row.prompt_id: index for index, row in enumerate(rows)}
    groups = np.array([ids[row.prompt_id] for row in rows])
    lengths = np.array(
        [len(conversation(row.chosen)) - len(conversation(row.rejected)) for row in rows]
    )
    clear = np.abs(lengths) > 30
    sure = np.array([row.p_chosen for row in rows])
    figures = [
        FigureRow(
            label="Sure labels",
            estimate=proportion(sure > 0.9, groups),
            meaning="Share of pairs with P(chosen) above 0.9; the rest keep their doubt.",
        ),
        FigureRow(
            label="Ties",
            estimate=proportion([row.tie for row in rows], groups),
            meaning="Share of pairs that the judge called equally good.",
        ),
        FigureRow(
            label="Chosen is the longer",
            estimate=proportion(lengths[clear] > 0, groups[clear]),
            meaning="Among pairs more than 30 characters apart; far from one half, length may be "
            "what is being learnt.",
            fair=0.5,
        ),
    ]
    histogram = histogram_plot(
        {"pairs": sure.tolist()}, name="soft-labels", x_label="P(chosen preferred)",
        bounds=(0.5, 1.0),
    )  # fmt: skip
    blocks = [
        figure_table(figures),
        plot(
            histogram,
            caption="The soft labels.",
            meaning="A judge that is always sure would put every pair at 1.",
        ),
    ]
    return Section(
        "labels",
        "The labels",
        f"{len(rows):,} pairs from {len(ids):,} prompts; the judge's probability stays on each.",
        blocks,
    )


# --- training --------------------------------------------------------------------------------


def _training(run_folder: Path) -> list[Section]:
    sections = []
    for name, title in TRAINED.items():
        curves = read_curves(run_folder / name) if (run_folder / name).is_dir() else {}
        drawn = [(key, curves[key]) for key in CURVES if len(curves.get(key, ([], []))[0]) > 1]
        if drawn:
            items = [_curve(name, key, curve) for key, curve in drawn]
            steps = int(max(curve[0][-1] for _, curve in drawn))
            lead = f"{steps:,} optimiser steps; faint lines are single log lines."
            sections.append(Section(name, f"Training: {title}", lead, [plots(items)]))
    return sections


def _curve(stage: str, key: str, curve: Curve) -> Markup:
    fair = 0.5 if key.endswith("accuracies") else 0.0 if key.endswith("margins") else None
    svg = curve_plot({key: curve}, name=f"{stage} {key}", x_label="step", y_label=key, fair=fair)
    end = f"From {curve[1][0]:.3f} to {curve[1][-1]:.3f}."
    return plot(svg, caption=key, meaning=f"{end} {CURVES[key]}")


# --- verdicts and where it all came from ------------------------------------------------------


def _verdicts(run_folder: Path, rows: int) -> list[Section]:
    del rows
    manifest = _manifest(run_folder, "verdicts")
    if manifest is None:
        return []
    counts = Counter(manifest.get("counts", {}))
    total = sum(counts.values())
    if not total:
        return []
    lines = [(outcome, count, f"{count / total:.1%}") for outcome, count in counts.most_common()]
    return [
        Section(
            "verdicts",
            "Verdicts",
            f"{total:,} judge calls and how they ended. A failure is never a label.",
            [table(("Outcome", "Calls", "Share"), lines)],
        )
    ]


def _provenance(run_folder: Path) -> Section | None:
    lines = []
    for path in sorted(run_folder.glob(f"*/{MANIFEST}")):
        manifest = _load(path) or {}
        if "kind" in manifest:
            folder_kind(path.parent)
            shards = manifest.get("shards", [])
            first = shards[0]["sha256"][:12] if shards else ""
            lines.append((path.parent.name, manifest.get("rows", 0), len(shards), first))
    if not lines:
        return None
    versions = (_load(run_folder / "verdicts" / MANIFEST) or {}).get("versions", {})
    packages = ", ".join(f"{name} {version}" for name, version in versions.items())
    blocks = [table(("Folder", "Rows", "Shards", "First shard's sha256"), lines)]
    if packages:
        blocks.append(note(f"Made with {packages}."))
    return Section("provenance", "Where this comes from", "", blocks)
