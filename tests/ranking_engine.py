"""An engine whose answers a test writes: strengths of completions, noise, failures."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from feedback.backends import Capabilities, JudgeCall, JudgeReply, SampleCall, SampleReply
from feedback.records import Candidates, Completion, JudgeIdentity, Usage, encode

REPLY = re.compile(r"<reply(?:_\w)?(?: name=\"(\w+)\")?>\n(.*?)\n</reply", re.DOTALL)


class Scripted:
    """Prefers completions by the number that their text ends in, higher is better."""

    def __init__(
        self,
        name: str,
        *,
        p: Callable[[float, float, JudgeCall], float] | None = None,
        text: Callable[[JudgeCall], str] | None = None,
        fail: Callable[[JudgeCall], bool] = lambda call: False,
        mass: float = 0.9,
    ):
        self.identity = JudgeIdentity(model=name)
        self.p = p or (lambda first, second, call: 1 / (1 + math.exp(second - first)))
        self.text = text
        self.fail = fail
        self.mass = mass
        self.calls: list[JudgeCall] = []
        self.waves: list[int] = []
        self.closed = 0

    def prepare(self, labels: tuple[str, ...]) -> Capabilities:
        return Capabilities(logprobs=True)

    def judge(self, calls: Iterable[JudgeCall]) -> Iterator[JudgeReply]:
        self.waves.append(0)
        for call in calls:
            self.calls.append(call)
            self.waves[-1] += 1
            yield self.answer(call)

    def answer(self, call: JudgeCall) -> JudgeReply:
        usage = Usage(prompt_tokens=100, completion_tokens=1)
        if self.fail(call):
            return JudgeReply(call_id=call.call_id, error="scripted failure")
        if self.text is not None:
            return JudgeReply(
                call_id=call.call_id, text=self.text(call), finish_reason="stop", usage=usage
            )
        assert call.choices is not None
        values = self.values(call)
        if len(values) == 1:
            place = min(max(round(values[0]), 1), len(call.choices)) - 1
            shares = [0.02] * len(call.choices)
            shares[place] = 1 - 0.02 * (len(call.choices) - 1)
        else:
            first = self.p(*values, call)
            shares = [first, 1 - first]
        logprobs = {
            label: math.log(max(share, 1e-9) * self.mass)
            for label, share in zip(call.choices, shares, strict=False)
        }
        return JudgeReply(call_id=call.call_id, choice_logprobs=logprobs, usage=usage)

    @staticmethod
    def values(call: JudgeCall) -> list[float]:
        """Return the number at the end of each reply shown."""
        return [float(text.split()[-1]) for _, text in REPLY.findall(call.messages[-1]["content"])]

    def sample(self, calls: Iterable[SampleCall]) -> Iterator[SampleReply]:
        raise NotImplementedError

    def close(self) -> None:
        self.closed += 1


def write_candidates(path: Path, rows: dict[str, list[float]], **fields) -> Path:
    """Write candidates whose completions end in the given numbers."""
    lines = [
        encode(
            Candidates(
                prompt_id=prompt_id,
                prompt=f"Question {prompt_id}?",
                completions=[
                    Completion(
                        completion_id=f"{prompt_id}-{place}",
                        completion=f"answer {place} of {prompt_id} worth {value}",
                        model=f"m{place % 2}",
                    )
                    for place, value in enumerate(values)
                ],
                **fields,
            )
        )
        for prompt_id, values in rows.items()
    ]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())
