"""Critique and revision: a model improves its own completions by principles of a constitution.

The supervised half of Constitutional AI (arXiv 2212.08073) as a generator of candidates: a
principle is drawn, the model says what in its completion offends against it, then writes the
completion anew; further rounds start from the revision. Every revision says where it comes from, by
which principle and after which critique.

``rlaif revise --candidates runs/x/candidates --out runs/x/revised --constitution harmlessness``
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal

from feedback.backends.identity import engine_record
from feedback.backends.opening import open_backend
from feedback.budget import Budget, Price, engine_price
from feedback.config import EngineOptions, at_least, recipe_of
from feedback.constitution import load_constitution
from feedback.errors import RecipeError
from feedback.estimate import Estimate, finished_prompts, needs_nothing
from feedback.inputs import checked_candidates
from feedback.labeling_setup import candidates_sha256
from feedback.progress import ProgressBar, say
from feedback.provenance import sampling_record
from feedback.records import Candidates
from feedback.reviser import Reviser
from feedback.revision_calls import RevisionCalls, RevisionPlan
from feedback.run_folder import (
    OnChange,
    check_not_all_failed,
    claim_folder,
    make_way,
    started,
)
from feedback.shards import ShardWriter, write_text
from feedback.unread import BY_BACKEND, check_engine, refuse_unread
from feedback.verdict_index import FAILED, SeenIds

__all__ = ["ReviseOptions", "run"]

_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class ReviseOptions:
    """Candidates -> candidates with revisions."""

    candidates: Path
    """Folder of candidates (from rlaif sample), or a JSONL file of such rows."""
    out: Path
    """Folder for the candidates with their revisions; a run that stopped continues there."""
    engine: EngineOptions = field(default_factory=lambda: EngineOptions(model="pocket:policy"))
    """The model that criticises and revises; usually the policy itself."""
    constitution: str = "harmlessness"
    """Whose principles are drawn: a name from prompts/constitutions, or a path of a .toml file."""
    rounds: int = 1
    """Revisions one after the other, each by a principle of its own."""
    completions: Literal["first", "all"] = "first"
    """Which completions of a prompt are revised."""
    keep: Literal["all", "ends", "last"] = "all"
    """all: originals and every revision; ends: originals and last revisions; last: only the last
    revisions, for supervised training."""
    temperature: float = 1.0
    """Sampling temperature of critiques and revisions."""
    top_p: float = 1.0
    """Share of the probability that the nucleus holds."""
    max_tokens: int = 256
    """Longest revision in tokens."""
    critique_tokens: int = 192
    """Longest critique in tokens."""
    seed: int = 0
    """Seed of drawn principles and of all draws."""
    prices: Path | None = None
    """Price table; None: prompts/prices.toml."""
    max_cost: float | None = None
    """Stop before this run has spent so many US dollars; what is done is kept."""
    max_calls: int | None = None
    """Stop after so many calls of this run; a row is begun only if all of its calls fit."""
    on_change: OnChange = "refuse"
    """What happens to completions in --out that were made with other settings: refuse to go on;
    set-aside: move them to a folder beside it; replace: remove them."""
    dry_run: bool = False
    """Print calls, tokens and price, and stop before anything is sent."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if min(self.rounds, self.max_tokens, self.critique_tokens) < 1:
            raise RecipeError("rounds, max_tokens and critique_tokens must be at least 1")
        if self.temperature < 0 or not 0 < self.top_p <= 1:
            raise RecipeError("temperature must be at least 0, and top_p in (0, 1]")
        at_least(self, 1, "max_calls")
        at_least(self, 0, "max_cost")


