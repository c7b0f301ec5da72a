"""Every fault that an endpoint can show, end to end through the labelling run.

Each test labels the same candidates twice: undisturbed, which gives the truth, and through a proxy
that breaks things. Then it counts verdicts that were lost, doubled or invented. All three are zero.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import fault_proxy
import pytest
from fault_proxy import FaultProxy

from feedback import labeling
from feedback.config import EngineOptions
from feedback.errors import BackendError, BudgetExceeded
from feedback.records import Candidates, Completion, Verdict, encode
from feedback.shards import read_jsonl, read_manifest, shard_paths

PROMPTS = 40
FAST = {"first_wait_s": 0.002, "start_concurrency": 16}


class Damage(NamedTuple):
    """What a faulty run did to the truth."""

    lost: int
    doubled: int
    invented: int


def write_candidates(path: Path, prompts: int = PROMPTS) -> Path:
    """Write prompts with three completions each: six verdicts a prompt."""
    with path.open("wb") as file:
        for number in range(prompts):
            completions = [
                Completion(
                    completion_id=f"c{number}-{place}",
                    completion=f"Reply {place} about topic {number}: " + "so it goes. " * place,
                    model="invented",
                )
                for place in range(3)
            ]
            row = Candidates(
                prompt_id=f"p{number}", prompt=f"Topic {number}?", completions=completions
            )
            file.write(encode(row) + b"\n")
    return path


def options(candidates: Path, out: Path, base_url: str, **engine: object) -> labeling.JudgeOptions:
    """Return a labelling run over the endpoint at ``base_url``."""
    extra = {**FAST, **engine.pop("extra", {})}  # type: ignore[dict-item]
    settings = {"model": "stand-in", "concurrency": 32, "timeout_s": 20.0, **engine}
    return labeling.JudgeOptions(
        candidates=candidates,
        out=out,
        cache="none",
        engine=EngineOptions(backend="openai", base_url=base_url, extra=extra, **settings),
    )


def verdicts(out: Path) -> list[Verdict]:
    """Return the final verdicts of a folder, as they lie on disk."""
    return [row for path in shard_paths(out, "verdicts") for row in read_jsonl(path, Verdict)]


def failures(out: Path) -> list[Verdict]:
    """Return the failed calls of a folder's last run."""
    path = out / "failed.jsonl"
    return list(read_jsonl(path, Verdict)) if path.is_file() else []


def damage(truth: list[Verdict], found: list[Verdict], *, excused: int = 0) -> Damage:
    """Compare a faulty run with the truth; ``excused`` verdicts may be missing."""
    # By what was asked: each proxy has a port of its own, which is part of the ids.
    known = {_asked(verdict): verdict for verdict in truth}
    seen = Counter(_asked(verdict) for verdict in found)
    invented = sum(
        _asked(verdict) not in known
        or verdict.probs != known[_asked(verdict)].probs
        or verdict.winner != known[_asked(verdict)].winner
        or verdict.outcome != known[_asked(verdict)].outcome
        for verdict in found
    )
    lost = len(known.keys() - seen.keys()) - excused
    return Damage(lost, sum(seen.values()) - len(seen), invented)


def _asked(verdict: Verdict) -> tuple[str, tuple[str, ...], int]:
    return verdict.prompt_id, tuple(verdict.shown), verdict.repeat


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_candidates(tmp_path_factory.mktemp("faults") / "candidates.jsonl")


@pytest.fixture(scope="module")
def truth(candidates: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Verdict]:
    out = tmp_path_factory.mktemp("truth") / "verdicts"
    with FaultProxy() as proxy:
        labeling.run(options(candidates, out, proxy.base_url))
    found = verdicts(out)
    assert len(found) == 6 * PROMPTS
    assert {verdict.outcome for verdict in found} == {"decided"}
    return found


PASSING = {
    "5% HTTP 500": fault_proxy.share("status_500", 0.05, seed=1),
    "5% HTTP 503": fault_proxy.share("status_503", 0.05, seed=2),
    "burst of 429": fault_proxy.burst("status_429", first=40, last=160),
    "burst of 429 with Retry-After": fault_proxy.burst("status_429_after_0.1", first=40, last=90),
    "burst of 429 with a date": fault_proxy.burst("status_429_date_0", first=40, last=90),
    "5% dropped connections": fault_proxy.share("drop", 0.05, seed=3),
    "5% half-sent bodies": fault_proxy.share("half", 0.05, seed=4),
    **{
        f"every reply {fault} at first": fault_proxy.first_time(fault)
        for fault in fault_proxy.BROKEN_REPLIES
    },
}


