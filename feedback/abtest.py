"""Options of ``rlaif abtest``: judge templates (or judges, or modes) against each other on gold.

``rlaif abtest --recipe recipes/abtest.toml``; with ``--plan True`` nothing is asked: it says how
many gold pairs the question needs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from feedback.config import EngineOptions
from feedback.errors import RecipeError

__all__ = ["AbtestOptions", "ArmOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class ArmOptions:
    """One arm: a template, its rubric, and the judge that answers it."""

    name: str = ""
    """Name in tables; empty: the template's."""
    template: str = "pairwise"
    """Judge template: a name from prompts/judges, or a path of a .toml file."""
    rubric: str | None = None
    """Criteria; None: the template's own."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """The judge."""
    read: Literal["auto", "text"] = "auto"
    """auto: label probabilities where the template asks for one token; text: the reply's text."""


@dataclass(frozen=True, kw_only=True)
class AbtestOptions:
    """Judge templates against each other on the same gold pairs."""

    candidates: Path
    """Completions that the gold pairs speak of: a candidates folder or JSONL file."""
    gold: Path
    """Gold pairs: a folder or a JSONL file (rlaif annotate and rlaif import write them)."""
    out: Path
    """Folder for the verdicts of each arm, abtest.json and abtest.html."""
    arms: tuple[ArmOptions, ...] = ()
    """Two or more arms; the first is the baseline that the others are compared with."""
    margin: float = 0.03
    """Difference of accuracy that does not matter: within it, arms are equivalent."""
    alpha: float = 0.05
    """Chance of calling an arm better or worse that is neither, over all arms together."""
    power: float = 0.8
    """Chance of finding a difference as large as the margin, for --plan and 'need n more'."""
    looks: int = 1
    """Looks at the data as it comes. More than one stops as soon as every arm is decided, by a test
    that stays honest however often one looks."""
    halving: bool = False
    """Drop the worse half of many arms round by round on one half of the gold pairs, and compare
    the survivor with the baseline on the other half."""
    max_calls: int | None = None
    """Calls over all arms; gold pairs are used as far as they reach."""
    training: tuple[Path, ...] = ()
    """Shards or prompt files used for training or tuning; a prompt in both is an error."""
    plan: bool = False
    """Say how many gold pairs are needed, and stop before anything is asked."""
    expected_rate: float = 0.2
    """For --plan: share of pairs on which exactly one of two arms is right."""
    seed: int = 0
    """Seed of the order in which gold pairs are used, and of resamples."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("margin", "alpha", "power", "expected_rate"):
            if not 0 < getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be in (0, 1)")
        if self.looks < 1:
            raise RecipeError(f"looks is {self.looks}; it must be at least 1")
        if self.margin > self.expected_rate:
            raise RecipeError(
                f"margin {self.margin} is larger than expected_rate {self.expected_rate}: arms "
                "cannot differ by more than the share of pairs on which they differ"
            )


def run(options: AbtestOptions) -> None:
    """Compare the arms, or print the plan.

    Raises:
        InputError: gold, candidates or arms cannot answer the question; says why.
        BackendError: a judge cannot answer.
    """
    from feedback.abtest_run import abtest

    abtest(options)
