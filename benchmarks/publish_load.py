"""A million preference rows to a folder and to a Hub server: rows per second, flat memory.

python benchmarks/publish_load.py [ROWS]    (writes benchmarks/results/publish_load.json)

Each publish runs in a process of its own, at a tenth of the rows and at all of them: scan of every
text, evaluation-set overlap, Parquet, and for the server the upload with commit and tag. The server
is the tests' own, on this machine, so that its figure holds no network. Rows have the shape that
``rlaif pair`` writes: six pairs of four completions to each prompt.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from result_file import RESULTS, cpu, write_result

from feedback.installed import package_versions
from feedback.records import Preference, content_id
from feedback.shards import ShardWriter

ROOT = Path(__file__).parent.parent
TEXT = (
    "please could you tell me about how the old harbour bridge was built and why it still stands "
    "after so many winters of ice wind salt rain trade war repair paint and very careful neglect "
    "because people who cross it every day would rather not know what holds it up or for how long"
)
WORDS = TEXT.split()


def rows(number: int) -> Iterator[Preference]:
    """Yield invented preferences, always the same."""
    draw = random.Random(0)
    for prompt in itertools.count():
        asked = " ".join(draw.choices(WORDS, k=40))
        said = [" ".join(draw.choices(WORDS, k=60)) for _ in range(4)]
        for first, second in itertools.combinations(range(4), 2):
            if number == 0:
                return
            number -= 1
            p = 0.5 + draw.random() / 2
            yield Preference(
                prompt=asked,
                chosen=said[first],
                rejected=said[second],
                margin=2 * p - 1,
                p_chosen=p,
                prompt_id=f"prompt-{prompt}",
                source={
                    "judge": "invented",
                    "verdicts": [content_id(prompt, first, second, order) for order in range(2)],
                    "completions": [f"c{first}", f"c{second}"],
                },
            )


def write(folder: Path, number: int) -> Path:
    """Write the shards that are published."""
    with ShardWriter[Preference](folder / "preferences", "preferences") as writer:
        for row in rows(number):
            writer.append(row)
        writer.finish({"stage": "pair"})
    return folder / "preferences"


def run_phase(name: str, folder: Path) -> None:
    """Publish in this process, and print what it took."""
    from feedback.publish import PublishOptions, publish

    place: dict[str, Any] = {"to": folder / "out"} if name == "folder" else {"repo": "load"}
    options = PublishOptions(folders=(folder / "preferences",), license="cc0-1.0", **place)
    started = time.perf_counter()
    publish(options)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"phase": name, "seconds": seconds, "peak_mib": peak}))


def measure(name: str, folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Publish in a process of its own; return what it took."""
    command = [sys.executable, __file__, name, str(folder)]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def main(number: int) -> None:
    """Publish both ways at two sizes, and write the results."""
    sys.path.insert(0, str(ROOT / "tests"))
    from hub_server import TOKEN, HubServer

    runs = []
    for size in (number // 10, number):
        folder = Path(tempfile.mkdtemp(prefix="publish-load-"))
        write(folder, size)
        with HubServer(folder / "hub") as hub:
            environment = {
                "HF_ENDPOINT": hub.url,
                "HF_TOKEN": TOKEN,
                "HF_HUB_OFFLINE": "0",
                "HF_HUB_DISABLE_XET": "1",
                "HF_HOME": str(folder / "home"),
            }
            for name in ("folder", "hub"):
                runs.append({"rows": size, **measure(name, folder, environment)})
                print(runs[-1], flush=True)
        shutil.rmtree(folder)
    to_folder, to_hub = runs[2:]
    figures = {
        "rows": number,
        "rows_per_s": round(number / to_folder["seconds"]),
        "rows_per_s_hub": round(number / to_hub["seconds"]),
        "peak_mib": round(max(to_folder["peak_mib"], to_hub["peak_mib"]), 1),
        "peak_growth_mib": round(
            max(
                large["peak_mib"] - small["peak_mib"]
                for small, large in zip(runs[:2], runs[2:], strict=True)
            ),
            1,
        ),
    }
    write_result(
        RESULTS / "publish_load.json",
        "publish_load",
        command=f"python benchmarks/publish_load.py {number}",
        hardware=cpu(),
        versions=package_versions(("huggingface_hub", "pyarrow")),
        figures=figures,
        runs=runs,
    )
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        run_phase(sys.argv[1], Path(sys.argv[2]))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
