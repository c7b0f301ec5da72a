"""Options of ``rlaif judge``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from feedback.config import EngineOptions, at_least
from feedback.errors import RecipeError
from feedback.ordering import Orders, PairPolicy
from feedback.panel import CascadeOptions, PanelOptions
from feedback.run_folder import OnChange

__all__ = ["JudgeOptions"]


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Candidates -> verdicts."""

    candidates: Path
    """Folder of candidates (from rlaif sample), or a JSONL file of such rows."""
    out: Path
    """Folder for the verdicts; a run that stopped continues there."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """The judge. A recipe can name several: [judge.panel] or [judge.cascade]."""
    template: str = "pairwise"
    """Judge template: a name from prompts/judges, or a path of a .toml file. Its kind says what is
    asked: pairs, ratings of single completions, or whole lists."""
    rubric: str | None = None
    """Criteria: a name from prompts/rubrics, or a path of a .md file; None: the template's own."""
    constitution: str | None = None
    """Constitution of which one principle is drawn for each pair, for templates that show a
    {principle}: a name from prompts/constitutions, or a path of a .toml file."""
    orders: Orders = "both"
    """both: each pair in both orders, the only way to see position bias; one: a seeded one;
    rotations: whole lists in as many orders as completions, each once at each place."""
    pairs: PairPolicy = "all"
    """Pairs to ask: all, first (the first completion with each other), random, or cross (only
    between completions of different models); or chosen by the answers so far: sort (merge sort),
    swiss (neighbours by points, in rounds) or active (where an answer tells most); of several
    judges, the first one's answers choose for all."""
    pairs_per_prompt: int | None = None
    """At most so many pairs of each prompt; None: all that the policy names (active: k log2 k)."""
    repeats: int = 1
    """How often each question is asked; more than once only makes sense with a temperature."""
    temperature: float = 0.0
    """Sampling temperature of text replies; label probabilities do not depend on it."""
    reply_tokens: int = 0
    """Longest reply in tokens; 0: the template's."""
    read: Literal["auto", "text"] = "auto"
    """auto: label probabilities where the template asks for one token; text: the reply's text, for
    engines without log-probabilities."""
    min_mass: float = 0.05
    """Least probability that the offered labels must hold together; below it the verdict is
    unparsed, because the judge wanted to say something else."""
    max_prompt_tokens: int | None = None
    """Longest question in tokens; longer completions are cut fairly and flagged. None: what the
    judge can read, where its tokenizer is at hand."""
    seed: int = 0
    """Seed of drawn orders and pairs, and of sampled replies."""
    cache: str = "auto"
    """File of earlier replies; auto: replies.sqlite beside --out for engines that are paid for,
    none for engines in this process; none: no cache."""
    ask_again: tuple[Literal["unparsed", "truncated", "refused"], ...] = ()
    """Outcomes of earlier runs in --out that are asked once more; the old answers are kept in
    replaced.jsonl. Calls that failed are asked again in any case."""
    prices: Path | None = None
    """Price table; None: prompts/prices.toml."""
    max_cost: float | None = None
    """Stop before this run has spent so many US dollars; what is done is kept."""
    max_calls: int | None = None
    """Stop after so many calls of this run."""
    max_tokens: int | None = None
    """Stop before this run has used so many tokens, prompts and replies together."""
    panel: PanelOptions | None = None
    """Further judges that are asked the same: a [judge.panel] table in the recipe."""
    cascade: CascadeOptions | None = None
    """A strong judge for what this one is unsure of: a [judge.cascade] table in the recipe."""
    on_change: OnChange = "refuse"
    """What happens to verdicts in --out that were made with other settings: refuse to go on;
    set-aside: move them to a folder beside it; replace: remove them."""
    dry_run: bool = False
    """Print calls, tokens and price, and stop before anything is sent."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least(self, 1, "repeats", "pairs_per_prompt", "max_prompt_tokens")
        at_least(self, 1, "max_calls", "max_tokens")
        at_least(self, 0, "max_cost", "reply_tokens")
        if not 0 <= self.min_mass < 1:
            raise RecipeError(f"min_mass is {self.min_mass}; it must be in [0, 1)")
        at_least(self, 0, "temperature")
        local = self.engine.backend in ("transformers", "vllm", "replay")
        if self.ask_again and (self.engine.backend == "replay" or (local and not self.temperature)):
            raise RecipeError(
                f"ask_again does nothing here: {self.engine.backend} at temperature "
                f"{self.temperature:g} gives the same answer to the same question"
            )
        if self.panel is not None and self.cascade is not None:
            raise RecipeError("a recipe has [judge.panel] or [judge.cascade], not both")
