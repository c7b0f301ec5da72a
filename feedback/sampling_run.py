"""Drawing completions in stages: each policy in turn, and within it the refills.

A stage reads the rows that the stage before left unfinished and asks for what is missing in them.
Rows that need nothing more go to the candidates folder; the others to a folder of the stage inside
it, which is also where an interrupted run finds them again.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback.backends import Backend, SampleCall, SampleReply
from feedback.budget import Budget
from feedback.draws import DrawPlan, Stage
from feedback.progress import ProgressBar
from feedback.records import (
    Candidates,
    Completion,
    content_id,
    normalise_text,
)
from feedback.shards import ShardWriter, read_rows, shard_paths
from feedback.verdict_index import FAILED, SeenIds

__all__ = ["SamplingRun"]


@dataclass(slots=True)
class _Open:
    """A row whose calls are under way."""

    row: Candidates
    waiting: int
    drawn: dict[int, list[Completion]] = dataclasses.field(default_factory=dict)
    """By the call's number: replies come in any order, and the row must not depend on it."""
    error: str = ""


class SamplingRun:
    """One run over one candidates folder.

    Args:
        folder: made if missing; locked until ``close``.
        stages: in the order in which they are run.
        plan: what is drawn, and how.
        budget: limits and prices.
        claim: as ``ShardWriter``'s: raises, before anything is touched, if the folder is not ours.

    Raises:
        ShardError: another run writes the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        stages: list[Stage],
        plan: DrawPlan,
        budget: Budget,
        claim: Callable[[], None] = lambda: None,
    ):
        self.folder = folder
        self.stages = stages
        self.plan = plan
        self.budget = budget
        self.counts: Counter[str] = Counter()
        self._seconds = 0.0
        self._tokens = 0
        self._errors: dict[str, str] = {}
        self.writer = ShardWriter[Candidates](folder, "candidates", claim=claim)
        self._done = SeenIds()
        for row in self.writer.existing():
            self._done.add(row.prompt_id, 0)

    def has_work(self, policy: int, prompts: Iterable[Candidates]) -> bool:
        """Return whether any prompt still needs this policy."""
        last = max(place for place, stage in enumerate(self.stages) if stage.policy == policy)
        with _StageFolder(self.folder, last) as after:
            return any(
                row.prompt_id not in self._done and row.prompt_id not in after.done
                for row in prompts
            )

    def run_policy(
        self,
        policy: int,
        backend: Backend,
        prompts: Callable[[], Iterator[Candidates]],
        *,
        total: int,
    ) -> None:
        """Draw everything that is missing of one policy's share, as far as the budget goes."""
        backend = self.budget.charged(backend)
        for place, stage in enumerate(self.stages):
            if stage.policy != policy:
                continue
            source = prompts() if place == 0 else _stage_rows(self.folder, place - 1)
            title = f"sampling {backend.identity.model}" + " again" * (stage.attempt > 0)
            steps = None if place else total
            with _StageFolder(self.folder, place) as after, ProgressBar(title, steps) as bar:
                self._run_stage(place, backend, source, after, bar)
            if self.budget.reached:
                return

    def _run_stage(
        self,
        place: int,
        backend: Backend,
        source: Iterator[Candidates],
        after: _StageFolder,
        bar: ProgressBar,
    ) -> None:
        stage = self.stages[place]
        model = backend.identity.model
        waiting: dict[str, _Open] = {}
        owners: dict[str, tuple[str, int, SampleCall]] = {}

        def calls() -> Iterator[SampleCall]:
            for row in source:
                if row.prompt_id in self._done or row.prompt_id in after.done:
                    bar.advance()
                    continue
                asked = self.plan.calls(row, stage)
                if not asked:
                    self._pass_on(place, row, after)
                    bar.advance()
                    continue
                # All of a row's calls or none: half a row would be asked, and paid for, again.
                if not self.budget.admit_all(asked):
                    return
                waiting[row.prompt_id] = _Open(row, len(asked))
                for number, call in enumerate(asked):
                    owners[call.call_id] = (row.prompt_id, number, call)
                    yield call

        start = time.perf_counter()
        try:
            for reply in backend.sample(calls()):
                prompt_id, number, call = owners.pop(reply.call_id)
                self.budget.settle(reply.call_id, reply.usage)
                entry = waiting[prompt_id]
                entry.waiting -= 1
                entry.drawn[number] = self._completions(call, reply, model, stage)
                entry.error = reply.error or entry.error
                if not entry.waiting:
                    del waiting[prompt_id]
                    if entry.error:
                        self._errors[prompt_id] = entry.error
                    self._pass_on(place, self._merged(entry), after)
                    bar.advance()
        finally:
            self._seconds += time.perf_counter() - start

    def _completions(
        self, call: SampleCall, reply: SampleReply, model: str, stage: Stage
    ) -> list[Completion]:
        self._tokens += reply.usage.completion_tokens
        prompt_id = content_id(call.messages)
        found = []
        logps = reply.logps or (None,) * len(reply.texts)
        for number, (text, reason, logp) in enumerate(
            zip(reply.texts, reply.finish_reasons, logps, strict=True)
        ):
            name = (prompt_id, text, call.call_id, number) if self.plan.keep_repeats else text
            self.counts["drawn"] += 1
            self.counts["cut off"] += reason == "length"
            found.append(
                Completion(
                    completion_id=content_id(prompt_id, name, length=12),
                    completion=text,
                    model=model,
                    sampling={
                        "temperature": call.temperature,
                        "top_p": call.top_p,
                        "max_tokens": call.max_tokens,
                        "seed": call.seed,
                        "number": number,
                        "policy": stage.policy,
                    },
                    finish_reason=reason,
                    logp=logp,
                )
            )
        return found

    def _merged(self, entry: _Open) -> Candidates:
        """Return the row with what was drawn for it, without empty texts and repeats."""
        completions = list(entry.row.completions)
        drawn = [each for number in sorted(entry.drawn) for each in entry.drawn[number]]
        if self.plan.keep_repeats:
            return dataclasses.replace(entry.row, completions=completions + drawn)
        seen = {normalise_text(completion.completion) for completion in completions}
        for completion in drawn:
            text = normalise_text(completion.completion)
            if not text:
                self.counts["empty"] += 1
            elif text in seen:
                self.counts["repeated"] += 1
            else:
                seen.add(text)
                completions.append(completion)
        return dataclasses.replace(entry.row, completions=completions)

    def _pass_on(self, place: int, row: Candidates, after: _StageFolder) -> None:
        """Write a row to where it belongs after stage ``place``."""
        if any(self._needs(row, stage) for stage in self.stages[place + 1 :]):
            after.append(row)
            return
        if not row.completions:
            # Not set aside: where this run is stopped, the next one asks for it again.
            self.counts["failed"] += 1
            return
        wanted = sum(stage.wanted for stage in self.stages if stage.attempt == 0)
        self.counts["short"] += len(row.completions) < wanted
        self.counts["kept"] += len(row.completions)
        self._errors.pop(row.prompt_id, None)
        self._done.add(row.prompt_id, 0)
        self.writer.append(row)

    def _needs(self, row: Candidates, stage: Stage) -> bool:
        return bool(self.plan.calls(row, stage))

    def finish(self, info: dict[str, Any]) -> None:
        """Write the manifest and remove what only served resuming."""
        lines = [
            json.dumps({"prompt_id": prompt_id, "error": error}) + "\n"
            for prompt_id, error in self._errors.items()
        ]
        (self.folder / FAILED).unlink(missing_ok=True)
        if lines:
            (self.folder / FAILED).write_text("".join(lines), encoding="utf-8")
        self.writer.finish(
            {**info, "failed": self.counts["failed"]},
            count=lambda row: f"{len(row.completions)} completions",
        )
        for place in range(len(self.stages)):
            shutil.rmtree(_stage_path(self.folder, place), ignore_errors=True)

    def rate(self) -> float:
        """Return the tokens sampled per second."""
        return self._tokens / self._seconds if self._seconds else 0.0

    def close(self) -> None:
        """Release the folder; without ``finish`` the run can be continued."""
        self._done.close()
        self.writer.close()


def _stage_path(folder: Path, place: int) -> Path:
    return folder / f".stage-{place:03d}"


def _stage_rows(folder: Path, place: int) -> Iterator[Candidates]:
    path = _stage_path(folder, place)
    if shard_paths(path, "candidates"):
        yield from read_rows(path, Candidates)


class _StageFolder:
    """The unfinished rows that left a stage; made when the first one does."""

    def __init__(self, folder: Path, place: int):
        self.path = _stage_path(folder, place)
        self.done = SeenIds()
        self._writer: ShardWriter[Candidates] | None = None
        if self.path.is_dir():
            self._writer = ShardWriter[Candidates](self.path, "candidates")
            for row in self._writer.existing():
                self.done.add(row.prompt_id, 0)

    def append(self, row: Candidates) -> None:
        if self._writer is None:
            self._writer = ShardWriter[Candidates](self.path, "candidates")
        self._writer.append(row)

    def __enter__(self) -> _StageFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.done.close()
        if self._writer is not None:
            self._writer.close()
