"""Training speed on one GPU: DPO, reward model and RRHF, packed, against TRL and the authors' RRHF.

    python benchmarks/train_speed.py --out benchmarks/results
    python benchmarks/train_speed.py --shape tiny --mix tiny --device cpu --steps 3   # a rehearsal

First it proves that both sides do the same work: equal token ids, a DPO loss of log 2 at step 0,
packed log-probabilities and gradients equal to the padded model's. Then it times both sides with
the same callback, and prints one table. Jobs run in order of importance until ``--minutes`` are
over; what did not run is named. Tokens per second count a prompt once per completion on both sides.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from result_file import gpu, write_result
from train_clock import Clock, Profile, kernel_shares, measured_peak, warm_steps
from train_peers import authors_rrhf_loss, trl_dpo, trl_reward
from train_proof import prove
from train_work import MIXES, SHAPES, build_model, clean, make_groups, word_tokenizer

from train.config import DpoOptions, RewardOptions, RrhfOptions
from train.data import Group
from train.dpo import DpoObjective
from train.models import compile_layers, enable_packing
from train.reference import attach_reference
from train.reward import RewardObjective
from train.rrhf import RrhfObjective
from train.trainer import PackedTrainer, packing_of

LEAN_BUDGETS = (0.5, 0.3)
"""Shares of the activations kept, where memory is what is short."""


def unshared_tokens(groups: Sequence[Group]) -> int:
    """Return the tokens with a prompt counted once per completion."""
    return sum(len(g.prompt_ids) + len(ids) for g in groups for ids in g.completions)


def peak_gib(device: str) -> float:
    """Return the most memory allocated since ``clean``, in GiB."""
    return torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0


def ours(
    name: str, args: argparse.Namespace, *, completions: int = 2, **changes: Any
) -> dict[str, Any]:
    """Train ``args.steps`` steps with our engine and return the figures."""
    warm, cuda = args.warm, args.device == "cuda"
    settings: dict[str, Any] = {
        "data": (),
        "output": Path(args.scratch) / "ours",
        "device": args.device,
        "max_steps": warm + args.steps,
        "batch_size": 0,
        "row_tokens": args.row_tokens,
        "attention": args.attention,
        "activation_budget": args.activation_budget,
        "log_every": 1000,
        "learning_rate": 1e-6,
        "epochs": 1000.0,
    } | changes
    kinds = {"dpo": DpoOptions, "reward": RewardOptions, "rrhf": RrhfOptions}
    makers = {"dpo": DpoObjective, "reward": RewardObjective, "rrhf": RrhfObjective}
    options = kinds[name](**settings)
    mix = MIXES[args.mix]
    per_row = args.row_tokens / (mix.prompt + mix.chosen + mix.rejected * (completions - 1))
    groups = make_groups(mix, int(per_row * min(8, warm + args.steps)) + 1, completions=completions)
    precision = changes.get("precision", "bfloat16" if cuda else "float32")
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    clean(args.device)
    kind = "reward" if name == "reward" else "causal"
    model = build_model(args.shape, dtype=dtype, device=args.device, kind=kind)
    enable_packing(model)
    prepared: dict[str, float] = {}
    if name == "dpo":
        groups, prepared = prepare(model, groups, options)
    clock = Clock(warm, args.device)
    trainer = PackedTrainer(
        model=model,
        options=options,
        objective=makers[name](options),
        groups=groups,
        callbacks=[clock],
    )
    warm = clock.warm = warm_steps(trainer.steps, least=warm, steps_timed=args.steps)
    trainer.args.max_steps = warm + args.steps
    profile = Profile(warm - 1)  # before the clock starts
    if args.profile and cuda:
        trainer.add_callback(profile)
    built = time.perf_counter()
    trainer.train()
    plan = [plan for epoch in range(100) for plan in trainer.steps.plan(epoch)]
    timed = [groups[i] for step in plan[warm : warm + args.steps] for row in step.rows for i in row]
    figures = rates(args, model, timed, clock.seconds, shared=True)
    figures |= {"compile_s": clock.started - built, "row_tokens": args.row_tokens}
    if profile.kernels:
        figures["profile"] = kernel_shares(profile.kernels, profile.wall_ms)
        figures["kernels"] = profile.kernels[:30]
    return figures | prepared


def prepare(
    model: Any, groups: Sequence[Group], options: DpoOptions
) -> tuple[list[Group], dict[str, float]]:
    """Tokenise the pairs and attach the reference; return the groups and the time of both."""
    tokenizer = word_tokenizer()
    texts = [text(ids) for group in groups for ids in (group.prompt_ids, *group.completions)]
    start = time.perf_counter()
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    tokenised = time.perf_counter() - start
    assert encoded[0] == list(groups[0].prompt_ids), "the words are not the tokens"
    compile_layers(model, options.compile)
    packing, folder = packing_of(options), Path(tempfile.mkdtemp())
    compiled = min(300, len(groups) // 3)
    attach_reference(groups[:compiled], model, packing=packing, folder=folder)  # compiles
    start = time.perf_counter()
    attached = attach_reference(groups, model, packing=packing, folder=folder)
    seconds = time.perf_counter() - start
    count = len(groups)
    prepared = {"tokenise_ms_per_pair": 1e3 * tokenised / count}
    if count > 2 * compiled:
        prepared["reference_ms_per_pair"] = 1e3 * seconds / (count - compiled)
    return attached, prepared


def text(ids: Sequence[int]) -> str:
    """Return token ids as the words that ``word_tokenizer`` reads."""
    return " ".join("</s>" if token == 2 else f"w{token}" for token in ids)


def rates(
    args: argparse.Namespace, model: Any, groups: Sequence[Group], seconds: float, *, shared: bool
) -> dict[str, Any]:
    """Return pairs, groups and tokens per second, MFU and memory."""
    weights = sum(p.numel() for p in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    body = weights - embedding
    counted = sum(len(ids) for g in groups for ids in g.completions)
    processed = counted + sum(
        len(g.prompt_ids) * (1 if shared else len(g.completions)) for g in groups
    )
    operations = 6 * (body * processed + embedding * counted)
    figures = {
        "seconds": seconds,
        "groups_per_s": len(groups) / seconds,
        "real_tokens_per_s": unshared_tokens(groups) / seconds,
        "processed_tokens_per_s": processed / seconds,
        "peak_gib": peak_gib(args.device),
        "groups_per_step": len(groups) / args.steps,
    }
    if args.peak:
        figures["mfu"] = operations / seconds / args.peak / 1e12
        figures["mfu_real"] = 6 * weights * unshared_tokens(groups) / seconds / args.peak / 1e12
    return figures


def theirs(
    name: str, args: argparse.Namespace, *, batch: int, best: bool, attention: str
) -> dict[str, Any]:
    """Train with TRL and return the figures."""
    clean(args.device)
    groups = make_groups(MIXES[args.mix], batch * (args.warm + args.steps))
    clock = Clock(args.warm, args.device)
    make = trl_dpo if name == "dpo" else trl_reward
    begun = time.perf_counter()
    trainer = make(
        args.shape,
        groups,
        batch=batch,
        steps=args.warm + args.steps,
        best=best,
        attention=attention,
        device=args.device,
        callback=clock,
    )
    model = trainer.model
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    prepared = {"prepare_ms_per_pair": 1e3 * (time.perf_counter() - begun) / len(groups)}
    trainer.train()
    timed = groups[args.warm * batch :]
    return rates(args, model, timed, clock.seconds, shared=False) | prepared


def authors_rrhf(args: argparse.Namespace, *, completions: int) -> dict[str, Any]:
    """Train RRHF one prompt at a time, a step every 8 prompts, and return the figures."""
    clean(args.device)
    cuda = args.device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    model = build_model(args.shape, dtype=dtype, device=args.device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    groups = make_groups(MIXES[args.mix], 8 * (args.warm + args.steps), completions=completions)
    clock = Clock(0, args.device)
    for number, group in enumerate(groups):
        if number == 8 * args.warm:
            clock.started = clock._wait()
        (authors_rrhf_loss(model, group) / 8).backward()
        if number % 8 == 7:
            optimiser.step()
            optimiser.zero_grad()
    seconds = clock._wait() - clock.started
    return rates(args, model, groups[8 * args.warm :], seconds, shared=False)


Job = tuple[str, Callable[[], dict[str, Any]]]


def jobs(args: argparse.Namespace) -> list[Job]:
    """Return the named jobs, most important first."""
    batches = args.batches or {"362m": (16, 32), "1500m": (4, 8), "tiny": (4,)}[args.shape]
    cuda = args.device == "cuda"
    listed: list[Job] = []

    def mine(job: str, name: str, **changes: Any) -> None:
        listed.append((f"ours {job}", lambda: ours(name, args, **changes)))

    def peer(name: str, level: str, batch: int, attention: str) -> None:
        settings = {"batch": batch, "best": level == "best", "attention": attention}
        kernel = f" {attention}" if level == "best" else ""
        job = f"trl {name} {level} batch {batch}{kernel}"
        listed.append((job, lambda: theirs(name, args, **settings)))

    mine("dpo", "dpo")
    for batch in batches:
        peer("dpo", "best", batch, "flex_attention" if cuda else "sdpa")
    for budget in LEAN_BUDGETS:
        mine(f"dpo budget {budget}", "dpo", activation_budget=budget)
    mine("dpo checkpointing", "dpo", gradient_checkpointing=True)
    mine("reward", "reward")
    for batch in batches:
        peer("reward", "best", batch, "sdpa")
    for k in (4, 2, 8):
        mine(f"rrhf k{k}", "rrhf", completions=k)
        listed.append((f"authors rrhf k{k}", lambda k=k: authors_rrhf(args, completions=k)))
    if cuda:
        peer("dpo", "best", batches[0], "sdpa")
    peer("dpo", "default", batches[0], "sdpa")
    peer("reward", "default", batches[0], "sdpa")
    if cuda:
        mine("dpo varlen", "dpo", attention="varlen")
        mine("dpo autocast", "dpo", precision="autocast")
        mine("dpo flex", "dpo", attention="flex")
        mine("dpo not shared", "dpo", share_prompt=False)
    return listed


def run_jobs(args: argparse.Namespace, proof: dict[str, float]) -> list[dict[str, Any]]:
    """Run the chosen jobs until the time is over; a job that fails is reported as failed.

    The result files are written after each, so that a run that is cut short keeps what it has.
    """
    rows = []
    for name, job in jobs(args):
        if args.jobs and not any(fnmatch(name, pattern) for pattern in args.jobs):
            continue
        row: dict[str, Any] = {"job": name, "shape": args.shape, "mix": args.mix}
        if time.perf_counter() - args.started > 60 * args.minutes:
            row["skipped"] = "out of time"
        else:
            start = time.perf_counter()
            try:
                row |= job()
            except Exception as error:  # one job's trouble must not cost the others their time
                row["failed"] = f"{type(error).__name__}: {str(error)[:200]}"
            row["job_s"] = time.perf_counter() - start
        rows.append(row)
        print(line(row), flush=True)
        if args.out:
            save(args, rows, proof)
    return rows


def line(row: dict[str, Any]) -> str:
    """Return one line of the table."""
    if "groups_per_s" not in row:
        return f"{row['job']:36s} {row.get('failed') or row.get('skipped')}"
    return (
        f"{row['job']:36s} {row['groups_per_s']:8.1f} groups/s {row['real_tokens_per_s']:9,.0f} "
        f"real tok/s  MFU {row.get('mfu', 0):.3f} (real {row.get('mfu_real', 0):.3f}) "
        f"{row['peak_gib']:6.1f} GiB for {row['groups_per_step']:.0f}  [{row['job_s']:.0f} s]"
    )


def figures_of(rows: Sequence[dict[str, Any]], name: str, suffix: str) -> dict[str, float]:
    """Return the ratios of one algorithm at one setting, where both sides ran."""
    done = {row["job"]: row for row in rows if "groups_per_s" in row}
    mine = done.get("ours rrhf k4" if name == "rrhf" else f"ours {name}")
    if mine is None:
        return {}
    figures = {
        key: mine[key] for key in ("mfu", "real_tokens_per_s", "groups_per_s") if key in mine
    }

    def best_of(word: str) -> dict[str, Any] | None:
        found = [row for job, row in done.items() if job.startswith(word)]
        return max(found, key=lambda row: row["groups_per_s"], default=None)

    if name == "rrhf":
        # The yardstick that stands in TRL's place: the authors' loss, one prompt at a time.
        for peer in filter(None, [done.get("authors rrhf k4")]):
            figures["speedup_vs_trl_best"] = mine["groups_per_s"] / peer["groups_per_s"]
    else:
        for label, peer in (
            ("best", best_of(f"trl {name} best")),
            ("default", best_of(f"trl {name} default")),
        ):
            if peer is not None:
                figures[f"speedup_vs_trl_{label}"] = mine["groups_per_s"] / peer["groups_per_s"]
        peer = best_of(f"trl {name} best")
        if peer is not None and peer["peak_gib"]:
            figures["memory_per_pair_ratio"] = memory_per_pair(mine) / memory_per_pair(peer)
            lean = [
                row
                for job, row in done.items()
                if job.startswith(f"ours {name}")
                and memory_per_pair(row) <= memory_per_pair(peer) / 8
            ]
            if lean:
                best = max(lean, key=lambda row: row["groups_per_s"])
                speed = best["groups_per_s"] / peer["groups_per_s"]
                figures["speedup_vs_trl_best_at_an_eighth_of_its_memory"] = speed
    return {f"{key}_{suffix}": value for key, value in figures.items()}


def memory_per_pair(row: dict[str, Any]) -> float:
    """Return peak memory over the groups of a step, in GiB."""
    return row["peak_gib"] / row["groups_per_step"]


def save(args: argparse.Namespace, rows: list[dict[str, Any]], proof: dict[str, float]) -> None:
    """Write one result file per algorithm that ran, keeping what other settings wrote there."""
    suffix = f"{args.shape}_{args.mix}"
    for name in ("dpo", "reward", "rrhf"):
        mine = [row for row in rows if f" {name}" in row["job"]]
        figures = figures_of(rows, name, suffix)
        plain = [{k: v for k, v in row.items() if k != "kernels"} for row in mine]
        save_runs(args, f"train_{name}", plain, figures, proof)
    profiled = [
        {key: row[key] for key in ("job", "shape", "mix", "groups_per_step", "profile", "kernels")}
        for row in rows
        if "kernels" in row
    ]
    shares = {
        f"{key}_{row['job'].removeprefix('ours ').replace(' ', '_')}_{suffix}": value
        for row in profiled
        for key, value in row["profile"].items()
    }
    save_runs(args, "train_profile", profiled, shares, {})


def save_runs(
    args: argparse.Namespace,
    bench: str,
    rows: list[dict[str, Any]],
    figures: dict[str, float],
    proof: dict[str, float],
) -> None:
    """Put the runs of this shape and mix in the place of older ones in the bench's file."""
    if not rows:
        return
    suffix = f"{args.shape}_{args.mix}"
    path = Path(args.out) / f"{bench}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    others = {k: v for k, v in known.get("figures", {}).items() if not k.endswith(suffix)}
    kept = [r for r in known.get("runs", []) if (r["shape"], r["mix"]) != (args.shape, args.mix)]
    command = shlex.join(["python", *sys.argv])
    proven = proof or known.get("proof", {})
    write_result(
        path,
        bench,
        hardware=gpu(),
        figures=others | figures,
        runs=kept + rows,
        commands=known.get("commands", {}) | {suffix: command},
        measured_peak_tflops=known.get("measured_peak_tflops", {}) | {suffix: args.peak},
        **({"proof": proven} if proven else {}),
    )


