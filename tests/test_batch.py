"""The Batch API engine: limits, prices, and every moment at which a run can die."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from batch_server import BatchServer, Runner, answer_at_once, vllm_run_batch
from fault_proxy import FaultProxy
from serving import MODEL_NAME, need_vllm
from test_faults import Damage, damage, failures, options, verdicts, write_candidates

from feedback import labeling
from feedback.backends import JudgeCall, JudgeReply, SampleCall
from feedback.backends.batch import BatchBackend
from feedback.backends.openai import OpenAIBackend
from feedback.backends.opening import open_backend
from feedback.config import EngineOptions
from feedback.errors import BackendError, RecipeError
from feedback.records import Message
from feedback.shards import read_manifest


def calls(count: int = 24) -> list[JudgeCall]:
    return [
        JudgeCall(
            call_id=f"call {number}",
            messages=(Message(role="user", content=f"Question {number}: A or B?"),),
            choices=("A", "B"),
        )
        for number in range(count)
    ]


def engine(server: BatchServer, folder: Path, **settings: Any) -> BatchBackend:
    extra = {"folder": str(folder), "poll_s": 0.01, "probe": False, **settings.pop("extra", {})}
    values = {"model": "stand-in", "timeout_s": 20.0, "max_retries": 2, **settings}
    return BatchBackend(
        EngineOptions(backend="batch", base_url=server.base_url, extra=extra, **values)
    )


def judged(server: BatchServer, folder: Path, count: int = 24, **settings: Any) -> list[JudgeReply]:
    backend = engine(server, folder, **settings)
    try:
        return list(backend.judge(calls(count)))
    finally:
        backend.close()


@pytest.fixture
def truth() -> dict[str, dict[str, float] | None]:
    """What the same endpoint says outside of batches."""
    with FaultProxy() as proxy:
        online = OpenAIBackend(EngineOptions(model="stand-in", base_url=proxy.base_url))
        found = {reply.call_id: reply.choice_logprobs for reply in online.judge(calls())}
        online.close()
    return found


def same(replies: list[JudgeReply], truth: dict[str, dict[str, float] | None]) -> bool:
    assert [reply.error for reply in replies] == [None] * len(replies)
    assert len(replies) == len(truth), Counter(reply.call_id for reply in replies)
    return {reply.call_id: reply.choice_logprobs for reply in replies} == truth


def request_files(server: BatchServer) -> list[list[dict[str, Any]]]:
    return [
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(server.folder.glob("file-*"))
    ]


def test_files_stay_within_the_limits(tmp_path: Path, truth: dict[str, Any]) -> None:
    with BatchServer(tmp_path) as server:
        replies = judged(server, tmp_path / "a", extra={"requests_per_file": 7})
        assert same(replies, truth)
        assert [len(rows) for rows in request_files(server)] == [7, 7, 7, 3]
        rows = request_files(server)[0]
        assert {row["url"] for row in rows} == {"/v1/chat/completions"}
        assert {row["method"] for row in rows} == {"POST"}
        size = max(len(json.dumps(row)) for row in rows)
    with BatchServer(tmp_path) as server:
        replies = judged(server, tmp_path / "b", extra={"bytes_per_file": 5 * size})
        assert same(replies, truth)
        files = [path for path in tmp_path.glob("file-*") if path.stat().st_size <= 5 * size]
        assert len(files) >= 5


def test_call_larger_than_a_batch_is_that_calls_error(tmp_path: Path) -> None:
    with BatchServer(tmp_path) as server:
        backend = engine(server, tmp_path / "state", extra={"bytes_per_file": 2000})
        large = JudgeCall(call_id="large", messages=(Message(role="user", content="x" * 3000),))
        replies = {reply.call_id: reply for reply in backend.judge([large, *calls(3)])}
        backend.close()
    assert "larger than a batch may be" in (replies.pop("large").error or "")
    assert [reply.error for reply in replies.values()] == [None] * 3


def test_ids_are_on_disk_before_anything_is_waited_for(
    tmp_path: Path, truth: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at the first look; run again: no second upload, no second batch, every reply."""
    state = tmp_path / "state"
    with BatchServer(tmp_path) as server:
        server.looks_until_done = 2

        def interrupt(seconds: float) -> None:
            batches = [json.loads(path.read_text()) for path in state.glob("*.json")]
            assert len(batches) == 3
            assert {batch["step"] for batch in batches} == {"submitted"}
            assert {batch["batch_id"] for batch in batches} == set(server.batches)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", interrupt)
            with pytest.raises(KeyboardInterrupt):
                judged(server, state, extra={"requests_per_file": 10})
        assert same(judged(server, state), truth)
        assert (server.files, len(server.batches)) == (3, 3)
        # And once more, after everything has ended: answered from the downloaded files.
        assert same(judged(server, state), truth)
        assert (server.files, len(server.batches)) == (3, 3)


