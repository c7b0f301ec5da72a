"""The reply cache: shared by runs at work, whole after a kill, and clear when it fails."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from scripted import Scripted, write_candidates

from feedback import cache, labeling
from feedback.backends import JudgeCall, JudgeReply
from feedback.cache import ReplyCache
from feedback.config import EngineOptions
from feedback.errors import InputError
from feedback.judge_options import JudgeOptions
from feedback.records import JudgeIdentity, Message, Verdict
from feedback.shards import read_rows

JUDGE = JudgeIdentity(model="judge")


def call(text: str) -> JudgeCall:
    return JudgeCall(call_id=text, messages=(Message(role="user", content=text),))


def reply(text: str) -> JudgeReply:
    return JudgeReply(call_id=text, text=f"about {text}")


def test_runs_at_work_share_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither waits for the other to end, and each finds at once what the other was told."""
    monkeypatch.setattr(cache, "_WAIT_S", 0.1)
    with ReplyCache(tmp_path / "c", JUDGE) as first, ReplyCache(tmp_path / "c", JUDGE) as second:
        first.put(call("a"), reply("a"))
        second.put(call("b"), reply("b"))
        first.put(call("c"), reply("c"))
        assert [one.text for one in (second.get(call("a")), first.get(call("b"))) if one] == [
            "about a",
            "about b",
        ]


def test_a_killed_process_leaves_every_reply(tmp_path: Path) -> None:
    script = (
        "import sys, os, signal; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from test_cache import *\n"
        "store = ReplyCache(Path(sys.argv[1]), JUDGE)\n"
        "for name in 'abc': store.put(call(name), reply(name))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "c")],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    with ReplyCache(tmp_path / "c", JUDGE) as store:
        assert all(store.get(call(name)) == reply(name) for name in "abc")


def test_a_cache_that_fails_is_named_and_loses_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_WAIT_S", 0.05)
    monkeypatch.setattr(labeling, "open_backend", lambda options: Scripted("judge"))
    write_candidates(tmp_path / "candidates.jsonl", {"p": [1, 2, 3]})
    options = JudgeOptions(
        candidates=tmp_path / "candidates.jsonl",
        out=tmp_path / "verdicts",
        engine=EngineOptions(model="judge"),
        cache=str(tmp_path / "c"),
    )
    ReplyCache(tmp_path / "c", JUDGE).close()
    other = sqlite3.connect(tmp_path / "c", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(InputError, match=r"c: the reply cache cannot be used: .*locked.*--cache"):
        labeling.run(options)
    other.close()
    assert len(list(read_rows(tmp_path / "verdicts", Verdict))) == 1  # the one it was told
    labeling.run(options)
    assert len(list(read_rows(tmp_path / "verdicts", Verdict))) == 6
