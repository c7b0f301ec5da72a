"""Which completions a prompt still needs, and the calls that ask for them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from feedback.backends import SampleCall
from feedback.records import Candidates, Message, content_id, prompt_messages

__all__ = ["DrawPlan", "Stage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One attempt of one policy: rows leave it with up to ``wanted`` completions of that policy."""

    policy: int
    attempt: int
    wanted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawPlan:
    """How completions are drawn; the fields are those of ``SampleOptions``."""

    temperatures: tuple[float, ...]
    top_p: float
    max_tokens: int
    system: str | None
    keep_repeats: bool
    seed: int

    def calls(self, row: Candidates, stage: Stage) -> list[SampleCall]:
        """Return the calls that ask for what is missing, one for each temperature."""
        have = sum(entry.sampling.get("policy") == stage.policy for entry in row.completions)
        wanted = Counter(
            self.temperatures[number % len(self.temperatures)]
            for number in range(have, stage.wanted)
        )
        messages = prompt_messages(row.prompt)
        if self.system is not None and messages[0]["role"] != "system":
            messages.insert(0, Message(role="system", content=self.system))
        return [
            SampleCall(
                call_id=content_id(row.prompt_id, stage.policy, stage.attempt, temperature),
                messages=tuple(messages),
                # Greedy draws are all the same.
                n=count if temperature > 0 or self.keep_repeats else 1,
                max_tokens=self.max_tokens,
                temperature=temperature,
                top_p=self.top_p,
                seed=self._seed(row.prompt_id, stage, temperature),
            )
            for temperature, count in wanted.items()
            if temperature > 0 or self.keep_repeats or stage.attempt == 0
        ]

    def _seed(self, prompt_id: str, stage: Stage, temperature: float) -> int:
        name = content_id(self.seed, prompt_id, stage.policy, stage.attempt, temperature, length=7)
        return int(name, 16)
