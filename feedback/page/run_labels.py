"""The labels of a run and what was learnt from them: pairs to read, soft labels, curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from markupsafe import Markup

from feedback.intervals import proportion
from feedback.page.components import (
    FigureRow,
    Section,
    figure_table,
    note,
    plot,
    plots,
    side_by_side,
)
from feedback.page.curves import Curve, read_curves
from feedback.page.plots import curve_plot, histogram_plot
from feedback.page.text import conversation
from feedback.records import Preference
from feedback.shards import MANIFEST, read_manifest, read_rows

__all__ = ["label_sections", "training_sections"]

TRAINED = {
    "policy-sft": "SFT",
    "reward-model": "reward model",
    "policy-dpo": "DPO",
    "policy-rrhf": "RRHF",
    "policy-ppo": "PPO",
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


def label_sections(run_folder: Path, examples: int) -> list[Section]:
    """Return what is to be said of the preferences; nothing where there are none."""
    folder = run_folder / "preferences"
    if not (folder / MANIFEST).is_file():
        return []
    rows = list(read_rows(folder, Preference))
    if not rows:
        return []
    gate = read_manifest(folder).get("gate") or {}
    blocks = [_figures(rows), _histogram(rows)]
    if gate.get("status") == "accepted":
        names = ", ".join(gate.get("accepted", []))
        blocks.append(
            note(
                f"Made from verdicts that fail the gate; accepted by name: {names}.", kind="warning"
            )
        )
    sections = [
        Section(
            "labels",
            "The labels",
            f"{len(rows):,} pairs from {len({row.prompt_id for row in rows}):,} prompts; the "
            "judge's probability stays on each.",
            blocks,
        )
    ]
    decided = sorted((row for row in rows if not row.tie), key=lambda row: -row.p_chosen)
    if decided and examples:
        places = sorted({int(place) for place in np.linspace(0, len(decided) - 1, examples)})
        words = {0: "The surest label. ", len(decided) - 1: "The least sure label. "}
        sections.append(
            Section(
                "examples",
                "A few labels to read",
                "Real rows, taken by how sure the judge was. Read them before believing a number.",
                [_example(decided[place], words.get(place, "")) for place in places],
            )
        )
    return sections


def _figures(rows: list[Preference]) -> Markup:
    ids: dict[str, int] = {}
    groups = np.array([ids.setdefault(row.prompt_id, len(ids)) for row in rows])
    lengths = np.array(
        [len(conversation(row.chosen)) - len(conversation(row.rejected)) for row in rows]
    )
    tie = np.array([row.tie for row in rows], bool)
    clear = (np.abs(lengths) > 30) & ~tie
    sure = np.array([row.p_chosen for row in rows])
    return figure_table(
        [
            FigureRow(
                label="Sure labels",
                estimate=proportion(sure > 0.9, groups),
                meaning="Share of pairs with P(chosen) above 0.9; the rest keep their doubt.",
            ),
            FigureRow(
                label="Ties",
                estimate=proportion(tie, groups),
                meaning="Share of pairs that the judge called equally good.",
            ),
            FigureRow(
                label="Chosen is the longer",
                estimate=proportion(lengths[clear] > 0, groups[clear]),
                meaning="Among pairs more than 30 characters apart; far from one half, length may "
                "be what is being learnt.",
                fair=0.5,
            ),
        ]
    )


def _histogram(rows: list[Preference]) -> Markup:
    svg = histogram_plot(
        {"pairs": [row.p_chosen for row in rows]},
        name="soft-labels",
        x_label="P(chosen preferred)",
        bounds=(0.5, 1.0),
    )
    words = "A judge that is always sure would put every pair at 1."
    return plot(svg, caption="The soft labels.", meaning=words)


def _example(row: Preference, words: str) -> Markup:
    return side_by_side(
        conversation(row.prompt),
        [("chosen", conversation(row.chosen)), ("rejected", conversation(row.rejected))],
        remark=f"{words}P(chosen preferred) = {row.p_chosen:.3f}, the mean of both orders.",
        mark=0,
    )


def training_sections(run_folder: Path) -> list[Section]:
    """Return a section of curves for each model that the run trained."""
    sections = []
    for name, title in TRAINED.items():
        curves = read_curves(run_folder / name) if (run_folder / name).is_dir() else {}
        drawn = [(key, curves[key]) for key in CURVES if len(curves.get(key, ([], []))[0]) > 1]
        if drawn:
            items = [_curve(name, key, curve) for key, curve in drawn]
            steps = int(max(curve[0][-1] for _, curve in drawn))
            lead = f"{steps:,} optimiser steps."
            if any(len(curve[0]) > 40 for _, curve in drawn):
                lead += " Faint lines are single log lines, strong ones their running mean."
            sections.append(Section(name, f"Training: {title}", lead, [plots(items)]))
    return sections


def _curve(stage: str, key: str, curve: Curve) -> Markup:
    fair = 0.5 if key.endswith("accuracies") else 0.0 if key.endswith("margins") else None
    svg = curve_plot({key: curve}, name=f"{stage} {key}", x_label="step", y_label=key, fair=fair)
    ends = f"From {curve[1][0]:.3f} to {curve[1][-1]:.3f}."
    return plot(svg, caption=key, meaning=f"{ends} {CURVES[key]}")
