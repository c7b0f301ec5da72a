"""Rankings that choose their next pairs by the answers so far, many prompts side by side.

One wave asks what each prompt of a block wants to know next; when its answers are in, the next wave
is drawn. Engines thus see many questions at a time though each prompt waits for its own answers.
A run that was stopped first completes the pairs it finds on disk, then goes on from there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from feedback.judge import Question
from feedback.ordering import distinct_completions, merge_orders
from feedback.pair_schedule import Answers, Pair, next_pairs
from feedback.questions import QuestionPlan, questions_about, schedule_of
from feedback.records import Candidates, Completion, Verdict

__all__ = ["BLOCK", "PairRounds"]

BLOCK = 2000
"""Prompts that advance together; memory is bounded by their verdicts."""


class _Ranking:
    """One prompt on its way."""

    def __init__(self, row: Candidates):
        self.row = row
        self.completions: list[Completion] = distinct_completions(row)
        self.place = {entry.completion_id: at for at, entry in enumerate(self.completions)}
        self.verdicts: dict[Pair, dict[str, Verdict]] = defaultdict(dict)
        self.asked: set[Pair] = set()

    def pair(self, verdict: Verdict) -> Pair | None:
        places = sorted(self.place.get(name, -1) for name in verdict.shown)
        return (places[0], places[1]) if len(places) == 2 and places[0] >= 0 else None


class PairRounds:
    """The rankings of a block of prompts.

    Args:
        rows: the prompts' candidates.
        plan: an adaptive plan.
        known: returns what this judge was asked of a prompt in earlier runs. Calls that failed
            are among them: their pairs were begun, and are asked again before any other.
    """

    def __init__(
        self,
        rows: Sequence[Candidates],
        plan: QuestionPlan,
        known: Callable[[str], Sequence[Verdict]],
    ):
        self.plan = plan
        self.schedule = schedule_of(plan)
        self._rankings = {row.prompt_id: _Ranking(row) for row in rows}
        for prompt_id in self._rankings:
            for verdict in known(prompt_id):
                self.hear(verdict)

    def hear(self, verdict: Verdict) -> None:
        """Take note of a verdict."""
        ranking = self._rankings.get(verdict.prompt_id)
        pair = ranking.pair(verdict) if ranking is not None else None
        if ranking is not None and pair is not None:
            ranking.verdicts[pair][verdict.verdict_id] = verdict

    def waves(self) -> Iterator[Iterator[Question]]:
        """Yield one wave of questions after the other; hear all answers before asking for more."""
        while wave := [
            (ranking, pairs)
            for ranking in self._rankings.values()
            if (pairs := self._next(ranking))
        ]:
            yield self._questions(wave)

    def _next(self, ranking: _Ranking) -> list[Pair]:
        # What an earlier run began is completed first; its answers decide what comes next.
        begun = [pair for pair in ranking.verdicts if pair not in ranking.asked]
        pairs = begun or next_pairs(
            len(ranking.completions),
            self._answers(ranking),
            self.schedule,
            salt=ranking.row.prompt_id,
        )
        ranking.asked.update(pairs)
        return pairs

    def _answers(self, ranking: _Ranking) -> Answers:
        answers: dict[Pair, float | None] = {}
        for pair in ranking.asked:
            verdicts = list(ranking.verdicts.get(pair, {}).values())
            p = None
            if verdicts:
                merged = merge_orders(verdicts, orders=self.plan.orders)
                first = ranking.completions[pair[0]].completion_id
                p = merged.p if merged.p is None or merged.a == first else 1.0 - merged.p
            answers[pair] = p
        return answers

    def _questions(self, wave: Sequence[tuple[_Ranking, list[Pair]]]) -> Iterator[Question]:
        for ranking, pairs in wave:
            chosen = [(ranking.completions[i], ranking.completions[j]) for i, j in pairs]
            yield from questions_about(ranking.row, chosen, self.plan)
