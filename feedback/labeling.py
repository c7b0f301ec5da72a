"""The labelling run: candidates to verdict shards.

Questions are drawn prompt by prompt, what is on disk already is skipped, the rest streams through
the engine and is written as it comes. ``verdicts-*.jsonl`` holds final verdicts only, each once;
calls that failed stand in ``failed.jsonl`` and are asked again by the next run. A run killed at any
point continues where it stopped, and memory does not grow with the number of rows.

Several judges (a panel, a cascade) are asked one after the other into the same folder.

``rlaif judge --candidates runs/x/candidates --out runs/x/verdicts``
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from feedback.adaptive import BLOCK, PairRounds
from feedback.backends.opening import open_backend
from feedback.budget import estimate_tokens
from feedback.comparing import prompt_comparisons
from feedback.config import recipe_of
from feedback.constitution import load_constitution
from feedback.errors import BudgetExceeded
from feedback.judge import Judge, Question
from feedback.judge_options import JudgeOptions
from feedback.labeling_run import LabelingRun
from feedback.labeling_setup import (
    LOCAL_ENGINES,
    Member,
    Work,
    all_questions,
    candidates_sha256,
    combination_of,
    make_budget,
    make_judge,
    members_of,
    open_cache,
    price_of,
    question_plan,
    survey,
)
from feedback.panel import CascadeOptions, by_member, is_unsure
from feedback.panel_ratings import is_unsure_rating
from feedback.panel_report import panel_lines, panel_report
from feedback.progress import ProgressBar, say
from feedback.provenance import template_record
from feedback.questions import (
    QuestionPlan,
    expected_questions,
    questions_about,
    questions_of,
)
from feedback.ranking import criterion_of
from feedback.records import Candidates, Verdict
from feedback.run_folder import claim_folder, make_way, started
from feedback.shards import read_rows
from feedback.templates import Template, describe, load_criteria, load_template, render
from feedback.verdict_index import VerdictIndex

__all__ = ["JudgeOptions", "Work", "answer", "make_judge", "run"]

Ask = Callable[[LabelingRun, ProgressBar], None]


class _Pass(NamedTuple):
    """One judge's turn: who, and what it is asked."""

    member: Member
    ask: Ask


def run(options: JudgeOptions) -> None:
    """Judge all candidates.

    Raises:
        InputError: candidates, template or options are wrong; nothing has been sent.
        BackendError: the engine cannot give what the template needs, or is gone.
        BudgetExceeded: a limit was reached; what is done is on disk, and the run can be continued.
    """
    members = members_of(options)
    plans = [question_plan(row.options, load_template(row.options.template)) for row in members]
    work = survey(options.candidates, plans[0])
    if options.dry_run:
        _say_dry_run(members, plans, work)
        return
    passes = []
    for member, plan in zip(members, plans, strict=True):
        if options.cascade is not None and member.number:
            ask = _ask_unsure(options, options.cascade, plan)
        elif plan.adaptive:
            ask = (
                _ask_the_same_pairs(options, plan)
                if member.number
                else _ask_adaptive(options, plan)
            )
        else:
            ask = _ask_everything(options, plan)
        passes.append(_Pass(member, ask))
    _label(options, passes, work)


def answer(options: JudgeOptions, questions: Callable[[], Iterator[Question]], work: Work) -> None:
    """Open the judge, ask it ``questions`` about the candidates, and finish the folder.

    Raises:
        BackendError: the engine cannot give what the template needs, or is gone.
        BudgetExceeded: a limit was reached.
    """

    def ask(run: LabelingRun, bar: ProgressBar) -> None:
        run.ask_all(questions(), bar)

    _label(options, [_Pass(Member(options, None), ask)], work)


def _ask_everything(options: JudgeOptions, plan: QuestionPlan) -> Ask:
    def ask(run: LabelingRun, bar: ProgressBar) -> None:
        run.ask_all(all_questions(options.candidates, plan), bar)

    return ask


def _ask_adaptive(options: JudgeOptions, plan: QuestionPlan) -> Ask:
    """Ask block by block, each prompt's next pairs by its answers so far."""

    def ask(run: LabelingRun, bar: ProgressBar) -> None:
        rows = read_rows(options.candidates, Candidates)
        while block := list(itertools.islice(rows, BLOCK)):
            rounds = PairRounds(block, plan, run.known)
            run.listener = rounds.hear
            for wave in rounds.waves():
                run.ask_all(wave, bar)
                if run.budget.reached:
                    return

    return ask


