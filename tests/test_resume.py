"""Killed and continued: the same losses, weights and figures, bit for bit; several processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from feedback.errors import InputError
from tests.preference_rows import preferences, write_rows
from train import results
from train.config import DpoOptions
from train.dpo import run
from train.trainer import newest_checkpoint

SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "batch_size": 8,
    "epochs": 2.0,
    "log_every": 1,
    "save_every": 3,
    "device": "cpu",
    "row_tokens": 512,
    "max_length": 256,
}


def options(tmp_path: Path, model: Path, name: str, **fields: Any) -> DpoOptions:
    data = tmp_path / "rows.jsonl"
    if not data.exists():
        write_rows(data, preferences(48))
    values = SETTINGS | {"data": (str(data),), "output": tmp_path / name, "model": str(model)}
    return DpoOptions(**(values | fields))


def losses(folder: Path) -> list[tuple[int, float, float]]:
    lines = (folder / "loss.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"], r["rewards/margins"]) for r in rows if "loss" in r]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


class StopNow(Exception):
    """Stands in for a crash."""


def crash_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    from train.trainer import PackedTrainer

    plain = PackedTrainer.training_step

    def training_step(self: Any, *rest: Any) -> Any:
        if self.state.global_step == step:
            raise StopNow
        return plain(self, *rest)

    monkeypatch.setattr(PackedTrainer, "training_step", training_step)


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("step", [4, 7, 11])
def test_a_crash_leaves_no_trace(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, step: int, dropout: bool
) -> None:
    """12 steps, checkpoints at 3, 6, 9, 12; a crash in between repeats what came after them."""
    model = with_dropout(tiny_model, tmp_path) if dropout else tiny_model
    fields = {"dropout": dropout}
    run(options(tmp_path, model, "whole", **fields))
    with monkeypatch.context() as patch:
        crash_at(patch, step)
        with pytest.raises(StopNow):
            run(options(tmp_path, model, "cut", **fields))
    assert not (tmp_path / "cut" / "training.json").exists()
    run(options(tmp_path, model, "cut", **fields))
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_process_that_packs_rows_changes_nothing_and_ends(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process for all epochs: cut off in the second and continued, too."""
    run(options(tmp_path, tiny_model, "whole"))
    with monkeypatch.context() as patch:
        crash_at(patch, 8)
        with pytest.raises(StopNow):
            run(options(tmp_path, tiny_model, "cut", workers=1))
    assert not multiprocessing.active_children()
    run(options(tmp_path, tiny_model, "cut", workers=1))
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert not multiprocessing.active_children()


