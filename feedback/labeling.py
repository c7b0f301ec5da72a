"""The labelling run: candidates to verdict shards.

Questions are drawn prompt by prompt, what is on disk already is skipped, the rest streams through
the engine and is written as it comes. ``verdicts-*.jsonl`` holds final verdicts only, each once;
calls that failed stand in ``failed.jsonl`` and are asked again by the next run. A run killed at any
point continues where it stopped, and memory does not grow with the number of rows.

``rlaif judge --candidates runs/x/candidates --out runs/x/verdicts``
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from feedback.backends import Backend
from feedback.backends.opening import open_backend
from feedback.budget import Budget, estimate_tokens, find_price
from feedback.cache import ReplyCache
from feedback.config import EngineOptions, recipe_of
from feedback.errors import BudgetExceeded, InputError, RecipeError
from feedback.inputs import checked_candidates
from feedback.judge import Judge, Question
from feedback.labeling_run import LabelingRun, claim_folder
from feedback.length import LengthBudget
from feedback.ordering import Orders, PairPolicy, distinct_completions
from feedback.progress import ProgressBar, say
from feedback.questions import QuestionPlan, questions_of
from feedback.records import Candidates
from feedback.shards import MANIFEST, file_sha256, manifest_sha256, read_rows
from feedback.templates import Template, describe, load_rubric, load_template, render

__all__ = [
    "JudgeOptions",
    "Work",
    "answer",
    "label",
    "make_judge",
    "question_plan",
    "run",
    "survey",
]

# Engines that run in this process, whose replies cost nothing but time.
_LOCAL = ("transformers", "vllm", "replay")


@dataclass(frozen=True, kw_only=True)
class JudgeOptions:
    """Candidates -> verdicts."""

    candidates: Path
    """Folder of candidates (from rlaif sample), or a JSONL file of such rows."""
    out: Path
    """Folder for the verdicts; a run that stopped continues there."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    """The judge."""
    template: str = "pairwise"
    """Judge template: a name from prompts/judges, or a path of a .toml file. Its kind says what is
    asked: pairs, ratings of single completions, or whole lists."""
    rubric: str | None = None
    """Criteria: a name from prompts/rubrics, or a path of a .md file; None: the template's own."""
    orders: Orders = "both"
    """both: each pair in both orders, the only way to see position bias; one: a seeded one."""
    pairs: PairPolicy = "all"
    """Pairs to ask: all, first (the first completion with each other), random, or cross (only
    between completions of different models)."""
    pairs_per_prompt: int | None = None
    """At most so many pairs of each prompt; None: all that the policy names."""
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
    prices: Path | None = None
    """Price table; None: prompts/prices.toml."""
    max_cost: float | None = None
    """Stop before this run has spent so many US dollars; what is done is kept."""
    max_calls: int | None = None
    """Stop after so many calls of this run."""
    max_tokens: int | None = None
    """Stop before this run has used so many tokens, prompts and replies together."""
    dry_run: bool = False
    """Print calls, tokens and price, and stop before anything is sent."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("repeats", "pairs_per_prompt", "max_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} is {value}; it must be at least 1")
        if not 0 <= self.min_mass < 1:
            raise RecipeError(f"min_mass is {self.min_mass}; it must be in [0, 1)")
        if self.temperature < 0:
            raise RecipeError(f"temperature is {self.temperature}; it must be at least 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What there is to ask, counted and checked before the first call."""

    prompts: int = 0
    questions: int = 0
    repeated: int = 0
    """Completions left out: empty, or equal to another of their prompt after normalisation."""
    single: int = 0
    """Prompts with fewer than two distinct completions."""


def run(options: JudgeOptions) -> None:
    """Judge all candidates.

    Raises:
        InputError: candidates, template or options are wrong; nothing has been sent.
        BackendError: the engine cannot give what the template needs, or is gone.
        BudgetExceeded: a limit was reached; what is done is on disk, and the run can be continued.
    """
    template = load_template(options.template)
    plan = question_plan(options, template)
    work = survey(options.candidates, plan)
    if options.dry_run:
        _say_dry_run(options, template, plan, work)
        return
    answer(options, lambda: _questions(options.candidates, plan), work)


