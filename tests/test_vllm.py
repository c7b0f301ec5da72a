"""vLLM as it is: in process and behind its own server, against transformers and against faults.

The engine runs in a process of its own (``IN_PROCESS``), because it leaves process groups and seeds
behind; everything it answers comes back as JSON.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import fault_proxy
import pytest
from fault_proxy import FaultProxy
from serving import Server, need_vllm
from test_faults import (
    FAST,
    PASSING,
    Damage,
    damage,
    failures,
    options,
    verdicts,
    write_candidates,
)

from feedback import labeling
from feedback.backends import JudgeCall, SampleCall
from feedback.backends.openai import OpenAIBackend
from feedback.backends.opening import open_backend
from feedback.config import EngineOptions
from feedback.errors import BackendError
from feedback.records import Candidates, Completion, Message, Verdict, encode
from feedback.templates import load_rubric, load_template, render

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    # Under xdist, one process runs all of these: one server, one engine.
    pytest.mark.xdist_group("vllm"),
]
TOLERANCE = 2e-4
"""In probability: float32 on both sides, summed in other orders."""

IN_PROCESS = """
import dataclasses, json, multiprocessing, os, signal, sys
sys.path.insert(0, "tests")

from test_vllm import judge_calls, sample_calls
from feedback.backends import JudgeCall
from feedback.backends.opening import open_backend
from feedback.config import EngineOptions
from feedback.errors import BackendError

def death_of(stream):
    try:
        list(stream)
    except BackendError as error:
        return str(error)
    return "alive"

def main():
    model, adapter, target = sys.argv[1:]
    backend = open_backend(EngineOptions(
        backend="vllm", model=model, dtype="float32", enforce_eager=True, max_model_len=2048,
        lora=adapter, extra={"max_num_seqs": 16},
    ))
    lora, backend._adapter = backend._adapter, None
    found = {"note": backend.prepare(("A", "B")).note, "revision": backend.identity.revision}
    from vllm import envs
    known = envs.environment_variables
    found["unknown"] = [n for n in os.environ if n.startswith("VLLM_") and n not in known]
    found["method"] = envs.VLLM_WORKER_MULTIPROC_METHOD
    found["judged"] = list(backend.judge(judge_calls()))
    taken = []
    def counted():
        for call in judge_calls() * 10:
            taken.append(call)
            yield call
    stream = backend.judge(counted())
    first = [next(stream) for _ in range(3)]
    found["taken"] = len(taken)
    stream.close()
    found["again"] = list(backend.judge(judge_calls()))
    found["sampled"] = list(backend.sample(sample_calls()))
    found["sampled_again"] = list(backend.sample(sample_calls()))
    message = ({"role": "user", "content": "x" * 5000},)
    found["too_long"] = list(backend.judge([
        JudgeCall(call_id="long", messages=message, choices=("A", "B")), judge_calls()[0],
    ]))
    found["text"] = list(backend.judge([
        dataclasses.replace(judge_calls()[0], choices=None, max_tokens=5),
        dataclasses.replace(judge_calls()[0], call_id="both", max_tokens=4),
    ]))
    backend._adapter = lora
    found["adapted"] = list(backend.judge(judge_calls()))
    found["refused"] = list(backend.judge([
        dataclasses.replace(judge_calls()[0], temperature=-1.0), judge_calls()[1],
    ]))
    stream = backend.judge(judge_calls() * 10)
    next(stream)
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
    found["deaths"] = [death_of(stream), death_of(backend.judge(judge_calls()))]
    backend.close()
    with open(target, "w") as file:
        json.dump(found, file, default=dataclasses.asdict)

if __name__ == "__main__":
    main()
