"""The calls that criticise and revise a completion, as they are sent and as they are planned."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from feedback.backends import SampleCall
from feedback.constitution import Principle, draw_principle
from feedback.records import Candidates, Completion, Message, content_id, prompt_messages
from feedback.templates import prompts_folder

__all__ = ["RevisionCalls", "RevisionPlan"]

_PLACEHOLDER = re.compile(r"\{(critique|revise)\}")
_TOKEN = "word "
"""Stands for a token of a text that is not written yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RevisionPlan:
    """How completions are revised; the fields are those of ``ReviseOptions``."""

    rounds: int = 1
    completions: Literal["first", "all"] = "first"
    keep: Literal["all", "ends", "last"] = "all"
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    critique_tokens: int = 192
    seed: int = 0


class RevisionCalls:
    """Writes the calls: the same for the same rows, texts and seed.

    Args:
        principles: with both forms, ``critique`` and ``revise``.
        plan: rounds and sampling.
    """

    def __init__(self, principles: Sequence[Principle], plan: RevisionPlan):
        self.principles = principles
        self.plan = plan
        path = prompts_folder() / "revision.toml"
        self._requests: dict[str, str] = tomllib.loads(path.read_text(encoding="utf-8"))

    def chosen(self, row: Candidates) -> list[Completion]:
        """Return the completions of a prompt that are revised."""
        return row.completions[: 1 if self.plan.completions == "first" else None]

    def principle(self, row: Candidates, source: Completion, turn: int) -> Principle:
        """Return what a completion is criticised by in one round."""
        return draw_principle(
            self.principles, self.plan.seed, row.prompt_id, source.completion_id, turn
        )

    def critique(
        self, row: Candidates, versions: Sequence[Completion], principle: Principle
    ) -> SampleCall:
        """Return the call that criticises the last version."""
        messages = self._critique_messages(row, versions, principle)
        return self._call(row, versions, messages, self.plan.critique_tokens)

    def revision(
        self, row: Candidates, versions: Sequence[Completion], principle: Principle, critique: str
    ) -> SampleCall:
        """Return the call that writes the last version anew."""
        messages = [
            *self._critique_messages(row, versions, principle),
            Message(role="assistant", content=critique),
            Message(role="user", content=self._request("revise", principle)),
        ]
        return self._call(row, versions, messages, self.plan.max_tokens)

    def expected(self, row: Candidates) -> list[SampleCall]:
        """Return every call that a row can take, unwritten texts as long as they may become."""
        calls = []
        for source in self.chosen(row):
            versions = [source]
            for turn in range(self.plan.rounds):
                principle = self.principle(row, source, turn)
                calls.append(self.critique(row, versions, principle))
                critique = _TOKEN * self.plan.critique_tokens
                calls.append(self.revision(row, versions, principle, critique))
                revised = _TOKEN * self.plan.max_tokens
                versions.append(dataclasses.replace(source, completion=revised))
        return calls

    def _critique_messages(
        self, row: Candidates, versions: Sequence[Completion], principle: Principle
    ) -> list[Message]:
        return [
            *prompt_messages(row.prompt),
            Message(role="assistant", content=versions[-1].completion),
            Message(role="user", content=self._request("critique", principle)),
        ]

    def _request(self, form: str, principle: Principle) -> str:
        forms = {"critique": principle.critique, "revise": principle.revise}
        return _PLACEHOLDER.sub(lambda found: forms[found[1]], self._requests[form]).strip()

    def _call(
        self,
        row: Candidates,
        versions: Sequence[Completion],
        messages: list[Message],
        max_tokens: int,
    ) -> SampleCall:
        name = [row.prompt_id, versions[0].completion_id, len(messages)]
        identity = content_id("revise", name, len(versions), self.plan.seed)
        return SampleCall(
            call_id=identity,
            messages=tuple(messages),
            max_tokens=max_tokens,
            temperature=self.plan.temperature,
            top_p=self.plan.top_p,
            seed=int(identity[:7], 16),
        )
