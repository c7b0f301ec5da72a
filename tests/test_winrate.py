"""Policy against policy: hand-counted rates, intervals that cover, ties that are half."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scripted import Scripted

from feedback import labeling
from feedback.config import EngineOptions
from feedback.labeling import JudgeOptions, answer
from feedback.labeling_setup import Work
from feedback.records import Candidates, Completion, encode
from feedback.winrate import Meeting, meeting_questions, meetings, meetings_row, win_rate


def completion(text: str, name: str = "c") -> Completion:
    return Completion(completion_id=name, completion=text, model="m")


def meeting(
    p: float | None, *, prompt: str = "p", gap: int = 0, consistent: bool = True
) -> Meeting:
    new, old = completion("x" * (20 + gap)), completion("y" * 20)
    return Meeting(prompt, new, old, p, consistent if p is not None else None)


def test_rates_by_hand() -> None:
    found = win_rate(
        [
            meeting(0.9, prompt="a"),
            meeting(0.6, prompt="b", consistent=False),
            meeting(0.5, prompt="c"),
            meeting(0.2, prompt="d"),
            meeting(None, prompt="e"),
        ]
    )
    assert (found.won, found.level, found.lost, found.undecided) == (2, 1, 1, 1)
    # (1 + 1 + 1/2 + 0) / 4; (0.9 + 0.6 + 0.5 + 0.2) / 4; without the inconsistent pair 1.5 / 3.
    assert found.win_rate.value == pytest.approx(0.625)
    assert found.preference.value == pytest.approx(0.55)
    assert found.consistent_win_rate.value == pytest.approx(0.5)
    assert found.win_rate.n == 4


def test_nothing_decided_is_no_rate() -> None:
    found = win_rate([meeting(None), meeting(None, prompt="b")])
    assert found.win_rate.value is None
    assert found.undecided == 2


def test_the_interval_covers_the_truth_when_prompts_differ() -> None:
    # Prompts have win rates of their own, four meetings each: rows are not independent.
    draw = np.random.default_rng(0)
    covered = 0
    runs = 120
    for run in range(runs):
        rates = draw.beta(2, 1.5, size=60)
        rows = [
            meeting(0.9 if draw.random() < rate else 0.1, prompt=str(prompt))
            for prompt, rate in enumerate(rates)
            for _ in range(4)
        ]
        found = win_rate(rows, seed=run).win_rate
        assert found.low is not None
        assert found.high is not None
        covered += found.low <= 2 / 3.5 <= found.high
    # 95% nominal: below 88% would be five standard deviations off.
    assert covered / runs > 0.88


def test_length_held_equal_takes_out_what_length_alone_buys() -> None:
    draw = np.random.default_rng(1)
    rows = []
    for prompt in range(600):
        gap = int(draw.integers(0, 60))
        p = 1 / (1 + math.exp(-(gap - 15) / 10))  # a judge that only counts characters past 15
        rows.append(meeting(p, prompt=str(prompt), gap=gap))
    plain = win_rate(rows)
    assert plain.win_rate.value is not None
    assert plain.at_equal_length.value is not None
    assert plain.win_rate.value > 0.7
    assert plain.at_equal_length.value < 0.4


def test_equal_length_takes_nothing_out_where_length_buys_nothing() -> None:
    """A soft judge who does not look at length: the corrected rate is the rate, no softer."""
    draw = np.random.default_rng(2)
    rows = [
        meeting(float(draw.beta(2.5, 1.6)), prompt=str(prompt), gap=int(draw.integers(-19, 60)))
        for prompt in range(1500)
    ]
    found = win_rate(rows)
    values = [
        getattr(found, name).value
        for name in ("win_rate", "preference", "at_equal_length", "preference_at_equal_length")
    ]
    rate, preference, equal, soft = values
    assert rate - preference > 0.05
    assert equal == pytest.approx(rate, abs=0.02)
    assert soft == pytest.approx(preference, abs=0.02)


def test_a_policy_that_wins_everything_wins_it_at_equal_length_too() -> None:
    rows = [meeting(0.9, prompt=str(prompt), gap=prompt - 10) for prompt in range(20)]
    rate = win_rate(rows).at_equal_length
    assert rate.value is not None
    assert rate.low is not None
    assert rate.high is not None
    assert 0.9 < rate.low <= rate.value <= rate.high <= 1


def row(prompt_id: str, new: list[str], old: list[str]) -> Candidates:
    def side(texts: list[str]) -> Candidates:
        completions = [completion(text, str(place)) for place, text in enumerate(texts)]
        return Candidates(prompt_id=prompt_id, prompt=f"Q {prompt_id}", completions=completions)

    return meetings_row(side(new), side(old))


def judged(
    folder: Path, rows: list[Candidates], monkeypatch: pytest.MonkeyPatch, scripted: Scripted
) -> list[Meeting]:
    monkeypatch.setattr(labeling, "open_backend", lambda options: scripted)
    (folder / "pairs.jsonl").write_bytes(b"".join(encode(each) + b"\n" for each in rows))
    answer(
        JudgeOptions(
            candidates=folder / "pairs.jsonl",
            out=folder / "verdicts",
            engine=EngineOptions(model="judge"),
        ),
        lambda: meeting_questions(rows),
        Work(prompts=len(rows), questions=1),
    )
    return list(meetings(rows, folder / "verdicts"))


def test_number_i_meets_number_i_and_equal_texts_cost_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        row("a", ["new 3", "new 1"], ["old 1", "old 2"]),
        row("b", ["same 1", "new 5"], [" SAME  1", "old 0"]),
    ]
    scripted = Scripted("judge")
    found = judged(tmp_path, rows, monkeypatch, scripted)
    assert len(scripted.calls) == 6  # three different pairs, both orders
    sigmoid = [1 / (1 + math.exp(-gap)) for gap in (2.0, -1.0, 5.0)]
    chances = [entry.p for entry in found]
    assert chances == pytest.approx([sigmoid[0], sigmoid[1], 0.5, sigmoid[2]])
    assert [entry.new.completion for entry in found] == ["new 3", "new 1", "same 1", "new 5"]
    rate = win_rate(found)
    assert (rate.won, rate.level, rate.lost) == (2, 1, 1)


def test_a_failed_order_leaves_its_pair_undecided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("a", ["new 3"], ["old 1"]), row("b", ["new 2"], ["old 1"])]
    scripted = Scripted("judge", fail=lambda call: Scripted.values(call) == [1.0, 3.0])
    found = judged(tmp_path, rows, monkeypatch, scripted)
    assert found[0].p is None
    assert found[1].p is not None
    assert win_rate(found).undecided == 1


def test_rows_of_different_prompts_do_not_meet() -> None:
    one = Candidates(prompt_id="a", prompt="Q", completions=[completion("x")])
    two = Candidates(prompt_id="b", prompt="Q", completions=[completion("x")])
    with pytest.raises(ValueError, match="not the same"):
        meetings_row(one, two)
