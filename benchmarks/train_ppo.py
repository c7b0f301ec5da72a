"""PPO on one GPU against TRL 1.12.0, the last TRL with a PPO trainer, at equal work.

    pip install --no-deps --target /tmp/trl112 trl==1.12.0
    python benchmarks/train_ppo.py --trl /tmp/trl112 --out benchmarks/results
    python benchmarks/train_ppo.py --trl /tmp/trl112 --shape tiny --mix tiny  # a rehearsal

Both sides start from the same policy, reward model and value model (the reward model), and take the
same prompts, completions per prompt, epochs, minibatches and completion length. First the work is
proved equal: on one rollout TRL's trainer and ours make the same updates of policy and value model,
number by number. Then the steps are timed. TRL gets what it is best with: bfloat16 weights, no
checkpointing, one forward batch per rollout.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ppo_peer import prove, trl_steps
from result_file import gpu, write_result
from train_work import MIXES, SHAPES, build_model, make_groups, word_tokenizer

from train import ppo
from train.config import RrhfOptions
from train.models import enable_packing
from train.ppo_config import PpoOptions, RewardSource
from train.rrhf import RrhfObjective
from train.trainer import PackedTrainer

Job = tuple[str, Callable[[], dict[str, Any]]]


def clean(device: str) -> None:
    """Free memory between jobs; compiled code stays, both of our runs use the same."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def write_work(args: argparse.Namespace) -> None:
    """Write policy, reward model, tokenizer and prompts to the scratch folder."""
    folder = Path(args.scratch)
    shutil.rmtree(folder, ignore_errors=True)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    for name, kind in (("policy", "causal"), ("reward", "reward")):
        model = build_model(args.shape, dtype=dtype, device=args.device, kind=kind)
        model.save_pretrained(folder / name)
        word_tokenizer().save_pretrained(folder / name)
    groups = make_groups(MIXES[args.mix], args.prompts * (args.warm + args.steps), seed=1)
    rows = [
        {"prompt_id": str(number), "prompt": " ".join(f"w{token}" for token in group.prompt_ids)}
        for number, group in enumerate(groups)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def ours(args: argparse.Namespace, sampler: str, **changes: Any) -> dict[str, Any]:
    """Run our PPO and return seconds per step by phase, and peak memory."""
    clean(args.device)
    folder = Path(args.scratch)
    output = folder / f"ours-{sampler}"
    values: dict[str, Any] = {
        "prompts": (str(folder / "prompts.jsonl"),),
        "output": output,
        "reward": RewardSource(kind="model", models=(str(folder / "reward"),)),
        "model": str(folder / "policy"),
        "steps": args.warm + args.steps,
        "prompts_per_step": args.prompts,
        "completions_per_prompt": args.completions,
        "max_prompt_tokens": MIXES[args.mix].longest_prompt,
        "max_tokens": args.max_tokens,
        "ppo_epochs": args.epochs,
        "learning_rate": 3e-6,
        "kl_coef": 0.05,
        "missing_eos_penalty": None,
        "row_tokens": args.row_tokens,
        "sampler": sampler,
        "vllm_eager": args.vllm_eager,
        "vllm_memory": args.vllm_memory,
        "device": args.device,
        "resume": False,
    }
    ppo.train(PpoOptions(**{**values, **changes}))
    lines = (output / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines][args.warm :]
    names = [name for name in rows[0] if name.startswith("time/")]
    figures = {name: sum(row.get(name, 0.0) for row in rows) / len(rows) for name in names}
    figures["length"] = sum(row["completion/length"] for row in rows) / len(rows)
    figures["sampler_gap"] = max(row["sampler/gap"] for row in rows)
    return figures | {"peak_gib": peak_gib(args)}


def theirs(args: argparse.Namespace) -> dict[str, Any]:
    """Run TRL's PPO on the same prompts and return the same figures."""
    clean(args.device)
    figures = trl_steps(
        Path(args.scratch),
        prompts=args.prompts,
        completions=args.completions,
        steps=args.steps,
        warm=args.warm,
        epochs=args.epochs,
        max_tokens=args.max_tokens,
        batch=args.trl_batch,
        device=args.device,
    )
    return figures | {"peak_gib": peak_gib(args)}


def rrhf(args: argparse.Namespace) -> dict[str, Any]:
    """Train RRHF on as many prompts and completions as a PPO step has; return its peak memory."""
    clean(args.device)
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    model = build_model(args.shape, dtype=dtype, device=args.device)
    enable_packing(model)
    options = RrhfOptions(
        data=(),
        output=Path(args.scratch) / "rrhf",
        device=args.device,
        max_steps=args.warm + args.steps,
        batch_size=args.prompts,
        row_tokens=args.row_tokens,
        max_length=MIXES[args.mix].longest_prompt + MIXES[args.mix].longest_completion,
        log_every=10_000,
    )
    groups = make_groups(
        MIXES[args.mix], args.prompts * (args.warm + args.steps), completions=args.completions
    )
    trainer = PackedTrainer(
        model=model,
        options=options,
        objective=RrhfObjective(options),
        groups=groups,
        tokenizer=None,
    )
    started = time.perf_counter()
    trainer.train()
    return {"seconds": time.perf_counter() - started, "peak_gib": peak_gib(args)}


def peak_gib(args: argparse.Namespace) -> float:
    """Return the most memory allocated since ``clean``, in GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if args.device == "cuda" else 0.0


def jobs(args: argparse.Namespace) -> list[Job]:
    """Return the named jobs, most important first."""
    listed: list[Job] = [
        ("ours generate", lambda: ours(args, "cached")),
        ("trl112 generate", lambda: theirs(args)),
    ]
    if args.device == "cuda" or args.vllm:
        listed.append(("ours vllm", lambda: ours(args, "vllm")))
    listed.append(("ours rrhf", lambda: rrhf(args)))
    return listed


def run_jobs(args: argparse.Namespace, proof: dict[str, float]) -> list[dict[str, Any]]:
    """Run the jobs until the time is over; a job that fails is reported as failed.

    The result file is written after each, so that a run that is cut short keeps what it has.
    """
    rows = []
    for name, job in jobs(args):
        if args.jobs and not any(wanted in name for wanted in args.jobs):
            continue
        row: dict[str, Any] = {"job": name, "shape": args.shape, "mix": args.mix}
        if time.perf_counter() - args.started > 60 * args.minutes:
            row["skipped"] = "out of time"
        else:
            begun = time.perf_counter()
            try:
                row |= job()
            except Exception as error:  # one job's trouble must not cost the others their time
                row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
            row["job_s"] = time.perf_counter() - begun
        if "time/step" in row:
            row["episodes_per_s"] = args.prompts * args.completions / row["time/step"]
        rows.append(row)
        print(line(row), flush=True)
        if args.out:
            save(args, rows, proof)
    return rows


def line(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    if "peak_gib" not in row:
        return f"{row['job']:18s} {row.get('failed') or row.get('skipped')}"
    phases = "  ".join(
        f"{name.partition('/')[2]} {value:.2f}"
        for name, value in row.items()
        if name.startswith("time/")
    )
    speed = f"{row['episodes_per_s']:7.1f} episodes/s  {phases} s" if phases else " " * 12
    return f"{row['job']:18s} {speed}  {row['peak_gib']:.1f} GiB  [{row['job_s']:.0f} s]"


def figures_of(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the ratios, where both sides ran."""
    done = {row["job"]: row for row in rows if "peak_gib" in row}
    mine, peer = done.get("ours generate"), done.get("trl112 generate")
    fast, ranked = done.get("ours vllm"), done.get("ours rrhf")
    figures: dict[str, float] = {}
    if mine and peer:
        figures["speedup_vs_trl112"] = mine["episodes_per_s"] / peer["episodes_per_s"]
    if fast and peer:
        figures["speedup_vs_trl112_vllm"] = fast["episodes_per_s"] / peer["episodes_per_s"]
    for label, row in (("", mine), ("_vllm", fast), ("_trl112", peer)):
        if row:
            figures[f"peak_gib{label}"] = row["peak_gib"]
            figures[f"episodes_per_s{label}"] = row["episodes_per_s"]
    if mine and ranked and mine["peak_gib"]:
        figures["rrhf_memory_over_ppo"] = ranked["peak_gib"] / mine["peak_gib"]
    if peer and ranked and peer["peak_gib"]:
        figures["rrhf_memory_over_ppo_trl112"] = ranked["peak_gib"] / peer["peak_gib"]
    return figures


def save(args: argparse.Namespace, rows: list[dict[str, Any]], proof: dict[str, float]) -> None:
    """Write the result file."""
    write_result(
        Path(args.out) / "train_ppo.json",
        "train_ppo",
        hardware=gpu(),
        figures=figures_of(rows),
        runs=rows,
        versions={"trl": "1.12.0"},
        proof=proof,
    )


def main() -> None:
    """Prove, time, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", required=True, help="folder with TRL 1.12.0")
    parser.add_argument("--shape", choices=SHAPES, default="362m")
    parser.add_argument("--mix", choices=MIXES, default="hh")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompts", type=int, default=64, help="prompts per step")
    parser.add_argument("--completions", type=int, default=4, help="completions per prompt")
    parser.add_argument("--max-tokens", type=int, default=53)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--warm", type=int, default=2, help="steps not counted: compiling")
    parser.add_argument("--row-tokens", type=int, default=32768)
    parser.add_argument("--trl-batch", type=int, default=32, help="TRL's micro-batch")
    parser.add_argument("--vllm", action="store_true", help="vLLM rollouts on a CPU too")
    parser.add_argument("--vllm-eager", action="store_true")
    parser.add_argument("--vllm-memory", type=float, default=0.3)
    parser.add_argument("--minutes", type=float, default=4.0, help="start no job after this")
    parser.add_argument("--jobs", nargs="*", default=[], help="only jobs whose name holds a word")
    parser.add_argument("--no-proof", action="store_true")
    parser.add_argument("--out", default="")
    parser.add_argument("--scratch", default="/tmp/train-ppo")
    args = parser.parse_args()
    args.started = time.perf_counter()
    sys.path.insert(0, args.trl)
    proof = {} if args.no_proof else prove(Path(args.scratch) / "proof", device=args.device)
    write_work(args)
    rows = run_jobs(args, proof)
    print("\n" + "\n".join(line(row) for row in rows))
    for name, value in figures_of(rows).items():
        print(f"{name}: {value:.4g}")


if __name__ == "__main__":
    main()
