"""A judge whose probabilities a test writes, by the text of each question."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from feedback.backends import Capabilities, JudgeCall, JudgeReply, SampleCall, SampleReply
from feedback.judge import Judge
from feedback.records import JudgeIdentity
from feedback.templates import load_template

__all__ = ["StubBackend", "between", "stub_judge"]

Answer = Callable[[str], dict[str, float] | str]
"""From the text of a question to probabilities of the labels, or to the words of an error."""


class StubBackend:
    """Answers every call by a function of its text."""

    identity = JudgeIdentity(model="stub")

    def __init__(self, answer: Answer):
        self.answer = answer
        self.asked: list[str] = []

    def prepare(self, labels: tuple[str, ...]) -> Capabilities:
        return Capabilities(logprobs=True)

    def judge(self, calls: Iterable[JudgeCall]) -> Iterator[JudgeReply]:
        for call in calls:
            text = call.messages[-1]["content"]
            self.asked.append(text)
            found = self.answer(text)
            if isinstance(found, str):
                yield JudgeReply(call_id=call.call_id, error=found)
                continue
            yield JudgeReply(
                call_id=call.call_id,
                text=max(found, default="", key=found.__getitem__),
                finish_reason="length",
                choice_logprobs={label: math.log(p) for label, p in found.items() if p > 0},
            )

    def sample(self, calls: Iterable[SampleCall]) -> Iterator[SampleReply]:
        raise NotImplementedError

    def close(self) -> None:
        pass


def stub_judge(template: str, answer: Answer) -> tuple[Judge, StubBackend]:
    """Return a judge on a shipped template, and the backend that answers it."""
    backend = StubBackend(answer)
    return Judge(identity=backend.identity, template=load_template(template)), backend


def between(text: str, start: str, end: str) -> str:
    """Return what stands between two marks of a rendered question."""
    return text.partition(start)[2].partition(end)[0].strip("\n")
