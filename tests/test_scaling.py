"""Two processes train like one: ``rlaif dpo`` as a user launches it, through the benchmark."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_two_processes_train_like_one(root: Path, tmp_path: Path) -> None:
    """Several rows a step, so that both have work; the saved weights are compared too."""
    options = "--shape tiny --mix tiny --device cpu --prompts 24 --steps 3 --row-tokens 160"
    command = [sys.executable, "benchmarks/train_scaling.py", *options.split(), "--runs", "ddp"]
    command += ["--scratch", str(tmp_path / "work"), "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads((tmp_path / "train_scaling.json").read_text())
    single, several = (run["losses"] for run in result["runs"])
    assert several == pytest.approx(single, rel=1e-5)
    assert result["figures"]["ddp_weights_difference"] < 1e-4
