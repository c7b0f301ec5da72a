"""One model criticising and revising its completions, block by block; see ``feedback.revision``."""

from __future__ import annotations

import dataclasses
import itertools
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from feedback.backends import Backend, SampleCall, SampleReply
from feedback.constitution import Principle, draw_principle
from feedback.records import (
    Candidates,
    Completion,
    Message,
    content_id,
    normalise_text,
    prompt_messages,
)
from feedback.templates import prompts_folder

__all__ = ["Reviser", "RevisionPlan"]

_PLACEHOLDER = re.compile(r"\{(critique|revise)\}")


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


@dataclass(slots=True)
class _Chain:
    """A completion on its way through the rounds."""

    row: Candidates
    versions: list[Completion]
    """The original, then its revisions."""
    principle: Principle | None = None
    critique: str = ""
    error: str = ""


class _Step(NamedTuple):
    """One call of one chain."""

    chain: _Chain
    call: SampleCall


class Reviser:
    """Criticises and revises blocks of rows.

    Args:
        backend: the model.
        principles: with both forms, ``critique`` and ``revise``.
        plan: rounds, sampling, what is kept.
    """

    def __init__(self, backend: Backend, principles: Sequence[Principle], plan: RevisionPlan):
        self.backend = backend
        self.principles = principles
        self.plan = plan
        self.counts: Counter[str] = Counter()
        self.errors: dict[str, str] = {}
        self._requests = _load_requests()

    def revise(self, rows: Sequence[Candidates]) -> Iterator[Candidates]:
        """Yield the rows with their revisions, in order; those with a failed call are left out."""
        chains = [
            _Chain(row, [completion])
            for row in rows
            for completion in row.completions[: 1 if self.plan.completions == "first" else None]
        ]
        for turn in range(self.plan.rounds):
            open_chains = [chain for chain in chains if len(chain.versions) == turn + 1]
            for chain in open_chains:
                source = chain.versions[0].completion_id
                chain.principle = draw_principle(
                    self.principles, self.plan.seed, chain.row.prompt_id, source, turn
                )
            self._pass(open_chains, self._critique_call, self._take_critique)
            self._pass(
                [chain for chain in open_chains if chain.critique],
                self._revision_call,
                self._take_revision,
            )
        for _, own in itertools.groupby(chains, key=lambda chain: chain.row.prompt_id):
            result = self._collect(list(own))
            if result is not None:
                yield result

    def _pass(
        self,
        chains: Iterable[_Chain],
        ask: Callable[[_Chain], SampleCall],
        take: Callable[[_Chain, SampleCall, SampleReply], None],
    ) -> None:
        steps = {(call := ask(chain)).call_id: _Step(chain, call) for chain in chains}
        for reply in self.backend.sample(step.call for step in list(steps.values())):
            chain, call = steps.pop(reply.call_id)
            if reply.error is not None or not reply.texts:
                chain.error = reply.error or "the engine gave no text"
                self.counts["failed calls"] += 1
                continue
            take(chain, call, reply)
        for chain, _ in steps.values():
            chain.error = "the engine gave no reply to this call"
            self.counts["failed calls"] += 1

    def _critique_call(self, chain: _Chain) -> SampleCall:
        return self._call(chain, self._critique_messages(chain), self.plan.critique_tokens)

    def _revision_call(self, chain: _Chain) -> SampleCall:
        assert chain.principle is not None
        messages = [
            *self._critique_messages(chain),
            Message(role="assistant", content=chain.critique),
            Message(role="user", content=self._request("revise", chain.principle)),
        ]
        return self._call(chain, messages, self.plan.max_tokens)

    def _critique_messages(self, chain: _Chain) -> list[Message]:
        assert chain.principle is not None
        return [
            *prompt_messages(chain.row.prompt),
            Message(role="assistant", content=chain.versions[-1].completion),
            Message(role="user", content=self._request("critique", chain.principle)),
        ]

    def _request(self, form: str, principle: Principle) -> str:
        forms = {"critique": principle.critique, "revise": principle.revise}
        return _PLACEHOLDER.sub(lambda found: forms[found[1]], self._requests[form]).strip()

    def _call(self, chain: _Chain, messages: list[Message], max_tokens: int) -> SampleCall:
        name = [chain.row.prompt_id, chain.versions[0].completion_id, len(messages)]
        identity = content_id("revise", name, len(chain.versions), self.plan.seed)
        return SampleCall(
            call_id=identity,
            messages=tuple(messages),
            max_tokens=max_tokens,
            temperature=self.plan.temperature,
            top_p=self.plan.top_p,
            seed=int(identity[:7], 16),
        )

    def _take_critique(self, chain: _Chain, call: SampleCall, reply: SampleReply) -> None:
        chain.critique = reply.texts[0].strip()
        self.counts["empty critiques"] += not chain.critique

    def _take_revision(self, chain: _Chain, call: SampleCall, reply: SampleReply) -> None:
        text, critique = reply.texts[0].strip(), chain.critique
        chain.critique = ""
        known = {normalise_text(version.completion) for version in chain.versions}
        if not text or normalise_text(text) in known:
            self.counts["empty or unchanged revisions"] += 1
            return
        assert chain.principle is not None
        reason = reply.finish_reasons[0] if reply.finish_reasons else None
        self.counts["revisions"] += 1
        self.counts["cut off"] += reason == "length"
        chain.versions.append(
            Completion(
                completion_id=content_id(chain.row.prompt_id, "revision", text, length=12),
                completion=text,
                model=self.backend.identity.model,
                sampling={
                    "temperature": call.temperature,
                    "top_p": call.top_p,
                    "max_tokens": call.max_tokens,
                    "seed": call.seed,
                    "revised_from": chain.versions[-1].completion_id,
                    "round": len(chain.versions),
                    "principle": chain.principle.id,
                    "critique": critique,
                },
                finish_reason=reason,
                logp=reply.logps[0] if reply.logps else None,
            )
        )

    def _collect(self, chains: list[_Chain]) -> Candidates | None:
        """Return a prompt's row; None where a call failed: only whole rows are final."""
        row = chains[0].row
        errors = [chain.error for chain in chains if chain.error]
        if errors:
            self.errors[row.prompt_id] = errors[0]
            return None
        kept = [] if self.plan.keep == "last" else list(row.completions)
        for chain in chains:
            revisions = chain.versions[1:]
            kept += revisions if self.plan.keep == "all" else revisions[-1:]
        if not kept:
            self.counts["prompts without any revision"] += 1
            return None
        return dataclasses.replace(row, completions=_distinct(kept))


def _distinct(completions: Iterable[Completion]) -> list[Completion]:
    seen: set[str] = set()
    kept = []
    for completion in completions:
        text = normalise_text(completion.completion)
        if text not in seen:
            seen.add(text)
            kept.append(completion)
    return kept


def _load_requests() -> dict[str, str]:
    path = prompts_folder() / "revision.toml"
    return tomllib.loads(path.read_text(encoding="utf-8"))