def answer(options: JudgeOptions, questions: Callable[[], Iterator[Question]], work: Work) -> None:
    """Open the judge, ask it ``questions`` about the candidates, and finish the folder.

    Raises:
        BackendError: the engine cannot give what the template needs, or is gone.
        BudgetExceeded: a limit was reached.
    """
    budget = _budget(options)
    template = load_template(options.template)
    backend = open_backend(options.engine)
    try:
        judge = make_judge(options, template, backend)
        label(options, judge, backend, questions=questions, work=work, budget=budget)
    finally:
        backend.close()


def question_plan(options: JudgeOptions, template: Template) -> QuestionPlan:
    """Return how the options draw questions."""
    return QuestionPlan(
        template=template,
        orders=options.orders,
        pairs=options.pairs,
        pairs_per_prompt=options.pairs_per_prompt,
        repeats=options.repeats,
        seed=options.seed,
    )


def survey(candidates: Path, plan: QuestionPlan) -> Work:
    """Check every row of ``candidates`` and count what will be asked.

    Raises:
        InputError: a row is wrong, an id occurs twice, or the template shows a gold answer that a
            prompt lacks.
    """
    prompts = questions = repeated = single = 0
    wants_gold = "{gold}" in plan.template.user + plan.template.system
    for row in checked_candidates(candidates):
        prompts += 1
        distinct = len(distinct_completions(row))
        repeated += len(row.completions) - distinct
        single += distinct < 2
        questions += sum(1 for _ in questions_of(row, plan))
        if wants_gold and row.gold is None:
            raise InputError(
                f"template {plan.template.name!r} shows a known-good answer, and prompt "
                f"{row.prompt_id!r} has no 'gold'",
                path=candidates,
            )
    if not questions:
        raise InputError(
            "there is nothing to ask: no prompt has the completions that the template and "
            f"--pairs {plan.pairs} need",
            path=candidates,
        )
    return Work(prompts=prompts, questions=questions, repeated=repeated, single=single)


def make_judge(options: JudgeOptions, template: Template, backend: Backend) -> Judge:
    """Return the judge that the options describe, checked against its engine.

    Raises:
        BackendError: the engine cannot give log-probabilities of the template's labels.
    """
    judge = Judge(
        identity=backend.identity,
        template=template,
        rubric=load_rubric(options.rubric or template.rubric),
        temperature=options.temperature,
        max_tokens=options.reply_tokens,
        seed=options.seed,
        min_mass=options.min_mass,
        max_prompt_tokens=options.max_prompt_tokens,
        use_logprobs=options.read == "auto",
    )
    if judge.reads_choices:
        found = backend.prepare(template.choices)
        if found.note:
            say(f"{options.engine.model}: {found.note}")
    return dataclasses.replace(judge, budget=_length_budget(options, judge, backend))


def _length_budget(options: JudgeOptions, judge: Judge, backend: Backend) -> LengthBudget | None:
    """Return the limit on a question's length, where the judge's tokenizer is in this process."""
    tokenizer = getattr(backend, "chat", None)
    longest = getattr(backend, "max_length", None)
    if tokenizer is None:
        if options.max_prompt_tokens is not None and options.engine.backend != "replay":
            raise RecipeError(
                f"max_prompt_tokens needs the judge's tokenizer, which backend "
                f"{options.engine.backend!r} does not have; leave it out"
            )
        return None
    limits = [options.max_prompt_tokens, longest and longest - judge.reply_tokens]
    known = [limit for limit in limits if limit]
    return LengthBudget(tokenizer, min(known)) if known else None


def _budget(options: JudgeOptions) -> Budget:
    paid = options.engine.backend not in _LOCAL
    price = find_price(options.engine.model, options.prices) if paid else None
    if paid and price is None and options.max_cost is not None:
        where = options.prices or "prompts/prices.toml"
        raise InputError(
            f"--max-cost needs the price of {options.engine.model!r}; add it to {where} "
            "(0 for a server of your own)"
        )
    return Budget(
        price=price,
        batch=options.engine.backend == "batch",
        max_cost=options.max_cost,
        max_calls=options.max_calls,
        max_tokens=options.max_tokens,
    )


