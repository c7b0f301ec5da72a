"""What judging costs on a GPU: in process and behind vLLM's server, with and without prefix reuse.

    python benchmarks/judge_gpu.py --candidates FILE.jsonl --tokenizer FOLDER --out results.json

A random Llama (SmolLM2-360M's shape, output rows of its own: 409M parameters) judges real
completions in both orders. Weights do not matter for speed; the labels' output rows are tilted so
that label probabilities are ordinary numbers. Measured, each as the median of several runs on an
empty prefix cache:

* verdicts/s of the vllm engine, against ``LLM.generate`` on the same token ids and parameters, with
  nothing tokenised, read or yielded;
* the same questions in random order: what adjacency of orders and pairs buys (the KV cache is
  limited to ``--kv-gib``, as it is for a judge of ordinary size);
* one-token verdicts against rationale-first ones;
* the lean HTTP path against vLLM's own server;
* label probabilities in process and over HTTP on the same questions.

With ``--parity-model`` (pretrained: ``gguf_model.py`` says where to find a small one) the same
questions go through vLLM and transformers too. The random model will not do for that: its sharp
attention makes of bfloat16's rounding another verdict, even within one engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from result_file import gpu, write_result

from feedback.backends import JudgeCall
from feedback.backends.openai import OpenAIBackend
from feedback.backends.opening import open_backend
from feedback.backends.vllm import VllmBackend
from feedback.config import EngineOptions
from feedback.installed import package_versions
from feedback.ordering import distinct_completions
from feedback.records import Candidates
from feedback.shards import read_rows
from feedback.templates import load_rubric, load_template, render

SHAPES: dict[str, dict[str, int]] = {
    "409m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def make_model(folder: Path, tokenizer: Path, shape: str, dtype: str) -> Path:
    """Write a random Llama whose label tokens carry most of the first token's probability."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokens = AutoTokenizer.from_pretrained(tokenizer)
    tokens.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        **SHAPES[shape],
        vocab_size=len(tokens),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.02,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        shared = torch.randn(config.hidden_size)
        shared /= shared.norm()
        model.get_input_embeddings().weight.mul_(8.0).add_(3.0 * shared)
        for layer in model.model.layers:
            # Sharp attention, so that verdicts depend on the prompt; small steps of the residual
            # stream, so that rounding does not grow through the layers.
            layer.self_attn.q_proj.weight *= 8.0
            layer.self_attn.k_proj.weight *= 8.0
            layer.self_attn.o_proj.weight /= math.sqrt(2 * config.num_hidden_layers)
            layer.mlp.down_proj.weight /= math.sqrt(2 * config.num_hidden_layers)
        output = model.get_output_embeddings().weight
        for label in ("A", "B"):
            row = output[tokens.convert_tokens_to_ids(label)]
            row *= 3.0
            row += (56.0 / math.sqrt(config.hidden_size) - row @ shared) * shared
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def judge_calls(candidates: Path, template_name: str, most: int) -> list[JudgeCall]:
    """Return both orders of all pairs, prompt by prompt, as a labelling run asks them."""
    template = load_template(template_name)
    rubric = load_rubric(template.rubric)
    one_token = template.mode == "label"
    calls: list[JudgeCall] = []
    for row in read_rows(candidates, Candidates):
        texts = [completion.completion for completion in distinct_completions(row)]
        for a in range(len(texts)):
            for b in range(a + 1, len(texts)):
                for first, second in ((a, b), (b, a)):
                    calls.append(
                        JudgeCall(
                            call_id=f"{row.prompt_id}/{first}/{second}",
                            messages=render(
                                template,
                                prompt=row.prompt,
                                completions=(texts[first], texts[second]),
                                rubric=rubric,
                            ),
                            choices=template.choices if one_token else None,
                            max_tokens=template.max_tokens,
                        )
                    )
        if len(calls) >= most:
            break
    return calls[:most]


def measure(judge: Callable[[list[JudgeCall]], Iterable[Any]], calls: list[JudgeCall]) -> Any:
    """Run once; return seconds, rates and token counts."""
    begun, cpu = time.perf_counter(), time.process_time()
    replies = list(judge(calls))
    seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
    failed = [reply.error for reply in replies if reply.error]
    assert not failed, failed[0]
    assert len({reply.call_id for reply in replies}) == len(calls)
    prompt = sum(reply.usage.prompt_tokens for reply in replies)
    return {
        "seconds": seconds,
        "verdicts_per_s": len(calls) / seconds,
        "prompt_tokens_per_s": prompt / seconds,
        "prompt_tokens": prompt,
        "completion_tokens": sum(reply.usage.completion_tokens for reply in replies),
        "cached_share": sum(reply.usage.cached_tokens for reply in replies) / max(prompt, 1),
        "cpu_ms_per_verdict": 1e3 * cpu / len(calls),
    }


