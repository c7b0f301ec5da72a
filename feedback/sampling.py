"""Prompts to candidates: several completions per prompt, of one policy or of several.

Policies take turns, so that one model is in memory at a time. Completions that are empty or repeat
another of their prompt (after normalisation) are drawn again, up to a limit. Every row says how
each completion was sampled and from which seed. A run that stopped continues where it was.

``rlaif sample --prompts prompts/sets/booking-train.jsonl --out runs/x/candidates``
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from feedback.backends.identity import engine_record
from feedback.backends.opening import local_revision, open_backend, resolve_model
from feedback.budget import Budget, Price, engine_price
from feedback.config import EngineOptions, at_least, recipe_of
from feedback.draws import DrawPlan, Stage
from feedback.errors import InputError, RecipeError
from feedback.estimate import Estimate, finished_prompts, needs_nothing
from feedback.inputs import read_prompts
from feedback.progress import say
from feedback.records import Candidates, Prompt
from feedback.run_folder import OnChange, check_not_all_failed, claim_folder, make_way, started
from feedback.sampling_run import SamplingRun
from feedback.shards import file_sha256, shard_paths
from feedback.templates import prompts_folder
from feedback.unread import BY_BACKEND, check_engine, refuse_unread

__all__ = ["SampleOptions", "prompt_source", "run"]


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """Prompts -> candidates."""

    prompts: Path
    """JSONL file of prompts: {"prompt": ...} with prompt_id, gold and meta if there are any; or the
    name of a set in prompts/sets."""
    out: Path
    """Folder for the candidates; a run that stopped continues there."""
    engine: EngineOptions = field(default_factory=lambda: EngineOptions(model="pocket:policy"))
    """The policy."""
    more: tuple[EngineOptions, ...] = ()
    """Further policies; the completions of each prompt are shared out evenly."""
    completions: int = 4
    """Completions per prompt, over all policies."""
    temperatures: tuple[float, ...] = (1.0,)
    """Sampling temperatures; the completions of a policy take them in turn."""
    top_p: float = 1.0
    """Share of the probability that the nucleus holds."""
    max_tokens: int = 256
    """Longest completion in tokens."""
    system: str | None = None
    """System message put before every prompt that has none."""
    refills: int = 2
    """How often missing completions (failed, empty, repeated) are drawn again."""
    repeats: Literal["redraw", "keep"] = "redraw"
    """redraw: empty completions and repeats of another are drawn again; keep: they stay, as a fair
    sample of the policy needs them."""
    seed: int = 0
    """Seed of all draws; each call's own seed follows from it and stands in the row."""
    limit: int | None = None
    """Only so many prompts, from the top; None: all."""
    prices: Path | None = None
    """Price table; None: prompts/prices.toml."""
    max_cost: float | None = None
    """Stop before this run has spent so many US dollars; what is done is kept."""
    max_calls: int | None = None
    """Stop after so many calls of this run."""
    on_change: OnChange = "refuse"
    """What happens to completions in --out that were made with other settings: refuse to go on;
    set-aside: move them to a folder beside it; replace: remove them."""
    dry_run: bool = False
    """Print calls, tokens and price, and stop before anything is sent."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.completions < 1 + len(self.more):
            raise RecipeError(
                f"completions is {self.completions}; each of the {1 + len(self.more)} policies "
                "needs at least one"
            )
        if not self.temperatures or min(self.temperatures) < 0:
            raise RecipeError("temperatures must be one or more numbers, each at least 0")
        if not 0 < self.top_p <= 1:
            raise RecipeError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if self.max_tokens < 1 or self.refills < 0:
            raise RecipeError("max_tokens must be at least 1 and refills at least 0")
        at_least(self, 1, "max_calls", "limit")
        at_least(self, 0, "max_cost")

    @property
    def policies(self) -> tuple[EngineOptions, ...]:
        """All policies, in turn."""
        return (self.engine, *self.more)

    @property
    def plan(self) -> DrawPlan:
        """How completions are drawn."""
        return DrawPlan(
            temperatures=self.temperatures,
            top_p=self.top_p,
            max_tokens=self.max_tokens,
            system=self.system,
            keep_repeats=self.repeats == "keep",
            seed=self.seed,
        )


def prompt_source(name: Path) -> Path:
    """Return the file or folder of a prompt set: a path, or the name of a shipped set."""
    shipped = prompts_folder() / "sets" / f"{name}.jsonl"
    return shipped if not name.exists() and shipped.is_file() else name


def run(options: SampleOptions) -> None:
    """Sample completions for all prompts.

    Raises:
        InputError: the prompts or options are wrong; nothing has been sampled.
        BackendError: a policy cannot be loaded, or nothing could be sampled.
        BudgetExceeded: a limit was reached; what is done is on disk, and the run can be continued.
    """
    source = prompt_source(options.prompts)
    total = sum(1 for _ in _prompts(source, options.limit))
    if not total:
        raise InputError("holds no prompts", path=source)
    prices = _checked_prices(options)
    stages = _stages(options)
    if options.dry_run:
        _say_dry_run(options, source, stages, prices)
        return
    record = _run_record(options, source)
    make_way(options.out, record, options.on_change)
    if needs_nothing(options.out, record, (row.prompt_id for row in _rows(source, options.limit))):
        say(f"{options.out} is finished: nothing to sample")
        return
    budget = Budget(max_cost=options.max_cost, max_calls=options.max_calls)
    sampling = SamplingRun(
        options.out,
        stages=stages,
        plan=options.plan,
        budget=budget,
        claim=lambda: claim_folder(options.out, record),
    )
    try:
        for place, policy in enumerate(options.policies):
            if not sampling.has_work(place, _rows(source, options.limit)):
                continue
            budget.price, budget.batch = prices[place], policy.backend == "batch"
            with contextlib.closing(open_backend(policy)) as backend:
                if note := backend.prepare(()).note:
                    say(f"{policy.model}: {note}")
                with _saying_counts(sampling, total):
                    sampling.run_policy(
                        place, backend, lambda: _rows(source, options.limit), total=total
                    )
            if budget.reached:
                raise budget.stop()
        sampling.finish(_manifest(options, source, total, sampling.counts))
    finally:
        sampling.close()
    _say_outcome(sampling, total)
    check_not_all_failed(options.out)


@contextlib.contextmanager
def _saying_counts(sampling: SamplingRun, total: int) -> Iterator[None]:
    """Say what was done where a run ends before its time, by Ctrl-C or an endpoint that is gone."""
    try:
        yield
    except BaseException:
        _say_counts(sampling, total)
        raise


def _checked_prices(options: SampleOptions) -> list[Price | None]:
    """Return each policy's price, once options that do nothing are refused."""
    for place, policy in enumerate(options.policies):
        check_engine(policy, prefix=f"more[{place - 1}]." if place else "engine.")
    refuse_unread(options, BY_BACKEND, [policy.backend for policy in options.policies])
    return [
        engine_price(policy, prices=options.prices, max_cost=options.max_cost)
        for policy in options.policies
    ]


