"""What was published loads from the Hub and from a folder, and trains in TRL and here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, HubServer

from feedback.records import Message, Preference
from feedback.shards import ShardWriter


def preference(number: int) -> Preference:
    return Preference(
        prompt=[Message(role="user", content=f"Which way to hall {number}?")],
        chosen=[Message(role="assistant", content=f"Up the stairs, door {number}.")],
        rejected=[Message(role="assistant", content="No idea.")],
        margin=0.6,
        p_chosen=0.8,
        prompt_id=f"p{number}",
        source={"judge": "some-judge", "verdicts": ["a1", "b2"]},
    )


@pytest.mark.slow
def test_published_rows_load_and_train_unchanged(
    tmp_path: Path, tiny_model: Path, root: Path
) -> None:
    with ShardWriter[Preference](tmp_path / "preferences", "preferences") as writer:
        for number in range(12):
            writer.append(preference(number))
        writer.finish({"stage": "pair"})
    with HubServer(tmp_path / "hub") as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"),
        }
        script = Path(__file__).parent / "published_training.py"
        done = subprocess.run(
            [sys.executable, str(script), str(tmp_path / "preferences"), str(tiny_model),
             str(tmp_path / "runs")],
            env=environment, cwd=root, capture_output=True, text=True,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert sum(found["rows"].values()) == 12 and set(found["rows"]) == {"train", "test"}
    assert found["trl_steps"] == [1, 1]
    assert found["our_dpo_steps"] >= 1 and found["our_reward_steps"] >= 1
