"""Jobs of a comparison: each a command with resolved options, run in a process of its own.

The processes are forked from one that has everything imported, so that forty short jobs do not pay
for forty imports, and each job's peak memory is its own. A job that is finished with the same
options is not run again.
"""

from __future__ import annotations

import json
import multiprocessing
import multiprocessing.connection
import os
import resource
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from feedback.config import build_options
from feedback.errors import RlaifError
from feedback.records import content_id
from feedback.shards import write_json
from train.commands import COMMANDS, load

__all__ = ["Job", "JobResult", "run_jobs"]

_MIB = 2**20


@dataclass(frozen=True, slots=True)
class Job:
    """One run of one command."""

    name: str
    """Unique; names its record and its log."""
    command: str
    """A command of ``rlaif``, or ``package.module:function`` called with the table."""
    table: dict[str, Any]
    """Its options, as a recipe would hold them."""
    needs: tuple[str, ...] = ()
    """Jobs of the same list that must be finished before."""
    meta: dict[str, Any] = field(default_factory=dict, compare=False)
    """What the comparison wants to remember of it."""


class JobResult(NamedTuple):
    """What a job took."""

    seconds: float
    cpu_seconds: float
    """Of all its threads."""
    peak_mib: float
    """Most memory that it held, in MiB: of the GPU where it used one, else of its process, less
    what the process had before it began (Python and its libraries)."""


def run_jobs(
    jobs: Sequence[Job],
    folder: Path,
    *,
    parallel: int,
    say: Callable[[str], None],
    data: str = "",
) -> dict[str, JobResult]:
    """Run the jobs, ``parallel`` at a time; return what each took.

    Args:
        jobs: each after those that it needs, or before; a job is done again when its options
            change, or those of a job that it needs, or the data.
        folder: for records and logs.
        parallel: processes at one time.
        say: is told of each finished job.
        data: fingerprint of what all jobs read.

    Raises:
        RlaifError: a job failed; the message names its log.
    """
    prints = _fingerprints(jobs, data)
    for command in {job.command for job in jobs}:
        _function(command)  # imported here, once, rather than by every child
    results: dict[str, JobResult] = {}
    waiting = list(jobs)
    running: dict[str, tuple[Any, float]] = {}
    try:
        while waiting or running:
            for job in list(waiting):
                if (known := _known(job.name, folder, prints)) is not None:
                    results[job.name] = known
                    waiting.remove(job)
                elif len(running) < parallel and all(need in results for need in job.needs):
                    process = _start(job, folder, parallel, prints[job.name])
                    running[job.name] = (process, time.monotonic())
                    waiting.remove(job)
            if not running:  # what was known already may have been waited for
                continue
            multiprocessing.connection.wait([process.sentinel for process, _ in running.values()])
            for name in [name for name, (process, _) in running.items() if not process.is_alive()]:
                process, started = running.pop(name)
                process.join()
                found = _known(name, folder, prints)
                if process.exitcode or found is None:
                    raise _failure(name, folder, process.exitcode)
                results[name] = found
                say(f"  {name}: {time.monotonic() - started:.0f} s ({len(results)}/{len(jobs)})")
    finally:
        for process, _ in running.values():
            process.terminate()
            process.join()
    return results


def _fingerprints(jobs: Sequence[Job], data: str) -> dict[str, str]:
    """Return a hash of each job's options, of the jobs that it needs, and of the data."""
    by_name = {job.name: job for job in jobs}
    found: dict[str, str] = {}

    def add(name: str) -> str:
        if name not in found:
            job = by_name[name]
            needs = [add(need) for need in job.needs]
            found[name] = content_id(data, job.command, _plain(job.table), needs)
        return found[name]

    for name in by_name:
        add(name)
    return found


def _record(name: str, folder: Path) -> Path:
    return folder / "jobs" / f"{name}.json"


def _known(name: str, folder: Path, prints: Mapping[str, str]) -> JobResult | None:
    """Return the result of a job that is finished as it is asked for now, or None."""
    path = _record(name, folder)
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    same = record["fingerprint"] == prints[name]
    return JobResult(*(record[name] for name in JobResult._fields)) if same else None


def _plain(table: dict[str, Any]) -> Any:
    return json.loads(json.dumps(table, default=str))


def _failure(name: str, folder: Path, code: int | None) -> RlaifError:
    log = folder / "logs" / f"{name}.log"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else "no output"
    error = RlaifError(f"{name} failed ({last}); the whole story is in {log}")
    error.exit_code = code if code and code > 0 else 1
    return error


def _start(job: Job, folder: Path, parallel: int, fingerprint: str) -> Any:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context("fork").Process(
        target=_work, args=(job, folder, parallel, fingerprint), name=job.name
    )
    sys.stdout.flush()
    sys.stderr.flush()
    process.start()
    return process


def _function(command: str) -> Callable[[dict[str, Any]], Any]:
    """Return what runs a command's table."""
    if ":" in command:
        function: Callable[[dict[str, Any]], Any] = load(command)
        return function
    entry = COMMANDS[command]
    options, run = load(entry.options), load(entry.function)
    return lambda table: run(build_options(options, _plain(table)))


def _end_with_parent() -> None:
    """End this process when the comparison does, however that was ended.

    A job that went on by itself would write into the folders of the comparison's next run.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(job: Job, folder: Path, parallel: int, fingerprint: str) -> None:
    """Run the job; the child process."""
    import torch

    log = os.open(folder / "logs" / f"{job.name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # No more than OMP_NUM_THREADS says: threads that wait for a core spin, and stall each other.
    share = max((os.cpu_count() or 1) // parallel, 1)
    torch.set_num_threads(min(share, torch.get_num_threads()))
    threading.Thread(target=_end_with_parent, daemon=True).start()
    started, idle_mib = time.monotonic(), _resident_mib()
    try:
        _function(job.command)(job.table)
    except RlaifError as error:
        os.write(log, f"error: {error}\n".encode())
        os._exit(error.exit_code)
    except BaseException:  # the child's last word goes to its log
        os.write(log, traceback.format_exc().encode())
        os._exit(1)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    cuda = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    result = JobResult(
        seconds=time.monotonic() - started,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_mib=cuda / _MIB or _resident_mib() - idle_mib,
    )
    write_json(
        _record(job.name, folder),
        {
            "fingerprint": fingerprint,
            "command": job.command,
            "table": _plain(job.table),
            **result._asdict(),
        },
    )
    sys.stdout.flush()
    os._exit(0)


def _resident_mib() -> float:
    """Return the largest resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / _MIB
