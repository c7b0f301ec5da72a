"""What rounded logits do to a label: one judge in bfloat16, with and without a float32 head.

    python benchmarks/judge_rounding.py --candidates FILE.jsonl --model build/smollm2

The shortest questions about real completions go through vLLM twice, its logits once in the model's
16 bits, as vLLM computes them unless told otherwise, and once in float32, as the toolkit tells it;
and through transformers in float32 throughout, which is what both are compared with. Counted: how
many different values P(first label) takes, and how far it is off in the mean. Needs a vLLM that
knows ``head_dtype`` for generation (0.32 does, 0.25 ignores it); a CPU will do.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

from judge_gpu import difference, judge_calls, probabilities
from result_file import RESULTS, cpu, gpu, write_result

from feedback.backends import JudgeCall
from feedback.backends.opening import open_backend
from feedback.config import EngineOptions
from feedback.rounding import log_odds_step


def answers(calls: list[JudgeCall], **engine: Any) -> dict[str, float]:
    """Return P(first label) of each question."""
    backend = open_backend(EngineOptions(**engine))
    backend.prepare(("A", "B"))
    found = probabilities(backend.judge(calls))
    backend.close()
    return found


def main() -> None:
    """Ask three times, compare, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=Path, required=True)
    parser.add_argument("--model", required=True, help="pretrained judge")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--kv-gib", type=float, default=1.0)
    parser.add_argument("--device", default="cpu", help="of transformers")
    parser.add_argument("--out", type=Path, default=RESULTS / "judge_rounding.json")
    options = parser.parse_args()
    calls = judge_calls(options.candidates, "pairwise", 20 * options.questions)
    calls.sort(key=lambda call: sum(len(message["content"]) for message in call.messages))
    calls = calls[: options.questions]
    memory = {"kv_cache_memory_bytes": int(options.kv_gib * 2**30)}
    common: dict[str, Any] = {"model": options.model, "max_model_len": 2048}
    exact = answers(calls, **common, backend="transformers", dtype="float32", device=options.device)
    figures: dict[str, float] = {
        "questions": len(calls),
        "distinct_exact": len(set(exact.values())),
        "standard_deviation": statistics.pstdev(exact.values()),
    }
    asked = {"exact": exact}
    for name, more in (("rounded", {"hf_overrides": {"head_dtype": "model"}}), ("float32", {})):
        found = asked[name] = answers(
            calls,
            **common,
            backend="vllm",
            dtype="bfloat16",
            enforce_eager=True,
            extra=memory | more,
        )
        largest, mean = difference(exact, found)
        figures |= {
            # To five digits: two ways to one rounded value differ in the last ones.
            f"distinct_{name}": len({round(value, 5) for value in found.values()}),
            f"step_{name}": log_odds_step([(p, 1 - p) for p in found.values()]) or 0.0,
            f"mean_error_{name}": mean,
            f"largest_error_{name}": largest,
        }
    print(figures)
    hardware = gpu() if options.device == "cuda" else cpu()
    command = "python benchmarks/judge_rounding.py --candidates CANDIDATES.jsonl --model MODEL"
    write_result(
        options.out,
        "judge_rounding",
        hardware=hardware,
        figures=figures,
        runs=[{name: found[call] for name, found in asked.items()} for call in exact],
        command=command,
        model=Path(options.model).name,
    )


if __name__ == "__main__":
    main()
