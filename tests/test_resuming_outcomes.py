"""Asking again what could not be read: only that, with other seeds, and nothing is thrown away."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, manifest_of, write_candidates

from feedback import labeling
from feedback.backends import JudgeCall
from feedback.config import EngineOptions
from feedback.errors import RecipeError
from feedback.judge_options import JudgeOptions
from feedback.records import Prompt, Verdict
from feedback.shards import ShardWriter, read_jsonl, read_rows, shard_paths

ROWS = {f"p{number}": [1.0, 2.0] for number in range(6)}


class Mumbling(Scripted):
    """Says nothing that can be read the first time it is asked about some prompts."""

    def __init__(self) -> None:
        super().__init__("judge", text=self.say)
        self.clear = False

    def say(self, call: JudgeCall) -> str:
        hard = "of p1 " in call.messages[-1]["content"] or "of p4 " in call.messages[-1]["content"]
        return "Who knows." if hard and not self.clear else "Short.\n\nVerdict: A"


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Mumbling:
    mumbling = Mumbling()
    monkeypatch.setattr(labeling, "open_backend", lambda options: mumbling)
    return mumbling


def label(folder: Path, **fields: Any) -> Path:
    candidates = folder / "candidates.jsonl"
    if not candidates.exists():
        write_candidates(candidates, ROWS)
    options = JudgeOptions(
        **{
            "candidates": candidates,
            "out": folder / "verdicts",
            "engine": EngineOptions(model="judge", backend="openai"),
            "template": "pairwise-rationale",
            "temperature": 0.7,
            **fields,
        }
    )
    labeling.run(options)
    return options.out


def outcomes(folder: Path) -> Counter[str]:
    return Counter(row.outcome for row in read_rows(folder, Verdict))


def test_unreadable_replies_can_be_asked_again(tmp_path: Path, judge: Mumbling) -> None:
    out = label(tmp_path)
    assert outcomes(out) == {"decided": 8, "unparsed": 4}
    label(tmp_path)
    assert len(judge.calls) == 12, "an outcome is final unless somebody says otherwise"
    first = {row.verdict_id: row for row in read_rows(out, Verdict)}
    judge.clear = True
    label(tmp_path, ask_again=("unparsed",))
    assert len(judge.calls) == 16, "only what could not be read, and not from the cache"
    assert outcomes(out) == {"decided": 12}
    again = {row.verdict_id: row for row in read_rows(out, Verdict)}
    assert again.keys() == first.keys()
    changed = [name for name in first if first[name].outcome == "unparsed"]
    assert all(first[name].seed != again[name].seed for name in changed)
    assert all(first[name] == again[name] for name in first.keys() - set(changed))
    kept = list(read_jsonl(out / "replaced.jsonl", Verdict))
    assert {row.verdict_id for row in kept} == set(changed)
    assert manifest_of(out)["counts"] == {"decided": 12}


def test_an_answer_that_stays_unreadable_stands_there_once(tmp_path: Path, judge: Mumbling) -> None:
    label(tmp_path)
    seeds = set()
    for _ in range(3):
        out = label(tmp_path, ask_again=("unparsed", "truncated"))
        assert outcomes(out) == {"decided": 8, "unparsed": 4}
        seeds |= {row.seed for row in read_rows(out, Verdict) if row.outcome == "unparsed"}
    assert len(seeds) == 12, "each time with seeds that were not tried before"


def test_killed_after_the_rows_were_taken_out(tmp_path: Path, judge: Mumbling) -> None:
    """Nothing is asked of the folder in between: the next run asks what is missing."""
    label(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(labeling.LabelingRun, "ask_all", lambda *_: (_ for _ in ()).throw(OSError()))
        with pytest.raises(OSError):
            label(tmp_path, ask_again=("unparsed",))
    judge.clear = True
    out = label(tmp_path)
    assert outcomes(out) == {"decided": 12}


def test_it_is_refused_where_it_would_do_nothing(tmp_path: Path) -> None:
    for backend, temperature in (("transformers", 0.0), ("replay", 1.0)):
        with pytest.raises(RecipeError, match="same answer to the same question"):
            JudgeOptions(
                candidates=tmp_path,
                out=tmp_path,
                engine=EngineOptions(backend=backend),  # type: ignore[arg-type]
                temperature=temperature,
                ask_again=("unparsed",),
            )


def test_dropping_rows_over_several_shards(tmp_path: Path) -> None:
    rows = [Prompt(prompt_id=f"p{number}", prompt="x" * number) for number in range(1, 26)]
    with ShardWriter[Prompt](tmp_path, "prompts", rows_per_shard=10) as writer:
        for row in rows:
            writer.append(row)
        gone = tmp_path / "gone.jsonl"
        assert writer.drop(lambda row: len(row.prompt) % 5 == 0, into=gone) == 5
        writer.append(dataclasses.replace(rows[4], prompt_id="new"))
    assert [row.prompt_id for row in read_jsonl(gone, Prompt)] == ["p5", "p10", "p15", "p20", "p25"]
    left = [row.prompt_id for row in read_rows(tmp_path, Prompt)]
    assert len(left) == 21 and left[-1] == "new" and len(shard_paths(tmp_path, "prompts")) == 3