def main() -> None:
    """Prove, time, print the table, write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="362m")
    parser.add_argument("--mix", choices=MIXES, default="hh")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--row-tokens", type=int, default=65536)
    parser.add_argument("--minutes", type=float, default=8.0, help="start no job after this")
    parser.add_argument(
        "--jobs", nargs="*", default=[], help="only jobs of these names; * stands for anything"
    )
    parser.add_argument("--batches", type=int, nargs="*", help="micro-batches to search for TRL")
    parser.add_argument("--profile", action="store_true", help="record one step's kernels")
    parser.add_argument("--no-proof", action="store_true")
    parser.add_argument("--attention", default="auto", help="kernel of our side")
    parser.add_argument("--activation-budget", type=float, default=0.9, help="of our side")
    parser.add_argument("--kernel-configs", default="", help="from train_attention.py --configs")
    parser.add_argument("--out", default="")
    parser.add_argument("--scratch", default="/tmp/train-speed")
    args = parser.parse_args()
    args.started = time.perf_counter()
    args.peak = measured_peak(args.device)
    if args.kernel_configs:
        from train import triton_attention

        for kernel, tile, *settings in json.loads(Path(args.kernel_configs).read_text()):
            triton_attention._CONFIGS[kernel, tile] = tuple(settings)
    print(
        f"{args.shape} {args.mix} on {args.device}, measured peak {args.peak:.0f} TFLOP/s",
        flush=True,
    )
    proof = {} if args.no_proof else prove(args.device, Path(args.scratch))
    rows = run_jobs(args, proof)
    print("\n" + "\n".join(line(row) for row in rows))
    for name in ("dpo", "reward", "rrhf"):
        for key, value in figures_of(rows, name, f"{args.shape}_{args.mix}").items():
            print(f"{name} {key}: {value:.4g}")


if __name__ == "__main__":
    main()
