"""Training refuses labels whose judge failed its report card, unless that is accepted by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedback.card import make_card
from feedback.errors import GateRefused
from feedback.gate import GateThresholds, judge_card
from feedback.records import Preference
from feedback.shards import ShardWriter
from feedback.simulation import Planted, simulate
from train.config import DpoOptions
from train.data import read_groups
from train.models import load_tokenizer


def labels(folder: Path, gate: dict[str, object]) -> str:
    with ShardWriter[Preference](folder, "preferences") as writer:
        writer.append(
            Preference(
                prompt="ask", chosen="yes", rejected="no", margin=0.5, p_chosen=0.75, prompt_id="p"
            )
        )
        writer.finish({"gate": gate})
    return str(folder)


def test_training_reads_the_gate_of_its_labels(tmp_path: Path, tiny_model: Path) -> None:
    options = DpoOptions(data=("x",), output=tmp_path, model=str(tiny_model))
    tokenizer = load_tokenizer(options)
    leaning = simulate(Planted(sensitivity=0.4, position=3.0, soft=True), prompts=60)
    card = make_card([leaning.pairs()], replicates=100)
    refused = judge_card(card, GateThresholds())
    folder = labels(tmp_path / "refused", refused.manifest())
    with pytest.raises(GateRefused, match=r"position_bias\.order_consistency"):
        read_groups([folder], tokenizer, max_length=64)
    names = [row.name for row in refused.refused]
    groups, _ = read_groups([folder], tokenizer, max_length=64, accept_bias=names)
    assert len(groups) == 1
    sound = judge_card(card, GateThresholds(), accept=names)
    groups, _ = read_groups([labels(tmp_path / "ok", sound.manifest())], tokenizer, max_length=64)
    assert len(groups) == 1
