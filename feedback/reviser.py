"""One model criticising and revising its completions, block by block; see ``feedback.revision``."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from feedback.backends import Backend, SampleCall, SampleReply
from feedback.budget import Budget
from feedback.constitution import Principle
from feedback.records import Candidates, Completion, content_id, normalise_text
from feedback.revision_calls import RevisionCalls

__all__ = ["Reviser"]


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
        calls: what it is asked.
        budget: limits and prices.
    """

    def __init__(self, backend: Backend, calls: RevisionCalls, budget: Budget):
        self.backend = budget.charged(backend)
        self.calls = calls
        self.plan = calls.plan
        self.budget = budget
        self.counts: Counter[str] = Counter()
        self.errors: dict[str, str] = {}
        self._reserved: set[str] = set()

    def revise(self, rows: Sequence[Candidates]) -> Iterator[Candidates]:
        """Yield the rows with their revisions, in order, as far as the budget goes.

        Those with a failed call are left out. A row is begun only if all of its calls fit: a
        critique without its revision would be paid for again.
        """
        while rows:
            begun = self._admitted(rows)
            if not begun:
                return
            rows = rows[len(begun) :]
            self.budget.reached = ""  # what these leave over is there for the next
            yield from self._revise(begun)
            self.budget.release(self._reserved)
            self._reserved.clear()

    def _admitted(self, rows: Sequence[Candidates]) -> Sequence[Candidates]:
        """Return the first rows, as many as the budget has room for."""
        for place, row in enumerate(rows):
            expected = self.calls.expected(row)
            if not self.budget.admit_all(expected):
                return rows[:place]
            self._reserved |= {call.call_id for call in expected}
        return rows

    def _revise(self, rows: Sequence[Candidates]) -> Iterator[Candidates]:
        chains = [_Chain(row, [source]) for row in rows for source in self.calls.chosen(row)]
        for turn in range(self.plan.rounds):
            open_chains = [chain for chain in chains if len(chain.versions) == turn + 1]
            for chain in open_chains:
                chain.principle = self.calls.principle(chain.row, chain.versions[0], turn)
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
        for step in steps.values():
            self.budget.send(step.call)
        for reply in self.backend.sample(step.call for step in list(steps.values())):
            chain, call = steps.pop(reply.call_id)
            self._reserved.discard(reply.call_id)
            self.budget.settle(reply.call_id, reply.usage)
            if reply.error is not None or not reply.texts:
                chain.error = reply.error or "the engine gave no text"
                self.counts["failed calls"] += 1
                continue
            take(chain, call, reply)
        for chain, _ in steps.values():
            chain.error = "the engine gave no reply to this call"
            self.counts["failed calls"] += 1

    def _critique_call(self, chain: _Chain) -> SampleCall:
        assert chain.principle is not None
        return self.calls.critique(chain.row, chain.versions, chain.principle)

    def _revision_call(self, chain: _Chain) -> SampleCall:
        assert chain.principle is not None
        return self.calls.revision(chain.row, chain.versions, chain.principle, chain.critique)

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
