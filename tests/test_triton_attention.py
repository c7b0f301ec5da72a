"""The Triton kernel in Triton's interpreter on the CPU, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = """
import torch
import torch.nn.functional as F
from tests.packed_helpers import ragged_groups
from tests.test_attention import sparse_groups
from train.attention import dense_mask
from train.packing import pack_groups
from train.tiles import tile_layout
from train.triton_attention import tile_attention

torch.manual_seed(0)
for groups, share, width, tile in (
    (ragged_groups(), True, 16, 64),
    (ragged_groups(), False, 24, 64),
    (sparse_groups(0)[:2], True, 32, 128),
):
    batch = pack_groups(groups, share_prompt=share, multiple=8)
    size, covered = len(batch.input_ids), batch.runs[-1].end
    query = torch.randn(1, size, 4, width).transpose(1, 2).requires_grad_()
    key = torch.randn(1, 2, size, width, requires_grad=True)
    value = torch.randn(1, size, 2, width).transpose(1, 2).requires_grad_()
    output = tile_attention(query, key, value, tile_layout(batch.runs, size, tile=tile), None)
    assert torch.isfinite(output).all(), "padding is not finite"
    weights = torch.randn_like(output)
    weights[:, covered:] = 0
    slopes = torch.autograd.grad((output * weights).sum(), (query, key, value))
    wide = [part.repeat_interleave(2, 1) for part in (key, value)]
    exact = F.scaled_dot_product_attention(query, *wide, attn_mask=dense_mask(batch))
    exact = exact.transpose(1, 2)
    wanted = torch.autograd.grad((exact * weights).sum(), (query, key, value))
    assert torch.allclose(output[:, :covered], exact[:, :covered], atol=1e-5)
    for slope, expected in zip(slopes, wanted, strict=True):
        assert (slope - expected).norm() <= 1e-5 * expected.norm()
print("equal")
"""


@pytest.mark.slow
def test_the_kernel_equals_the_dense_mask(root: Path) -> None:
    pytest.importorskip("triton", reason="needs the package triton, whose interpreter runs on CPUs")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(root)}
    environment |= {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CHECK], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]
