"""One question to one judge, and what its reply means.

A ``Question`` is what is asked (which completions, in which order); ``Judge`` turns it into a
``JudgeCall`` and the reply into a ``Verdict``. Nothing is invented on the way: log-probabilities
that are missing, NaN or of too little mass are an outcome, never a label.

This module knows nothing of engines, files or of merging two orders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from feedback.backends import JudgeCall, JudgeReply
from feedback.errors import TemplateError
from feedback.length import Fitted, LengthBudget
from feedback.parsing import parse_reply, scale_values
from feedback.reading import Reading
from feedback.records import (
    JudgeIdentity,
    Message,
    Outcome,
    PromptText,
    Verdict,
    content_id,
)
from feedback.rubric import Criterion
from feedback.structured import reply_schema
from feedback.templates import Template, neutralise, render

__all__ = ["Asked", "ChoiceReading", "Judge", "Question", "read_choices"]

# An engine that lists only its most probable tokens may leave a label out. Then its probability is
# known to be small only if the labels that are there hold most of the mass.
_MASS_WITH_MISSING_LABELS = 0.5
# Rounding can push a probability of 1 this far above 0 in log space; more is no log-probability.
_LOG_TOLERANCE = 1e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What one call asks: completions of one prompt, in the order shown."""

    prompt_id: str
    prompt: PromptText
    shown: tuple[str, ...]
    """Completion ids."""
    completions: tuple[str, ...]
    """Their texts."""
    gold: str | None = None
    repeat: int = 0
    principle: str | None = None
    criterion: str | None = None
    """Name of the one criterion that is rated; None: the whole rubric."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A question with the call that asks it."""

    question: Question
    call: JudgeCall
    flags: tuple[str, ...] = ()


class ChoiceReading(NamedTuple):
    """Probabilities of the offered choices, or why there are none."""

    probs: list[float] | None
    mass: float | None
    outcome: Outcome
    """``decided`` (or ``tie``, where two choices are exactly level), ``unparsed`` or ``failed``."""
    problem: str = ""
    missing: bool = False
    """A choice's log-probability was not reported; it counts as 0, which the mass bounds."""


