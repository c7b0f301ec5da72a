"""Attention kernels over packed rows on one GPU: time of forward and backward, and their equality.

    python benchmarks/train_attention.py --out benchmarks/results

Every kernel runs on the same random queries, keys and values with the same row layout; outputs and
gradients are compared with the dense mask's in float32 on a shorter row first.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from train_work import MIXES, SHAPES, make_groups

from feedback.shards import package_versions, write_json
from train import triton_attention
from train.attention import attention_inputs, packed_attention, with_layout
from train.packing import PackedBatch, group_tokens, pack_groups
from train.tiles import tile_layout


def fill_row(mix: str, tokens: int, completions: int) -> PackedBatch:
    """Return a row of at most ``tokens`` tokens, padded to that length."""
    groups, used = [], 0
    for group in make_groups(MIXES[mix], 4000, completions=completions):
        used += group_tokens(group)
        if used > tokens:
            break
        groups.append(group)
    return pack_groups(groups, multiple=tokens)


def inputs(shape: str, rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return queries, keys and values as a model makes them: (1, heads, S, D), strided."""
    sizes = SHAPES[shape]
    heads, keys = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    width = sizes["hidden_size"] // heads
    torch.manual_seed(0)
    return [
        torch.randn(1, rows, count, width, device="cuda", dtype=dtype)
        .transpose(1, 2)
        .requires_grad_()
        for count in (heads, keys, keys)
    ]


def runner(batch: PackedBatch, parts: list[torch.Tensor]) -> Callable[[], tuple[Any, Any]]:
    """Return a function that runs forward and backward once and returns outputs and gradients."""
    extra = attention_inputs(batch)
    mask, layout = extra["attention_mask"], extra.get("packed_layout")
    grad = torch.randn_like(parts[0].transpose(1, 2))

    def run() -> tuple[Any, Any]:
        output, _ = packed_attention(torch.nn.Module(), *parts, mask, packed_layout=layout)
        return output, torch.autograd.grad(output, parts, grad)

    return run


def seconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Return the median time of one call, in seconds."""
    for _ in range(3):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(end) for start, end in events)[repeats // 2] / 1e3


def prove(shape: str, mix: str, kernels: list[str]) -> dict[str, float]:
    """Return each kernel's largest relative difference to the dense mask in float32."""
    batch = fill_row(mix, 4096, 3)
    covered = batch.runs[-1].end
    parts = inputs(shape, 4096, torch.float32)
    exact = runner(batch.to("cuda"), parts)()
    found = {}
    for kernel in kernels:
        torch._dynamo.reset()
        half = [part.detach().bfloat16().requires_grad_() for part in parts]
        torch.manual_seed(1)
        moved = with_layout(batch, kernel).to("cuda")
        output, grads = runner(moved, half)()
        torch.manual_seed(1)
        wanted, wanted_grads = runner(batch.to("cuda"), parts)()
        pairs = [(output[:, :covered], wanted[:, :covered])]
        pairs += [
            (a[:, :, :covered], b[:, :, :covered]) for a, b in zip(grads, wanted_grads, strict=True)
        ]
        found[kernel] = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
        print(f"  {kernel}: {found[kernel]:.1e} from float32 with a dense mask")
        assert found[kernel] < 2e-2, kernel
    del exact
    return found


def tune(batch: PackedBatch, parts: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Time the Triton kernel's settings; return the rows, quickest first."""
    rows = []
    for tile, step, warps, stages in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3)):
        if (tile, warps) in ((64, 8),) or (tile == 128 and step == 32):
            continue
        for kernel in ("forward", "query", "keys"):
            triton_attention._CONFIGS[kernel, tile] = (step, warps, stages)
        layout = tile_layout(batch.runs, len(batch.input_ids), tile=tile)
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
                run = runner(batch.with_layout(layout).to("cuda"), parts)
                for _ in range(5):
                    run()
                torch.cuda.synchronize()
        except Exception as error:  # too much shared memory, say: not a setting for this chip
            print(f"  tile {tile} step {step} warps {warps} stages {stages}: {str(error)[:60]}")
            continue
        row: dict[str, Any] = {"tile": tile, "step": step, "warps": warps, "stages": stages}
        for event in trace.key_averages():
            for kernel in ("forward", "query", "keys"):
                name = {"keys": "key"}.get(kernel, kernel)
                if event.key.startswith(f"_{name}_kernel"):
                    row[kernel] = event.self_device_time_total / event.count / 1e3
        rows.append(row)
    return rows


def main() -> None:
    """Prove, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row-tokens", type=int, default=65536)
    parser.add_argument("--tune", action="store_true", help="also time the kernel's settings")
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    kernels = ["triton", "flex", "varlen"]
    figures: dict[str, float] = {}
    runs = []
    for shape, mix, completions in (("362m", "hh", 2), ("1500m", "uf", 2), ("362m", "uf", 8)):
        figures |= {
            f"{name}_{shape}_{mix}_difference": value
            for name, value in prove(shape, mix, kernels).items()
        }
        batch = fill_row(mix, args.row_tokens, completions)
        parts = inputs(shape, args.row_tokens, torch.bfloat16)
        for kernel in kernels:
            torch._dynamo.reset()
            took = seconds(runner(with_layout(batch, kernel).to("cuda"), parts)) * 1e3
            figures[f"{kernel}_{shape}_{mix}_k{completions}_ms"] = took
            print(
                f"{shape} {mix} k={completions} {kernel:7s} {took:7.3f} ms forward and backward",
                flush=True,
            )
        if args.tune:
            for row in tune(batch, parts):
                runs.append(row | {"shape": shape, "mix": mix, "completions": completions})
                times = " ".join(
                    f"{key} {row[key]:.3f}" for key in ("forward", "query", "keys") if key in row
                )
                print(
                    f"  tile {row['tile']} step {row['step']} warps {row['warps']} stages {row['stages']}: {times}",
                    flush=True,
                )
    if args.out:
        write_json(
            Path(args.out) / "train_attention.json",
            {
                "bench": "train_attention",
                "command": "python " + " ".join(sys.argv),
                "date": time.strftime("%Y-%m-%d"),
                "hardware": torch.cuda.get_device_name(),
                "versions": package_versions(),
                "figures": figures,
                "runs": runs,
            },
        )


if __name__ == "__main__":
    main()