@pytest.mark.parametrize("name", PASSING)
def test_faults_that_pass_cost_nothing(
    name: str, candidates: Path, truth: list[Verdict], tmp_path: Path
) -> None:
    """Retried until they pass: the folder ends exactly as without faults."""
    with FaultProxy() as proxy:
        run = options(candidates, tmp_path / "out", proxy.base_url)
        plan = PASSING[name]
        proxy.plan = lambda number, body: plan(number, body) if b"Topic" in body else None
        labeling.run(run)
        assert proxy.broken, "the fault never happened"
    assert damage(truth, verdicts(tmp_path / "out")) == Damage(0, 0, 0)
    assert failures(tmp_path / "out") == []
    assert max(verdict.attempts for verdict in verdicts(tmp_path / "out")) > 1


TEXT_FAULTS = ("empty_text", "two_choices", "no_choices", "malformed", "not_json", "half", "drop")


@pytest.mark.parametrize("fault", TEXT_FAULTS)
def test_faults_cost_nothing_where_the_verdict_is_text(
    fault: str, candidates: Path, tmp_path: Path
) -> None:
    """Reasons first, then the verdict: an empty or broken text is asked again, never read."""
    with FaultProxy() as proxy:
        run = options(candidates, tmp_path / "truth", proxy.base_url)
        run = dataclasses.replace(run, template="pairwise-rationale")
        labeling.run(run)
        plan = fault_proxy.first_time(fault)
        proxy.plan = lambda number, body: plan(number, body) if b"Topic" in body else None
        labeling.run(dataclasses.replace(run, out=tmp_path / "out"))
        assert proxy.broken[fault] == 6 * PROMPTS
    known = verdicts(tmp_path / "truth")
    assert {verdict.outcome for verdict in known} == {"decided"}
    assert damage(known, verdicts(tmp_path / "out")) == Damage(0, 0, 0)
    assert failures(tmp_path / "out") == []


def test_hangs_time_out_and_pass(candidates: Path, truth: list[Verdict], tmp_path: Path) -> None:
    """2% of requests never get an answer."""
    plan = fault_proxy.share("hang", 0.02, seed=5)
    with FaultProxy() as proxy:
        run = options(candidates, tmp_path / "out", proxy.base_url, timeout_s=0.5)
        proxy.plan = lambda number, body: plan(number, body) if b"Topic" in body else None
        labeling.run(run)
        assert proxy.broken["hang"] > 0
    assert damage(truth, verdicts(tmp_path / "out")) == Damage(0, 0, 0)
    assert failures(tmp_path / "out") == []


def test_bad_requests_lose_themselves_alone_and_heal(
    candidates: Path, truth: list[Verdict], tmp_path: Path
) -> None:
    """HTTP 400 for some rows: those fail, in one try each, and the next run asks only them."""
    out = tmp_path / "out"
    plan = fault_proxy.rows("status_400", 0.02)
    with FaultProxy() as proxy:
        run = options(candidates, out, proxy.base_url)
        proxy.plan = lambda number, body: plan(number, body) if b"Topic" in body else None
        labeling.run(run)
        bad = proxy.broken["status_400"]
        assert bad > 0
        failed = failures(out)
        assert len(failed) == bad
        assert {verdict.outcome for verdict in failed} == {"failed"}
        assert all("HTTP 400: made to fail" in (verdict.error or "") for verdict in failed)
        assert {verdict.attempts for verdict in failed} == {1}
        assert all(verdict.probs is None and verdict.winner is None for verdict in failed)
        assert damage(truth, verdicts(out), excused=bad) == Damage(0, 0, 0)
        assert read_manifest(out)["failed"] == bad

        proxy.plan, before = None, proxy.requests
        labeling.run(run)
        judged = [body for body in proxy.answered if b"Topic" in body]
        assert len(judged) == len(truth), "a verdict that was there was asked again"
        assert proxy.requests - before < bad + 10
    assert damage(truth, verdicts(out)) == Damage(0, 0, 0)
    assert failures(out) == []


@pytest.mark.parametrize("fault", ["nan", "minus_inf", "two_choices", "no_logprobs", "malformed"])
def test_replies_that_stay_broken_never_become_labels(
    fault: str, candidates: Path, truth: list[Verdict], tmp_path: Path
) -> None:
    """10% of rows are answered wrongly for ever: failed, never a verdict."""
    out = tmp_path / "out"
    plan = fault_proxy.rows(fault, 0.1)
    with FaultProxy() as proxy:
        run = options(candidates, out, proxy.base_url, max_retries=2)
        proxy.plan = lambda number, body: plan(number, body) if b"Topic" in body else None
        labeling.run(run)
    failed = failures(out)
    assert failed
    assert all(verdict.attempts == 3 for verdict in failed)
    assert all("invalid reply" in (verdict.error or "") for verdict in failed)
    assert damage(truth, verdicts(out), excused=len(failed)) == Damage(0, 0, 0)


