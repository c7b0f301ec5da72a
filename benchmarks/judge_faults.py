"""Lost, doubled and invented verdicts under every fault, in front of real vLLM; 100 kills.

    python benchmarks/judge_faults.py [--kills 100] [--faketime /path/libfaketime.so.1]

A vLLM server (the CPU engine will do) answers through the fault proxy of the tests, which remembers
what it said, so that a run can be repeated thousands of times on real answers. Every labelling run
is ``rlaif judge`` or what that command calls; its folder is compared with an undisturbed one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import fault_proxy  # noqa: E402
from fault_proxy import FaultProxy  # noqa: E402
from result_file import RESULTS, cpu, write_result  # noqa: E402
from serving import make_judge, serve  # noqa: E402
from test_faults import (  # noqa: E402
    PASSING,
    Damage,
    damage,
    failures,
    options,
    verdicts,
    write_candidates,
)

from feedback import labeling  # noqa: E402
from feedback.records import Verdict  # noqa: E402

Row = dict[str, Any]


class Bench:
    """The proxy, the truth, and a folder for each run."""

    def __init__(self, proxy: FaultProxy, folder: Path, model: str, prompts: int):
        self.proxy = proxy
        self.folder = folder
        self.model = model
        self.candidates = write_candidates(folder / "candidates.jsonl", prompts)
        self.label(folder / "truth")
        self.truth: list[Verdict] = verdicts(folder / "truth")
        assert len(self.truth) == 6 * prompts
        self.rows: list[Row] = []

    def label(self, out: Path, **engine: Any) -> None:
        """One labelling run in this process."""
        labeling.run(options(self.candidates, out, self.proxy.base_url, model=self.model, **engine))

    def start(self, out: Path, *, cache: str = "none", **environment: str) -> subprocess.Popen[str]:
        """One labelling run in a process of its own."""
        command = [sys.executable, "-m", "train.cli", "judge", "--cache", cache]
        command += ["--candidates", str(self.candidates), "--out", str(out)]
        command += ["--engine.backend", "openai", "--engine.model", self.model]
        command += ["--engine.base-url", self.proxy.base_url, "--engine.concurrency", "8"]
        return subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, **environment},
        )

    def note(self, name: str, out: Path, *, excused: int = 0, **more: Any) -> Damage:
        """Compare a folder with the truth and keep the row."""
        found = damage(self.truth, verdicts(out), excused=excused)
        row = {"fault": name, **found._asdict(), "failed_calls": len(failures(out)), **more}
        self.rows.append(row)
        print(row, flush=True)
        return found

    def only_judging(self, plan: fault_proxy.Plan) -> fault_proxy.Plan:
        """Return the plan without the start-up probes."""
        return lambda number, body: plan(number, body) if b"Topic" in body else None


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Wait for a run; return exit code and stderr."""
    _, stderr = process.communicate(timeout=300)
    return process.returncode, stderr


def endpoint_faults(bench: Bench) -> None:
    """Everything that an endpoint can do wrong and then right."""
    hang = fault_proxy.share("hang", 0.02, seed=9)
    plans = {**PASSING, "2% hangs": hang}
    for number, (name, plan) in enumerate(plans.items()):
        out = bench.folder / f"endpoint{number}"
        bench.proxy.requests = 0
        bench.proxy.broken.clear()
        bench.proxy.plan = bench.only_judging(plan)
        bench.label(out, timeout_s=2.0)
        hits = sum(bench.proxy.broken.values())
        assert hits, name
        bench.note(name, out, faults=hits)
    for name, fault in (("0.5% HTTP 400", "status_400"), ("5% NaN for ever", "nan")):
        out = bench.folder / fault
        bench.proxy.plan = bench.only_judging(
            fault_proxy.rows(fault, 0.005 if fault == "status_400" else 0.05)
        )
        bench.label(out, max_retries=2)
        bad = len(failures(out))
        bench.note(name, out, excused=bad)
        bench.proxy.plan = None
        bench.label(out)
        bench.note(f"{name}, resumed", out)
    slow_answers(bench)
    bench.proxy.plan = None


def slow_answers(bench: Bench) -> None:
    """Some answers take 60 s: waited for where the timeout allows it, else asked again."""
    for name, timeout_s in (("60 s hangs, timeout 120 s", 120.0), ("60 s hangs, timeout 5 s", 5.0)):
        out = bench.folder / f"slow{timeout_s:.0f}"
        bench.proxy.requests = 0
        bench.proxy.broken.clear()
        bench.proxy.plan = bench.only_judging(fault_proxy.burst("hang_60", first=100, last=110))
        bench.label(out, timeout_s=timeout_s)
        hits = sum(bench.proxy.broken.values())
        assert hits == 10, hits
        slowest = round(max(verdict.latency_s for verdict in verdicts(out)), 1)
        bench.note(name, out, faults=hits, slowest_s=slowest)