def bare_generate(backend: VllmBackend, calls: list[JudgeCall]) -> Callable[[], dict[str, float]]:
    """Return a run of ``LLM.generate`` on the calls' token ids, made beforehand."""
    rows = backend.chat.ids_of([call.messages for call in calls])
    prompts = [{"prompt_token_ids": row} for row in rows]
    params = backend._new_params(calls[0])

    def run() -> dict[str, float]:
        begun, cpu = time.perf_counter(), time.process_time()
        outputs = backend._llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        assert len(outputs) == len(calls)
        return {
            "seconds": seconds,
            "verdicts_per_s": len(calls) / seconds,
            "cpu_ms_per_verdict": 1e3 * (time.process_time() - cpu) / len(calls),
        }

    return run


class Report:
    """The result file, rewritten after every stage so that a cut run still says something."""

    def __init__(self, path: Path, options: argparse.Namespace):
        self.path = path
        self.begun = time.perf_counter()
        self.runs: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}}
        self.figures: dict[str, float] = {}

    def add(self, name: str, runs: Any, **figures: float) -> None:
        """Keep a stage's table and figures, and print them."""
        self.runs[name] = runs
        self.figures |= figures
        seconds = time.perf_counter() - self.begun
        shown = ", ".join(f"{key} {value:.4g}" for key, value in figures.items())
        print(f"[{seconds:6.1f} s] {name}: {shown}", flush=True)
        hardware = f"{gpu()}, {os.cpu_count()} CPU cores"
        write_result(
            self.path, "judge_gpu", hardware=hardware, figures=self.figures, runs=self.runs
        )


def median(runs: list[dict[str, float]], key: str = "verdicts_per_s") -> float:
    """Return the median of one column."""
    return statistics.median(run[key] for run in runs)


def ratio(runs: list[dict[str, float]], others: list[dict[str, float]]) -> float:
    """Return the median over rounds of one rate over the other."""
    pairs = zip(runs, others, strict=True)
    return statistics.median(
        run["verdicts_per_s"] / other["verdicts_per_s"] for run, other in pairs
    )


def probabilities(replies: Iterable[Any]) -> dict[str, float]:
    """Return P(first label) of each call, among the labels."""
    found = {}
    for reply in replies:
        values = {label: math.exp(value) for label, value in reply.choice_logprobs.items()}
        found[reply.call_id] = values["A"] / sum(values.values())
    return found


def difference(first: dict[str, float], second: dict[str, float]) -> tuple[float, float]:
    """Return largest and mean absolute difference."""
    gaps = [abs(first[name] - second[name]) for name in first]
    return max(gaps), statistics.fmean(gaps)


