"""Options of ``rlaif compare``: five ways to use one judge's labels; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from feedback.errors import RecipeError

__all__ = ["Algorithm", "CompareOptions", "Part"]

Algorithm = Literal["sft", "bon", "dpo", "rrhf", "ppo"]
Part = Literal["methods", "labels", "bias"]


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """SFT, best-of-n, DPO, RRHF and PPO at equal compute, on labels of one judge.

    Each algorithm's own options are its table in the same recipe; [sample], [judge], [pair] and
    [reward] make the data, [evaluate] says who scores.
    """

    folder: Path = Path("runs/compare")
    """Folder of the comparison; what is finished in it is not done again."""
    algorithms: tuple[Algorithm, ...] = ("sft", "bon", "dpo", "rrhf", "ppo")
    """What is compared; bon is best-of-n by the reward model, from the starting policy."""
    parts: tuple[Part, ...] = ("methods",)
    """methods: the algorithms against each other; labels: the judge's labels against the gold
    check's on the same pairs; bias: what a planted length bias does to each algorithm, by how the
    labels are made."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training per algorithm and seed."""
    tokens: int = 0
    """Tokens that each algorithm passes forward and backward; 0: what the recipe's DPO takes."""
    best_of: int = 8
    """Completions that best-of-n chooses from."""
    copies: int = 2
    """Earlier copies of each first-seed policy that are evaluated for the gold-against-KL curve."""
    bias: float = 1.5
    """Planted length bias: log-odds per standard deviation of the difference in length."""
    jobs: int = 0
    """Trainings and evaluations that run side by side; 0: one per core on a CPU, one on CUDA."""
    recipe: str = ""
    """The recipe itself; filled by --recipe."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise RecipeError("seeds must be one or more different numbers")
        if not self.algorithms or not self.parts:
            raise RecipeError("algorithms and parts must name at least one each")
        if self.best_of < 2 or self.copies < 0 or self.tokens < 0 or self.jobs < 0:
            raise RecipeError("best_of must be at least 2; copies, tokens and jobs at least 0")
