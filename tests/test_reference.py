"""The reference cache: what its keys depend on, what is computed again, and that it is right."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import train.reference as module
from tests.packed_helpers import make_model, ragged_groups, relative, unpacked_logps
from train.batches import Packing
from train.data import Group
from train.packing import pack_groups
from train.reference import ReferenceCache, attach_reference, completion_key, weights_hash

PACKING = Packing(batch_size=4, row_tokens=128, attention="blocks")


def attach(groups: list[Group], model: Any, folder: Path, **changes: Any) -> list[Group]:
    packing = dataclasses.replace(PACKING, **changes)
    return attach_reference(groups, model, packing=packing, folder=folder)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of groups that were computed, call by call."""
    counts: list[int] = []
    plain = module._compute

    def spy(groups: Any, *rest: Any) -> Any:
        counts.append(len(groups))
        return plain(groups, *rest)

    monkeypatch.setattr(module, "_compute", spy)
    return counts


def test_values_are_the_models(tmp_path: Path) -> None:
    model, groups = make_model(), ragged_groups()
    attached = attach(groups, model, tmp_path)
    logps = torch.tensor([value for group in attached for value in group.ref_logps])
    assert relative(logps, unpacked_logps(model, groups)) < 1e-5
    for group in attached:
        for ids, logprobs, total in zip(
            group.completions, group.ref_logprobs, group.ref_logps, strict=True
        ):
            assert len(logprobs) == len(ids)
            assert float(np.sum(logprobs)) == pytest.approx(total, rel=1e-5)
    batch = pack_groups(attached)
    assert torch.allclose(batch.ref_logps, logps)
    assert batch.ref_logprobs.shape == batch.targets.shape


def test_a_second_run_computes_nothing(tmp_path: Path, computed: list[int]) -> None:
    model, groups = make_model(), ragged_groups()
    first = attach(groups, model, tmp_path)
    second = attach(list(reversed(groups)), model, tmp_path, row_tokens=256, attention="sdpa")
    assert computed == [5]
    assert [g.ref_logps for g in second] == [g.ref_logps for g in reversed(first)]


def test_only_what_is_new_is_computed(tmp_path: Path, computed: list[int]) -> None:
    model, groups = make_model(), ragged_groups()
    attach(groups[:3], model, tmp_path)
    attach(groups, model, tmp_path)
    assert computed == [3, 2]


def test_other_weights_never_read_each_others_values(tmp_path: Path, computed: list[int]) -> None:
    model, groups = make_model(), ragged_groups(2)
    before = attach(groups, model, tmp_path)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    attach(groups, model, tmp_path)
    attach(groups, model.to(torch.bfloat16), tmp_path)
    assert computed == [2, 2, 2]
    assert len(list(tmp_path.glob("*.sqlite"))) == 3
    assert before[0].ref_logps


def test_keys_depend_on_ids_boundary_and_mask() -> None:
    def key(prompt: list[int], ids: list[int], mask: list[bool] | None = None) -> bytes:
        masks = () if mask is None else (mask,)
        group = Group(prompt_id="", prompt_ids=prompt, completions=[ids], loss_masks=masks)
        return completion_key(group, 0)

    plain = key([1, 2], [3, 4])
    assert plain == key(np.array([1, 2], dtype=np.int32), np.array([3, 4]))  # type: ignore[arg-type]
    others = [key([1], [2, 3, 4]), key([1, 2], [3, 5]), key([1, 2], [3, 4], [True, False])]
    assert len({plain, *others}) == 4


def test_the_hash_sees_every_weight_and_its_type() -> None:
    model = make_model("llama")
    before = weights_hash(model)
    assert before == weights_hash(make_model("llama"))
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1e-4
    assert weights_hash(model) != before
    assert weights_hash(make_model("llama", torch.bfloat16)) != before


def test_adapters_are_off_and_out_of_the_hash(tmp_path: Path, computed: list[int]) -> None:
    from peft import LoraConfig, get_peft_model

    groups = ragged_groups(2)
    plain = attach(groups, make_model(), tmp_path)
    adapted = get_peft_model(make_model(), LoraConfig(r=2, target_modules="all-linear"))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.3)
    again = attach(groups, adapted, tmp_path)
    assert computed == [2]
    assert [g.ref_logps for g in again] == [g.ref_logps for g in plain]
    fresh = attach(groups, adapted, tmp_path / "other")
    assert fresh[1].ref_logps == pytest.approx(plain[1].ref_logps, rel=1e-5)


def test_a_torn_write_leaves_the_old_values(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "model")
    cache.write({b"a": np.array([1.0, 2.0])})

    class Broken(dict):  # type: ignore[type-arg]
        def items(self) -> Any:
            yield b"b", np.array([3.0])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.write(Broken())
    assert list(cache.read([b"a", b"b"])) == [b"a"]
    assert cache.read([b"a"])[b"a"].tolist() == [1.0, 2.0]


def test_many_keys(tmp_path: Path) -> None:
    cache = ReferenceCache(tmp_path, "model")
    values = {i.to_bytes(4, "little"): np.array([float(i)]) for i in range(1700)}
    cache.write(values)
    found = cache.read(values)
    assert {key: float(value[0]) for key, value in found.items()} == {
        key: float(value[0]) for key, value in values.items()
    }
