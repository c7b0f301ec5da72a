"""What a labelling run needs before its first call: the plan, the work, the judge, its limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from feedback.backends import Backend
from feedback.backends.identity import identity_of
from feedback.backends.opening import check_openable
from feedback.budget import Budget, Price, engine_price
from feedback.cache import ReplyCache
from feedback.config import ENDPOINTS
from feedback.constitution import load_constitution
from feedback.errors import InputError, RecipeError, TemplateError
from feedback.inputs import checked_candidates
from feedback.judge import Judge, Question
from feedback.judge_options import JudgeOptions
from feedback.length import LengthBudget
from feedback.ordering import distinct_completions
from feedback.panel import Combination
from feedback.parsing import scale_values
from feedback.progress import say
from feedback.questions import QuestionPlan, expected_questions, questions_of
from feedback.records import Candidates, JudgeIdentity
from feedback.shards import MANIFEST, file_sha256, manifest_sha256, read_rows
from feedback.templates import Template, load_criteria, load_template
from feedback.unread import (
    BY_ANSWER,
    BY_BACKEND,
    BY_KIND,
    BY_MODE,
    check_engine,
    refuse_unread,
)

__all__ = [
    "Member",
    "Work",
    "all_questions",
    "candidates_sha256",
    "check_judges",
    "combination_of",
    "make_budget",
    "make_judge",
    "members_of",
    "open_cache",
    "plain_judge",
    "price_of",
    "question_plan",
    "survey",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What there is to ask, counted and checked before the first call."""

    prompts: int = 0
    questions: int = 0
    """At most so many, where answers decide about further ones."""
    repeated: int = 0
    """Completions left out: empty, or equal to another of their prompt after normalisation."""
    single: int = 0
    """Prompts with fewer than two distinct completions."""


class Member(NamedTuple):
    """One judge of a run: the options with its engine, template and rubric, and its number."""

    options: JudgeOptions
    number: int | None
    """None for a single judge; 0 for the first of several."""


def members_of(options: JudgeOptions) -> list[Member]:
    """Return the judges of a run, in the order in which they are asked.

    Raises:
        RecipeError: two of them are the same, their answers cannot be merged, or an option does
            nothing with any of them.
    """
    members = _members(options)
    for member in members:
        which = f"judge {member.number + 1}: " if member.number else ""
        check_engine(member.options.engine, prefix=f"{which}engine.")
    if len(members) > 1:
        _check_distinct(members)
        _check_same_question(options, members)
    _refuse_unread(options, members)
    return members


def _members(options: JudgeOptions) -> list[Member]:
    if options.panel is None and options.cascade is None:
        return [Member(options, None)]
    others = options.panel.judges if options.panel is not None else ()
    members = [Member(options, 0)]
    for other in [options.cascade] if options.cascade is not None else others:
        changed = dataclasses.replace(
            options,
            engine=other.engine,
            template=other.template or options.template,
            rubric=other.rubric if other.template or other.rubric else options.rubric,
        )
        members.append(Member(changed, len(members)))
    if len(members) < 2:
        raise RecipeError("[judge.panel] has no [[judge.panel.judges]]")
    return members


def _check_distinct(members: Sequence[Member]) -> None:
    """Refuse one judge under two numbers."""
    # By what shapes the replies: one that merely runs with another concurrency is the same judge.
    asked = [
        (identity_of(row.engine), row.engine.replay_from, row.template, row.rubric)
        for row, _ in members
    ]
    if any(entry in asked[:place] for place, entry in enumerate(asked)):
        raise RecipeError("two judges have the same engine, template and rubric")


def _refuse_unread(options: JudgeOptions, members: Sequence[Member]) -> None:
    """Refuse what none of the judges reads."""
    pairs = [(row.options, load_template(row.options.template)) for row in members]
    refuse_unread(options, BY_BACKEND, [judge.engine.backend for judge, _ in pairs])
    refuse_unread(options, BY_KIND, [template.kind for _, template in pairs])
    refuse_unread(options, BY_MODE, [_mode(template) for _, template in pairs])
    refuse_unread(options, BY_ANSWER, [_answer(*pair) for pair in pairs])