def kills(bench: Bench, count: int, *, per_campaign: int = 10) -> int:
    """SIGKILL at moments drawn over the whole life of a run, start-up and finish included.

    Every other campaign runs with the reply cache, as endpoints do unless it is switched off: then
    no reply that stands in the folder may be missing from it.
    """
    draw = random.Random(0)
    bench.proxy.latency_s = 0.03
    begun = time.monotonic()
    assert finish(bench.start(bench.folder / "timing"))[0] == 0
    whole = time.monotonic() - begun
    done = campaign = 0
    while done < count:
        out = bench.folder / f"killed{campaign}" / "verdicts"  # a cache of its own beside it
        cache = ("none", "auto")[campaign % 2]
        moments = []
        asked = bench.proxy.requests
        for _ in range(min(per_campaign, count - done)):
            process = bench.start(out, cache=cache)
            moment = draw.uniform(0.0, whole / 2)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(moment)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                done += 1
                moments.append(round(moment, 2))
            process.communicate()
        written, cached = len(verdicts(out)), replies_kept(out.parent)
        assert cache == "none" or cached >= written, f"{written} verdicts, {cached} replies"
        code, stderr = finish(bench.start(out, cache=cache))
        assert code == 0, stderr
        bench.note(
            f"{len(moments)} kills",
            out,
            cache=cache,
            verdicts_before_the_last_run=written,
            replies_in_the_cache_before_it=cached,
            kills=len(moments),
            at_s=moments,
            requests=bench.proxy.requests - asked,
        )
        campaign += 1
    bench.proxy.latency_s = 0.0
    return done


def replies_kept(folder: Path) -> int:
    """Replies in the cache beside a verdict folder; 0 without one."""
    if not (folder / "replies.sqlite").is_file():
        return 0
    with contextlib.closing(sqlite3.connect(folder / "replies.sqlite")) as database:
        try:
            (count,) = database.execute("SELECT COUNT(*) FROM reply").fetchone()
        except sqlite3.OperationalError:  # killed before the table was made
            return 0
    return int(count)


def second_run(bench: Bench) -> None:
    """Two runs on one folder."""
    out = bench.folder / "twice"
    bench.proxy.latency_s = 0.2
    first = bench.start(out)
    while not any(path.stat().st_size for path in out.glob("verdicts-*.jsonl")):
        time.sleep(0.02)
        assert first.poll() is None
    code, stderr = finish(bench.start(out))
    assert first.poll() is None, "the first run ended before the second began: more --prompts"
    bench.proxy.latency_s = 0.0
    assert finish(first)[0] == 0
    refused = code == 2 and "another run is writing this folder" in stderr
    bench.note("two runs on one folder", out, second_refused=refused)
    assert refused


def disk_full(bench: Bench) -> None:
    """A file system of 64 KiB, then a larger one. Needs the right to mount."""
    disk = bench.folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        bench.rows.append({"fault": "disk full", "skipped": "may not mount a file system"})
        return
    try:
        code, stderr = finish(bench.start(disk / "out"))
        lines = [line for line in stderr.splitlines() if line.startswith("error:")]
        assert code != 0 and "Traceback" not in stderr and lines, stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert finish(bench.start(disk / "out"))[0] == 0
        bench.note("disk full, then resumed", disk / "out", message=lines[-1])
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@contextlib.contextmanager
def jumping(path: Path) -> Iterator[None]:
    """Rewrite libfaketime's offset file every 20 ms: hours and years, back and forth."""
    stop = threading.Event()
    draw = random.Random(0)

    def jump() -> None:
        while not stop.wait(0.02):
            path.write_text(f"{draw.choice('+-')}{draw.choice([5, 3600, 86400, 31536000])}\n")

    thread = threading.Thread(target=jump)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def clock_jumps(bench: Bench, library: Path | None) -> None:
    """The whole process under libfaketime, the wall clock jumping all the time."""
    if library is None or not library.is_file():
        bench.rows.append({"fault": "clock jumps", "skipped": "no libfaketime (--faketime)"})
        return
    stamp = bench.folder / "faketime"
    stamp.write_text("+0\n")
    out = bench.folder / "clock"
    bench.proxy.plan = bench.only_judging(fault_proxy.burst("status_429_date_1", first=30, last=60))
    bench.proxy.requests = 0
    bench.proxy.broken.clear()
    bench.proxy.latency_s = 0.01
    with jumping(stamp):
        code, stderr = finish(
            bench.start(
                out,
                LD_PRELOAD=str(library),
                FAKETIME_TIMESTAMP_FILE=str(stamp),
                FAKETIME_NO_CACHE="1",
                FAKETIME_DONT_FAKE_MONOTONIC="1",
                DONT_FAKE_MONOTONIC="1",
            )
        )
    bench.proxy.plan, bench.proxy.latency_s = None, 0.0
    assert code == 0, stderr
    slowest = max(verdict.latency_s for verdict in verdicts(out))
    assert slowest < 60, slowest
    bench.note("clock jumps", out, faults=sum(bench.proxy.broken.values()), slowest_s=slowest)


def main() -> None:
    """Run everything and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--faketime", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "judge_faults.json")
    options = parser.parse_args()
    stages: list[Callable[[Bench], object]] = [
        endpoint_faults,
        second_run,
        disk_full,
        lambda bench: clock_jumps(bench, options.faketime),
    ]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        model = make_judge(folder / "model")
        server = stack.enter_context(serve(model, folder / "server.log"))
        proxy = stack.enter_context(FaultProxy(server.base_url))
        bench = Bench(proxy, folder, server.model, options.prompts)
        for stage in stages:
            stage(bench)
        killed = kills(bench, options.kills)
    counted = [row for row in bench.rows if "lost" in row]
    figures = {
        "kills": killed,
        **{name: sum(row[name] for row in counted) for name in Damage._fields},
        "fault_runs": len(counted),
        "verdicts_per_run": len(bench.truth),
    }
    write_result(options.out, "judge_faults", hardware=cpu(), figures=figures, runs=bench.rows)
    print(figures)


if __name__ == "__main__":
    main()