def run(options: ReviseOptions) -> None:
    """Revise the completions of all prompts.

    Raises:
        InputError: the candidates or options are wrong; nothing has been sampled.
        TemplateError: the constitution has no principle that criticises and revises.
        BackendError: the model cannot be loaded, or every call failed.
        BudgetExceeded: a limit was reached; what is done is on disk, and the run can be continued.
    """
    constitution = load_constitution(options.constitution)
    calls = RevisionCalls(constitution.having("critique", "revise"), _plan(options))
    total = sum(1 for _ in checked_candidates(options.candidates))
    check_engine(options.engine)
    refuse_unread(options, BY_BACKEND, [options.engine.backend])
    price = engine_price(options.engine, prices=options.prices, max_cost=options.max_cost)
    if options.dry_run:
        _say_dry_run(options, calls, price)
        return
    record = {
        "candidates_sha256": candidates_sha256(options.candidates),
        "constitution": constitution.describe(),
        "model": [options.engine.model, options.engine.revision],
        "engine": engine_record(options.engine),
        **asdict(_plan(options)),
    }
    make_way(options.out, record, options.on_change)
    asked = (row.prompt_id for row in checked_candidates(options.candidates) if row.completions)
    if needs_nothing(options.out, record, asked):
        say(f"{options.out} is finished: nothing to revise")
        return
    budget = Budget(
        price=price,
        batch=options.engine.backend == "batch",
        max_cost=options.max_cost,
        max_calls=options.max_calls,
    )
    claim = functools.partial(claim_folder, options.out, record)
    with ShardWriter[Candidates](options.out, "candidates", claim=claim) as writer:
        with contextlib.closing(open_backend(options.engine)) as backend:
            if note := backend.prepare(()).note:
                say(f"{options.engine.model}: {note}")
            reviser = Reviser(backend, calls, budget)
            _revise(options, reviser, writer, total)
        _write_failed(options.out, reviser.errors)
        if budget.reached:
            raise budget.stop()
        info = {"stage": "revise", **record, "prompts": total, "failed": len(reviser.errors)}
        counts = {"counts_of_calls": dict(reviser.counts), "started": started(options.out)}
        before = {"revised_from": sampling_record(options.candidates)}
        writer.finish(
            {**info, **counts, **before, "recipe": recipe_of(options)},
            count=lambda row: f"{len(row.completions)} completions",
        )
    _say_outcome(options, reviser, total)
    check_not_all_failed(options.out)


def _revise(
    options: ReviseOptions, reviser: Reviser, writer: ShardWriter[Candidates], total: int
) -> None:
    """Revise and write what is not on disk yet, as far as the budget goes."""
    with (
        contextlib.closing(finished_prompts(options.out)) as done,
        ProgressBar("revising", total) as bar,
    ):
        for block in _blocks(options.candidates, done, bar):
            for row in reviser.revise(block):
                writer.append(row)
            bar.advance(len(block))
            if reviser.budget.reached:
                return


def _say_dry_run(options: ReviseOptions, calls: RevisionCalls, price: Price | None) -> None:
    """Print what the run would send for prompts that have no row yet."""
    estimate = Estimate(engine=options.engine, price=price)
    waiting = 0
    with contextlib.closing(finished_prompts(options.out)) as done:
        for row in checked_candidates(options.candidates):
            if row.completions and row.prompt_id not in done:
                waiting += 1
                estimate.add(calls.expected(row))
    say(f"{waiting} prompts to revise")
    for line in estimate.lines(most="at most "):
        say(line)


def _plan(options: ReviseOptions) -> RevisionPlan:
    values = {entry.name: getattr(options, entry.name) for entry in fields(RevisionPlan)}
    return RevisionPlan(**values)


def _blocks(candidates: Path, done: SeenIds, bar: ProgressBar) -> Iterator[list[Candidates]]:
    block: list[Candidates] = []
    for row in checked_candidates(candidates):
        if row.prompt_id in done or not row.completions:
            bar.advance()
            continue
        block.append(row)
        if len(block) == _BLOCK:
            yield block
            block = []
    if block:
        yield block


def _write_failed(folder: Path, errors: dict[str, str]) -> None:
    (folder / FAILED).unlink(missing_ok=True)
    if errors:
        rows = [json.dumps({"prompt_id": name, "error": error}) for name, error in errors.items()]
        write_text(folder / FAILED, "\n".join(rows) + "\n")


def _say_outcome(options: ReviseOptions, reviser: Reviser, total: int) -> None:
    counts = reviser.counts
    left = ", ".join(f"{number} {name}" for name, number in counts.items() if name != "revisions")
    line = f"{total} prompts, {counts['revisions']} revisions" + (f" ({left})" if left else "")
    say(line + reviser.budget.said)
    if reviser.errors:
        say(
            f"{len(reviser.errors)} prompts failed (why: {options.out / FAILED}); run the same "
            "command again to retry only those"
        )
