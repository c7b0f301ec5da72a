"""Recorded verdicts answer again: the same labels without a call; others are named."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, write_candidates

from feedback import labeling
from feedback.backends import JudgeCall
from feedback.backends.opening import open_backend
from feedback.config import EngineOptions
from feedback.errors import InputError, ShardError
from feedback.labeling import JudgeOptions
from feedback.records import Verdict
from feedback.report_run import read_evidence
from feedback.shards import read_rows

VALUES = {f"p{n}": [1.0, 2.0, 3.0] for n in range(4)}


def judge(folder: Path, out: str, engine: EngineOptions, **fields: Any) -> dict[str, Verdict]:
    labeling.run(
        JudgeOptions(
            candidates=folder / "candidates.jsonl", out=folder / out, engine=engine, **fields
        )
    )
    return {row.verdict_id: row for row in read_rows(folder / out, Verdict)}


def record(
    folder: Path, monkeypatch: pytest.MonkeyPatch, scripted: Scripted, **fields: Any
) -> dict[str, Verdict]:
    write_candidates(folder / "candidates.jsonl", VALUES)
    with monkeypatch.context() as patch:
        patch.setattr(labeling, "open_backend", lambda options: scripted)
        return judge(folder, "recorded", EngineOptions(model="judge"), **fields)


def replay(folder: Path, **fields: Any) -> dict[str, Verdict]:
    engine = EngineOptions(backend="replay", replay_from=str(folder / "recorded"))
    return judge(folder, "replayed", engine, **fields)


def said(row: Verdict) -> tuple[Any, ...]:
    probs = None if row.probs is None else [round(p, 12) for p in row.probs]
    return row.outcome, row.winner, probs, row.ranking, row.rationale, row.reply, row.judge


def test_every_label_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = record(tmp_path, monkeypatch, Scripted("judge"))
    replayed = replay(tmp_path)
    assert {name: said(row) for name, row in replayed.items()} == {
        name: said(row) for name, row in recorded.items()
    }
    for name, row in replayed.items():
        assert row.mass == pytest.approx(recorded[name].mass)


def test_text_verdicts_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(
        ["B says more.\nVerdict: B", "Verdict: A", "I cannot judge these.", "well, well"] * 6
    )
    scripted = Scripted("judge", text=lambda call: next(texts))
    recorded = record(tmp_path, monkeypatch, scripted, template="pairwise-rationale")
    assert {row.outcome for row in recorded.values()} == {"decided", "refused", "unparsed"}
    replayed = replay(tmp_path, template="pairwise-rationale")
    assert {name: said(row) for name, row in replayed.items()} == {
        name: said(row) for name, row in recorded.items()
    }


def test_another_limit_on_the_mass_needs_no_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = record(tmp_path, monkeypatch, Scripted("judge", mass=0.03))
    assert {row.outcome for row in recorded.values()} == {"unparsed"}
    replayed = replay(tmp_path, min_mass=0.01)
    assert {row.outcome for row in replayed.values()} == {"decided"}
    assert all(row.mass == pytest.approx(0.03) for row in replayed.values())


def test_a_question_that_was_not_recorded_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, monkeypatch, Scripted("judge"))
    write_candidates(tmp_path / "candidates.jsonl", {**VALUES, "new": [1.0, 2.0]})
    replayed = replay(tmp_path)
    unknown = [row for row in replayed.values() if row.prompt_id == "new"]
    assert len(unknown) == 2
    for row in unknown:
        assert row.outcome == "failed"
        assert f"question {row.verdict_id} is not recorded" in str(row.error)


def test_failed_calls_stay_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted = Scripted("judge", fail=lambda call: Scripted.values(call) == [1.0, 3.0])
    record(tmp_path, monkeypatch, scripted)
    replayed = replay(tmp_path)
    failed = [row for row in replayed.values() if row.outcome == "failed"]
    assert [row.error for row in failed] == ["scripted failure"] * 4


def test_labels_of_another_template_do_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from feedback.backends import JudgeCall

    recorded = record(tmp_path, monkeypatch, Scripted("judge"))
    engine = EngineOptions(backend="replay", replay_from=str(tmp_path / "recorded"))
    backend = open_backend(engine)
    call = JudgeCall(call_id=next(iter(recorded)), messages=(), choices=("A", "B", "C"))
    (reply,) = backend.judge([call])
    assert reply.error == "recorded for 2 labels, asked for 3"
    (reply,) = backend.judge([JudgeCall(call_id=call.call_id, messages=(), choices=("A", "B"))])
    assert reply.choice_logprobs is not None
    assert math.fsum(map(math.exp, reply.choice_logprobs.values())) == pytest.approx(0.9)
    backend.close()


def test_one_of_several_judges_is_chosen_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(tmp_path, monkeypatch, Scripted("judge"))
    shard = tmp_path / "recorded/verdicts-00000.jsonl"
    line = shard.read_text().splitlines()[0]
    other = line.replace('"model":"judge"', '"model":"second"').replace(
        '"verdict_id":"', '"verdict_id":"x'
    )
    shard.write_text(shard.read_text() + other + "\n")
    engine = EngineOptions(backend="replay", replay_from=str(tmp_path / "recorded"))
    with pytest.raises(ShardError, match=r"several judges \(judge, second\)"):
        open_backend(engine)
    backend = open_backend(dataclasses.replace(engine, model="second"))
    assert backend.identity.model == "second"
    backend.close()


def test_a_killed_folder_answers_with_its_whole_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last row is torn, as a kill leaves it; in a finished folder that is damage."""
    record(tmp_path, monkeypatch, Scripted("judge"))
    folder = tmp_path / "recorded"
    shard = folder / "verdicts-00000.jsonl"
    shard.write_bytes(shard.read_bytes()[:-40])
    engine = EngineOptions(backend="replay", replay_from=str(folder))
    with pytest.raises(InputError, match="not a verdict row"):
        open_backend(engine)
    with pytest.raises(InputError, match="not a verdict row"):
        list(read_rows(folder, Verdict))
    (folder / "manifest.json").unlink()
    whole = shard.read_bytes().count(b"\n")
    rows = list(read_rows(folder, Verdict))
    assert len(rows) == whole == shard.read_bytes().count(b"verdict_id") - 1
    assert sum(arm.outcomes.total() for arm in read_evidence([folder]).arms) == whole
    backend = open_backend(engine)
    (torn,) = re.findall(rb'^{"verdict_id":"(\w+)"', shard.read_bytes().splitlines()[-1])
    calls = [
        JudgeCall(call_id=name, messages=(), choices=("A", "B"))
        for name in (rows[0].verdict_id, torn.decode())
    ]
    first, last = backend.judge(calls)
    assert first.error is None
    assert "is not recorded" in (last.error or "")
    backend.close()
    # A torn row anywhere but at the end is damage in any folder.
    shard.write_bytes(b'{"verdict_id":"x\n' + shard.read_bytes())
    with pytest.raises(InputError, match="jsonl:1: not a verdict row"):
        open_backend(engine)


def test_what_cannot_be_replayed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs replay_from"):
        open_backend(EngineOptions(backend="replay"))
    with pytest.raises(InputError, match="no such folder"):
        open_backend(EngineOptions(backend="replay", replay_from=str(tmp_path / "none")))
    with pytest.raises(ShardError, match="no verdicts"):
        open_backend(EngineOptions(backend="replay", replay_from=str(tmp_path)))