"""


def judge_calls() -> list[JudgeCall]:
    """Return both orders of all pairs of four invented conversations, adjacent."""
    template = load_template("pairwise-tie")
    calls = []
    for prompt in range(4):
        texts = [f"Answer {place}: " + f"word{prompt * place} " * (5 + place) for place in range(3)]
        for a, b in ((0, 1), (1, 0), (0, 2), (2, 0), (1, 2), (2, 1)):
            messages = render(
                template,
                prompt=f"Question {prompt}? " + "Some background. " * 3,
                completions=[texts[a], texts[b]],
                rubric=load_rubric("helpfulness"),
            )
            calls.append(
                JudgeCall(call_id=f"{prompt}-{a}-{b}", messages=messages, choices=template.choices)
            )
    return calls


def sample_calls() -> list[SampleCall]:
    """Return sampling calls with a seed."""
    return [
        SampleCall(
            call_id=f"s{number}",
            messages=(Message(role="user", content=f"Prompt {number}"),),
            n=3,
            max_tokens=8,
            seed=number,
        )
        for number in range(3)
    ]


def probabilities(replies: Any) -> dict[str, dict[str, float]]:
    """Return call id -> label -> probability, of replies or of their JSON."""
    found = {}
    for reply in replies:
        row = reply if isinstance(reply, dict) else vars_of(reply)
        assert row["error"] is None, row["error"]
        found[row["call_id"]] = {k: math.exp(v) for k, v in row["choice_logprobs"].items()}
    return found


def vars_of(reply: Any) -> dict[str, Any]:
    return {name: getattr(reply, name) for name in ("call_id", "error", "choice_logprobs")}


def assert_same(first: dict[str, dict[str, float]], second: dict[str, dict[str, float]]) -> None:
    assert first.keys() == second.keys()
    for name, expected in first.items():
        assert second[name] == pytest.approx(expected, abs=TOLERANCE), name


@pytest.fixture(scope="module")
def adapter(vllm_judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter that changes verdicts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False
    )
    get_peft_model(AutoModelForCausalLM.from_pretrained(vllm_judge), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def in_process(
    vllm_judge: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Everything that the in-process engine answered."""
    need_vllm()
    folder = tmp_path_factory.mktemp("in-process")
    script, target = folder / "script.py", folder / "found.json"
    script.write_text(IN_PROCESS)
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, script, vllm_judge, adapter, target],
        capture_output=True,
        text=True,
        cwd=root,
        env={
            **os.environ,
            "PYTHONPATH": str(root),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "OMP_NUM_THREADS": "1",
        },
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(target.read_text())
    return found


@pytest.fixture(scope="module")
def by_transformers(vllm_judge: Path) -> dict[str, dict[str, float]]:
    backend = open_backend(EngineOptions(model=str(vllm_judge), device="cpu", dtype="float32"))
    return probabilities(backend.judge(judge_calls()))


def endpoint(server: Server, **extra: Any) -> OpenAIBackend:
    return OpenAIBackend(
        EngineOptions(
            backend="openai",
            model=server.model,
            base_url=server.base_url,
            extra={**FAST, **extra},
        )
    )


# --- the same probabilities everywhere -----------------------------------------------------------


def test_reference_verdicts_vary(by_transformers: dict[str, dict[str, float]]) -> None:
    """Or agreement would mean nothing."""
    first = [row["A"] for row in by_transformers.values()]
    assert max(first) - min(first) > 0.1
    assert all(0.3 < sum(row.values()) <= 1.0001 for row in by_transformers.values())


def test_in_process_equals_transformers(
    in_process: dict[str, Any], by_transformers: dict[str, dict[str, float]]
) -> None:
    assert_same(by_transformers, probabilities(in_process["judged"]))
    assert_same(by_transformers, probabilities(in_process["again"]))


def test_lean_path_equals_transformers(
    vllm_server: Server, by_transformers: dict[str, dict[str, float]]
) -> None:
    """Label tokens named by id: exact, whatever their rank."""
    backend = endpoint(vllm_server)
    found = backend.prepare(("A", "B", "C"))
    assert found.max_logprobs is None
    assert_same(by_transformers, probabilities(backend.judge(judge_calls())))
    backend.close()


def test_package_equals_transformers(
    vllm_server: Server, by_transformers: dict[str, dict[str, float]]
) -> None:
    """The twenty likeliest tokens, as hosted APIs give them."""
    backend = endpoint(vllm_server, transport="sdk")
    found = backend.prepare(("A", "B", "C"))
    assert found.max_logprobs == 20
    assert_same(by_transformers, probabilities(backend.judge(judge_calls())))
    backend.close()


def test_adapter_equals_transformers(
    in_process: dict[str, Any],
    adapter: Path,
    vllm_judge: Path,
    by_transformers: dict[str, dict[str, float]],
) -> None:
    backend = open_backend(
        EngineOptions(model=str(vllm_judge), device="cpu", dtype="float32", lora=str(adapter))
    )
    expected = probabilities(backend.judge(judge_calls()))
    assert_same(expected, probabilities(in_process["adapted"]))
    moved = max(abs(expected[name]["A"] - row["A"]) for name, row in by_transformers.items())
    assert moved > 0.02, "the adapter changes nothing"


# --- in process ----------------------------------------------------------------------------------