def _stages(options: SampleOptions) -> list[Stage]:
    return [
        Stage(policy=place, attempt=attempt, wanted=wanted)
        for place, wanted in enumerate(_shares(options.completions, len(options.policies)))
        for attempt in range(options.refills + 1)
    ]


def _say_dry_run(
    options: SampleOptions, source: Path, stages: list[Stage], prices: list[Price | None]
) -> None:
    """Print what the run would send, policy by policy, for prompts that have no row yet."""
    estimates = [
        Estimate(engine=policy, price=price)
        for policy, price in zip(options.policies, prices, strict=True)
    ]
    firsts = [stage for stage in stages if stage.attempt == 0]
    waiting = 0
    with contextlib.closing(finished_prompts(options.out)) as done:
        for row in _rows(source, options.limit):
            if row.prompt_id in done:
                continue
            waiting += 1
            for stage in firsts:
                estimates[stage.policy].add(options.plan.calls(row, stage))
    say(f"{waiting} prompts to sample")
    for estimate in estimates:
        for line in estimate.lines():
            say(line)
    if options.refills and options.repeats == "redraw":
        say(f"what fails, is empty or repeats itself is drawn again, up to {options.refills} times")


def _prompts(source: Path, limit: int | None) -> Iterator[Prompt]:
    for number, prompt in enumerate(read_prompts(source)):
        if limit is not None and number >= limit:
            return
        yield prompt


def _rows(source: Path, limit: int | None) -> Iterator[Candidates]:
    for prompt in _prompts(source, limit):
        yield Candidates(
            prompt_id=prompt.prompt_id,
            prompt=prompt.prompt,
            completions=[],
            gold=prompt.gold,
            meta=prompt.meta,
        )


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (place < total % parts) for place in range(parts)]


def _run_record(options: SampleOptions, source: Path) -> dict[str, Any]:
    """Return what the completions of a folder depend on."""
    files = [source] if source.is_file() else shard_paths(source, "prompts")
    return {
        "prompts_sha256": [file_sha256(path) for path in files],
        "policies": [
            [policy.model, policy.revision, local_revision(resolve_model(policy.model))]
            for policy in options.policies
        ],
        "engines": [engine_record(policy) for policy in options.policies],
        "completions": options.completions,
        "temperatures": options.temperatures,
        "top_p": options.top_p,
        "max_tokens": options.max_tokens,
        "system": options.system,
        "refills": options.refills,
        "repeats": options.repeats,
        "seed": options.seed,
        "limit": options.limit,
    }


def _manifest(
    options: SampleOptions, source: Path, total: int, counts: Counter[str]
) -> dict[str, Any]:
    return {
        "stage": "sample",
        "started": started(options.out),
        **_run_record(options, source),
        "prompts": total,
        "drawn": dict(counts),
        "recipe": recipe_of(options),
    }


def _say_outcome(sampling: SamplingRun, total: int) -> None:
    counts = sampling.counts
    _say_counts(sampling, total)
    if counts["short"]:
        say(f"{counts['short']} prompts have fewer completions than asked for")
    if counts["failed"]:
        say(
            f"{counts['failed']} prompts failed (why: {sampling.folder / 'failed.jsonl'}); run the "
            "same command again to retry only those"
        )


def _say_counts(sampling: SamplingRun, total: int) -> None:
    counts = sampling.counts
    say(
        f"{total} prompts, {counts['kept']} completions kept of {counts['drawn']} drawn in this "
        f"run ({counts['repeated']} repeated, {counts['empty']} empty, {counts['cut off']} cut off "
        f"by max_tokens); {sampling.rate():.0f} tokens/s{sampling.budget.said}"
    )
