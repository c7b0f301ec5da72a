"""Streaming questions through an engine into a verdict folder: nothing twice, nothing lost."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from feedback.backends import Backend, JudgeCall
from feedback.begun import BegunCalls
from feedback.budget import Budget
from feedback.cache import ReplyCache
from feedback.judge import Asked, Judge, Question
from feedback.progress import ProgressBar, say
from feedback.records import Usage, Verdict, encode
from feedback.shards import ShardWriter, read_jsonl, writing
from feedback.verdict_index import FAILED, VerdictIndex

__all__ = ["REPLACED", "LabelingRun", "RunTotals"]

REPLACED = "replaced.jsonl"
_LOOKED_AT = 1000


@dataclass(slots=True)
class RunTotals:
    """What one run did."""

    outcomes: Counter[str] = field(default_factory=Counter)
    from_cache: int = 0
    already_done: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    in_flight: int = 0
    """Most calls under way at once."""
    probs: list[list[float]] = field(default_factory=list)
    """Label probabilities of the first verdicts, to see whether they are rounded."""
    started: float = field(default_factory=time.perf_counter)
    cpu_started: float = field(default_factory=time.process_time)

    def add(self, verdict: Verdict) -> None:
        """Count a verdict of this run."""
        self.outcomes[verdict.outcome] += 1
        self.cost += verdict.cost
        if verdict.probs is not None and len(self.probs) < _LOOKED_AT:
            self.probs.append(verdict.probs)
        if verdict.cached:
            self.from_cache += 1
            return
        self.prompt_tokens += verdict.usage.prompt_tokens
        self.cached_tokens += verdict.usage.cached_tokens
        self.completion_tokens += verdict.usage.completion_tokens

    @property
    def verdicts(self) -> int:
        """Verdicts of this run, failed calls included."""
        return self.outcomes.total()

    @property
    def said(self) -> str:
        """Return how many verdicts there are, in words; calls that failed are none."""
        failed = self.outcomes["failed"]
        return f"{self.verdicts - failed} verdicts" + (f", {failed} failed" if failed else "")

    def line(self) -> str:
        """Return the closing line: what was done, how fast, and what it cost."""
        seconds = max(time.perf_counter() - self.started, 1e-9)
        cpu = time.process_time() - self.cpu_started
        count = max(self.verdicts, 1)
        tokens = self.prompt_tokens + self.completion_tokens
        shared = self.cached_tokens / max(self.prompt_tokens, 1)
        outcomes = ", ".join(f"{name} {number}" for name, number in self.outcomes.most_common())
        return (
            f"{self.verdicts} verdicts in {seconds:.1f} s ({outcomes or 'nothing to ask'}): "
            f"{self.verdicts / seconds:.1f} verdicts/s, {tokens / seconds:.0f} tokens/s, "
            f"in flight {self.in_flight}, prefix reuse {shared:.0%}, "
            f"from cache {self.from_cache / count:.0%}, "
            f"{cpu / count * 1000:.2f} CPU ms per verdict, cost ${self.cost:.4f}"
        )


class LabelingRun:
    """One run over one verdict folder.

    Args:
        judge: asks and reads.
        backend: answers.
        folder: made if missing; locked until ``close``.
        budget: limits and prices.
        cache: replies of earlier runs, or None.
        claim: as ``ShardWriter``'s: raises, before anything is touched, if the folder is not ours.

    Raises:
        ShardError: another run writes the folder.
    """

    def __init__(
        self,
        judge: Judge,
        backend: Backend,
        *,
        folder: Path,
        budget: Budget,
        cache: ReplyCache | None = None,
        claim: Callable[[], None] = lambda: None,
    ):
        # What was taken out to be asked again gets other seeds, in whichever run that happens.
        self.judge = dataclasses.replace(judge, turn=_lines(folder / REPLACED))
        self.budget = budget
        self.backend = budget.charged(backend)
        self.cache = cache
        self.totals = RunTotals()
        self.listener: Callable[[Verdict], None] | None = None
        """Told of each verdict of this run, once it is written."""
        self._open: dict[str, Asked] = {}
        self._unwanted: frozenset[str] = frozenset()
        self.writer = ShardWriter[Verdict](folder, "verdicts", claim=claim)
        try:
            self._index = VerdictIndex(folder)
            # What failed before is asked again now, so its old rows go.
            self._begun = BegunCalls(folder)
            self._failed: BinaryIO = (folder / FAILED).open("wb")
        except BaseException:
            self.writer.close()
            raise

    def ask_again(self, outcomes: Sequence[str]) -> None:
        """Take verdicts with these outcomes out of the folder, so that they are asked once more.

        Their rows stay in ``replaced.jsonl``. Sampled replies get seeds that were not tried yet.
        """
        replaced = self.writer.folder / REPLACED
        self._index.close()
        moved = self.writer.drop(lambda verdict: verdict.outcome in outcomes, into=replaced)
        self._index = VerdictIndex(self.writer.folder)
        self._unwanted = frozenset(outcomes)
        self.judge = dataclasses.replace(self.judge, turn=_lines(replaced))
        say(f"{moved} verdicts are asked again ({', '.join(outcomes)})")

    def use(self, judge: Judge, backend: Backend, cache: ReplyCache | None) -> None:
        """Go on with another judge: what it is asked next is written to the same folder."""
        self.judge = dataclasses.replace(judge, turn=self.judge.turn)
        self.backend, self.cache = self.budget.charged(backend), cache
        self.listener = None

    def known(self, prompt_id: str) -> list[Verdict]:
        """Return what this judge was asked of a prompt in earlier runs; some calls failed."""
        judge = (self.judge.identity, self.judge.template.sha256, self.judge.member)
        final = self._index.verdicts(prompt_id)
        answered = {row.verdict_id for row in final}
        failed = [row for row in self._begun.verdicts(prompt_id) if row.verdict_id not in answered]
        return [
            row
            for row in final + failed
            if (row.judge, row.template_sha256, row.meta.get("member")) == judge
        ]

    def ask_all(self, questions: Iterable[Question], bar: ProgressBar) -> None:
        """Ask what is not on disk yet, and write each verdict as it comes."""
        self._bar = bar
        for reply in self.backend.judge(self._calls(questions)):
            asked = self._open.pop(reply.call_id, None)
            if asked is None:
                continue  # an engine that answers twice is heard once
            cost = self.budget.settle(reply.call_id, reply.usage)
            verdict = self.judge.read(asked, reply, cost=cost)
            try:
                if self.cache is not None and verdict.outcome != "failed":
                    self.cache.put(asked.call, reply, repeat=asked.question.repeat)
            finally:  # a verdict that was paid for is kept, whatever becomes of the cache
                self._keep(verdict)
        # Calls taken from here include those an endpoint's gate still holds back.
        gate = getattr(self.backend, "gate_state", None)
        if gate is not None:
            self.totals.in_flight = gate.most_in_flight
        for asked in self._open.values():
            self.budget.settle(asked.call.call_id, Usage())
            self._keep(self.judge.lost(asked))
        self._open.clear()

    def _calls(self, questions: Iterable[Question]) -> Iterator[JudgeCall]:
        prompt_id, done = None, set[str]()
        for question in questions:
            if question.prompt_id != prompt_id:
                prompt_id = question.prompt_id
                done = self._index.ids(prompt_id) if self._index.rows else set()
            verdict_id = self.judge.verdict_id(question)
            if verdict_id in done:
                self.totals.already_done += 1
                self._bar.advance()
                continue
            asked = self.judge.ask(question, verdict_id)
            if self.cache is not None:
                reply = self.cache.get(asked.call, repeat=question.repeat)
                verdict = None if reply is None else self.judge.read(asked, reply, cached=True)
                unwanted = {"failed", *self._unwanted}
                if verdict is not None and verdict.outcome not in unwanted:
                    self._keep(verdict)
                    continue
            if not self.budget.admit(asked.call):
                return
            self._open[verdict_id] = asked
            self.totals.in_flight = max(self.totals.in_flight, len(self._open))
            yield asked.call

    def _keep(self, verdict: Verdict) -> None:
        if verdict.outcome == "failed":
            with writing(self.writer.folder / FAILED):
                self._failed.write(encode(verdict) + b"\n")
                self._failed.flush()
        else:
            self.writer.append(verdict)
        self.totals.add(verdict)
        if self.listener is not None:
            self.listener(verdict)
        self._bar.advance(note=f"${self.totals.cost:.2f}" if self.totals.cost else "")

    def finish(self, info: dict[str, Any]) -> None:
        """Write the manifest: the folder is complete, except for calls that failed."""
        # Over all runs that filled the folder: summed while the rows are counted.
        totals: dict[str, float] = dict.fromkeys(
            ("prompt_tokens", "cached_tokens", "completion_tokens", "cost", "from_cache"), 0
        )

        def count(verdict: Verdict) -> str:
            totals["from_cache"] += verdict.cached
            totals["cost"] += verdict.cost
            if not verdict.cached:
                totals["prompt_tokens"] += verdict.usage.prompt_tokens
                totals["cached_tokens"] += verdict.usage.cached_tokens
                totals["completion_tokens"] += verdict.usage.completion_tokens
            return verdict.outcome

        failed = self.totals.outcomes["failed"]
        self._failed.close()
        for verdict in read_jsonl(self.writer.folder / FAILED, Verdict):
            count(verdict)  # a reply that could not be used was billed all the same
        if not failed:
            (self.writer.folder / FAILED).unlink()
        self._begun.forget()
        self.writer.finish({**info, "failed": failed, "totals": totals}, count=count)

    def close(self) -> None:
        """Release the folder; without ``finish`` the run can be continued."""
        with contextlib.ExitStack() as closing:  # each is closed, whatever the others do
            closing.callback(self.writer.close)
            closing.callback(self._index.close)
            closing.callback(self._begun.close)
            with writing(self.writer.folder / FAILED):
                self._failed.close()


def _lines(path: Path) -> int:
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        return sum(1 for _ in file)
