"""Options of ``rlaif pair``: verdicts to preferences and rankings.

``rlaif pair --verdicts runs/x/verdicts --candidates runs/x/candidates --out runs/x``
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from feedback.errors import RecipeError

__all__ = ["PairOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class PairOptions:
    """Verdicts -> preferences and rankings."""

    verdicts: Path
    """Verdict folder (from rlaif judge)."""
    candidates: Path
    """The candidates that were judged."""
    out: Path
    """Folder that gets preferences/ and rankings/."""
    pairs: Literal["all", "best-worst", "best-rest"] = "all"
    """Preferences of a prompt: all its comparisons; the best completion against the worst it was
    compared with; or the best against each that it was compared with."""
    labels: Literal["soft", "hard"] = "soft"
    """soft: p_chosen is the judge's probability; hard: 1, and the probability stays in p_raw."""
    ties: Literal["keep", "drop"] = "keep"
    """keep: a tie is a row with tie true and p_chosen 0.5; drop: no row."""
    near_ties: Literal["keep", "drop", "tie"] = "keep"
    """What a probability within --band of 1/2 becomes: its soft label, no row, or a tie."""
    band: float = 0.0
    """Half width of the band around 1/2 that --near-ties speaks of."""
    inconsistent: Literal["keep", "drop"] = "keep"
    """keep: a pair whose orders disagree keeps its (then uncertain) mean; drop: no row."""
    pairs_per_prompt: int | None = None
    """At most so many preferences of a prompt, drawn by seed; None: no limit."""
    calibration: Path | None = None
    """Calibration file (from rlaif calibrate) applied to the probabilities; p_raw keeps the judge's
    own."""
    remedy: Literal["none", "length", "annotators"] = "none"
    """Correction of the probabilities, after calibration: length takes out the judge's pull of
    length, annotators weighs every judge and order by Dawid-Skene; p_raw keeps the judge's own.
    The report card shows what each would change."""
    prompts: Literal["auto", "text", "messages"] = "auto"
    """Form of prompts and completions; auto: messages if any prompt is messages, because data
    loaders want one form throughout."""
    accept_bias: tuple[str, ...] = ()
    """Figures or sections of the judge's report card whose failure is accepted, by name; without
    them a judge that fails its card is refused."""
    seed: int = 0
    """Seed of what is drawn: pairs over the limit, sides of ties."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 0 <= self.band < 0.5:
            raise RecipeError(f"band is {self.band}; it must be in [0, 0.5)")
        if self.near_ties != "keep" and self.band == 0:
            raise RecipeError(f"near_ties {self.near_ties!r} needs a band above 0, say --band 0.05")


def run(options: PairOptions) -> None:
    """Write the preferences and rankings of a verdict folder.

    Raises:
        InputError: verdicts and candidates do not belong together, or one of them is unfinished.
        GateRefused: the judge's report card fails a threshold.
    """
    from feedback.pairing_run import pair

    pair(options)
