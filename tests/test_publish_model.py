"""A trained model's folder on the Hub: weights as safetensors, nothing that runs when loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_server import HubServer
from test_publish_hub import hub, pytestmark

from feedback.errors import InputError
from feedback.publish import PublishOptions
from train.cli import main
from train.publish import is_model, publish_model

__all__ = ["hub", "pytestmark"]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model's folder as a trainer leaves it, with what must stay behind."""
    folder = tmp_path / "policy"
    shutil.copytree(tiny_model, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# A policy\n", encoding="utf-8")
    (folder / "training_args.bin").write_bytes(b"\x80\x04pickle")
    (folder / "optimizer.pt").write_bytes(b"\x80\x04pickle")
    (folder / "checkpoint-3").mkdir()
    return folder


def publish(folder: Path, **more: Any) -> str:
    return publish_model(PublishOptions(folders=(folder,), **{"license": "mit", **more}))


def test_a_model_leaves_without_what_only_resuming_needs(
    hub: HubServer, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["publish", str(model), "--repo", "policy", "--license", "mit"]) == 0
    said = capsys.readouterr().out
    assert "left behind: checkpoint-3, optimizer.pt, training_args.bin" in said
    repository = hub.repository("ann/policy", "models")
    files = repository.commits[-1][2]
    assert repository.private and len(repository.commits) == 2
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= set(files)
    assert not {"training_args.bin", "optimizer.pt"} & set(files)
    assert files["model.safetensors"].sha256
    publish(model, repo="policy")
    assert "nothing has changed" in capsys.readouterr().out
    assert len(repository.commits) == 2


def test_a_model_to_a_folder_loads(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "out"
    publish(model, to=out)
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() > 0
    assert AutoTokenizer.from_pretrained(out).chat_template
    publish(model, to=out)
    assert "nothing has changed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "policy.pt", "x.pkl"])
def test_pickles_are_refused(name: str, model: Path, tmp_path: Path) -> None:
    (model / name).write_bytes(b"\x80\x04")
    with pytest.raises(InputError, match=rf"{name}: is a pickle"):
        publish(model, to=tmp_path / "out")
    (model / name).unlink()
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights as safetensors"):
        publish(model, to=tmp_path / "out")


def test_places_of_this_machine_stay_here(model: Path, tmp_path: Path) -> None:
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config |= {"name_or_path": "/home/ann/models/base", "bos_token": "/think"}
    path.write_text(json.dumps(config), encoding="utf-8")
    out = tmp_path / "out"
    publish(model, to=out)
    written = json.loads((out / path.name).read_text(encoding="utf-8"))
    assert written["name_or_path"] == "base" and written["bos_token"] == "/think"


def test_what_must_not_leave_stops_a_model_too(model: Path, tmp_path: Path) -> None:
    key = "hf_" + "AbCdEfGh" * 4 + "Xy"
    (model / "notes.json").write_text(json.dumps({"token": key}), encoding="utf-8")
    with pytest.raises(InputError, match=r"found secret \(1\)"):
        publish(model, to=tmp_path / "out")
    publish(model, to=tmp_path / "out", redact=True)
    assert "[SECRET]" in (tmp_path / "out" / "notes.json").read_text(encoding="utf-8")


def test_a_model_on_a_hosted_judges_labels_needs_its_terms(model: Path, tmp_path: Path) -> None:
    judge = {"model": "big-judge", "endpoint": "api.example.com"}
    judging = {"judge": judge, "manifest_sha256": "0" * 64}
    source = {
        "source": "runs/x/preferences",
        "identity": "1" * 64,
        "manifest": {"kind": "preferences", "rows": 1, "provenance": {"judging": judging}},
    }
    record: dict[str, Any] = {"command": "dpo", "data": [source], "options": {"model": "base"}}
    (model / "training.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match=r"big-judge was asked at api\.example\.com"):
        publish(model, to=tmp_path / "out")
    engine = {"model": "scorer", "backend": "openai", "base_url": None}
    record |= {"data": [], "options": {"model": "base", "reward": {"judge": engine}}}
    (model / "training.json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InputError, match=r"scorer was asked at api\.openai\.com"):
        publish(model, to=tmp_path / "out")


def test_a_card_and_one_model_at_a_time(model: Path, tmp_path: Path) -> None:
    assert is_model(model) and not is_model(tmp_path)
    with pytest.raises(InputError, match="by itself"):
        publish_model(PublishOptions(folders=(model, tmp_path), to=tmp_path / "out", license="mit"))
    (model / "README.md").unlink()
    with pytest.raises(InputError, match="write a card"):
        publish(model, to=tmp_path / "out")
