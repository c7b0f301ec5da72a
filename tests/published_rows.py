"""Rows of every kind that can be published, with what a naive conversion would lose."""

from __future__ import annotations

from typing import Any

from feedback.records import (
    Candidates,
    Completion,
    JudgeIdentity,
    Message,
    Preference,
    Ranking,
    Usage,
    Verdict,
)

__all__ = ["PLAIN", "ROWS"]


def _user(text: str) -> list[Message]:
    return [Message(role="system", content="Be brief."), Message(role="user", content=text)]


def _said(text: str) -> list[Message]:
    return [Message(role="assistant", content=text)]


PLAIN = Preference(
    prompt="Name a river.",
    chosen="The Loire.",
    rejected="A lake.",
    margin=0.5,
    p_chosen=0.75,
    prompt_id="plain",
)

ROWS: dict[str, list[Any]] = {
    "preferences": [
        Preference(
            prompt=_user(f"Question {number}?"),
            chosen=_said(f"good {number} – ünïcode"),
            rejected=_said("" if number == 1 else f"bad {number}"),
            margin=0.6,
            p_chosen=0.5 if number == 2 else 0.8,
            prompt_id=f"p{number}",
            tie=number == 2,
            weight=0.25,
            p_raw=None if number else 0.7,
            source={"judge": "some-judge", "verdicts": ["a1", "b2"], "votes": [{"p": 1.0}]},
        )
        for number in range(3)
    ],
    "rankings": [
        Ranking(
            prompt="Which?",
            completions=["one", "two", "three"],
            scores=[1.5, None, -0.25],
            ranking=[[0], [2]],
            prompt_id="r0",
            comparisons=[(0, 2, 0.9)],
            source={"judge": "some-judge", "fit": {"ties": True}},
        ),
        Ranking(prompt="Why?", completions=["a"], scores=[None], ranking=[], prompt_id="r1"),
    ],
    "candidates": [
        Candidates(
            prompt_id="c0",
            prompt=_user("Say."),
            completions=[
                Completion(
                    completion_id="x",
                    completion="said",
                    model="policy",
                    sampling={"temperature": 1.0, "stop": ["\n"]},
                    finish_reason="stop",
                    logp=-3.5,
                ),
                Completion(completion_id="y", completion="", model="policy"),
            ],
            gold="said",
            meta={"topic": {"name": "speech"}},
        )
    ],
    "verdicts": [
        Verdict(
            verdict_id="v0",
            prompt_id="c0",
            kind="pairwise",
            shown=["x", "y"],
            outcome="decided",
            judge=JudgeIdentity(model="some-judge", revision="abc", endpoint="api.example.com"),
            template="pairwise",
            template_sha256="f" * 64,
            probs=[0.9, 0.1],
            mass=0.99,
            winner="x",
            reply="A",
            sampling={"temperature": 0},
            seed=3,
            usage=Usage(prompt_tokens=200, completion_tokens=1),
            cost=0.0001,
            flags=["truncated_prompt"],
            meta={"topic": "speech"},
        ),
        Verdict(
            verdict_id="v1",
            prompt_id="c0",
            kind="listwise",
            shown=["x", "y"],
            outcome="failed",
            judge=JudgeIdentity(model="some-judge"),
            template="listwise",
            template_sha256="0" * 64,
            ranking=[["x"], ["y"]],
            error="timed out",
        ),
    ],
}
