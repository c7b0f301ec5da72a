"""Attention kernels over packed rows on one GPU: time of forward and backward, and their equality.

    python benchmarks/train_attention.py --out benchmarks/results

Every kernel runs on the same random queries, keys and values with the same row layout; outputs and
gradients are compared with the dense mask's in float32 on a shorter row first.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from result_file import gpu, write_result
from train_work import MIXES, SHAPES, make_groups

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
    layer = torch.nn.Module()
    layer.num_key_value_groups = parts[0].shape[1] // parts[1].shape[1]
    torch.manual_seed(1)
    shape, device = parts[0].transpose(1, 2).shape, parts[0].device
    grad = torch.randn(shape, device=device).to(parts[0].dtype)

    def run() -> tuple[Any, Any]:
        output, _ = packed_attention(layer, *parts, mask, packed_layout=layout)
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
    found = {}
    for kernel in kernels:
        torch._dynamo.reset()
        half = [part.detach().bfloat16().requires_grad_() for part in parts]
        moved = with_layout(batch, kernel).to("cuda")
        output, grads = runner(moved, half)()
        wanted, wanted_grads = runner(batch.to("cuda"), parts)()
        pairs = [(output[:, :covered], wanted[:, :covered])]
        pairs += [
            (a[:, :, :covered], b[:, :, :covered]) for a, b in zip(grads, wanted_grads, strict=True)
        ]
        found[kernel] = max(float((a.float() - b).norm() / b.norm()) for a, b in pairs)
        print(f"  {kernel}: {found[kernel]:.1e} from float32 with a dense mask")
        assert found[kernel] < 2e-2, kernel
    return found


# Rows per tile to (keys per step, warps, stages): what is worth trying for short and long runs.
SETTINGS = {
    "hh": {64: ((32, 4, 2), (64, 4, 2), (64, 4, 3), (64, 8, 2)), 128: ((64, 8, 2),)},
    "uf": {64: ((64, 4, 2),), 128: ((64, 4, 2), (64, 8, 2), (64, 8, 3), (128, 8, 2))},
}
KERNELS = {"forward": "_forward_kernel", "query": "_query_kernel", "keys": "_key_kernel"}


def tune(mix: str, batch: PackedBatch, parts: list[torch.Tensor]) -> list[dict[str, Any]]:
    """Return the time of each of the Triton kernels, in ms, at each of the settings."""
    rows = []
    for tile, choices in SETTINGS[mix].items():
        layout = tile_layout(batch.runs, len(batch.input_ids), tile=tile)
        run = runner(batch.with_layout(layout).to("cuda"), parts)
        for step, warps, stages in choices:
            row: dict[str, Any] = {"tile": tile, "step": step, "warps": warps, "stages": stages}
            for kernel in KERNELS:
                triton_attention._CONFIGS[kernel, tile] = (step, warps, stages)
            try:
                row |= kernel_times(run)
            except Exception as error:  # too much shared memory, say: not a setting for this chip
                row["failed"] = str(error)[:80]
            rows.append(row)
            texts = [f"{k} {v:.3f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()]
            print("  " + " ".join(texts), flush=True)
    return rows


def kernel_times(run: Callable[[], Any]) -> dict[str, float]:
    """Return the mean device time of each Triton kernel over a few runs, in ms."""
    run()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    return {
        kernel: event.self_device_time_total / event.count / 1e3
        for event in trace.key_averages()
        for kernel, name in KERNELS.items()
        if event.key.startswith(name)
    }


def choose(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Set, and return, each kernel's quickest settings for each size of tile."""
    chosen = []
    for tile, kernel in itertools.product((64, 128), KERNELS):
        timed = [row for row in rows if row["tile"] == tile and kernel in row]
        if len(timed) > 1:
            best = min(timed, key=lambda row: row[kernel])
            settings = (best["step"], best["warps"], best["stages"])
            triton_attention._CONFIGS[kernel, tile] = settings
            chosen.append(
                {"kernel": kernel, "tile": tile, "settings": settings, "ms": best[kernel]}
            )
    return chosen


def main() -> None:
    """Prove, time, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--row-tokens", type=int, default=65536)
    parser.add_argument("--tune", action="store_true", help="also time the kernel's settings")
    parser.add_argument("--configs", default="", help="file that gets the settings chosen")
    parser.add_argument("--kernels", nargs="*", default=["triton", "varlen", "flex"])
    parser.add_argument("--out", default="")
    args = parser.parse_args()
    kernels = [name for name in ("triton", "varlen", "flex") if name in args.kernels]
    figures: dict[str, float] = {}
    runs: list[dict[str, Any]] = []
    for shape, mix, completions in (("362m", "hh", 2), ("1500m", "uf", 2), ("362m", "uf", 8)):
        if completions == 2:
            for name, value in prove(shape, mix, kernels).items():
                figures[f"{name}_{shape}_{mix}_difference"] = value
        batch = fill_row(mix, args.row_tokens, completions)
        parts = inputs(shape, args.row_tokens, torch.bfloat16)
        label = f"{shape}_{mix}_k{completions}"
        if args.tune and completions == 2:
            rows = tune(mix, batch, parts)
            runs += [row | {"work": label} for row in rows]
            for row in choose(rows):
                print(f"  chosen for {label}: {row}", flush=True)
            if args.configs:
                chosen = [[*key, *value] for key, value in triton_attention._CONFIGS.items()]
                Path(args.configs).write_text(json.dumps(chosen))
        for kernel in kernels:
            torch._dynamo.reset()
            took = seconds(runner(with_layout(batch, kernel).to("cuda"), parts)) * 1e3
            figures[f"{kernel}_{label}_ms"] = took
            print(f"{label} {kernel:7s} {took:7.3f} ms forward and backward", flush=True)
    if args.out:
        path = Path(args.out) / "train_attention.json"
        write_result(path, "train_attention", hardware=gpu(), figures=figures, runs=runs)


if __name__ == "__main__":
    main()
