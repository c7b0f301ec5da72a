"""Several GPUs: does DPO train the same under DDP and FSDP2, and how much faster?

    python benchmarks/train_scaling.py --out benchmarks/results

Runs ``rlaif dpo`` on the same rows three times, as a user would: by itself, and through
``accelerate launch`` with DDP and with FSDP2 on all GPUs of the machine, at the same prompts per
step. The loss of every step must agree (``--tolerance``, for bfloat16 products added up in another
order), the saved weights must load and agree too, and each run's own speed is what is compared.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from result_file import gpu, write_result
from train_work import MIXES, SHAPES, build_model, make_groups, word_tokenizer

FSDP = [
    "--use_fsdp",
    *("--fsdp_version", "2"),
    *("--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"),
    *("--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"),
    *("--fsdp_state_dict_type", "FULL_STATE_DICT"),
    # Each process loads the weights itself: the packed forward is checked before they are sharded.
    *("--fsdp_cpu_ram_efficient_loading", "false"),
]


def write_work(args: argparse.Namespace) -> None:
    """Write policy, tokenizer and preference rows."""
    folder = Path(args.scratch)
    shutil.rmtree(folder, ignore_errors=True)
    model = build_model(args.shape, dtype=torch.float32, device="cpu")
    model.save_pretrained(folder / "policy")
    word_tokenizer().save_pretrained(folder / "policy")
    groups = make_groups(MIXES[args.mix], args.prompts * args.steps)
    with (folder / "preferences.jsonl").open("w") as file:
        for number, group in enumerate(groups):
            chosen, rejected = (" " + words(ids[:-1]) for ids in group.completions)
            row = {"prompt": words(group.prompt_ids), "chosen": chosen, "rejected": rejected}
            file.write(
                json.dumps(row | {"prompt_id": str(number), "p_chosen": 0.9, "margin": 0.8}) + "\n"
            )


def words(ids: Any) -> str:
    """Return token ids as the words that ``word_tokenizer`` reads."""
    return " ".join(f"w{token}" for token in ids)


def run(args: argparse.Namespace, name: str, launcher: list[str]) -> dict[str, Any]:
    """Train once; return the losses and the run's own figures."""
    folder = Path(args.scratch) / name
    options = {
        "data": Path(args.scratch) / "preferences.jsonl",
        "model": Path(args.scratch) / "policy",
        "output": folder,
        "reference-cache": Path(args.scratch) / "references",
        "precision": "autocast" if args.device == "cuda" else "float32",
        "batch-size": args.prompts,
        "row-tokens": args.row_tokens,
        "max-length": MIXES[args.mix].longest_prompt + MIXES[args.mix].longest_completion,
        "log-every": 1,
        "learning-rate": 1e-5,
        "device": args.device,
    }
    command = [*launcher, "-m", "train.cli", "dpo"]
    command += [word for key, value in options.items() for word in (f"--{key}", str(value))]
    begun = time.perf_counter()
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=args.timeout, env=environment()
    )
    if done.returncode:
        raise RuntimeError(
            f"{name}: {' '.join(command)}\n{done.stdout[-800:]}{done.stderr[-3000:]}"
        )
    curve = [json.loads(line) for line in (folder / "loss.jsonl").read_text().splitlines()]
    figures = json.loads((folder / "training.json").read_text())["figures"]
    return {
        "run": name,
        "losses": [row["loss"] for row in curve if "loss" in row],
        "grad_norms": [row["grad_norm"] for row in curve if "grad_norm" in row],
        "seconds": time.perf_counter() - begun,
        **{key: figures[key] for key in ("real_tokens_per_s", "mfu", "peak_gib") if key in figures},
    }


def environment() -> dict[str, str]:
    """Return this process's environment, with the project's folder to import from."""
    root = str(Path(__file__).resolve().parent.parent)
    known = os.environ.get("PYTHONPATH", "")
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (root, known)))}


def weights_gap(args: argparse.Namespace, first: str, second: str) -> float:
    """Return how far two runs' saved weights are apart, over how far the first has moved."""
    from transformers import AutoModelForCausalLM

    start, one, other = (
        AutoModelForCausalLM.from_pretrained(Path(args.scratch) / name, dtype=torch.float32)
        for name in ("policy", first, second)
    )
    with torch.no_grad():
        triples = zip(start.parameters(), one.parameters(), other.parameters(), strict=True)
        squares = [((a - b).pow(2).sum(), (a - s).pow(2).sum()) for s, a, b in triples]
    apart, moved = (float(sum(column)) for column in zip(*squares, strict=True))
    return math.sqrt(apart / moved)


def compare(args: argparse.Namespace, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return largest differences and speed-ups over the single process; raises AssertionError."""
    single, figures = rows[0], {}
    for row in rows[1:]:
        name = row["run"]
        for key in ("losses", "grad_norms"):
            pairs = list(zip(single[key], row[key], strict=True))
            figures[f"{name}_{key}_difference"] = max(abs(a - b) / abs(a) for a, b in pairs)
        figures[f"{name}_weights_difference"] = weights_gap(args, single["run"], name)
        if "real_tokens_per_s" in row:
            rate = row["real_tokens_per_s"] * args.processes  # a run counts its own process's
            figures[f"{name}_speedup"] = rate / single["real_tokens_per_s"]
        if "peak_gib" in row:
            figures[f"{name}_peak_gib_ratio"] = row["peak_gib"] / single["peak_gib"]
        assert figures[f"{name}_losses_difference"] < args.tolerance, row["losses"]
    return figures


def launchers_of(args: argparse.Namespace) -> dict[str, list[str]]:
    """Return what stands before ``-m train.cli`` for each way to use several processes."""
    count = str(args.processes)
    if args.device == "cpu":  # accelerate has no launcher of its own there, and shards nothing
        return {"ddp": ["-m", "torch.distributed.run", "--nproc_per_node", count]}
    shared = ["-m", "accelerate.commands.launch", "--num_processes", count, "--num_machines", "1"]
    shared += ["--mixed_precision", "bf16", "--dynamo_backend", "no"]
    return {"ddp": [*shared, "--multi_gpu"], "fsdp2": [*shared, *FSDP]}


def main() -> None:
    """Train three times, compare, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="362m")
    parser.add_argument("--mix", choices=MIXES, default="hh")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--prompts", type=int, default=384, help="per step, over all processes")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--row-tokens", type=int, default=32768)
    parser.add_argument("--tolerance", type=float, default=5e-3, help="of the losses")
    parser.add_argument("--timeout", type=float, default=200.0, help="of each run, in seconds")
    parser.add_argument("--runs", nargs="*", default=["ddp", "fsdp2"])
    parser.add_argument("--out", default="")
    parser.add_argument("--scratch", default="/tmp/train-scaling")
    args = parser.parse_args()
    write_work(args)
    launchers = launchers_of(args)
    rows = [run(args, "single", [sys.executable])]
    print(json.dumps(rows[-1]), flush=True)
    for name in args.runs:
        rows.append(run(args, name, [sys.executable, *launchers[name]]))
        print(json.dumps(rows[-1]), flush=True)
    figures = compare(args, rows)
    print(json.dumps(figures, indent=1))
    if args.out:
        path = Path(args.out) / "train_scaling.json"
        hardware = gpu(args.processes)
        write_result(path, "train_scaling", hardware=hardware, figures=figures, runs=rows)


if __name__ == "__main__":
    main()