def read_choices(
    choices: Sequence[str], logprobs: Mapping[str, float] | None, *, min_mass: float = 0.0
) -> ChoiceReading:
    """Turn log-probabilities of the offered choices into probabilities that sum to 1.

    A reply without log-probabilities, or with NaN or positive ones, is a failed call and is asked
    again; one whose choices hold less than ``min_mass`` is unparsed: the judge wanted to say
    something else.
    """
    if logprobs is None:
        return ChoiceReading(None, None, "failed", "the reply carries no log-probabilities")
    known = {choice: logprobs[choice] for choice in choices if choice in logprobs}
    for choice, value in known.items():
        if math.isnan(value) or value > _LOG_TOLERANCE:
            problem = f"the log-probability of {choice!r} is {value}"
            return ChoiceReading(None, None, "failed", problem)
    probs = [math.exp(min(known[choice], 0.0)) if choice in known else 0.0 for choice in choices]
    mass = min(math.fsum(probs), 1.0)
    missing = len(known) < len(choices)
    needed = max(min_mass, _MASS_WITH_MISSING_LABELS if missing else 0.0)
    if mass <= 0.0:
        return ChoiceReading(None, 0.0, "unparsed", "no offered label has any probability", missing)
    total = math.fsum(probs)
    probs = [value / total for value in probs]
    if mass < needed:
        # The probabilities are kept, so that another limit can be tried without a call.
        problem = f"the offered labels hold {mass:.2g} of the probability (at least {needed:.2g})"
        return ChoiceReading(probs, mass, "unparsed", problem, missing)
    return ChoiceReading(probs, mass, "decided", "", missing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A template with its criteria and settings, bound to the model that answers.

    ``ask`` and ``read`` are each other's halves: what ``ask`` puts into a call, ``read`` finds in
    the reply.
    """

    identity: JudgeIdentity
    template: Template
    rubric: str = ""
    """Text of the criteria."""
    temperature: float = 0.0
    max_tokens: int = 0
    """Longest reply; 0: the template's."""
    seed: int = 0
    min_mass: float = 0.0
    max_prompt_tokens: int | None = None
    """Longest question in tokens, as the user set it; None: what the judge can read."""
    budget: LengthBudget | None = None
    """Cuts completions so that the question fits the judge; None: nothing is cut."""
    use_logprobs: bool = True
    """Read label probabilities where the template's mode allows it; False: read the text."""
    criteria: tuple[Criterion, ...] = ()
    """The rubric's criteria, where a rating is about them one by one or all in one object."""
    member: int | None = None
    """Number in a panel or cascade; None outside of one."""
    turn: int = 0
    """Grows when questions are asked again for another answer; sampled replies get other seeds."""

    @property
    def reply_tokens(self) -> int:
        """Longest reply in tokens."""
        return self.max_tokens or self.template.max_tokens

    @property
    def reads_choices(self) -> bool:
        """Whether the verdict is read from label probabilities."""
        return self.use_logprobs and self.template.reads_labels

    @property
    def _all_criteria(self) -> dict[str, float]:
        """Weights of the criteria that one structured reply scores; empty for a single score."""
        if self.template.kind != "rating" or self.template.mode != "structured":
            return {}
        return {criterion.name: criterion.weight for criterion in self.criteria}

    def sampling(self) -> dict[str, Any]:
        """Return what verdicts record of the sampling."""
        return {"temperature": self.temperature, "max_tokens": self.reply_tokens}

    def same_as(self, other: Judge) -> bool:
        """Return whether another judge asks the same model the same in the same words."""
        mine, theirs = (
            (one.identity, one.template.sha256, one.rubric, one.temperature, one.reply_tokens)
            for one in (self, other)
        )
        return mine == theirs

    def verdict_id(self, question: Question) -> str:
        """Return the content address of a question: the same question has the same id everywhere.

        It is a hash of what is asked, of whom and how, before anything is cut to length, so that it
        can be found again without the judge's tokenizer.
        """
        judge = self.identity
        return content_id(
            [judge.model, judge.revision, judge.endpoint, judge.setup],
            [self.template.sha256, self.rubric, question.principle, question.criterion],
            [self.temperature, self.reply_tokens, self.use_logprobs, self.seed],
            [question.prompt_id, question.prompt, question.gold, question.repeat],
            [question.shown, question.completions],
            self.max_prompt_tokens,
        )

    def ask(self, question: Question, verdict_id: str | None = None) -> Asked:
        """Return the call that asks ``question``.

        Raises:
            TemplateError: the template cannot show this many completions, or wants a gold answer
                that the prompt does not have.
        """
        if "{gold}" in self.template.user + self.template.system and question.gold is None:
            raise TemplateError(
                f"template {self.template.name!r} shows a known-good answer, and prompt "
                f"{question.prompt_id!r} has no 'gold'"
            )
        verdict_id = verdict_id or self.verdict_id(question)
        messages, flags = self._messages(question)
        sampled = self.temperature > 0
        seed = (self.seed, self.turn) if self.turn else (self.seed,)
        call = JudgeCall(
            call_id=verdict_id,
            messages=messages,
            choices=self.template.choices if self.reads_choices else None,
            max_tokens=self.reply_tokens,
            temperature=self.temperature,
            seed=int(content_id(*seed, verdict_id, length=7), 16) if sampled else None,
            schema=reply_schema(
                self.template, shown=len(question.shown), criteria=tuple(self._all_criteria)
            )
            if self.template.mode == "structured"
            else None,
        )
        return Asked(question=question, call=call, flags=flags)

    def _messages(self, question: Question) -> tuple[tuple[Message, ...], tuple[str, ...]]:
        def rendered(prompt: PromptText, completions: Sequence[str]) -> tuple[Message, ...]:
            return render(
                self.template,
                prompt=prompt,
                completions=completions,
                rubric=self._rubric_text(question),
                principle=question.principle or "",
                gold=question.gold or "",
            )

        try:
            fitted = (
                Fitted(rendered(question.prompt, question.completions))
                if self.budget is None
                else self.budget.fit(question.prompt, question.completions, rendered)
            )
        except ValueError as error:
            raise TemplateError(f"prompt {question.prompt_id!r}: {error}") from error
        flags = list(fitted.flags)
        if any(neutralise(text) != text for text in question.completions):
            flags.append("neutralised")
        return fitted.messages, tuple(flags)

    def _rubric_text(self, question: Question) -> str:
        if question.criterion is None:
            return self.rubric
        shown = {criterion.name: criterion.shown for criterion in self.criteria}
        return shown[question.criterion]

    def read(
        self, asked: Asked, reply: JudgeReply, *, cost: float = 0.0, cached: bool = False
    ) -> Verdict:
        """Return the verdict that ``reply`` holds, or the outcome that says why it holds none."""
        if reply.error is not None:
            return self._verdict(asked, reply, "failed", cost, cached, error=reply.error)
        if self.reads_choices:
            return self._read_choices(asked, reply, cost, cached)
        reading = parse_reply(
            reply.text,
            self.template,
            shown=len(asked.question.shown),
            criteria=self._all_criteria,
            finish_reason=reply.finish_reason,
        )
        return self._read_text(asked, reply, reading, cost, cached)

    def lost(self, asked: Asked) -> Verdict:
        """Return the verdict of a call that the engine never answered."""
        reply = JudgeReply(call_id=asked.call.call_id, attempts=0)
        return self._verdict(
            asked, reply, "failed", 0.0, False, error="the engine gave no reply to this call"
        )

    def _read_choices(self, asked: Asked, reply: JudgeReply, cost: float, cached: bool) -> Verdict:
        if reply.finish_reason == "content_filter":
            error = "stopped by a content filter"
            return self._verdict(asked, reply, "refused", cost, cached, error=error)
        found = read_choices(self.template.choices, reply.choice_logprobs, min_mass=self.min_mass)
        flags = ("missing_labels",) if found.missing else ()
        values: dict[str, Any] = {"probs": found.probs, "mass": found.mass, "flags": flags}
        if found.probs is None or found.outcome != "decided":
            values["error"] = found.problem
            return self._verdict(asked, reply, found.outcome, cost, cached, **values)
        outcome: Outcome = "decided"
        if self.template.kind == "rating":
            scale = scale_values(self.template)
            values["scores"] = [
                math.fsum(p * point for p, point in zip(found.probs, scale, strict=True))
            ]
        else:
            best = max(found.probs)
            leaders = [place for place, value in enumerate(found.probs) if value == best]
            if len(leaders) > 1 or leaders[0] == len(asked.question.shown):
                outcome = "tie"
            else:
                values["winner"] = asked.question.shown[leaders[0]]
        return self._verdict(asked, reply, outcome, cost, cached, **values)

    def _read_text(
        self, asked: Asked, reply: JudgeReply, reading: Reading, cost: float, cached: bool
    ) -> Verdict:
        meta = {"finish_reason": reply.finish_reason, "scores": reading.scores}
        values: dict[str, Any] = {
            "rationale": reading.rationale,
            "meta": {key: value for key, value in meta.items() if value},
        }
        if not reading.has_verdict:
            values["error"] = reading.reason or None
            return self._verdict(asked, reply, reading.outcome, cost, cached, **values)
        shown = dict(zip(self.template.labels, asked.question.shown, strict=False))
        if self.template.kind == "pairwise" and reading.outcome == "decided":
            values["winner"] = shown[reading.label or ""]
        elif self.template.kind == "listwise" and reading.ranking is not None:
            values["ranking"] = [[shown[label] for label in group] for group in reading.ranking]
        elif self.template.kind == "rating" and reading.score is not None:
            values["scores"] = [reading.score]
        return self._verdict(asked, reply, reading.outcome, cost, cached, **values)

    def _verdict(
        self,
        asked: Asked,
        reply: JudgeReply,
        outcome: Outcome,
        cost: float,
        cached: bool,
        *,
        flags: tuple[str, ...] = (),
        **values: Any,
    ) -> Verdict:
        question = asked.question
        about = {"criterion": question.criterion, "member": self.member}
        meta = {key: value for key, value in about.items() if value is not None}
        meta |= values.pop("meta", {})
        return Verdict(
            verdict_id=asked.call.call_id,
            prompt_id=question.prompt_id,
            kind=self.template.kind,
            shown=list(question.shown),
            outcome=outcome,
            judge=self.identity,
            template=self.template.name,
            template_sha256=self.template.sha256,
            reply=reply.text,
            sampling=self.sampling(),
            seed=asked.call.seed,
            repeat=question.repeat,
            usage=reply.usage,
            cost=cost,
            latency_s=round(reply.latency_s, 4),
            attempts=reply.attempts,
            cached=cached,
            flags=[*asked.flags, *flags],
            principle=question.principle,
            meta=meta,
            **values,
        )
