"""FSDP2: parameters sharded over processes give the losses and gradients of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from tests.packed_helpers import make_model, ragged_groups
from train.attention import with_layout
from train.models import completion_logps
from train.packing import pack_groups

def loss_of(model, groups):
    batch = with_layout(pack_groups(groups), "blocks")
    return (completion_logps(model, batch).logps * torch.arange(1.0, len(batch) + 1)).sum()

def compare(kind):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    groups = [ragged_groups(4)[rank::2] for rank in range(2)]
    whole, sharded = make_model(kind), make_model(kind)
    expected = sum(loss_of(whole, part) for part in groups) / 2
    expected.backward()
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    loss = loss_of(sharded, groups[dist.get_rank()])
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    wanted = dict(whole.named_parameters())
    gaps, found = [], dict(sharded.named_parameters())
    assert all(isinstance(p, DTensor) for p in found.values())
    for name, parameter in found.items():
        grad = parameter.grad.full_tensor()
        gaps.append(float((grad - wanted[name].grad).norm() / wanted[name].grad.norm()))
    return {"loss": float(total / 2), "expected": float(expected), "gap": max(gaps)}

dist.init_process_group("gloo")
found = {kind: compare(kind) for kind in sys.argv[2:]}
if dist.get_rank() == 0:
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)
dist.barrier()  # a process that leaves first takes its connections with it
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_sharded_parameters_compute_what_whole_ones_do(tmp_path: Path, root: Path) -> None:
    """Tied output rows and output rows of their own; each process its own groups."""
    script, target = tmp_path / "workers.py", tmp_path / "found.json"
    script.write_text(SCRIPT)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_port", "29583", str(script), str(target), "smollm2", "llama"),
    ]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[:3000] + done.stderr[-1000:]
    for found in json.loads(target.read_text()).values():
        assert found["loss"] == pytest.approx(found["expected"], rel=1e-5)
        assert found["gap"] < 1e-5
