"""Timing training steps: the clock, the warm-up, the device's own peak, and where a step goes."""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from transformers import TrainerCallback

from train.batches import StepDataset
from train.packing import StepPlan

__all__ = ["Clock", "Profile", "kernel_shares", "measured_peak", "warm_steps"]


class Clock(TrainerCallback):
    """Times the steps after the warm-up, with the device's queue emptied at both ends."""

    def __init__(self, warm: int, device: str):
        self.warm, self.device, self.seconds, self.started = warm, device, math.nan, 0.0

    def _wait(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """React to the event of this name."""
        if state.global_step == self.warm:
            self.started = self._wait()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """React to the event of this name."""
        self.seconds = self._wait() - self.started


class Profile(TrainerCallback):
    """Records one step's kernels: ``kernels`` and ``wall_ms`` are there when training ends."""

    def __init__(self, step: int):
        self.step, self.profiler, self.kernels, self.wall_ms = step, None, [], math.nan

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """React to the event of this name."""
        if state.global_step == self.step:
            torch.cuda.synchronize()
            activities = [torch.profiler.ProfilerActivity.CUDA]
            self.profiler = torch.profiler.profile(activities=activities)
            self.profiler.__enter__()
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """React to the event of this name."""
        if self.profiler is None:
            return
        torch.cuda.synchronize()
        self.wall_ms = 1e3 * (time.perf_counter() - self.started)
        self.profiler.__exit__(None, None, None)
        for event in self.profiler.key_averages():
            ms = event.self_device_time_total / 1e3
            self.kernels.append({"kernel": event.key[:100], "ms": ms, "calls": event.count})
        self.kernels.sort(key=lambda row: -row["ms"])
        self.profiler = None


_KINDS = {
    "matrix_products": ("nvjet", "gemm", "cutlass", "splitK"),
    "attention": ("_key_kernel", "_query_kernel", "_forward_kernel", "flash", "flex"),
    "pointwise_and_norms": ("triton_",),
    "optimiser_and_copies": ("multi_tensor", "copy", "CUDAFunctor_add", "Memcpy", "foreach"),
}


def kernel_shares(kernels: list[dict[str, Any]], wall_ms: float) -> dict[str, float]:
    """Return the share of a step's time of each kind of kernel, and of waiting."""
    sums = dict.fromkeys([*_KINDS, "other"], 0.0)
    for row in kernels:
        found = (kind for kind, words in _KINDS.items() if any(w in row["kernel"] for w in words))
        sums[next(found, "other")] += row["ms"]
    busy = sum(sums.values())
    shares = {f"share_{kind}": ms / wall_ms for kind, ms in sums.items()}
    return shares | {"share_no_kernel": 1 - busy / wall_ms, "step_ms": wall_ms}


def measured_peak(device: str) -> float:
    """Return the rate of a large bfloat16 matrix product on random data, in TFLOP/s."""
    if device != "cuda":
        return 0.0
    left, right = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        left @ right
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(10):
        left @ right
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - start) / 1e12


def warm_steps(steps: StepDataset, *, least: int, steps_timed: int) -> int:
    """Return after how many steps no row comes whose length was not seen, and compiled, before."""
    multiple = steps.packing.multiple

    def lengths(plan: StepPlan) -> set[int]:
        sizes = (sum(steps.sizes[index] for index in row) for row in plan.rows)
        return {-(-size // multiple) for size in sizes}

    found = [lengths(plan) for epoch in range(20) for plan in steps.plan(epoch)]
    warm = least
    while not set().union(*found[warm : warm + steps_timed]) <= set().union(*found[:warm]):
        warm += 1
    return warm