def test_a_dead_endpoint_stops_the_run_and_keeps_what_is_done(
    candidates: Path, truth: list[Verdict], tmp_path: Path
) -> None:
    """From request 150 on, everything fails: one clear error, no flood, and the rest on resume."""
    out = tmp_path / "out"
    with FaultProxy() as proxy:
        run = options(candidates, out, proxy.base_url, max_retries=1, concurrency=16)
        proxy.plan = lambda number, body: "status_401" if number >= 150 else None
        with pytest.raises(BackendError, match=r"calls in a row.*HTTP 401"):
            labeling.run(run)
        assert proxy.requests < 150 + 100
        assert 0 < len(verdicts(out)) <= 150
        proxy.plan = None
        labeling.run(run)
    assert damage(truth, verdicts(out)) == Damage(0, 0, 0)
    assert failures(out) == []


@pytest.mark.parametrize("fault", ["two_choices", "no_logprobs", "above_zero"])
def test_replies_that_cannot_be_used_are_billed_and_count_against_the_limit(
    fault: str, candidates: Path, tmp_path: Path
) -> None:
    """Every attempt is charged, and no retry is sent once the limit is reached."""
    prices = tmp_path / "prices.toml"
    prices.write_text('["stand-in"]\nprompt = 100.0\ncompletion = 100.0\n')
    out, billed = tmp_path / "out", 0.0

    def bill(number: int, body: bytes) -> str | None:
        nonlocal billed
        if b"Topic" not in body:
            return None
        billed += (len(json.dumps(json.loads(body)["messages"])) // 4 + 1) * 100 / 1e6
        return fault

    with FaultProxy() as proxy:
        run = options(candidates, out, proxy.base_url, max_retries=5, concurrency=4)
        run = dataclasses.replace(run, prices=prices, max_cost=0.5)
        proxy.plan = bill
        with pytest.raises(BudgetExceeded, match=r"--max-cost \$0.5"):
            labeling.run(run)
    failed = failures(out)
    assert math.fsum(verdict.cost for verdict in failed) == pytest.approx(billed)
    assert max(verdict.attempts for verdict in failed) == 6
    assert 0.3 < billed <= 0.5 * 1.1  # a call is estimated before it is sent


def test_a_verdict_costs_all_its_attempts(candidates: Path, tmp_path: Path) -> None:
    """The first reply to each question is of no use; the second is the verdict: both are paid."""
    prices = tmp_path / "prices.toml"
    prices.write_text('["stand-in"]\nprompt = 100.0\ncompletion = 0\n')
    costs = []
    for name in ("good", "bad"):
        with FaultProxy() as proxy:
            run = options(candidates, tmp_path / name, proxy.base_url)
            if name == "bad":
                plan = fault_proxy.first_time("two_choices")
                proxy.plan = lambda number, body, plan=plan: (
                    plan(number, body) if b"Topic" in body else None
                )
            labeling.run(dataclasses.replace(run, prices=prices))
        costs.append(read_manifest(tmp_path / name)["totals"]["cost"])
    assert costs[1] == pytest.approx(2 * costs[0])


def test_clock_jumps_change_nothing(
    candidates: Path, truth: list[Verdict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock leaps by days, both ways, at every reading; waits and rates do not notice."""
    import itertools
    import time

    real = time.time
    jumps = itertools.cycle((0.0, 86400.0, -86400.0 * 365, 5.0, -3600.0))
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    plan = fault_proxy.burst("status_429_date_0", first=20, last=60)
    with FaultProxy() as proxy:
        proxy.plan = plan
        run = options(candidates, tmp_path / "out", proxy.base_url, requests_per_minute=60_000.0)
        labeling.run(run)
        assert proxy.broken
    found = verdicts(tmp_path / "out")
    assert damage(truth, found) == Damage(0, 0, 0)
    assert all(0 <= verdict.latency_s < 20 for verdict in found)


def test_no_wall_clock_in_any_wait(root: Path) -> None:
    """No module of the engines reads a clock that can jump."""
    for path in (root / "feedback" / "backends").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "time.time(" not in text, path
        assert "datetime.now" not in text, path


def test_manifest_and_rows_hold_no_key(
    candidates: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that echoes the key in its errors, and every file the run writes."""
    secret = "sk-this-must-never-be-seen-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    out = tmp_path / "out"
    with FaultProxy() as proxy:
        host = proxy.base_url.replace("http://", "http://user:hunter2secret@")
        run = options(
            candidates, out, host, max_retries=0, extra={"headers": {"X-Team": "teamsecret99"}}
        )
        plan = fault_proxy.rows("status_400", 0.05)
        proxy.plan = lambda number, body: plan(number, body) if b"Topic" in body else None
        labeling.run(run)
    for path in out.iterdir():
        text = path.read_text(encoding="utf-8", errors="replace")
        for hidden in (secret, "hunter2secret", "teamsecret99"):
            assert hidden not in text, f"{path.name} holds a secret"
    json.loads((out / "manifest.json").read_text())
