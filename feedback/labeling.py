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
import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from feedback.adaptive import BLOCK, PairRounds
from feedback.backends.opening import open_backend
from feedback.comparing import prompt_comparisons
from feedback.config import recipe_of
from feedback.dry_run import say_dry_run
from feedback.errors import BudgetExceeded, RecipeError
from feedback.judge import Judge, Question
from feedback.judge_options import JudgeOptions
from feedback.labeling_run import LabelingRun
from feedback.labeling_setup import (
    Member,
    Work,
    all_questions,
    check_judges,
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
    questions_about,
    questions_of,
)
from feedback.ranking import criterion_of
from feedback.records import Candidates, Verdict
from feedback.rounding import rounding_note
from feedback.run_folder import check_not_all_failed, claim_folder, make_way, started
from feedback.run_record import run_record
from feedback.shards import read_rows
from feedback.templates import Template, load_template
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
        BackendError: the engine cannot give what the template needs, or is gone; or every call
            failed.
        BudgetExceeded: a limit was reached; what is done is on disk, and the run can be continued.
    """
    members = members_of(options)
    plans = [question_plan(row.options, load_template(row.options.template)) for row in members]
    work, *_ = [
        survey(options.candidates, plan)
        for place, plan in enumerate(plans)
        if plan not in plans[:place]
    ]
    if options.dry_run:
        say_dry_run(members, plans, work)
        return
    check_judges(members)
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
                _check_new(judge, judges)
                judges.append(judge)
                cache = open_cache(member.options, judge)
                if cache is not None:
                    turn.callback(cache.close)
                if run is None:
                    record = run_record(options, [row.member for row in passes], judge)
                    make_way(options.out, record, options.on_change)
                    kept = ". Replies that were paid for stay in the cache" if cache else ""
                    run = LabelingRun(
                        judge,
                        backend,
                        folder=options.out,
                        budget=budget,
                        cache=cache,
                        claim=functools.partial(claim_folder, options.out, record, kept=kept),
                    )
                    closing.callback(run.close)
                    if options.ask_again:
                        run.ask_again(options.ask_again)
                    closing.enter_context(bar)
                else:
                    budget.price = price_of(member.options)
                    budget.batch = member.options.engine.backend == "batch"
                    run.use(judge, backend, cache)
                with _closing_line(run):
                    ask(run, bar)
            if budget.reached:
                break
        assert run is not None
        _finish(options, passes, run, judges, work)


@contextlib.contextmanager
def _closing_line(run: LabelingRun) -> Iterator[None]:
    """Say what was done where a run ends before its time, by Ctrl-C or an endpoint that is gone."""
    try:
        yield
    except BaseException:
        say(run.totals.line())
        raise


def _check_new(judge: Judge, judges: Sequence[Judge]) -> None:
    """Refuse a judge that is one of those before it: their verdicts would have the same ids.

    Raises:
        RecipeError: two folders of recorded verdicts, say, are of one judge.
    """
    if any(judge.same_as(other) for other in judges):
        raise RecipeError(
            f"two judges are {judge.identity.model} with the same template and rubric"
        )


def _finish(
    options: JudgeOptions,
    passes: Sequence[_Pass],
    run: LabelingRun,
    judges: Sequence[Judge],
    work: Work,
) -> None:
    say(run.totals.line())
    if (note := rounding_note(run.totals.probs)) is not None:
        say(note)
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
    check_not_all_failed(options.out)


def _manifest(
    options: JudgeOptions, passes: Sequence[_Pass], judges: Sequence[Judge], work: Work
) -> dict[str, Any]:
    return {
        "stage": "judge",
        "started": started(options.out),
        **run_record(options, [row.member for row in passes], judges[0]),
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