def _mode(template: Template) -> str:
    return "list" if template.kind == "listwise" else template.mode


def _answer(options: JudgeOptions, template: Template) -> str:
    """Return what can differ when a question is asked once more."""
    if options.engine.backend in ENDPOINTS:
        return "an endpoint's"
    reads_text = options.read == "text" or not template.reads_labels
    return "sampled text" if options.temperature > 0 and reads_text else "always the same"


def _check_same_question(options: JudgeOptions, members: Sequence[Member]) -> None:
    """Refuse judges whose answers cannot be merged."""
    templates = [load_template(row.options.template) for row in members]
    kinds = {template.kind for template in templates}
    if len(kinds) > 1:
        raise RecipeError(
            f"several judges answer the same kind of question; their templates are "
            f"{' and '.join(sorted(kinds))}"
        )
    if kinds == {"listwise"} and options.cascade is not None:
        raise RecipeError(
            "a cascade goes by pairs or ratings; for lists use a panel, or a pairwise template"
        )
    if kinds == {"rating"}:
        scales = {tuple(scale_values(template)) for template in templates}
        weights = [
            load_criteria(row.options.rubric or template.rubric).weights
            for row, template in zip(members, templates, strict=True)
        ]
        if len(scales) > 1 or any(entry != weights[0] for entry in weights):
            raise RecipeError(
                "several judges rate on one scale, by the same criteria with the same weights; "
                "give them templates and rubrics that agree"
            )


def check_judges(members: Sequence[Member]) -> None:
    """Check everything that can be known of all judges before the first one is asked.

    Raises:
        InputError: a price is unknown, and there is a limit on cost; or a later judge's options are
            wrong.
        BackendError: what a later judge's engine needs is missing.
    """
    for options, number in members:
        price_of(options)
        check_tokenizer(options)
        if number:  # the first is opened at once
            check_openable(options.engine)


def check_tokenizer(options: JudgeOptions) -> None:
    """Refuse a limit on the question's length where nothing here can count tokens.

    Raises:
        RecipeError: as said.
    """
    engine = options.engine
    counts = engine.backend not in ENDPOINTS or "tokenizer" in engine.extra
    if options.max_prompt_tokens is not None and not counts:
        raise RecipeError(
            f"max_prompt_tokens needs the judge's tokenizer, which backend {engine.backend!r} does "
            "not have here; leave it out, or name the tokenizer of an endpoint's model under "
            "engine.extra"
        )


def combination_of(options: JudgeOptions) -> Combination | None:
    """Return how the judges' comparisons are merged; None for a single judge."""
    if options.cascade is not None:
        return Combination("cascade", (1.0, 1.0))
    if options.panel is None:
        return None
    weights = (options.panel.weight, *(judge.weight for judge in options.panel.judges))
    return Combination(options.panel.combine, weights)


