"""Options of ``rlaif evaluate``: policy against policy, by judges and checks of their own.

``rlaif evaluate --policy.model runs/x/policy-dpo --prompts booking-eval --out runs/x/evaluation``
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from feedback.config import EngineOptions
from feedback.errors import RecipeError

__all__ = ["EvaluateOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Policy against policy, by judges and checks that labelled nothing."""

    policy: EngineOptions = field(default_factory=lambda: EngineOptions(model=""))
    """The trained policy; its model must be given."""
    start: EngineOptions = field(default_factory=lambda: EngineOptions(model="pocket:policy"))
    """The policy that it is compared with: usually the one that training started from."""
    prompts: Path = Path("booking-eval")
    """Prompts that training never saw: a JSONL file, or the name of a set in prompts/sets."""
    out: Path = Path("evaluation")
    """Folder for samples, verdicts and figures; a run that stopped continues there."""
    judges: tuple[EngineOptions, ...] = (EngineOptions(model="pocket:second-judge"),)
    """Judges, each asked about every pair in both orders; none of them should have labelled."""
    template: str = "pairwise"
    """Pairwise judge template."""
    rubric: str | None = None
    """Criteria; None: the template's own."""
    min_mass: float = 0.05
    """Least probability that the offered labels must hold together."""
    completions: int = 1
    """Completions of each policy per prompt; number i meets number i."""
    temperature: float = 1.0
    """Sampling temperature of both policies."""
    top_p: float = 1.0
    """Share of the probability that the nucleus holds."""
    max_tokens: int = 256
    """Longest completion in tokens."""
    policy_samples: Path | None = None
    """Candidates folder with the policy's completions of these prompts, already sampled (best-of-n,
    say); None: they are sampled here."""
    start_samples: Path | None = None
    """The same for the starting policy; several evaluations can share it."""
    gold: Literal["auto", "off"] = "auto"
    """Programmatic check of each completion against the prompt's known slots; auto: where the
    prompts have such slots."""
    kl: bool = True
    """Estimate the KL divergence from the start; both models are loaded with transformers."""
    limit: int | None = None
    """Only so many prompts, from the top; None: all."""
    seed: int = 0
    """Seed of samples and resamples."""

    def __post_init__(self) -> None:
        """Refuse an evaluation without a judge."""
        if not self.judges:
            raise RecipeError("evaluate needs at least one judge")


def run(options: EvaluateOptions) -> None:
    """Sample, judge and check both policies, and write ``evaluation.json`` and ``rows.jsonl``.

    Raises:
        InputError: prompts or templates are wrong.
        BackendError: a model cannot be loaded or cannot judge.
    """
    if not options.policy.model:
        raise RecipeError("evaluate needs the trained policy: --policy.model FOLDER")
    from train.evaluation import evaluate

    evaluate(options)