def test_both_orders_share_their_beginning(in_process: dict[str, Any]) -> None:
    """Adjacent questions about one prompt reuse its blocks; asked again, nearly everything is."""
    first = sum(row["usage"]["cached_tokens"] for row in in_process["judged"])
    prompt = sum(row["usage"]["prompt_tokens"] for row in in_process["judged"])
    again = sum(row["usage"]["cached_tokens"] for row in in_process["again"])
    assert first / prompt > 0.3
    assert again / prompt > 0.8
    assert {row["usage"]["completion_tokens"] for row in in_process["judged"]} == {1}
    assert all(row["text"] for row in in_process["judged"])


def test_the_engine_runs_in_a_fresh_process(in_process: dict[str, Any]) -> None:
    """A fork of a process whose torch has threads can hang for ever; vLLM's default is a fork."""
    assert in_process["method"] == "spawn"
    assert in_process["unknown"] == []  # a misspelt variable would be ignored


def test_calls_are_read_ahead_but_not_all_at_once(in_process: dict[str, Any]) -> None:
    """A small block, one to be queued behind it, and one for each thread that tokenises."""
    threads = min(8, os.cpu_count() or 1)
    fewest = 8 + 32 * (threads + 1)
    # One more where tokenising was done before the engine's first step.
    assert in_process["taken"] in (min(fewest, 240), min(fewest + 32, 240))


def test_sampling_is_seeded(in_process: dict[str, Any]) -> None:
    assert [row["texts"] for row in in_process["sampled"]] == [
        row["texts"] for row in in_process["sampled_again"]
    ]
    for row in in_process["sampled"]:
        assert len(row["texts"]) == len(row["logps"]) == len(row["finish_reasons"]) == 3
        assert len(set(row["texts"])) == 3
        assert all(value < 0 for value in row["logps"])


def test_one_bad_call_is_that_calls_error(in_process: dict[str, Any]) -> None:
    long, good = sorted(in_process["too_long"], key=lambda row: row["error"] is None)
    assert "exceed the model's 2048" in long["error"]
    assert good["error"] is None


def test_a_call_that_vllm_refuses_is_that_calls_error(in_process: dict[str, Any]) -> None:
    """Its errors are no ValueErrors any more."""
    bad, good = sorted(in_process["refused"], key=lambda row: row["error"] is None)
    assert "refused by vLLM: temperature" in bad["error"]
    assert good["error"] is None


def test_an_engine_that_is_killed_ends_the_run_with_an_error(in_process: dict[str, Any]) -> None:
    """Its process is killed while calls wait: no traceback, no waiting for ever, no new calls."""
    for death in in_process["deaths"]:
        assert death.startswith("vLLM stopped: "), death
        assert "What is finished is kept" in death


def test_text_and_text_with_label(in_process: dict[str, Any]) -> None:
    rows = {row["call_id"]: row for row in in_process["text"]}
    assert len(rows["both"]["choice_logprobs"]) == 3
    assert rows["both"]["text"] and rows["both"]["usage"]["completion_tokens"] <= 4
    other = next(row for name, row in rows.items() if name != "both")
    assert other["choice_logprobs"] is None and other["finish_reason"] in ("stop", "length")


def test_engine_settings_are_passed_through(adapter: Path, tmp_path: Path) -> None:
    from feedback.backends.vllm import engine_settings

    settings = engine_settings(
        EngineOptions(
            backend="vllm",
            tensor_parallel=4,
            gpu_memory=0.5,
            max_model_len=512,
            lora=str(adapter),
            extra={"block_size": 32, "chat_template_kwargs": {"enable_thinking": False}},
        )
    )
    assert settings["tensor_parallel_size"] == 4
    assert settings["gpu_memory_utilization"] == 0.5
    assert settings["max_model_len"] == 512
    assert (settings["enable_lora"], settings["max_lora_rank"]) == (True, 8)
    assert settings["block_size"] == 32
    assert settings["enable_prefix_caching"] is True
    assert "chat_template_kwargs" not in settings
    with pytest.raises(BackendError, match="holds no LoRA adapter"):
        engine_settings(EngineOptions(lora=str(tmp_path)))


# --- behind its server ---------------------------------------------------------------------------


def test_server_samples(vllm_server: Server) -> None:
    backend = endpoint(vllm_server)
    replies = list(backend.sample(sample_calls()))
    again = list(backend.sample(sample_calls()))
    backend.close()
    assert sorted(reply.texts for reply in replies) == sorted(reply.texts for reply in again)
    for reply in replies:
        assert reply.error is None
        assert len(reply.texts) == 3
        assert all(value is not None and value < 0 for value in reply.logps)


