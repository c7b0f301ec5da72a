"""PPO and the gate: a reward is a judge's opinion at first or second hand, and its card counts.

A judge as the reward is held against the report card that ``reward.report_card`` names. A reward
model was trained on labels that passed the gate, or whose failure somebody accepted by name; that
record travels with it, and into the policy's own.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from feedback.card import read_card
from feedback.errors import RecipeError
from feedback.gate import check_gate
from feedback.templates import load_template
from train.ppo_config import PpoOptions, RewardSource

__all__ = ["reward_gates"]

logger = logging.getLogger(__name__)


def reward_gates(options: PpoOptions) -> list[dict[str, Any]]:
    """Return what is known of the judge behind the reward: per source, status and accepted names.

    Raises:
        GateRefused: the judge fails its report card, and not every failure is accepted by name.
        RecipeError: the card is of another judge or template, or an accepted name is unknown.
    """
    source = options.reward
    if source.kind == "model":
        return [gate for name in source.models for gate in _inherited(Path(name))]
    if source.kind != "judge":
        return []
    if source.report_card is None:
        logger.warning(
            "the judge that is the reward (%s) has no report card: whatever it is biased to, the "
            "policy will learn; make one with rlaif report and name it in reward.report_card",
            source.judge.model,
        )
        return []
    _check_identity(source, source.report_card)
    gate = check_gate(source.report_card, accept=options.accept_bias)
    return [{"source": str(source.report_card), "status": gate.status, "accepted": gate.accepted}]


def _check_identity(source: RewardSource, path: Path) -> None:
    template = load_template(source.template)
    arms = read_card(path).arms
    known = [(arm.judge["model"], arm.template_sha256) for arm in arms]
    if (source.judge.model, template.sha256) not in known:
        found = "; ".join(f"{arm.judge['model']} with {arm.template}" for arm in arms)
        raise RecipeError(
            f"{path}: the card is of {found}, not of {source.judge.model} with {template.name}"
        )


def _inherited(folder: Path) -> list[dict[str, Any]]:
    """Return the gate records of the labels that a reward model was trained on."""
    record = folder / "training.json"
    if not record.is_file():
        return []
    made = json.loads(record.read_text(encoding="utf-8"))
    allowed = made.get("options", {}).get("accept_bias", [])
    found = []
    for entry in made.get("data", []):
        if gate := entry.get("manifest", {}).get("gate"):
            # Labels that were refused could be trained on by naming what fails; that is inherited.
            status = "passed" if gate["status"] == "passed" else "accepted"
            accepted = sorted({*gate.get("accepted", []), *allowed})
            found.append({"source": entry["source"], "status": status, "accepted": accepted})
    return found
