"""Options of ``rlaif annotate``: a local page on which people label pairs; the result is gold.

``rlaif annotate runs/x/verdicts`` takes a shuffled, stratified sample of the judged pairs and shows
it on a page of this machine. Who labels sees the prompt and two texts, and neither the judge's
verdict nor who wrote which. Labels land in ``runs/x/gold``, where ``rlaif report`` finds them by
itself, and which ``rlaif calibrate`` and ``rlaif abtest`` take as ``--gold``. Stop with Ctrl-C,
continue with the same command.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from feedback.errors import RecipeError

__all__ = ["AnnotateOptions", "run"]


@dataclass(frozen=True, kw_only=True)
class AnnotateOptions:
    """Pairs -> people's labels, on a local page."""

    verdicts: Path | None = None
    """Verdict folder whose pairs are to be labelled; None: every pair of the candidates."""
    also: tuple[Path, ...] = ()
    """More verdict folders on the same candidates, for strata by disagreement."""
    candidates: Path | None = None
    """Candidates folder or JSONL file with the texts; None: the folder beside the verdicts."""
    out: Path | None = None
    """Folder for the labels and the gold made of them; None: ``gold`` beside the verdicts (or the
    candidates)."""
    sample: int = 200
    """Pairs to label. May be larger another time: labels given so far stay."""
    strata: tuple[str, ...] | None = None
    """What the sample is balanced over: confidence (of the judge), disagreement (between orders and
    judges), or names of meta fields; None: confidence where there are verdicts."""
    allocation: Literal["proportional", "equal"] = "proportional"
    """proportional: strata as large as among all pairs, so that figures speak of all pairs; equal:
    as many of each, to see rare ones; figures over all gold then speak of that mixture only."""
    votes: int = 0
    """People wanted per pair; 0: everybody labels every pair. Three and more give the report card
    its human ceiling."""
    rubric: str | None = None
    """Criteria shown to who labels: a name from prompts/rubrics or a path. Give people those that
    the judge was given."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but this machine's own shows your texts to its network."""
    port: int = 8650
    """Port to listen on; 0: any free one."""
    seed: int = 0
    """Seed of the sample, of its order, and of which text stands left."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.sample < 1:
            raise RecipeError(f"sample is {self.sample}; it must be at least 1")
        if self.votes < 0:
            raise RecipeError(f"votes is {self.votes}; it must not be negative")
        if not 0 <= self.port < 2**16:
            raise RecipeError(f"port is {self.port}; it must be in [0, 65535]")

    @property
    def folder(self) -> Path:
        """Where labels and gold land.

        Raises:
            RecipeError: there is neither a folder nor anything to stand beside.
        """
        if (beside := self.out or self.verdicts or self.candidates) is None:
            raise RecipeError("rlaif annotate needs --verdicts or --candidates")
        return self.out or beside.parent / "gold"


def run(options: AnnotateOptions) -> None:
    """Serve the page until interrupted.

    Raises:
        RecipeError: neither verdicts nor candidates were named.
        InputError: texts or verdicts are missing or damaged, or no pair can be labelled.
        ShardError: the folder holds gold that was not made here, or another process writes it.
    """
    from feedback.annotate_server import serve

    serve(options)