@pytest.mark.parametrize("retries", [0, 3])
def test_lost_yes_of_the_provider_makes_no_second_batch(
    retries: int, tmp_path: Path, truth: dict[str, Any]
) -> None:
    """The batch was created and the reply lost: within one run, and over two."""
    state = tmp_path / "state"
    with BatchServer(tmp_path) as server:
        server.lose_next = "POST /v1/batches"
        if retries == 0:
            with pytest.raises(BackendError, match="run the command again"):
                judged(server, state, max_retries=0)
        else:
            assert same(judged(server, state, max_retries=retries), truth)
        assert server.lose_next == "", "the reply was not lost"
        assert same(judged(server, state), truth)
        assert len(server.batches) == 1


def test_killed_between_upload_and_submission(
    tmp_path: Path, truth: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "state"
    with BatchServer(tmp_path) as server:
        backend = engine(server, state)

        def die(batch: Any) -> str:
            raise KeyboardInterrupt

        monkeypatch.setattr(backend._jobs, "_create", die)
        with pytest.raises(KeyboardInterrupt):
            list(backend.judge(calls()))
        backend.close()
        assert len(server.batches) == 0
        assert same(judged(server, state), truth)
        assert (server.files, len(server.batches)) == (1, 1)


def broken(**lines: str) -> Runner:
    """Return a runner that breaks the results of some calls: ``call_3="status"``."""

    def run(requests: Path, output: Path) -> None:
        answer_at_once(requests, output)
        rows = []
        for line in output.read_text().splitlines():
            row = json.loads(line)
            fault = lines.get(row["custom_id"].replace(" ", "_"))
            if fault == "status":
                error = {"error": {"message": "too long", "code": "context_length_exceeded"}}
                row["response"] |= {"status_code": 400, "body": error}
            elif fault == "error":
                row |= {"response": None, "error": {"code": "batch_expired", "message": "expired"}}
            elif fault == "nan":
                top = row["response"]["body"]["choices"][0]["logprobs"]["content"][0]
                top["top_logprobs"][0]["logprob"] = math.nan
            elif fault == "two_choices":
                row["response"]["body"]["choices"] *= 2
            if fault != "missing":
                rows.append(json.dumps(row))
        output.write_text("\n".join(rows) + "\nnot a line of JSON\n")

    return run


def test_what_a_batch_could_not_answer_is_asked_again_and_only_that(
    tmp_path: Path, truth: dict[str, Any]
) -> None:
    state = tmp_path / "state"
    faults = {
        "call_2": "status",
        "call_5": "error",
        "call_7": "missing",
        "call_11": "nan",
        "call_13": "two_choices",
    }
    with BatchServer(tmp_path, broken(**faults)) as server:
        replies = {reply.call_id: reply for reply in judged(server, state)}
        assert len(replies) == 24
        errors = {name: reply.error for name, reply in replies.items() if reply.error}
        assert errors.keys() == {name.replace("_", " ") for name in faults}
        assert "HTTP 400: too long" in (errors["call 2"] or "")
        assert "expired" in (errors["call 5"] or "")
        assert "without a readable reply" in (errors["call 7"] or "")
        assert "without a readable reply" in (errors["call 11"] or ""), "NaN is not JSON"
        assert "invalid reply: 2 choices" in (errors["call 13"] or "")
        # That one was billed like any other; the rest of them said nothing of tokens.
        assert replies["call 13"].usage.prompt_tokens > 0
        server.runner = answer_at_once
        assert same(judged(server, state), truth)
        assert [len(rows) for rows in request_files(server)] == [24, 5]


def test_full_queue_is_waited_for(tmp_path: Path, truth: dict[str, Any]) -> None:
    with BatchServer(tmp_path) as server:
        server.looks_until_done = 1
        server.refusal = {"code": "token_limit_exceeded", "message": "Enqueued token limit"}
        replies = judged(server, tmp_path / "state", extra={"requests_per_file": 12})
        assert same(replies, truth)
        assert (server.files, len(server.batches)) == (2, 3)


def test_refused_batch_is_an_error_and_forgotten(tmp_path: Path, truth: dict[str, Any]) -> None:
    with BatchServer(tmp_path) as server:
        server.refusal = {"code": "invalid_model", "message": "no such model"}
        with pytest.raises(BackendError, match="refused: no such model"):
            judged(server, tmp_path / "state")
        assert same(judged(server, tmp_path / "state"), truth)


def test_second_run_on_one_folder_refuses(tmp_path: Path) -> None:
    with BatchServer(tmp_path) as server:
        server.looks_until_done = 10**9
        first = engine(server, tmp_path / "state", extra={"requests_per_file": 1})
        bad = JudgeCall(call_id="bad", messages=(Message(role="user", content="\ud800"),))
        stream = first.judge([bad, *calls(1)])
        next(stream)
        with pytest.raises(BackendError, match=r"another run uses the batches.*extra\.folder"):
            judged(server, tmp_path / "state")
        stream.close()  # type: ignore[attr-defined]
        first.close()


def test_other_models_batches_are_left_alone(tmp_path: Path, truth: dict[str, Any]) -> None:
    with BatchServer(tmp_path) as server:
        judged(server, tmp_path / "state", 5)
        judged(server, tmp_path / "state", 5, model="another")
        assert len(server.batches) == 2


def test_samples_come_in_batches_too(tmp_path: Path) -> None:
    with BatchServer(tmp_path) as server:
        backend = engine(server, tmp_path / "state")
        wanted = [SampleCall(call_id=f"s{n}", messages=calls()[n].messages, n=3) for n in range(4)]
        replies = list(backend.sample(wanted))
        backend.close()
    assert sorted(reply.call_id for reply in replies) == ["s0", "s1", "s2", "s3"]
    assert all(len(reply.texts) == 3 for reply in replies)


def test_labelling_through_batches_is_the_same_at_half_the_price(tmp_path: Path) -> None:
    """End to end, with one call that fails and is asked again by the next run."""
    rows = write_candidates(tmp_path / "candidates.jsonl", 6)
    prices = tmp_path / "prices.toml"
    prices.write_text("[stand-in]\nprompt = 2.0\ncompletion = 8.0\nbatch = 0.5\n")
    with FaultProxy() as proxy:
        run = options(rows, tmp_path / "online", proxy.base_url)
        labeling.run(dataclasses.replace(run, prices=prices))
    truth = verdicts(tmp_path / "online")
    with BatchServer(tmp_path) as server:
        extra = {"folder": str(tmp_path / "state"), "poll_s": 0.01, "probe": False}
        batched = dataclasses.replace(
            run,
            out=tmp_path / "batched",
            prices=prices,
            engine=EngineOptions(
                backend="batch", model="stand-in", base_url=server.base_url, extra=extra
            ),
        )
        labeling.run(batched)
    found = verdicts(tmp_path / "batched")
    assert damage(truth, found) == Damage(0, 0, 0)
    assert failures(tmp_path / "batched") == []
    full = read_manifest(tmp_path / "online")["totals"]["cost"]
    assert full > 0
    assert read_manifest(tmp_path / "batched")["totals"]["cost"] == pytest.approx(full / 2)


def test_long_questions_are_cut_and_headers_sent(tmp_path: Path, tiny_model: Path) -> None:
    """As at any other endpoint: fairly, flagged, and never beyond what the judge can read."""
    rows = write_candidates(tmp_path / "candidates.jsonl", 2)
    rows.write_text(rows.read_text().replace("Reply 2", "Reply 2 " + "at length " * 200))
    with BatchServer(tmp_path) as server:
        extra = {
            **{"folder": str(tmp_path / "state"), "poll_s": 0.01, "probe": False},
            **{"tokenizer": str(tiny_model), "max_length": 1000, "headers": {"X-Team": "judges"}},
        }
        run = options(rows, tmp_path / "out", server.base_url)
        batch = EngineOptions(
            backend="batch", model="stand-in", base_url=server.base_url, extra=extra
        )
        labeling.run(dataclasses.replace(run, engine=batch))
        (sent,) = request_files(server)
        assert {headers.get("X-Team") for headers in server.headers} == {"judges"}
    found = verdicts(tmp_path / "out")
    assert len(found) == len(sent) == 12
    assert {tuple(verdict.flags) for verdict in found} == {(), ("truncated_completions",)}
    # A byte is a token there.
    lengths = [sum(len(turn["content"]) for turn in row["body"]["messages"]) for row in sent]
    assert 900 < max(lengths) < 1000 < 2000
    with pytest.raises(RecipeError, match=r"extra.max_length does nothing without extra.tokenizer"):
        engine(server, tmp_path / "other", extra={"max_length": 100})


def test_batch_api_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(BackendError, match="set OPENAI_API_KEY"):
        open_backend(EngineOptions(backend="batch", model="m"))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.xdist_group("vllm")
def test_vllm_run_batch_reads_and_answers_our_files(vllm_judge: Path, tmp_path: Path) -> None:
    """The file format, by a program that reads it: same probabilities as transformers."""
    need_vllm()
    local = open_backend(EngineOptions(model=str(vllm_judge), device="cpu", dtype="float32"))
    expected = {reply.call_id: reply.choice_logprobs for reply in local.judge(calls(12))}
    with BatchServer(tmp_path, vllm_run_batch(vllm_judge, MODEL_NAME)) as server:
        replies = judged(server, tmp_path / "state", 12, model=MODEL_NAME, extra={"poll_s": 0.2})
        assert not server.problems
    assert len(replies) == 12
    for reply in replies:
        assert reply.error is None
        found = {label: math.exp(value) for label, value in (reply.choice_logprobs or {}).items()}
        wanted = {k: math.exp(v) for k, v in (expected[reply.call_id] or {}).items()}
        assert found == pytest.approx(wanted, abs=2e-4)
        assert reply.usage.prompt_tokens > 0
