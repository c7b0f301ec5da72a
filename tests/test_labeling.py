"""The labelling run: every verdict once, failures retried alone, nothing paid twice."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, manifest_of, write_candidates

from feedback import labeling, unread
from feedback.backends import JudgeCall, JudgeReply
from feedback.backends.identity import identity_of
from feedback.backends.opening import open_backend
from feedback.budget import find_price
from feedback.config import EngineOptions
from feedback.errors import (
    BackendError,
    BudgetExceeded,
    InputError,
    RecipeError,
    ShardError,
    TemplateError,
)
from feedback.labeling import JudgeOptions
from feedback.panel import PanelJudge, PanelOptions
from feedback.records import Usage, Verdict, decode
from feedback.shards import ShardWriter, read_jsonl, read_rows, shard_paths
from feedback.templates import prompts_folder
from feedback.verdict_index import VerdictIndex

SMALL = {f"p{n}": [1.0, 2.0, 3.0] for n in range(5)}  # 5 prompts, 3 pairs, 2 orders: 30 questions


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Scripted]:
    known = {"judge": Scripted("judge")}
    monkeypatch.setattr(labeling, "open_backend", lambda options: known[options.model])
    return known


def options(folder: Path, **fields: Any) -> JudgeOptions:
    if not (folder / "candidates.jsonl").exists():
        write_candidates(folder / "candidates.jsonl", SMALL)
    engine = EngineOptions(model="judge", backend=fields.pop("backend", "transformers"))
    return JudgeOptions(
        **{
            "candidates": folder / "candidates.jsonl",
            "out": folder / "verdicts",
            "engine": engine,
            **fields,
        }
    )


def final(folder: Path) -> list[Verdict]:
    """The verdicts of the shards, failed ones aside; none twice."""
    rows = [
        row
        for path in shard_paths(folder / "verdicts", "verdicts")
        for row in read_jsonl(path, Verdict)
    ]
    assert len({row.verdict_id for row in rows}) == len(rows)
    return rows


def failed(folder: Path) -> list[Verdict]:
    path = folder / "verdicts/failed.jsonl"
    return list(read_jsonl(path, Verdict)) if path.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_question_gets_one_verdict(tmp_path: Path, engines: dict[str, Scripted]) -> None:
    labeling.run(options(tmp_path))
    rows = final(tmp_path)
    assert len(rows) == 30
    assert {row.outcome for row in rows} == {"decided"}
    manifest = manifest_of(tmp_path / "verdicts")
    assert manifest["rows"] == manifest["questions"] == 30
    assert manifest["counts"] == {"decided": 30}
    assert manifest["failed"] == 0
    assert manifest["totals"]["prompt_tokens"] == 3000
    assert engines["judge"].closed == 1


def test_questions_of_a_prompt_and_of_a_pair_stand_together(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    labeling.run(options(tmp_path))
    heads = [
        call.messages[-1]["content"].split("Question ")[1][:2] for call in engines["judge"].calls
    ]
    assert heads == sorted(heads)
    shown = [Scripted.values(call) for call in engines["judge"].calls]
    assert all(shown[n] == shown[n + 1][::-1] for n in range(0, 30, 2))


def test_resume_asks_again_what_failed_and_only_that(
    tmp_path: Path, engines: dict[str, Scripted], capsys: pytest.CaptureFixture[str]
) -> None:
    engines["judge"].fail = lambda call: Scripted.values(call) == [1.0, 3.0]
    labeling.run(options(tmp_path))
    assert (len(final(tmp_path)), len(failed(tmp_path))) == (25, 5)
    assert manifest_of(tmp_path / "verdicts")["failed"] == 5
    assert "retry only those" in capsys.readouterr().out
    before = {row.verdict_id: row for row in final(tmp_path)}

    engines["judge"] = again = Scripted("judge")
    labeling.run(options(tmp_path))
    assert [Scripted.values(call) for call in again.calls] == [[1.0, 3.0]] * 5
    after = {row.verdict_id: row for row in final(tmp_path)}
    assert len(after) == 30
    assert before.items() <= after.items(), "a final verdict changed"
    assert failed(tmp_path) == []


def test_a_failure_that_repeats_stands_there_once(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    engines["judge"].fail = lambda call: Scripted.values(call) == [1.0, 3.0]
    for _ in range(3):
        labeling.run(options(tmp_path))
    assert len(failed(tmp_path)) == 5
    assert {row.error for row in failed(tmp_path)} == {"scripted failure"}


def test_where_every_call_failed_the_run_fails_and_can_be_repeated(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    engines["judge"].fail = lambda call: True
    words = r"30 of 30; the last one: scripted failure \(all: .*failed.jsonl\)"
    for _ in range(2):
        with pytest.raises(BackendError, match=words) as caught:
            labeling.run(options(tmp_path))
        assert caught.value.exit_code != 0
    assert (len(final(tmp_path)), len(failed(tmp_path))) == (0, 30)
    engines["judge"].fail = lambda call: Scripted.values(call) != [1.0, 3.0]
    labeling.run(options(tmp_path))
    assert len(final(tmp_path)) == 5
    # What is left fails again, every call of it: the folder holds verdicts all the same.
    engines["judge"].fail = lambda call: True
    labeling.run(options(tmp_path))
    assert (len(final(tmp_path)), len(failed(tmp_path))) == (5, 25)


def test_final_outcomes_are_not_asked_again(tmp_path: Path, engines: dict[str, Scripted]) -> None:
    engines["judge"].mass = 0.01
    labeling.run(options(tmp_path))
    assert {row.outcome for row in final(tmp_path)} == {"unparsed"}
    engines["judge"] = again = Scripted("judge")
    labeling.run(options(tmp_path))
    assert again.calls == []


class Stubborn(Scripted):
    """Loses some calls, answers others twice, and some that nobody asked."""

    def judge(self, calls: Iterable[JudgeCall]) -> Iterator[JudgeReply]:
        for number, call in enumerate(calls):
            if number % 5 == 0:
                continue
            yield self.answer(call)
            if number % 5 == 1:
                yield JudgeReply(call_id=call.call_id, error="second thoughts")
            if number % 5 == 2:
                yield JudgeReply(call_id="never-asked", choice_logprobs={"A": -0.1, "B": -3.0})


def test_lost_doubled_and_unasked_replies_do_no_harm(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    engines["judge"] = Stubborn("judge")
    labeling.run(options(tmp_path))
    assert len(final(tmp_path)) == 24
    assert {row.error for row in failed(tmp_path)} == {"the engine gave no reply to this call"}
    engines["judge"] = Scripted("judge")
    labeling.run(options(tmp_path))
    assert len(final(tmp_path)) == 30


@pytest.mark.parametrize("stop", [0, 1, 7, 29])
def test_an_interrupted_run_goes_on(
    tmp_path: Path, engines: dict[str, Scripted], stop: int
) -> None:
    def interrupt(call: JudgeCall) -> bool:
        if len(engines["judge"].calls) > stop:
            raise KeyboardInterrupt
        return False

    engines["judge"].fail = interrupt
    with pytest.raises(KeyboardInterrupt):
        labeling.run(options(tmp_path))
    assert len(final(tmp_path)) == stop
    assert not (tmp_path / "verdicts/manifest.json").exists()
    engines["judge"] = again = Scripted("judge")
    labeling.run(options(tmp_path))
    assert len(again.calls) == 30 - stop
    assert len(final(tmp_path)) == 30


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"template": "pairwise-brief"}, "template"),
        ({"rubric": "booking"}, "rubric"),
        ({"seed": 3}, "seed"),
        ({"orders": "one"}, "orders"),
        ({"min_mass": 0.2}, "min_mass"),
    ],
)
def test_other_settings_are_not_mixed_into_a_folder(
    tmp_path: Path, engines: dict[str, Scripted], change: dict[str, Any], named: str
) -> None:
    engines["judge"].fail = lambda call: Scripted.values(call) == [1.0, 3.0]
    labeling.run(options(tmp_path))
    before = contents(tmp_path / "verdicts")
    assert {"manifest.json", "run.json", "failed.jsonl", "verdicts-00000.jsonl"} <= set(before)
    with pytest.raises(ShardError, match=f"begun with another {named}"):
        labeling.run(options(tmp_path, **change))
    assert contents(tmp_path / "verdicts") == before


def test_other_candidates_are_not_mixed_into_a_folder(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    labeling.run(options(tmp_path))
    write_candidates(tmp_path / "candidates.jsonl", {**SMALL, "p9": [1.0, 2.0]})
    with pytest.raises(ShardError, match="another candidates"):
        labeling.run(options(tmp_path))


def test_a_second_run_on_the_folder_is_refused(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    with (
        ShardWriter[Verdict](tmp_path / "verdicts", "verdicts"),
        pytest.raises(ShardError, match="another run is writing"),
    ):
        labeling.run(options(tmp_path))
    assert engines["judge"].calls == []


# --- cache, budget, dry run ----------------------------------------------------------------------


def test_the_cache_answers_what_was_asked_before(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    labeling.run(options(tmp_path, backend="openai"))
    assert (tmp_path / "replies.sqlite").exists()
    first = {row.verdict_id: row for row in final(tmp_path)}
    # Another folder, and a prompt more: only the new prompt is asked.
    write_candidates(tmp_path / "candidates.jsonl", {**SMALL, "p9": [1.0, 2.0]})
    engines["judge"] = again = Scripted("judge")
    labeling.run(options(tmp_path, backend="openai", out=tmp_path / "other"))
    assert len(again.calls) == 2
    rows = list(read_rows(tmp_path / "other", Verdict))
    assert len(rows) == 32
    for row in rows:
        if row.prompt_id == "p9":
            assert not row.cached
            continue
        assert row.cached
        assert row.cost == 0.0
        assert row.probs == first[row.verdict_id].probs
    assert manifest_of(tmp_path / "other")["totals"]["from_cache"] == 30


def test_the_cache_keeps_no_failure_and_tells_judges_apart(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    engines["judge"].fail = lambda call: True
    with pytest.raises(BackendError, match="everything that was asked failed, 30 of 30"):
        labeling.run(options(tmp_path, backend="openai"))
    engines["judge"] = healed = Scripted("judge")
    labeling.run(options(tmp_path, backend="openai"))
    assert len(healed.calls) == 30
    engines["judge"] = other = Scripted("another name")
    labeling.run(options(tmp_path, backend="openai", out=tmp_path / "other"))
    assert len(other.calls) == 30


def test_no_cache_for_engines_in_this_process(tmp_path: Path, engines: dict[str, Scripted]) -> None:
    labeling.run(options(tmp_path))
    assert not (tmp_path / "replies.sqlite").exists()
    labeling.run(options(tmp_path, out=tmp_path / "b", cache=str(tmp_path / "mine.sqlite")))
    engines["judge"] = again = Scripted("judge")
    labeling.run(options(tmp_path, out=tmp_path / "c", cache=str(tmp_path / "mine.sqlite")))
    assert again.calls == []


def test_a_file_that_is_no_cache_is_named(tmp_path: Path, engines: dict[str, Scripted]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("these are notes, not a database, and long enough to look like a page\n" * 40)
    with pytest.raises(InputError, match="not a reply cache"):
        labeling.run(options(tmp_path, cache=str(path)))


def test_a_cache_where_no_file_can_be_names_the_way_out(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    (tmp_path / "file").write_text("")
    for path in ("/proc/replies.sqlite", tmp_path, tmp_path / "file" / "replies.sqlite"):
        with pytest.raises(InputError, match=r"cannot be created here; .*--cache none") as caught:
            labeling.run(options(tmp_path, cache=str(path)))
        assert str(path) in str(caught.value)


def test_a_refused_folder_promises_a_cache_only_where_there_is_one(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    for backend, promised in (("transformers", False), ("openai", True)):
        folder = {"out": tmp_path / backend / "verdicts", "backend": backend}
        labeling.run(options(tmp_path, **folder))
        with pytest.raises(ShardError, match="--on-change set-aside") as caught:
            labeling.run(options(tmp_path, seed=5, **folder))
        assert ("stay in the cache" in str(caught.value)) is promised


def test_a_run_that_stopped_on_failures_alone_claims_no_verdicts(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    engines["judge"].fail = lambda call: True
    with pytest.raises(BudgetExceeded, match=r"--max-calls 3 with 0 verdicts, 3 failed of this"):
        labeling.run(options(tmp_path, max_calls=3))


def test_limits_stop_cleanly_and_the_run_goes_on(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    with pytest.raises(BudgetExceeded, match="--max-calls 12"):
        labeling.run(options(tmp_path, max_calls=12))
    assert len(engines["judge"].calls) == 12
    assert len(final(tmp_path)) == 12
    assert not (tmp_path / "verdicts/manifest.json").exists()
    with pytest.raises(BudgetExceeded, match="--max-tokens 1000"):
        labeling.run(options(tmp_path, max_tokens=1000))
    # 100 tokens a call were measured; at most nine and a bit fit under 1,000.
    assert 12 + 8 <= len(final(tmp_path)) <= 12 + 9
    labeling.run(options(tmp_path))
    assert len(final(tmp_path)) == 30


def prices(folder: Path, text: str) -> Path:
    path = folder / "prices.toml"
    path.write_text(text)
    return path


def test_cost_is_counted_and_limited(tmp_path: Path, engines: dict[str, Scripted]) -> None:
    # 100 prompt tokens and 1 reply token: 100 * 100 / 1e6 + 1 * 200 / 1e6 = $0.0102 a call.
    table = prices(tmp_path, '["judge"]\nprompt = 100.0\ncompletion = 200.0\n')
    settings: dict[str, Any] = {"backend": "openai", "prices": table, "cache": "none"}
    with pytest.raises(BudgetExceeded, match=r"--max-cost \$0.1"):
        labeling.run(options(tmp_path, max_cost=0.1, **settings))
    spent = math.fsum(row.cost for row in final(tmp_path))
    assert spent <= 0.1
    assert len(final(tmp_path)) >= 8
    labeling.run(options(tmp_path, **settings))
    assert all(row.cost == pytest.approx(0.0102) for row in final(tmp_path))
    assert manifest_of(tmp_path / "verdicts")["totals"]["cost"] == pytest.approx(30 * 0.0102)


def test_cached_prompt_tokens_and_the_batch_api_have_their_price(tmp_path: Path) -> None:
    table = prices(
        tmp_path,
        '["m"]\nprompt = 10.0\ncached = 1.0\ncompletion = 20.0\nbatch = 0.5\n["m-mini"]\n'
        "prompt = 0\ncompletion = 0\n",
    )
    price = find_price("m-2026-01-31", table)
    assert price is not None
    usage = Usage(prompt_tokens=100, cached_tokens=40, completion_tokens=10)
    # (60 * 10 + 40 * 1 + 10 * 20) / 1e6
    assert price.of(usage) == pytest.approx(840e-6)
    assert price.of(usage, batch=True) == pytest.approx(420e-6)
    assert find_price("m-mini", table) != price
    assert find_price("m-large", table) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[x", "not valid TOML"),
        ('["m"]\nprompt = 1\n', "has no 'completion'"),
        ('["m"]\nprompt = 1\ncompletion = -1\n', "not a price"),
        ('["m"]\npromt = 1\ncompletion = 1\n', "did you mean 'prompt'"),
        ('["m"]\nprompt = 1\ncompletion = 1\nchecked = "May"\n', "not a date such as"),
        ('["m"]\nprompt = 1\ncompletion = 1\nsource = 3\n', "not a text"),
    ],
)
def test_a_wrong_price_table_is_named(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        find_price("m", prices(tmp_path, text))


def test_max_cost_without_a_price_is_refused(tmp_path: Path, engines: dict[str, Scripted]) -> None:
    with pytest.raises(InputError, match="needs the price of 'judge'"):
        labeling.run(options(tmp_path, backend="openai", max_cost=1.0))
    assert engines["judge"].calls == []


def test_a_dry_run_prints_and_sends_nothing(
    tmp_path: Path, engines: dict[str, Scripted], capsys: pytest.CaptureFixture[str]
) -> None:
    table = prices(tmp_path, '["judge"]\nprompt = 100.0\ncompletion = 200.0\n')
    labeling.run(options(tmp_path, backend="openai", prices=table, dry_run=True))
    said = capsys.readouterr().out
    assert "5 prompts, 30 calls to judge; nothing was sent" in said
    assert "30 reply tokens" in said
    assert "price: about $" in said
    assert "a price without a date: check it" in said
    dated = 'prompt = 100.0\ncompletion = 200.0\nchecked = 2026-01-31\nsource = "the invoice"\n'
    table = prices(tmp_path, f'["judge"]\n{dated}')
    labeling.run(options(tmp_path, backend="openai", prices=table, dry_run=True))
    assert "(price as of 2026-01-31, the invoice)" in capsys.readouterr().out
    assert engines["judge"].calls == []
    assert not (tmp_path / "verdicts").exists()


def test_a_dry_run_counts_what_is_still_to_be_asked(
    tmp_path: Path, engines: dict[str, Scripted], capsys: pytest.CaptureFixture[str]
) -> None:
    def said(**fields: Any) -> str:
        capsys.readouterr()
        labeling.run(options(tmp_path, dry_run=True, **fields))
        return capsys.readouterr().out

    engines["judge"].fail = lambda call: Scripted.values(call) == [1.0, 3.0]
    with pytest.raises(BudgetExceeded):
        labeling.run(options(tmp_path, max_calls=12))
    before = contents(tmp_path / "verdicts")
    assert "20 calls to judge (10 verdicts are on disk already); nothing was sent" in said()
    assert "20 reply tokens" in said()
    other = said(seed=5)
    assert "30 calls to judge; nothing was sent" in other
    assert "begun with another seed (0, now 5); the run would be refused" in other
    assert "would be refused" not in said(seed=5, on_change="set-aside")
    assert contents(tmp_path / "verdicts") == before
    engines["judge"].fail = lambda call: False
    engines["judge"].mass = 0.01
    labeling.run(options(tmp_path))
    assert "0 calls to judge (30 verdicts are on disk already)" in said()
    fields: dict[str, Any] = {"backend": "openai", "cache": "none", "out": tmp_path / "paid"}
    engines["judge"].identity = identity_of(EngineOptions(model="judge", backend="openai"))
    labeling.run(options(tmp_path, **fields))
    assert "0 calls to judge (30" in said(**fields)
    assert "30 calls to judge; nothing" in said(**fields, ask_again=("unparsed",))


def test_every_shipped_price_says_when_it_was_checked_and_where() -> None:
    table = tomllib.loads((prompts_folder() / "prices.toml").read_text())
    for name in table:
        price = find_price(name)
        assert price is not None and price.checked is not None and price.source


# --- wrong input ---------------------------------------------------------------------------------

GOOD = {"completion_id": "a", "completion": "x", "model": "m"}
OTHER = {"completion_id": "b", "completion": "y", "model": "m"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not a candidates row"),
        ({"prompt_id": "p", "prompt": "Q"}, "completions"),
        ({"prompt": "Q"}, "these are prompts: run rlaif sample first"),
        ({"prompt_id": "p", "prompt": " ", "completions": [GOOD, OTHER]}, "prompt is empty"),
        ({"prompt_id": "p", "prompt": "Q", "completions": [GOOD, GOOD]}, "completion_id twice"),
        (
            {"prompt_id": "p0", "prompt": "Q", "completions": [GOOD]},
            "occurs twice .first in line 1",
        ),
    ],
)
def test_bad_candidates_name_file_and_line_and_leave_nothing(
    tmp_path: Path, engines: dict[str, Scripted], row: Any, words: str
) -> None:
    path = tmp_path / "candidates.jsonl"
    good = {"prompt_id": "p0", "prompt": "Q", "completions": [GOOD, OTHER]}
    text = row if isinstance(row, str) else json.dumps(row)
    path.write_text(json.dumps(good) + "\n" + text + "\n")
    with pytest.raises(InputError, match=words) as caught:
        labeling.run(options(tmp_path))
    assert f"{path}:2:" in str(caught.value)
    assert not (tmp_path / "verdicts").exists()
    assert engines["judge"].calls == []


def test_identical_completions_are_not_judged_and_counted(
    tmp_path: Path, engines: dict[str, Scripted], capsys: pytest.CaptureFixture[str]
) -> None:
    same = [{**GOOD, "completion": "Same 1"}, {**OTHER, "completion": " same  1"}]
    rows = [
        {"prompt_id": "p", "prompt": "Q", "completions": same},
        {
            "prompt_id": "q",
            "prompt": "Q",
            "completions": [*same, {**GOOD, "completion_id": "c", "completion": "z 2"}],
        },
    ]
    (tmp_path / "candidates.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labeling.run(options(tmp_path))
    assert len(final(tmp_path)) == 2
    assert manifest_of(tmp_path / "verdicts")["left_out"] == {
        "repeated_or_empty": 2,
        "single_prompts": 1,
    }
    assert "2 completions were empty or repeats" in capsys.readouterr().out


def test_nothing_to_ask_is_said(tmp_path: Path, engines: dict[str, Scripted]) -> None:
    write_candidates(tmp_path / "candidates.jsonl", {"p": [1.0]})
    with pytest.raises(InputError, match="nothing to ask"):
        labeling.run(options(tmp_path))


@pytest.mark.parametrize(
    "fields",
    [
        *({"repeats": 0}, {"min_mass": 1.0}, {"temperature": -1.0}, {"pairs_per_prompt": 0}),
        *({"max_calls": -3}, {"max_calls": 0}, {"max_tokens": 0}, {"max_cost": -0.5}),
        {"max_cost": math.nan},
    ],
)
def test_senseless_options(tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError):
        options(tmp_path, **fields)


def test_a_file_where_a_folder_or_a_template_belongs(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    run = options(tmp_path)
    with pytest.raises(ShardError, match=r"candidates\.jsonl: is a file; name a folder"):
        labeling.run(dataclasses.replace(run, out=run.candidates))
    with pytest.raises(ShardError, match=r"cannot be made: .* name another folder"):
        labeling.run(dataclasses.replace(run, out=run.candidates / "verdicts"))
    with pytest.raises(TemplateError, match=r"candidates\.jsonl: a template is a \.toml file"):
        labeling.run(dataclasses.replace(run, template=str(run.candidates)))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"concurrency": 0}, "concurrency is 0; it must be at least 1"),
        ({"requests_per_minute": 0.0}, "requests_per_minute is 0; it must be above 0"),
        ({"requests_per_minute": -5.0}, "requests_per_minute is -5; it must be above 0"),
        ({"tokens_per_minute": math.nan}, "tokens_per_minute is nan; it must be above 0"),
        ({"max_retries": -1}, "max_retries is -1; it must be at least 0"),
        ({"timeout_s": 0.0}, "timeout_s is 0; it must be above 0"),
        ({"tensor_parallel": 0}, "tensor_parallel is 0; it must be at least 1"),
        ({"gpu_memory": 85.0}, "gpu_memory is 85.0; it is a share, at most 1"),
    ],
)
def test_senseless_engine_options(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(problem)):
        EngineOptions(**fields)


@pytest.mark.parametrize(
    ("engine", "reader"),
    [
        ({"base_url": "http://x/v1"}, "transformers: it is for openai and batch"),
        ({"backend": "openai", "lora": "folder"}, "openai: it is for transformers and vllm"),
        ({"backend": "openai", "device": "cuda"}, "openai: it is for transformers"),
        ({"backend": "batch", "tensor_parallel": 2}, "batch: it is for vllm"),
        ({"backend": "vllm", "replay_from": "x"}, "vllm: it is for replay"),
    ],
)
def test_engine_options_that_do_nothing(
    tmp_path: Path, engines: dict[str, Scripted], engine: dict[str, Any], reader: str
) -> None:
    (name,) = engine.keys() - {"backend"}
    problem = rf"engine\.{name} does nothing with backend {reader}\. Leave it out, or change"
    made = EngineOptions(model="judge", **engine)
    for dry_run in (False, True):
        with pytest.raises(RecipeError, match=problem):
            labeling.run(options(tmp_path, engine=made, dry_run=dry_run))
    with pytest.raises(RecipeError, match=problem):
        open_backend(made)
    panel = PanelOptions(judges=(PanelJudge(engine=made),))
    with pytest.raises(RecipeError, match=f"judge 2: {problem}"):
        labeling.run(options(tmp_path, panel=panel))
    assert engines["judge"].calls == []


@pytest.mark.parametrize(
    ("fields", "reader"),
    [
        ({"pairs": "sort", "template": "rating"}, "kind rating: it is for pairwise"),
        ({"orders": "one", "template": "rating"}, "kind rating: it is for pairwise and listwise"),
        ({"min_mass": 0.2, "template": "pairwise-rationale"}, "mode rationale: it is for label"),
        ({"max_cost": 1.0}, "backend transformers: it is for openai and batch"),
        ({"repeats": 3}, "always the same: it is for sampled text and an endpoint's"),
    ],
)
def test_options_that_do_nothing(
    tmp_path: Path, engines: dict[str, Scripted], fields: dict[str, Any], reader: str
) -> None:
    with pytest.raises(RecipeError, match=f"{next(iter(fields))} does nothing .* {reader}"):
        labeling.run(options(tmp_path, **fields))


def test_an_option_that_one_of_two_judges_reads(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    second = EngineOptions(model="second", backend="openai", base_url="http://localhost/v1")
    engines["second"] = Scripted("second")
    prices = tmp_path / "prices.toml"
    prices.write_text("[second]\nprompt = 0\ncompletion = 0\n")
    panel = PanelOptions(judges=(PanelJudge(engine=second),))
    labeling.run(options(tmp_path, panel=panel, max_cost=1.0, prices=prices))
    assert len(final(tmp_path)) == 60


def test_every_engine_option_is_read_by_somebody() -> None:
    """The table knows each option that one engine or another does not read, and no other."""
    names = {entry.name for entry in dataclasses.fields(EngineOptions)}
    assert set(unread.ENGINE.options) == names - {"backend", "model"}
    made = EngineOptions(
        backend="vllm", model="m", lora="folder", gpu_memory=0.5, extra={"block_size": 8}
    )
    there = unread.engine_on(made, "transformers")
    assert there == EngineOptions(model="m", lora="folder")


# --- the index -----------------------------------------------------------------------------------


def test_the_index_finds_rows_by_prompt(tmp_path: Path, engines: dict[str, Scripted]) -> None:
    engines["judge"].fail = lambda call: Scripted.values(call) == [1.0, 3.0]
    labeling.run(options(tmp_path))
    with VerdictIndex(tmp_path / "verdicts") as index:
        assert index.rows == 25
        assert list(index.prompts()) == list(SMALL)
        for prompt_id in SMALL:
            rows = index.verdicts(prompt_id)
            assert {row.prompt_id for row in rows} == {prompt_id}
            assert {row.verdict_id for row in rows} == index.ids(prompt_id)
        assert index.verdicts("unknown") == []
    with VerdictIndex(tmp_path / "verdicts", failed=True) as index:
        assert index.rows == 30


def test_a_verdict_that_stands_there_twice_is_named(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    labeling.run(options(tmp_path))
    path = tmp_path / "verdicts/verdicts-00000.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[0]]))
    prompt_id = decode(lines[0], Verdict).prompt_id
    with (
        VerdictIndex(tmp_path / "verdicts") as index,
        pytest.raises(ShardError, match="has a verdict twice"),
    ):
        index.verdicts(prompt_id)


# --- kill -9 -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_points_and_resumed_ends_with_every_verdict_once(
    tmp_path: Path, engines: dict[str, Scripted]
) -> None:
    """The real command, on recorded replies: ``kill -9`` at twenty-four points of one run."""
    import random

    total = 400
    write_candidates(
        tmp_path / "candidates.jsonl", {f"p{n}": [1.0, 2.0] for n in range(total // 2)}
    )
    labeling.run(options(tmp_path, out=tmp_path / "recorded"))
    expected = {row.verdict_id: row.probs for row in read_rows(tmp_path / "recorded", Verdict)}
    assert len(expected) == total
    command = [sys.executable, "-m", "train.cli", "judge"]
    command += ["--candidates", str(tmp_path / "candidates.jsonl")]
    command += ["--out", str(tmp_path / "verdicts"), "--engine.backend", "replay"]
    command += ["--engine.replay-from", str(tmp_path / "recorded")]
    shard = tmp_path / "verdicts/verdicts-00000.jsonl"
    draw = random.Random(5)

    def size() -> int:
        return shard.stat().st_size if shard.exists() else 0

    row_bytes = (tmp_path / "recorded/verdicts-00000.jsonl").stat().st_size // total
    killed_midway = 0
    for target in sorted(draw.sample(range(1, total - 20), 24)):
        # A pipe that nobody reads slows nothing down; what is killed is a process at work.
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        while size() < target * row_bytes and process.poll() is None:
            os.sched_yield()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_midway += process.returncode == -signal.SIGKILL
        found = [
            decode(line, Verdict)
            for line in shard.read_bytes().splitlines(keepends=True)
            if line.endswith(b"\n")
        ]
        assert len({row.verdict_id for row in found}) == len(found)
        if process.returncode == 0:
            break
    assert killed_midway >= 20
    subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True)
    rows = final(tmp_path)
    assert {row.verdict_id: pytest.approx(row.probs) for row in rows} == expected
    assert manifest_of(tmp_path / "verdicts")["rows"] == total


@pytest.mark.parametrize(("step", "said"), [(0.125, True), (0.13, False)])
def test_rounded_probabilities_are_said_at_the_end(
    tmp_path: Path,
    engines: dict[str, Scripted],
    capsys: pytest.CaptureFixture[str],
    step: float,
    said: bool,
) -> None:
    """Before labels are made of them, and trained on."""
    rows = {f"q{n}": [0.0, step * n, step * (n + 7)] for n in range(12)}
    labeling.run(
        options(tmp_path, candidates=write_candidates(tmp_path / "candidates.jsonl", rows))
    )
    assert ("steps of 0.125" in capsys.readouterr().out) == said
