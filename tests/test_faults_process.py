"""Faults of the machine rather than of the endpoint: killed, disk full, started twice, clock moved.

The run is a process of its own, as users start it: ``rlaif judge``.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fault_proxy import FaultProxy
from test_faults import Damage, damage, failures, options, verdicts, write_candidates

from feedback import labeling
from feedback.records import Verdict

PROMPTS = 40
KILLS = 6
# Without a cache, and with the one that endpoints have unless it is switched off.
both_caches = pytest.mark.parametrize("cache", ["none", "auto"])


@pytest.fixture(scope="module")
def candidates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_candidates(tmp_path_factory.mktemp("process") / "candidates.jsonl", PROMPTS)


@pytest.fixture(scope="module")
def truth(candidates: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Verdict]:
    out = tmp_path_factory.mktemp("truth") / "verdicts"
    with FaultProxy() as proxy:
        labeling.run(options(candidates, out, proxy.base_url))
    return verdicts(out)


def start(
    candidates: Path,
    out: Path,
    base_url: str,
    cache: str,
    *,
    file_limit: int | None = None,
    **environment: str,
) -> subprocess.Popen[str]:
    """Start ``rlaif judge``."""
    command = [sys.executable, "-m", "train.cli", "judge"]
    command += ["--candidates", str(candidates), "--out", str(out), "--cache", cache]
    command += ["--engine.backend", "openai", "--engine.model", "stand-in"]
    command += ["--engine.base-url", base_url, "--engine.concurrency", "8"]

    def limit() -> None:
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        preexec_fn=limit,
        cwd=Path(__file__).parent.parent,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a process; return exit code, stdout and stderr."""
    stdout, stderr = process.communicate(timeout=120)
    return process.returncode, stdout, stderr


@both_caches
def test_killed_at_random_points_and_resumed(
    candidates: Path, truth: list[Verdict], tmp_path: Path, cache: str
) -> None:
    """SIGKILL again and again in one folder; then one run to the end: every verdict once."""
    out = tmp_path / "out"
    draw = random.Random(0)
    killed = 0
    with FaultProxy(latency_s=0.03) as proxy:
        for _ in range(KILLS):
            goal = proxy.requests + draw.randrange(50)
            process = start(candidates, out, proxy.base_url, cache)
            while proxy.requests < goal and process.poll() is None:
                time.sleep(draw.random() * 0.01)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                killed += 1
            process.communicate()
            assert process.returncode in (0, -signal.SIGKILL)
        before = len(verdicts(out)) if out.is_dir() else 0
        if cache == "auto":
            assert replies_kept(tmp_path) >= before, "a reply that was paid for is not in the cache"
        code, _, stderr = finish(start(candidates, out, proxy.base_url, cache))
        assert code == 0, stderr
    assert killed >= KILLS // 2
    assert before > 0, "nothing survived the kills"
    assert damage(truth, verdicts(out)) == Damage(0, 0, 0)
    assert failures(out) == []
    # Only what was in flight when a run died was paid for twice: at most one window a kill.
    asked = sum(count for body, count in proxy.answered.items() if b"Topic" in body)
    assert asked <= len(truth) + killed * 16


@both_caches
def test_disk_full_is_one_clear_line_and_resumable(
    candidates: Path, truth: list[Verdict], tmp_path: Path, cache: str
) -> None:
    """Files may not grow past 40 kB: the run stops with an error, and nothing is half-counted."""
    out = tmp_path / "out"
    with FaultProxy() as proxy:
        code, _, stderr = finish(start(candidates, out, proxy.base_url, cache, file_limit=40_000))
        assert code not in (0, -signal.SIGXFSZ), stderr
        assert "Traceback" not in stderr, stderr
        assert "error:" in stderr
        assert not (out / "manifest.json").exists()
        code, _, stderr = finish(start(candidates, out, proxy.base_url, cache))
        assert code == 0, stderr
    assert damage(truth, verdicts(out)) == Damage(0, 0, 0)


@both_caches
def test_second_run_on_one_folder_refuses(
    candidates: Path, truth: list[Verdict], tmp_path: Path, cache: str
) -> None:
    """Two processes, one folder: the second stops at once with a reason, the first ends well."""
    out = tmp_path / "out"
    with FaultProxy(latency_s=0.1) as proxy:
        first = start(candidates, out, proxy.base_url, cache)
        while not verdicts_begun(out) and first.poll() is None:
            time.sleep(0.01)
        code, _, stderr = finish(start(candidates, out, proxy.base_url, cache))
        assert first.poll() is None, "the first run ended before the second began"
        assert code == 2
        assert "another run is writing this folder" in stderr
        assert "Traceback" not in stderr
        proxy.latency_s = 0.0
        assert finish(first)[0] == 0
    assert damage(truth, verdicts(out)) == Damage(0, 0, 0)


def replies_kept(folder: Path) -> int:
    """Replies in the cache beside the verdict folder."""
    database = sqlite3.connect(folder / "replies.sqlite")
    (count,) = database.execute("SELECT COUNT(*) FROM reply").fetchone()
    database.close()
    return int(count)


def test_two_runs_beside_each_other(candidates: Path, truth: list[Verdict], tmp_path: Path) -> None:
    """Two folders under one parent, so one cache, at the same time: both end well."""
    with FaultProxy(latency_s=0.05) as proxy:
        runs = [start(candidates, tmp_path / name, proxy.base_url, "auto") for name in ("a", "b")]
        for process in runs:
            code, _, stderr = finish(process)
            assert code == 0, stderr
    for name in ("a", "b"):
        assert damage(truth, verdicts(tmp_path / name)) == Damage(0, 0, 0)


def verdicts_begun(out: Path) -> bool:
    """Whether a run has written a verdict."""
    return any(path.stat().st_size for path in out.glob("verdicts-*.jsonl"))


@both_caches
def test_interrupted_from_the_keyboard(
    candidates: Path, truth: list[Verdict], tmp_path: Path, cache: str
) -> None:
    """Ctrl-C: no traceback, what was answered is on disk, and the run can be continued."""
    out = tmp_path / "out"
    with FaultProxy(latency_s=0.3) as proxy:
        process = start(candidates, out, proxy.base_url, cache)
        while not verdicts_begun(out) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        code, stdout, stderr = finish(process)
        assert code != 0
        assert "Traceback" not in stderr, stderr
        kept = verdicts(out)
        assert f"{len(kept)} verdicts in " in stdout, stdout
        assert 0 < len(kept) < len(truth)
        assert finish(start(candidates, out, proxy.base_url, cache))[0] == 0
    assert damage(truth, verdicts(out)) == Damage(0, 0, 0)