def _ask_the_same_pairs(options: JudgeOptions, plan: QuestionPlan) -> Ask:
    """Ask a further judge about the pairs that the first one's answers chose."""

    def wanted(row: Candidates, first: Sequence[Verdict]) -> Iterator[Question]:
        by_id = {entry.completion_id: entry for entry in row.completions}
        chosen = dict.fromkeys(tuple(sorted(verdict.shown)) for verdict in first)
        yield from questions_about(row, [(by_id[a], by_id[b]) for a, b in chosen], plan)

    return _ask_after_the_first(options, wanted)


def _ask_unsure(options: JudgeOptions, cascade: CascadeOptions, plan: QuestionPlan) -> Ask:
    """Ask the strong judge about the pairs, or the ratings, that the first one is unsure of."""

    def pairs(row: Candidates, first: Sequence[Verdict]) -> Iterator[Question]:
        by_id = {entry.completion_id: entry for entry in row.completions}
        unsure = [
            (by_id[found.a], by_id[found.b])
            for found in prompt_comparisons(first, orders=options.orders)
            if is_unsure(found, cascade)
        ]
        yield from questions_about(row, unsure, plan)

    def ratings(row: Candidates, first: Sequence[Verdict]) -> Iterator[Question]:
        rated: dict[tuple[str, str], list[Verdict]] = defaultdict(list)
        for verdict in first:
            rated[verdict.shown[0], criterion_of(verdict)].append(verdict)
        unsure = {key for key, rows in rated.items() if is_unsure_rating(rows, cascade)}
        for question in questions_of(row, plan):
            if (question.shown[0], question.criterion or "") in unsure:
                yield question

    return _ask_after_the_first(options, ratings if plan.template.kind == "rating" else pairs)


def _ask_after_the_first(
    options: JudgeOptions, wanted: Callable[[Candidates, Sequence[Verdict]], Iterator[Question]]
) -> Ask:
    """Ask what follows, prompt by prompt, from the first judge's verdicts in the folder."""

    def questions() -> Iterator[Question]:
        with VerdictIndex(options.out) as index:
            for row in read_rows(options.candidates, Candidates):
                first = by_member(index.verdicts(row.prompt_id)).get(0)
                if first:
                    yield from wanted(row, first)

    def ask(run: LabelingRun, bar: ProgressBar) -> None:
        run.ask_all(questions(), bar)

    return ask


def _label(options: JudgeOptions, passes: Sequence[_Pass], work: Work) -> None:
    """Let each judge answer what is not on disk yet, and finish the folder.

    Raises:
        ShardError: the folder was begun with other settings, or another run is writing it.
        BudgetExceeded: a limit was reached.
    """
    budget = make_budget(options)
    judges: list[Judge] = []
    with contextlib.ExitStack() as closing:
        bar = ProgressBar("judging", work.questions)
        run: LabelingRun | None = None
        for member, ask in passes:
            with contextlib.ExitStack() as turn:
                backend = open_backend(member.options.engine)
                turn.callback(backend.close)
                template = load_template(member.options.template)
                judge = make_judge(member.options, template, backend, member=member.number)
                judges.append(judge)
                cache = open_cache(member.options, judge)
                if cache is not None:
                    turn.callback(cache.close)
                if run is None:
                    record = _run_record(options, passes, judge)
                    make_way(options.out, record, options.on_change)
                    run = LabelingRun(
                        judge, backend, folder=options.out, budget=budget, cache=cache
                    )
                    closing.callback(run.close)
                    kept = ". Replies that were paid for stay in the cache" if cache else ""
                    claim_folder(options.out, record, kept=kept)
                    if options.ask_again:
                        run.ask_again(options.ask_again)
                    closing.enter_context(bar)
                else:
                    budget.price = price_of(member.options)
                    budget.batch = member.options.engine.backend == "batch"
                    run.use(judge, backend, cache)
                ask(run, bar)
            if budget.reached:
                break
        assert run is not None
        _finish(options, passes, run, judges, work)


