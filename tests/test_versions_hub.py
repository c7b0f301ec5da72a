"""Versions on the Hub: published, compared by tag, and read back, each by its command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer

from feedback.records import Preference
from feedback.shards import ShardWriter, read_rows

Command = Callable[..., str]


def row(number: int, *, other_way: bool = False) -> Preference:
    sides = (f"good {number}", f"bad {number}")
    chosen, rejected = sides[::-1] if other_way else sides
    return Preference(
        prompt=f"Is {number} a prime number, and why?",
        chosen=chosen,
        rejected=rejected,
        margin=0.6,
        p_chosen=0.8,
        prompt_id=f"p{number}",
        source={"votes": [{"judge": "one", "p_chosen": 0.8}]},
    )


def write(folder: Path, rows: list[Preference]) -> Path:
    with ShardWriter[Preference](folder / "preferences", "preferences") as writer:
        for one in rows:
            writer.append(one)
        writer.finish({})
    return folder / "preferences"


@pytest.mark.slow
def test_two_published_versions_are_compared_and_read_back(tmp_path: Path) -> None:
    old, new = [row(1), row(2)], [row(1), row(2, other_way=True), row(3)]
    with HubServer(tmp_path / "hub") as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }

        def rlaif(*words: object) -> str:
            command = [sys.executable, "-m", "train.cli", *map(str, words)]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert ran.returncode == 0, ran.stderr
            return ran.stdout

        for name, rows in (("old", old), ("new", new)):
            folder = write(tmp_path / name, rows)
            rlaif("publish", folder, "--repo", "data", "--license", "mit")
        ((_, repo),) = hub.repositories
        first, second = hub.repositories["datasets", repo].tags

        said = rlaif("diff", f"{repo}@{first}", f"{repo}@{second}")
        assert "2 rows -> 3 rows" in said
        assert "flipped: 1 (p2)" in said and "added: 1 (p3)" in said

        rlaif("import", repo, "--format", "published", "--out", tmp_path / "back")
        assert list(read_rows(tmp_path / "back/preferences", Preference)) == new
        rlaif("import", repo, "--format", "trl", "--revision", first, "--out", tmp_path / "trl")
        imported = list(read_rows(tmp_path / "trl/preferences", Preference))
        assert [one.prompt for one in imported] == [one.prompt for one in old]
        assert imported[0].source == {"imported": repo, "row": 1}