def label(
    options: JudgeOptions,
    judge: Judge,
    backend: Backend,
    *,
    questions: Callable[[], Iterator[Question]],
    work: Work,
    budget: Budget,
) -> None:
    """Ask everything that is not on disk yet, and finish the folder.

    Raises:
        ShardError: the folder was begun with other settings, or another run is writing it.
        BudgetExceeded: a limit was reached.
    """
    cache = _open_cache(options, judge)
    run = LabelingRun(judge, backend, folder=options.out, budget=budget, cache=cache)
    try:
        claim_folder(options.out, _run_record(options, judge))
        with ProgressBar("judging", work.questions) as bar:
            run.ask_all(questions(), bar)
        say(run.totals.line())
        if budget.reached:
            raise BudgetExceeded(
                f"stopped at {budget.reached} with {run.totals.verdicts} verdicts of this run on "
                "disk; run the same command with a higher limit to continue"
            )
        run.finish(_manifest(options, judge, work))
        _say_outcome(run, work)
    finally:
        run.close()
        if cache is not None:
            cache.close()


def _questions(candidates: Path, plan: QuestionPlan) -> Iterator[Question]:
    for row in read_rows(candidates, Candidates):
        yield from questions_of(row, plan)


def _open_cache(options: JudgeOptions, judge: Judge) -> ReplyCache | None:
    if options.cache == "none" or (options.cache == "auto" and options.engine.backend in _LOCAL):
        return None
    path = options.out.parent / "replies.sqlite"
    return ReplyCache(path if options.cache == "auto" else Path(options.cache), judge.identity)


def _candidates_sha256(candidates: Path) -> str:
    if candidates.is_file():
        return file_sha256(candidates)
    if (candidates / MANIFEST).is_file():
        return manifest_sha256(candidates)
    raise InputError(
        "no manifest.json: sampling has not finished; run rlaif sample again", path=candidates
    )


def _run_record(options: JudgeOptions, judge: Judge) -> dict[str, Any]:
    """Return what the verdicts of a folder depend on."""
    return {
        "judge": dataclasses.asdict(judge.identity),
        "template": describe(judge.template),
        "rubric": judge.rubric,
        "candidates_sha256": _candidates_sha256(options.candidates),
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


def _manifest(options: JudgeOptions, judge: Judge, work: Work) -> dict[str, Any]:
    return {
        "stage": "judge",
        **_run_record(options, judge),
        "choices": list(judge.template.choices),
        "prompts": work.prompts,
        "questions": work.questions,
        "left_out": {"repeated_or_empty": work.repeated, "single_prompts": work.single},
        "recipe": recipe_of(options),
    }


def _say_outcome(run: LabelingRun, work: Work) -> None:
    if work.repeated:
        say(
            f"{work.repeated} completions were empty or repeats of another (after normalisation) "
            f"and were not judged; {work.single} prompts had fewer than two left"
        )
    outcomes = run.totals.outcomes
    if outcomes["failed"]:
        say(
            f"{outcomes['failed']} calls failed (why: {run.writer.folder / 'failed.jsonl'}); "
            "run the same command again to retry only those"
        )
    if outcomes["unparsed"] > 0.02 * max(run.totals.verdicts, 1):
        say(
            f"{outcomes['unparsed']} replies hold no verdict: look at their 'reply', 'mass' and "
            "'error' before using this judge with this template"
        )


def _say_dry_run(options: JudgeOptions, template: Template, plan: QuestionPlan, work: Work) -> None:
    """Print what the run would send, from the questions as rendered."""
    budget = _budget(options)
    rubric = load_rubric(options.rubric or template.rubric)
    reply = options.reply_tokens or template.max_tokens
    calls = prompt_tokens = 0
    cost = 0.0
    for question in _questions(options.candidates, plan):
        messages = render(
            template,
            prompt=question.prompt,
            completions=question.completions,
            rubric=rubric,
            gold=question.gold or "",
        )
        usage = estimate_tokens(messages, reply)
        calls += 1
        prompt_tokens += usage.prompt_tokens
        cost += 0.0 if budget.price is None else budget.price.of(usage, batch=budget.batch)
    say(f"{work.prompts} prompts, {calls} calls to {options.engine.model}; nothing was sent")
    say(
        f"about {prompt_tokens} prompt tokens (estimated at 4 characters each) and at most "
        f"{calls * reply} reply tokens"
    )
    if options.engine.backend in _LOCAL:
        say("price: none, the judge runs on this machine")
    elif budget.price is None:
        say(f"price: unknown; add {options.engine.model!r} to the price table to see it")
    else:
        say(f"price: about ${cost:.4f}")
