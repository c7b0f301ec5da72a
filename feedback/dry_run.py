"""What ``rlaif judge --dry-run`` prints: calls, tokens and price of what is still to be asked."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from feedback.backends.identity import identity_of
from feedback.backends.opening import local_revision, resolve_model
from feedback.budget import Price, estimate_tokens
from feedback.config import ENDPOINTS
from feedback.judge import Question
from feedback.judge_options import JudgeOptions
from feedback.labeling_setup import Member, Work, plain_judge, price_of
from feedback.progress import say
from feedback.questions import QuestionPlan, expected_questions
from feedback.records import Candidates, Verdict
from feedback.run_folder import changed_setting
from feedback.run_record import run_record
from feedback.shards import read_rows
from feedback.templates import load_criteria, render
from feedback.verdict_index import VerdictIndex

__all__ = ["say_dry_run"]


@dataclass(slots=True)
class _Estimate:
    """What one judge is still to be asked, from the questions as rendered."""

    calls: int = 0
    done: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    cost: float = 0.0
    most: str = ""
    """``at most``, where answers decide what is asked."""


def say_dry_run(members: Sequence[Member], plans: Sequence[QuestionPlan], work: Work) -> None:
    """Print what the run would send, judge by judge and in all; the cache is not looked at."""
    estimates, prices = [], []
    with contextlib.ExitStack() as stack:
        index = _index_of_folder(members, plans)
        if index is not None:
            stack.enter_context(index)
        for member, plan in zip(members, plans, strict=True):
            price = price_of(member.options)
            found = _estimate(member, plan, price, index)
            _say_judge(member.options, found, price, work)
            estimates.append(found)
            prices.append(price)
    if len(members) > 1:
        _say_total(members, estimates, prices)


def _index_of_folder(
    members: Sequence[Member], plans: Sequence[QuestionPlan]
) -> VerdictIndex | None:
    """Return the verdicts that the run would go on from; None where it would begin anew."""
    options = members[0].options
    if not options.out.is_dir():
        return None
    files = local_revision(resolve_model(options.engine.model))
    identity = identity_of(options.engine, revision=files)
    record = run_record(options, members, plain_judge(options, plans[0].template, identity))
    # Who judges is known in full (whose records, which revision on the Hub) only once it is open.
    later = options.engine.backend == "replay" or (
        options.engine.backend not in ENDPOINTS and files is None
    )
    changed = changed_setting(options.out, record, leave_out=("judge",) if later else ())
    if changed is None:
        return VerdictIndex(options.out)
    if options.on_change == "refuse":
        say(f"{options.out} was begun with another {changed}; the run would be refused")
    return None


def _estimate(
    member: Member, plan: QuestionPlan, price: Price | None, index: VerdictIndex | None
) -> _Estimate:
    options = member.options
    rubric = load_criteria(options.rubric or plan.template.rubric)
    shown = {entry.name: entry.shown for entry in rubric.criteria}
    reply = options.reply_tokens or plan.template.max_tokens
    batch = options.engine.backend == "batch"
    depends = plan.adaptive or (options.cascade is not None and member.number)
    found = _Estimate(most="at most " if depends else "")
    for row in read_rows(options.candidates, Candidates):
        known = [] if index is None else _known(index.verdicts(row.prompt_id), member)
        found.done += len(known)
        for question in _open_questions(row, plan, known):
            messages = render(
                plan.template,
                prompt=question.prompt,
                completions=question.completions,
                rubric=shown.get(question.criterion or "", rubric.text),
                principle=question.principle or "",
                gold=question.gold or "",
            )
            usage = estimate_tokens(messages, reply)
            found.calls += 1
            found.prompt_tokens += usage.prompt_tokens
            found.reply_tokens += reply
            found.cost += 0.0 if price is None else price.of(usage, batch=batch)
    return found


def _known(verdicts: Sequence[Verdict], member: Member) -> list[Verdict]:
    """Return a judge's own verdicts, those aside that are to be asked again."""
    return [
        verdict
        for verdict in verdicts
        if verdict.meta.get("member") == member.number
        and verdict.outcome not in member.options.ask_again
    ]


def _open_questions(
    row: Candidates, plan: QuestionPlan, known: Sequence[Verdict]
) -> Iterator[Question]:
    questions = expected_questions(row, plan)
    if plan.adaptive:  # which pairs they will be is not known, only how many
        yield from itertools.islice(questions, len(known), None)
        return
    done = {_asked(verdict.shown, verdict.repeat, verdict.meta, verdict) for verdict in known}
    for question in questions:
        about = {"criterion": question.criterion}
        if _asked(question.shown, question.repeat, about, question) not in done:
            yield question


def _asked(
    shown: Sequence[str], repeat: int, about: Mapping[str, object], one: Question | Verdict
) -> tuple[object, ...]:
    return tuple(shown), repeat, about.get("criterion"), one.principle


def _say_judge(options: JudgeOptions, found: _Estimate, price: Price | None, work: Work) -> None:
    on_disk = f" ({found.done} verdicts are on disk already)" if found.done else ""
    say(
        f"{work.prompts} prompts, {found.most}{found.calls} calls to {options.engine.model}"
        f"{on_disk}; nothing was sent"
    )
    say(
        f"about {found.prompt_tokens} prompt tokens (estimated at 4 characters each) and at most "
        f"{found.reply_tokens} reply tokens"
    )
    if options.engine.backend not in ENDPOINTS:
        say("price: none, the judge runs on this machine")
    elif price is None:
        say(f"price: unknown; add {options.engine.model!r} to the price table to see it")
    else:
        say(f"price: {found.most or 'about '}${found.cost:.4f} ({price.note})")


def _say_total(
    members: Sequence[Member], estimates: Sequence[_Estimate], prices: Sequence[Price | None]
) -> None:
    most = next((found.most for found in estimates if found.most), "")
    unknown = [
        member.options.engine.model
        for member, price in zip(members, prices, strict=True)
        if price is None and member.options.engine.backend in ENDPOINTS
    ]
    cost = sum(found.cost for found in estimates)
    beside = f" and the unknown price of {', '.join(unknown)}" if unknown else ""
    say(
        f"all {len(members)} judges: {most}{sum(found.calls for found in estimates)} calls, about "
        f"{sum(found.prompt_tokens for found in estimates)} prompt tokens, "
        f"{most or 'about '}${cost:.4f}{beside}"
    )
