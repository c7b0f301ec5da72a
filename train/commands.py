"""The table of commands: where each one's options class and its function live.

Targets are strings, so that reading the table loads nothing.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

__all__ = ["COMMANDS", "Command", "load"]


class Command(NamedTuple):
    """One subcommand: where its options class and its function live, and its one-line help."""

    options: str
    function: str
    help: str


COMMANDS: dict[str, Command] = {
    "run": Command(
        "train.pipeline:PipelineOptions",
        "train.pipeline:run",
        "the whole chain from one recipe; unchanged stages are skipped",
    ),
    "sample": Command(
        "feedback.sampling:SampleOptions", "feedback.sampling:run", "prompts -> candidates"
    ),
    "revise": Command(
        "feedback.revision:ReviseOptions",
        "feedback.revision:run",
        "candidates -> candidates revised by the principles of a constitution",
    ),
    "judge": Command(
        "feedback.judge_options:JudgeOptions", "feedback.labeling:run", "candidates -> verdicts"
    ),
    "pair": Command(
        "feedback.pairing:PairOptions",
        "feedback.pairing:run",
        "verdicts -> preferences and rankings",
    ),
    "report": Command(
        "feedback.report:ReportOptions",
        "feedback.report:run",
        "verdicts -> the judge's report card, in numbers and as a page",
    ),
    "import": Command(
        "feedback.importing:ImportOptions",
        "feedback.importing:run",
        "judgments made elsewhere -> candidates, verdicts and gold pairs",
    ),
    "sft": Command(
        "train.config:SftOptions",
        "train.sft:run",
        "supervised fine-tuning, from a checkpoint or from scratch",
    ),
    "reward": Command(
        "train.config:RewardOptions",
        "train.reward:run",
        "train a reward model on preferences or rankings",
    ),
    "dpo": Command(
        "train.config:DpoOptions",
        "train.dpo:run",
        "direct preference optimisation with soft labels",
    ),
    "rrhf": Command(
        "train.config:RrhfOptions",
        "train.rrhf:run",
        "rank responses to align: ranking hinge plus SFT on the best",
    ),
    "ppo": Command(
        "train.ppo_config:PpoOptions",
        "train.ppo:run",
        "PPO against a reward model, an ensemble, the judge itself, or a function",
    ),
    "evaluate": Command(
        "train.evaluate:EvaluateOptions",
        "train.evaluate:run",
        "policy against policy, by judges and checks that labelled nothing",
    ),
    "annotate": Command(
        "feedback.annotate:AnnotateOptions",
        "feedback.annotate:run",
        "people label a blind sample of pairs on a local page; gold for the commands below",
    ),
    "calibrate": Command(
        "feedback.calibrate:CalibrateOptions",
        "feedback.calibrate:run",
        "gold pairs -> a map from the judge's probabilities to honest ones",
    ),
    "abtest": Command(
        "feedback.abtest:AbtestOptions",
        "feedback.abtest:run",
        "judge templates, judges or modes against each other on gold pairs",
    ),
    "export": Command(
        "feedback.exports:ExportOptions",
        "feedback.exports:run",
        "preferences in the form of TRL, OpenRLHF, LLaMA-Factory, Axolotl or Argilla",
    ),
    "publish": Command(
        "feedback.publish:PublishOptions",
        "train.publish:run",
        "labels or a trained model -> the Hub or a folder, with a card, scanned before it leaves",
    ),
    "merge": Command(
        "feedback.merge:MergeOptions",
        "feedback.merge:run",
        "join shard folders: duplicates dropped, conflicts kept as votes, split by prompt",
    ),
    "diff": Command(
        "feedback.versions:DiffOptions",
        "feedback.versions:run",
        "what changed between two versions of a data set",
    ),
    "compare": Command(
        "train.compare_config:CompareOptions",
        "train.compare:run",
        "SFT, best-of-n, DPO, RRHF and PPO on one judge's labels, at equal tokens",
    ),
    "page": Command(
        "feedback.page:PageOptions",
        "feedback.page:run",
        "one HTML file that shows a whole run",
    ),
}


def load(target: str) -> Any:
    """Import ``module:name`` and return the object."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