def _finish(
    options: JudgeOptions,
    passes: Sequence[_Pass],
    run: LabelingRun,
    judges: Sequence[Judge],
    work: Work,
) -> None:
    say(run.totals.line())
    if run.budget.reached:
        raise BudgetExceeded(
            f"stopped at {run.budget.reached} with {run.totals.said} of this run on disk; run the "
            "same command with a higher limit to continue"
        )
    info = _manifest(options, passes, judges, work)
    combination = combination_of(options)
    if combination is not None:
        info["panel"] = panel_report(
            options.out, combination, orders=options.orders, weights=info.get("criteria")
        )
        for line in panel_lines(info["panel"], [judge.identity.model for judge in judges]):
            say(line)
    run.finish(info)
    _say_outcome(run, work)


def _run_record(options: JudgeOptions, passes: Sequence[_Pass], judge: Judge) -> dict[str, Any]:
    """Return what the verdicts of a folder depend on."""
    combination = combination_of(options)
    record: dict[str, Any] = {
        "judge": dataclasses.asdict(judge.identity),
        "template": describe(judge.template),
        "rubric": judge.rubric,
        "candidates_sha256": candidates_sha256(options.candidates),
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
    if options.constitution is not None:
        record["constitution"] = load_constitution(options.constitution).describe()
    if judge.criteria and judge.template.mode != "structured":
        record["criteria"] = {entry.name: entry.weight for entry in judge.criteria}
    if combination is not None:
        record["combine"] = combination.record()
        record["cascade"] = options.cascade and _cascade_record(options.cascade)
        record["members"] = [_member_record(member) for member, _ in passes]
    return record


def _cascade_record(cascade: CascadeOptions) -> dict[str, Any]:
    names = ("unsure", "inconsistent", "min_mass", "max_entropy")
    return {name: getattr(cascade, name) for name in names}


def _member_record(member: Member) -> dict[str, Any]:
    options = member.options
    template = load_template(options.template)
    return {
        "backend": options.engine.backend,
        "model": options.engine.model,
        "revision": options.engine.revision,
        "template": describe(template),
        "rubric": load_criteria(options.rubric or template.rubric).text,
    }


def _manifest(
    options: JudgeOptions, passes: Sequence[_Pass], judges: Sequence[Judge], work: Work
) -> dict[str, Any]:
    return {
        "stage": "judge",
        "started": started(options.out),
        **_run_record(options, passes, judges[0]),
        "judges": [dataclasses.asdict(judge.identity) for judge in judges],
        "templates": [template_record(template) for template in _templates(judges)],
        "choices": list(judges[0].template.choices),
        "prompts": work.prompts,
        "questions": work.questions,
        "left_out": {"repeated_or_empty": work.repeated, "single_prompts": work.single},
        "recipe": recipe_of(options),
    }


def _templates(judges: Sequence[Judge]) -> list[Template]:
    """Return each template once."""
    return list({judge.template.sha256: judge.template for judge in judges}.values())


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


def _say_dry_run(members: Sequence[Member], plans: Sequence[QuestionPlan], work: Work) -> None:
    """Print what the run would send, judge by judge, from the questions as rendered."""
    for (options, number), plan in zip(members, plans, strict=True):
        price = price_of(options)
        batch = options.engine.backend == "batch"
        rubric = load_criteria(options.rubric or plan.template.rubric)
        shown = {entry.name: entry.shown for entry in rubric.criteria}
        reply = options.reply_tokens or plan.template.max_tokens
        calls = prompt_tokens = 0
        cost = 0.0
        for row in read_rows(options.candidates, Candidates):
            for question in expected_questions(row, plan):
                messages = render(
                    plan.template,
                    prompt=question.prompt,
                    completions=question.completions,
                    rubric=shown.get(question.criterion or "", rubric.text),
                    principle=question.principle or "",
                    gold=question.gold or "",
                )
                usage = estimate_tokens(messages, reply)
                calls += 1
                prompt_tokens += usage.prompt_tokens
                cost += 0.0 if price is None else price.of(usage, batch=batch)
        most = "at most " if plan.adaptive or (options.cascade and number) else ""
        say(
            f"{work.prompts} prompts, {most}{calls} calls to {options.engine.model}; "
            "nothing was sent"
        )
        say(
            f"about {prompt_tokens} prompt tokens (estimated at 4 characters each) and at most "
            f"{calls * reply} reply tokens"
        )
        if options.engine.backend in LOCAL_ENGINES:
            say("price: none, the judge runs on this machine")
        elif price is None:
            say(f"price: unknown; add {options.engine.model!r} to the price table to see it")
        else:
            say(f"price: {most or 'about '}${cost:.4f} ({price.note})")
