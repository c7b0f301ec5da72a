"""The recipe of the embedded models runs from corpus to finished folder, at a tiny size."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.pocket_model.bookings import good_reply, make_booking

pytestmark = pytest.mark.slow

TINY = ["--scale", "0.0004", "--layers", "1", "--width", "64", "--lines", "2", "--count", "6"]
TINY += ["--line-length", "1024", "--workers", "1"]


def write_corpus(path: Path, *, dialogues: int) -> None:
    """Write dialogues as the corpus holds them, made of the project's own booking conversations."""
    rng = random.Random(3)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for _ in range(dialogues):
            booking = make_booking(rng, held_out=False)
            turns = [message["content"] for message in booking.messages] + [
                good_reply(booking, rng)
            ]
            names = ("Human", "Assistant")
            text = "\n\n".join(f"{names[i % 2]}: {turn}" for i, turn in enumerate(turns))
            file.write(json.dumps({"text": text}) + "\n")


def build(*words: str, root: Path) -> None:
    command = [sys.executable, "-m", "recipes.pocket_model.build", *words]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_recipe_builds_a_model_that_the_toolkit_loads(root: Path, tmp_path: Path) -> None:
    from feedback.backends.opening import open_backend
    from feedback.config import EngineOptions

    data, out = tmp_path / "dialogue.jsonl.gz", tmp_path / "build"
    write_corpus(data, dialogues=900)
    where = ["--data", str(data), "--out", str(out)]
    build("tokenizer", *where, root=root)
    build("assistant", *where, *TINY, root=root)
    backend = open_backend(EngineOptions(model=str(out / "assistant"), device="cpu"))
    assert backend.prepare(("A", "B")).logprobs
    backend.close()
    assert "plan" in (out / "assistant-train.log").read_text(encoding="utf-8")
