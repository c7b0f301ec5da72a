"""What the verdicts of a folder depend on, as ``run.json`` and the manifest hold it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from feedback.backends.identity import reply_settings
from feedback.constitution import load_constitution
from feedback.judge import Judge
from feedback.judge_options import JudgeOptions
from feedback.labeling_setup import Member, candidates_sha256, combination_of
from feedback.panel import CascadeOptions
from feedback.templates import describe, load_criteria, load_template

__all__ = ["run_record"]


def run_record(options: JudgeOptions, members: Sequence[Member], judge: Judge) -> dict[str, Any]:
    """Return what the verdicts of a folder depend on."""
    combination = combination_of(options)
    record: dict[str, Any] = {
        "judge": dataclasses.asdict(judge.identity),
        "engine": reply_settings(options.engine),
        "template": describe(judge.template),
        "rubric": judge.rubric,
        "candidates_sha256": candidates_sha256(options.candidates),
        "orders": options.orders,
        "pairs": options.pairs,
        "pairs_per_prompt": options.pairs_per_prompt,
        "repeats": options.repeats,
        "sampling": judge.sampling(),
        "read": options.read,
        "min_mass": options.min_mass,
        "max_prompt_tokens": options.max_prompt_tokens,
        "seed": options.seed,
    }
    if options.constitution is not None:
        record["constitution"] = load_constitution(options.constitution).describe()
    if judge.criteria and judge.template.mode != "structured":
        record["criteria"] = {entry.name: entry.weight for entry in judge.criteria}
    if combination is not None:
        record["combine"] = combination.record()
        record["cascade"] = options.cascade and _cascade_record(options.cascade)
        record["members"] = [_member_record(member) for member in members]
    return record


def _cascade_record(cascade: CascadeOptions) -> dict[str, Any]:
    names = ("unsure", "inconsistent", "min_mass", "max_entropy")
    return {name: getattr(cascade, name) for name in names}


def _member_record(member: Member) -> dict[str, Any]:
    options = member.options
    template = load_template(options.template)
    return {
        "backend": options.engine.backend,
        "model": options.engine.model,
        "revision": options.engine.revision,
        "engine": reply_settings(options.engine),
        "template": describe(template),
        "rubric": load_criteria(options.rubric or template.rubric).text,
    }