def question_plan(options: JudgeOptions, template: Template) -> QuestionPlan:
    """Return how the options draw questions.

    Raises:
        TemplateError: a constitution without a place in the template, or the other way round.
    """
    text = template.user + template.system
    if ("{principle}" in text) != (options.constitution is not None):
        raise TemplateError(
            f"template {template.name!r} shows a principle; give --constitution"
            if options.constitution is None
            else f"template {template.name!r} has no {{principle}}: --constitution would do "
            "nothing; use template 'principle' or your own"
        )
    principles = (
        load_constitution(options.constitution).having("choose") if options.constitution else ()
    )
    criteria: tuple[str, ...] = ()
    if template.kind == "rating" and template.mode != "structured":
        rubric = load_criteria(options.rubric or template.rubric)
        criteria = tuple(criterion.name for criterion in rubric.criteria)
    return QuestionPlan(
        template=template,
        orders=options.orders,
        pairs=options.pairs,
        pairs_per_prompt=options.pairs_per_prompt,
        repeats=options.repeats,
        seed=options.seed,
        criteria=criteria,
        principles=principles,
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
        questions += sum(1 for _ in expected_questions(row, plan))
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


def all_questions(candidates: Path, plan: QuestionPlan) -> Iterator[Question]:
    """Yield the questions about all prompts, where answers do not decide about them."""
    for row in read_rows(candidates, Candidates):
        yield from questions_of(row, plan)


def make_judge(
    options: JudgeOptions, template: Template, backend: Backend, *, member: int | None = None
) -> Judge:
    """Return the judge that the options describe, checked against its engine.

    Raises:
        BackendError: the engine cannot be reached, or cannot give log-probabilities of the
            template's labels.
        RecipeError: there is a limit on the question's length, and no tokenizer.
    """
    check_tokenizer(options)
    judge = plain_judge(options, template, backend.identity, member=member)
    found = backend.prepare(template.choices if judge.reads_choices else ())
    if found.note:
        say(f"{options.engine.model}: {found.note}")
    if template.mode == "structured" and not found.structured_output:
        say(
            f"{options.engine.model}: replies cannot be held to a JSON schema there; those that do "
            "not follow it are unparsed"
        )
    return dataclasses.replace(judge, budget=_length_budget(options, judge, backend))


def plain_judge(
    options: JudgeOptions,
    template: Template,
    identity: JudgeIdentity,
    *,
    member: int | None = None,
) -> Judge:
    """Return the judge that the options describe, before its engine was opened."""
    rubric = load_criteria(options.rubric or template.rubric)
    return Judge(
        identity=identity,
        template=template,
        rubric=rubric.text,
        criteria=rubric.criteria if template.kind == "rating" else (),
        member=member,
        temperature=options.temperature,
        max_tokens=options.reply_tokens,
        seed=options.seed,
        min_mass=options.min_mass,
        max_prompt_tokens=options.max_prompt_tokens,
        use_logprobs=options.read == "auto",
    )


def _length_budget(options: JudgeOptions, judge: Judge, backend: Backend) -> LengthBudget | None:
    """Return the limit on a question's length, where the judge's tokenizer is in this process."""
    tokenizer = getattr(backend, "chat", None)
    longest = getattr(backend, "max_length", None)
    if tokenizer is None:
        return None
    limits = [options.max_prompt_tokens, longest and longest - judge.reply_tokens]
    known = [limit for limit in limits if limit]
    return LengthBudget(tokenizer, min(known)) if known else None


def price_of(options: JudgeOptions) -> Price | None:
    """Return the price of the engine's model; None for engines in this process, or if unknown.

    Raises:
        InputError: the price is unknown, and there is a limit on cost.
    """
    return engine_price(options.engine, prices=options.prices, max_cost=options.max_cost)


def make_budget(options: JudgeOptions) -> Budget:
    """Return the run's limits, with the first judge's price."""
    return Budget(
        price=price_of(options),
        batch=options.engine.backend == "batch",
        max_cost=options.max_cost,
        max_calls=options.max_calls,
        max_tokens=options.max_tokens,
    )


def open_cache(options: JudgeOptions, judge: Judge) -> ReplyCache | None:
    """Open the file of earlier replies, where the options ask for one."""
    local = options.engine.backend not in ENDPOINTS
    if options.cache == "none" or (options.cache == "auto" and local):
        return None
    path = options.out.parent / "replies.sqlite"
    return ReplyCache(path if options.cache == "auto" else Path(options.cache), judge.identity)


def candidates_sha256(candidates: Path) -> str:
    """Return the hash of a candidates file, or of a finished folder's manifest.

    Raises:
        InputError: the folder is not finished.
    """
    if candidates.is_file():
        return file_sha256(candidates)
    if (candidates / MANIFEST).is_file():
        return manifest_sha256(candidates)
    raise InputError(
        "no manifest.json: sampling has not finished; run rlaif sample again", path=candidates
    )