def test_server_refuses_one_call(vllm_server: Server) -> None:
    backend = endpoint(vllm_server)
    long = JudgeCall(
        call_id="long",
        messages=(Message(role="user", content="x" * 9000),),
        choices=("A", "B"),
    )
    replies = {reply.call_id: reply for reply in backend.judge([long, *judge_calls()[:3]])}
    backend.close()
    assert "HTTP 400" in (replies.pop("long").error or "")
    assert all(reply.error is None for reply in replies.values())


def test_probe_says_what_the_server_can_do(vllm_server: Server) -> None:
    backend = OpenAIBackend(
        EngineOptions(backend="openai", model=vllm_server.model, base_url=vllm_server.base_url)
    )
    found, text_only = backend.prepare(("A", "B")), backend.prepare(())
    backend.close()
    assert found.logprobs and found.structured_output and text_only.structured_output
    assert found.note.endswith("log-probabilities of any label, structured output")
    assert not text_only.logprobs


def test_an_endpoints_tokenizer_cuts_what_is_too_long(vllm_server: Server, tmp_path: Path) -> None:
    """4096 tokens there; without its tokenizer such a question is an HTTP 400 of its own."""
    path = tmp_path / "candidates.jsonl"
    texts = {"a": "so it goes " * 400, "b": "and on " * 900}
    row = Candidates(
        prompt_id="p",
        prompt="Topic?",
        completions=[
            Completion(completion_id=name, completion=text, model="m")
            for name, text in texts.items()
        ],
    )
    path.write_bytes(encode(row) + b"\n")
    engine: dict[str, Any] = {"model": vllm_server.model}
    with pytest.raises(BackendError, match=r"2 of 2; the last one: HTTP 400"):
        labeling.run(options(path, tmp_path / "whole", vllm_server.base_url, **engine))
    assert [len(failures(tmp_path / "whole")), len(verdicts(tmp_path / "whole"))] == [2, 0]
    engine["extra"] = {"tokenizer": str(vllm_server.folder)}
    labeling.run(options(path, tmp_path / "cut", vllm_server.base_url, **engine))
    found = verdicts(tmp_path / "cut")
    assert [verdict.flags for verdict in found] == [["truncated_completions"]] * 2
    assert {verdict.outcome for verdict in found} == {"decided"}
    assert all(4000 < verdict.usage.prompt_tokens < 4096 for verdict in found)


def test_probe_names_what_is_served(vllm_server: Server) -> None:
    backend = OpenAIBackend(
        EngineOptions(backend="openai", model="tiny-juge", base_url=vllm_server.base_url)
    )
    with pytest.raises(BackendError, match=r"No model 'tiny-juge'.*did you mean 'tiny-judge'"):
        backend.prepare(("A", "B"))
    backend.close()


def test_every_fault_on_what_the_real_server_says(vllm_server: Server, tmp_path: Path) -> None:
    """One pass of every fault, in front of vLLM: nothing lost, doubled or invented."""
    rows = write_candidates(tmp_path / "candidates.jsonl", 8)
    engine: dict[str, Any] = {"model": vllm_server.model}
    hang = fault_proxy.first_time("hang")
    faults = {
        **PASSING,
        "bursts": fault_proxy.burst("status_429", first=4, last=20),
        "hangs": lambda number, body: hang(number, body) if number % 9 == 0 else None,
    }
    with FaultProxy(vllm_server.base_url) as proxy:
        labeling.run(options(rows, tmp_path / "truth", proxy.base_url, **engine))
        truth: list[Verdict] = verdicts(tmp_path / "truth")
        assert len(truth) == 48
        assert {verdict.outcome for verdict in truth} == {"decided"}
        for number, (name, plan) in enumerate(faults.items()):
            out = tmp_path / f"out{number}"
            proxy.plan = lambda n, body, plan=plan: plan(n, body) if b"Topic" in body else None
            proxy.requests = 0
            proxy.broken.clear()
            labeling.run(options(rows, out, proxy.base_url, timeout_s=2.0, **engine))
            assert damage(truth, verdicts(out)) == Damage(0, 0, 0), name
            assert failures(out) == [], name
        proxy.plan = fault_proxy.rows("status_400", 0.15)
        out = tmp_path / "refused"
        labeling.run(options(rows, out, proxy.base_url, **engine))
        refused = len(failures(out))
        assert refused > 0
        assert damage(truth, verdicts(out), excused=refused) == Damage(0, 0, 0)
        proxy.plan = None
        labeling.run(options(rows, out, proxy.base_url, **engine))
        assert damage(truth, verdicts(out)) == Damage(0, 0, 0)