def with_dropout(model: Path, tmp_path: Path) -> Path:
    """Return a copy of the model whose attention drops out: random numbers at every step."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "dropout-model"
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.config.attention_dropout = 0.2
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def test_bfloat16_resumes_from_its_float32_copies(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"precision": "bfloat16"}
    run(options(tmp_path, tiny_model, "whole", **fields))
    with monkeypatch.context() as patch:
        crash_at(patch, 7)
        with pytest.raises(StopNow):
            run(options(tmp_path, tiny_model, "cut", **fields))
    run(options(tmp_path, tiny_model, "cut", **fields))
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_torn_checkpoint_is_passed_over(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"keep_checkpoints": 3}
    run(options(tmp_path, tiny_model, "whole", **fields))
    with monkeypatch.context() as patch:
        crash_at(patch, 7)
        with pytest.raises(StopNow):
            run(options(tmp_path, tiny_model, "cut", **fields))
    folder = tmp_path / "cut" / "checkpoints"
    torn = folder / "checkpoint-6" / "trainer_state.json"
    torn.write_text(torn.read_text()[:100])
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert newest.name == "checkpoint-3"
    run(options(tmp_path, tiny_model, "cut", **fields))
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_checkpoints_of_another_run_are_refused(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_at(patch, 4)
        with pytest.raises(StopNow):
            run(options(tmp_path, tiny_model, "cut"))
    with pytest.raises(InputError, match="beta"):
        run(options(tmp_path, tiny_model, "cut", beta=0.2))
    run(options(tmp_path, tiny_model, "cut", beta=0.2, resume=False))
    assert losses(tmp_path / "cut")[0][0] == 1


def test_data_and_starting_weights_are_known_by_their_content(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows edited to the same size, and a model trained again in its folder, are other ones."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    chosen = options(tmp_path, model, "once", save_every=0, max_steps=1)
    run(chosen)
    run(chosen)
    assert "complete already" in capsys.readouterr().out
    data = Path(chosen.data[0])
    data.write_text(data.read_text().replace("I need a", "I want a"))
    run(chosen)
    assert "replaces a finished run (data_identity differ)" in capsys.readouterr().err
    shutil.copy(tmp_path / "once" / "model.safetensors", model / "model.safetensors")
    run(chosen)
    assert "replaces a finished run (weights_identity differ)" in capsys.readouterr().err


def test_data_that_change_while_a_run_trains_are_other_data(
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = options(tmp_path, tiny_model, "once", save_every=0, max_steps=1)
    data, save = Path(chosen.data[0]), results._save

    def edit_too(*arguments: Any) -> None:
        save(*arguments)
        data.write_text(data.read_text().replace("I need a", "I want a"))

    with monkeypatch.context() as patched:
        patched.setattr(results, "_save", edit_too)
        run(chosen)
    run(chosen)
    said = capsys.readouterr()
    assert "complete already" not in said.out
    assert "replaces a finished run (data_identity differ)" in said.err


SCRIPT = """
import sys
from pathlib import Path
from tests.test_resume import options
from train.dpo import run
run(options(Path(sys.argv[1]), Path(sys.argv[2]), "cut"))
"""


@pytest.mark.slow
def test_a_finished_run_is_not_replaced_in_silence(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(options(tmp_path, tiny_model, "once", save_every=0, max_steps=2))
    assert "replaces" not in capsys.readouterr().err
    run(options(tmp_path, tiny_model, "once", save_every=0, max_steps=2, beta=0.5))
    assert "replaces a finished run (beta differ)" in capsys.readouterr().err


def test_kill_minus_nine(tmp_path: Path, tiny_model: Path, root: Path) -> None:
    """The process dies without a word while it trains; the next one ends as if nothing happened."""
    run(options(tmp_path, tiny_model, "whole"))
    curve = tmp_path / "cut" / "loss.jsonl"
    command = [sys.executable, "-c", SCRIPT, str(tmp_path), str(tiny_model)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    for lines in (2, 5):
        process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if curve.exists() and len(curve.read_text().splitlines()) >= lines:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        assert process.wait(timeout=60) in (-signal.SIGKILL, 0)
    run(options(tmp_path, tiny_model, "cut"))
    assert_same(tmp_path / "whole", tmp_path / "cut")


WORKERS = """
import sys
from pathlib import Path
from tests.test_resume import options
from train.dpo import run
fields = {"eval_share": 0.2, "save_every": 0, "row_tokens": 256}
run(options(Path(sys.argv[1]), Path(sys.argv[2]), "two", **fields))
"""


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path, tiny_model: Path, root: Path) -> None:
    """Data parallel over two processes: the same losses, metrics and weights up to rounding."""
    fields = {"eval_share": 0.2, "save_every": 0, "row_tokens": 256}
    run(options(tmp_path, tiny_model, "one", **fields))
    script = tmp_path / "workers.py"
    script.write_text(WORKERS)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_port", "29577", str(script), str(tmp_path), str(tiny_model)),
    ]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (losses(tmp_path / name) for name in ("one", "two"))
    assert [row[0] for row in one] == [row[0] for row in two]
    for left, right in zip(one, two, strict=True):
        assert left[1:] == pytest.approx(right[1:], rel=2e-3, abs=1e-4)
    mine, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, weight in mine.items():
        assert torch.allclose(weight, theirs[name], atol=2e-4)
    records = [json.loads((tmp_path / n / "training.json").read_text()) for n in ("one", "two")]
    values = [record["figures"]["eval_loss"] for record in records]
    assert values[0] == pytest.approx(values[1], rel=1e-3)
