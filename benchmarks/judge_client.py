"""The judge client against its peers: one 50 ms server on a core of its own, one request per pair.

    python benchmarks/judge_client.py [--peers trl distilabel curator alpaca_eval]

Every peer runs in a virtual environment of its own, made from the package index under --venvs on
first use. The server (``judge_server.py``) is pinned to the last core, clients to the others; each
client gets the answers its parser wants, and as many rows as keep it busy for some seconds. Then
every client judges 1,000 rows of which 5 are refused with HTTP 400: how many are lost?

The fast clients take turns, the order of a turn reversed in the next; a ratio is the median over
turns of two neighbours in time, so that whatever else the machine did met both. Rates are each
client's fastest run (all else a machine does only slows a client down); medians stand beside them.
Compare rows of one result file, not of two.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from result_file import RESULTS, cpu, write_result

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "judge_peers"
BAD = "[reject this row]"
BAD_EVERY = 200  # 0.5%


class Client(NamedTuple):
    """One way of asking."""

    script: str
    rows: int
    answer: str = "A"
    packages: tuple[str, ...] = ()
    """What its environment needs; none: this one."""
    words: tuple[str, ...] = ()
    words_at_400: tuple[str, ...] | None = None
    """Another mode for the rows refused; None: the same."""


CLIENTS = {
    "bare_asyncio": Client("bare_asyncio.py", 20_000),
    "ours": Client("our_client.py", 20_000),
    "ours_run": Client("our_client.py", 20_000, words=("run",)),
    "trl": Client(
        "trl_judge.py",
        1500,
        "0",
        ("trl==1.0.0", "transformers<5", "openai", "torch==2.13.0"),
    ),
    "distilabel": Client(
        "distilabel_judge.py",
        3000,
        "Feedback: both were read. [RESULT] A",
        ("distilabel[openai]==1.5.3", "requests"),
        words_at_400=("pipeline",),
    ),
    "curator": Client("curator_judge.py", 3000, packages=("bespokelabs-curator==0.1.31",)),
    "alpaca_eval": Client(
        "alpaca_eval_judge.py", 600, "m", ("alpaca-eval==0.6.6", "pandas<3", "setuptools<81")
    ),
}
FAST = ("bare_asyncio", "ours", "ours_run")
PEERS = ("trl", "distilabel", "curator", "alpaca_eval")


def write_rows(path: Path, count: int, *, bad: bool) -> None:
    """Write pairs of invented text, about 1,200 characters each; some of them bad."""
    draw = random.Random(0)
    words = ("answer", "depends", "asked", "how", "much", "of", "it", "is", "really", "known")
    with path.open("w") as file:
        for number in range(count):
            text = {
                name: " ".join(draw.choices(words, k=size))
                for name, size in (("prompt", 60), ("a", 80), ("b", 80))
            }
            if bad and number % BAD_EVERY == BAD_EVERY // 2:
                text["a"] += f" {BAD}"
            # No two rows alike, whatever a client caches or merges.
            text["prompt"] = f"Question {number}: {text['prompt']}"
            file.write(json.dumps(text) + "\n")


@contextlib.contextmanager
def server(answer: str, core: int) -> Iterator[str]:
    """Run the mock endpoint on ``core``; yield its base URL."""
    command = [sys.executable, str(Path(__file__).parent / "judge_server.py")]
    command += ["--latency-ms", "50", "--answer", answer, "--reject", BAD]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().rsplit(maxsplit=1)[-1]
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


def environment(name: str, client: Client, venvs: Path) -> Path:
    """Return the Python of a client, after making its environment if there is none."""
    if not client.packages:
        return Path(sys.executable)
    folder = venvs / name
    ready = folder / ".ready"
    if not ready.is_file():
        print(f"making {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(folder / "bin" / "pip"), "install", "-q", *client.packages]
        subprocess.run(pip, check=True)
        ready.touch()
    return folder / "bin" / "python"


def run_client(
    name: str, client: Client, python: Path, rows: Path, *, words: tuple[str, ...]
) -> dict[str, Any]:
    """Run one client over ``rows`` against a server of its own."""
    cores = sorted(os.sched_getaffinity(0))
    mine = set(cores[:-1]) or set(cores)
    with (
        tempfile.TemporaryDirectory() as folder,
        server(client.answer, cores[-1]) as base_url,
    ):
        result = Path(folder) / "result.json"
        done = subprocess.run(
            [str(python), str(SCRIPTS / client.script), base_url, str(rows), str(result), *words],
            capture_output=True,
            text=True,
            timeout=900,
            cwd=folder,
            env={
                **os.environ,
                "PYTHONPATH": "" if client.packages else str(ROOT),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "HOME": folder,
                "NO_PROXY": "127.0.0.1",
            },
            preexec_fn=lambda: os.sched_setaffinity(0, mine),
        )
        if not result.is_file():
            raise RuntimeError(f"{name}: {done.stderr[-3000:]}")
        found: dict[str, Any] = json.loads(result.read_text())
        url = base_url.replace("/v1", "/stats")
        with urllib.request.urlopen(url) as reply:
            found |= json.loads(reply.read())
    return {"client": name, **found}


def measure(options: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """All clients, in turns; for each its fastest run, with the rates of every turn."""
    names = [*FAST, *options.peers]
    pythons = {name: environment(name, CLIENTS[name], options.venvs) for name in names}
    for name in names:
        rows = round(CLIENTS[name].rows * options.scale)
        write_rows(folder / f"{name}.jsonl", rows, bad=False)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for turn in range(options.repeats):
        # Peers are far away: two runs each place them, the near ones need the careful measurement.
        contenders = names if turn < options.peer_repeats else list(FAST)
        for name in contenders if turn % 2 == 0 else reversed(contenders):
            client, load = CLIENTS[name], os.getloadavg()[0]
            rows = folder / f"{name}.jsonl"
            run = run_client(name, client, pythons[name], rows, words=client.words)
            run["load_before"] = round(load, 2)
            print(turn, {key: value for key, value in run.items() if value != ""}, flush=True)
            runs[name].append(run)
    table = [max(found, key=lambda run: run["pairs_per_s"]) for found in runs.values()]
    rows = folder / "bad.jsonl"
    write_rows(rows, 1000, bad=True)
    for row, name in zip(table, names, strict=True):
        client = CLIENTS[name]
        words = client.words if client.words_at_400 is None else client.words_at_400
        row["at_400"] = run_client(name, client, pythons[name], rows, words=words)
        print(name, "at 0.5% HTTP 400:", row["at_400"], flush=True)
        row["runs"] = [run["pairs_per_s"] for run in runs[name]]
        row["loads"] = [run["load_before"] for run in runs[name]]
    return table


def paired(rows: dict[str, dict[str, Any]], name: str) -> float:
    """Median over turns of a client's rate by bare asyncio's in the same turn."""
    pairs = zip(rows[name]["runs"], rows["bare_asyncio"]["runs"], strict=True)
    return statistics.median(own / bare for own, bare in pairs)


def figures(table: list[dict[str, Any]]) -> dict[str, float]:
    """Return the flat map that the README reads."""
    rows = {row["client"]: row for row in table}
    peers = [name for name in PEERS if name in rows]
    speed = {name: max(row["runs"]) for name, row in rows.items()}
    found: dict[str, float] = {
        "pairs_per_s": speed["ours"],
        "pairs_per_s_labelling_run": speed["ours_run"],
        "bare_asyncio_pairs_per_s": speed["bare_asyncio"],
        "pairs_per_s_median": statistics.median(rows["ours"]["runs"]),
        "bare_asyncio_pairs_per_s_median": statistics.median(rows["bare_asyncio"]["runs"]),
        "ratio_to_bare_asyncio": paired(rows, "ours"),
        "labelling_run_ratio_to_bare_asyncio": paired(rows, "ours_run"),
        "cpu_ms_per_pair": rows["ours"]["cpu_ms_per_pair"],
        "max_in_flight": rows["ours"]["most_in_flight"],
        "rows_at_400": rows["ours"]["at_400"]["rows"],
        "bad_rows_at_400": rows["ours"]["at_400"]["rejected"],
        "rows_lost_at_400": rows["ours_run"]["at_400"]["lost"],
    }
    if peers:
        found["ratio_to_best_peer"] = speed["ours"] / max(speed[name] for name in peers)
    for name in peers:
        found[f"pairs_per_s_{name}"] = speed[name]
        found[f"cpu_ms_per_pair_{name}"] = rows[name]["cpu_ms_per_pair"]
        found[f"max_in_flight_{name}"] = rows[name]["most_in_flight"]
        found[f"rows_lost_at_400_{name}"] = rows[name]["at_400"]["lost"]
    return found


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--venvs", type=Path, default=Path("/tmp/rlaif-peers"))
    parser.add_argument("--repeats", type=int, default=9, help="turns")
    parser.add_argument("--peer-repeats", type=int, default=2, help="turns of the peers")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the usual rows")
    parser.add_argument("--out", type=Path, default=RESULTS / "judge_client.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(options, Path(folder))
    found = figures(table)
    write_result(
        options.out,
        "judge_client",
        hardware=f"{cpu()}, server on one of them",
        machine="load averages before each run are in runs[].loads; above 0.3 others worked too",
        peers={name: list(CLIENTS[name].packages) for name in options.peers},
        figures=found,
        runs=table,
    )
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