def in_process(options: argparse.Namespace, model: Path, report: Report) -> dict[str, float]:
    """All measurements on the engine in this process; return its probabilities."""
    begun = time.perf_counter()
    backend = open_backend(
        EngineOptions(
            backend="vllm",
            model=str(model),
            dtype=options.dtype,
            max_model_len=4096,
            enforce_eager=options.eager,
            gpu_memory=0.5,  # asked for at the start only: --kv-gib says what is taken
            extra={"kv_cache_memory_bytes": int(options.kv_gib * 2**30)},
        )
    )
    assert isinstance(backend, VllmBackend)
    backend.prepare(("A", "B"))
    calls = judge_calls(options.candidates, "pairwise", options.calls)
    list(backend.judge(calls[: options.calls // 10]))
    report.add("ready", {}, engine_start_s=time.perf_counter() - begun)

    def fresh(run: Callable[[], Any]) -> Any:
        backend._llm.reset_prefix_cache()
        return run()

    shuffled = random.Random(0).sample(calls, len(calls))
    kinds = {"bare": bare_generate(backend, calls)}
    kinds["ours"] = lambda: measure(backend.judge, calls)
    kinds["shuffled"] = lambda: measure(backend.judge, shuffled)
    table: dict[str, list[Any]] = {name: [] for name in kinds}
    for number in range(options.repeats):
        # Every other round the other way round: what drifts meets all of them alike.
        for name in list(kinds) if number % 2 else reversed(kinds):
            table[name].append(fresh(kinds[name]))
        report.add("in_process", table, **in_process_figures(table, len(calls)))
    if options.in_process_only:
        backend.close()
        return {}
    reasons = judge_calls(options.candidates, "pairwise-rationale", options.calls // 4)
    run = fresh(lambda: measure(backend.judge, reasons))
    report.add(
        "rationale",
        run,
        rationale_verdicts_per_s=run["verdicts_per_s"],
        rationale_completion_tokens=run["completion_tokens"] / len(reasons),
        one_token_speedup_over_rationale=median(table["ours"]) / run["verdicts_per_s"],
    )
    found = probabilities(backend.judge(calls[: options.compare]))
    backend.close()
    return found


def in_process_figures(table: dict[str, list[Any]], calls: int) -> dict[str, float]:
    """Return rates, and ratios of runs of one round: the machine's own drift is not in them."""
    return {
        "verdicts_per_s": median(table["ours"]),
        "bare_generate_per_s": median(table["bare"]),
        "ratio_to_bare_generate": ratio(table["ours"], table["bare"]),
        "adjacency_speedup": ratio(table["ours"], table["shuffled"]),
        "cached_share_adjacent": median(table["ours"], "cached_share"),
        "cached_share_shuffled": median(table["shuffled"], "cached_share"),
        "prompt_tokens_per_verdict": table["ours"][0]["prompt_tokens"] / calls,
    }


@contextlib.contextmanager
def server(options: argparse.Namespace, model: Path, log: Path) -> Iterator[str]:
    """Run vLLM's server; yield its base URL."""
    port = 8193
    command = ["--served-model-name", "judge", "--port", str(port), "--dtype", options.dtype]
    command += ["--max-model-len", "4096", "--max-logprobs", "20", "--enable-prompt-tokens-details"]
    command += ["--kv-cache-memory-bytes", str(int(options.kv_gib * 2**30))]
    command += ["--enforce-eager"] if options.eager else []
    # The CPU build goes by another name, and its command line trips over that.
    if options.api_servers > 1 and "vllm" in package_versions():
        start = ["-m", "vllm.entrypoints.cli.main", "serve", str(model)]
        start += ["--api-server-count", str(options.api_servers)]
    else:
        start = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    environment = {**os.environ, "VLLM_SERVER_DEV_MODE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, *start, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 200
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start:\n{log.read_text()[-3000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 15)
            try:
                process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, 9)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except OSError:
        return False
    return True


def over_http(
    options: argparse.Namespace, model: Path, report: Report, reference: dict[str, float]
) -> None:
    """The lean path against the server."""
    calls = judge_calls(options.candidates, "pairwise", options.calls)
    begun = time.perf_counter()
    with server(options, model, options.out.with_suffix(".server.log")) as base_url:
        backend = OpenAIBackend(
            EngineOptions(
                backend="openai",
                model="judge",
                base_url=base_url,
                concurrency=options.concurrency,
                extra={"start_concurrency": options.concurrency},
            )
        )
        note = backend.prepare(("A", "B")).note
        list(backend.judge(calls[: options.calls // 10]))
        report.add("server", {"note": note}, server_start_s=time.perf_counter() - begun)
        runs = []
        for _ in range(options.repeats):
            reset = base_url.removesuffix("/v1") + "/reset_prefix_cache"
            with contextlib.suppress(OSError):
                urllib.request.urlopen(urllib.request.Request(reset, method="POST")).close()
            runs.append(measure(backend.judge, calls))
        largest, mean = difference(
            reference, probabilities(backend.judge(calls[: options.compare]))
        )
        backend.close()
    report.add(
        "http",
        runs,
        http_verdicts_per_s=median(runs),
        http_ratio_to_in_process=median(runs) / report.figures["verdicts_per_s"],
        http_probability_largest_difference=largest,
        http_probability_mean_difference=mean,
    )


def by_transformers(options: argparse.Namespace, report: Report) -> None:
    """The same questions to a pretrained judge through vLLM and through transformers."""
    calls = judge_calls(options.candidates, "pairwise", options.compare)
    found, runs = {}, {}
    for name in ("vllm", "transformers"):
        settings: dict[str, Any] = {"enforce_eager": True} if name == "vllm" else {}
        if name == "vllm":
            settings["extra"] = {"kv_cache_memory_bytes": int(options.kv_gib * 2**30)}
        backend = open_backend(
            EngineOptions(
                backend=name,
                model=str(options.parity_model),
                dtype=options.dtype,
                max_model_len=4096,
                **settings,
            )
        )
        backend.prepare(("A", "B"))
        list(backend.judge(calls[:8]))
        runs[name] = measure(backend.judge, calls)
        found[name] = probabilities(backend.judge(calls))
        backend.close()
    largest, mean = difference(found["vllm"], found["transformers"])
    report.add(
        "transformers",
        runs,
        transformers_verdicts_per_s=runs["transformers"]["verdicts_per_s"],
        transformers_probability_largest_difference=largest,
        transformers_probability_mean_difference=mean,
        probability_standard_deviation=statistics.pstdev(found["vllm"].values()),
    )


def main() -> None:
    """Measure everything."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--candidates", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/judge_gpu.json"))
    parser.add_argument("--shape", choices=sorted(SHAPES), default="409m")
    parser.add_argument("--model", type=Path, help="judge to measure, instead of a random one")
    parser.add_argument("--parity-model", type=Path, help="pretrained judge for two engines")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--calls", type=int, default=6000)
    parser.add_argument("--compare", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--in-process-only", action="store_true")
    parser.add_argument("--kv-gib", type=float, default=16.0)
    parser.add_argument("--concurrency", type=int, default=512)
    parser.add_argument("--api-servers", type=int, default=6)
    parser.add_argument("--eager", action="store_true")
    options = parser.parse_args()
    report = Report(options.out, options)
    with tempfile.TemporaryDirectory() as folder:
        model = options.model or make_model(
            Path(folder), options.tokenizer, options.shape, options.dtype
        )
        reference = in_process(options, model, report)
        if not options.in_process_only:
            over_http(options, model, report, reference)
    if options.parity_model:
        by_transformers(options, report)
    print(json.dumps(report.figures, indent=1))


if __name__ == "__main__":
    main()
