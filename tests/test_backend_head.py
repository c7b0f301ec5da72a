"""Logits keep float32's resolution, whatever type the weights have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from feedback.backends import JudgeCall
from feedback.backends.head import float32_head, vllm_overrides
from feedback.backends.opening import open_backend
from feedback.config import EngineOptions
from feedback.records import Message

IDS = torch.tensor([[5, 3, 8, 13, 21, 2]])


def small_model(*, dtype: torch.dtype = torch.bfloat16, bias: bool = False) -> Any:
    """A random model whose logits are as large as a trained one's."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    if bias:
        model.lm_head = torch.nn.Linear(32, 64)
    with torch.no_grad():
        model.lm_head.weight.mul_(150.0)
    return model.to(dtype).eval()


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_logits_are_the_unrounded_product(bias: bool) -> None:
    model = small_model(bias=bias)
    rounded = model(IDS).logits
    assert rounded.dtype == torch.bfloat16
    assert float32_head(model)
    found = model(IDS).logits
    hidden = model.model(IDS).last_hidden_state.double()
    exact = hidden @ model.lm_head.weight.double().T
    exact += model.lm_head.bias.double() if bias else 0.0
    assert found.dtype == torch.float32
    assert (found - exact).abs().max() < 1e-4
    assert (rounded - exact).abs().max() > 0.01, "rounding changes nothing here"


def test_what_is_left_alone() -> None:
    assert not float32_head(small_model(dtype=torch.float32))
    wrapped = small_model()
    wrapped.lm_head.forward = lambda hidden: hidden
    assert not float32_head(wrapped)

    class Quantised(torch.nn.Linear):
        pass

    model = small_model()
    model.lm_head = Quantised(32, 64).to(torch.bfloat16)
    assert not float32_head(model)


def question(number: int) -> JudgeCall:
    text = f"Which is better, answer {number} or answer {number + 1}?"
    message = Message(role="user", content=text)
    return JudgeCall(call_id=str(number), messages=[message], choices=("A", "B"), max_tokens=1)


def test_labels_of_a_16_bit_judge_are_on_no_grid(vllm_judge: Path) -> None:
    """Rounded logits would be a few values apart: these are as many as there are questions."""
    backend = open_backend(EngineOptions(model=str(vllm_judge), device="cpu", dtype="bfloat16"))
    gaps = [
        reply.choice_logprobs["A"] - reply.choice_logprobs["B"]
        for reply in backend.judge([question(number) for number in range(40)])
        if reply.choice_logprobs
    ]
    backend.close()
    assert len(gaps) == 40
    steps = [gap * 128 for gap in gaps]
    rounded = sum(math.isclose(step, round(step), abs_tol=1e-3) for step in steps)
    assert rounded <= 4, f"{rounded} of 40 differences are multiples of 1/128"


def test_overrides_of_vllm(tmp_path: Path) -> None:
    def overrides(folder: Path, **settings: Any) -> dict[str, Any]:
        return vllm_overrides(str(folder), settings, revision=None, trust_remote_code=False)

    plain, quantised = tmp_path / "plain", tmp_path / "quantised"
    small_model().config.save_pretrained(plain)
    config = small_model().config
    config.quantization_config = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    config.save_pretrained(quantised)
    assert overrides(plain) == {"hf_overrides": {"head_dtype": "float32"}}
    assert overrides(plain, hf_overrides={"rope_theta": 1.0, "head_dtype": "model"}) == {
        "hf_overrides": {"head_dtype": "model", "rope_theta": 1.0}
    }
    assert overrides(plain, quantization="fp8") == {}
    assert overrides(quantised) == {}
    assert overrides(quantised, hf_overrides={"rope_theta": 1.0}) == {
        "hf_overrides": {"rope_theta": 1.0}
    }

    def change(config: Any) -> Any:
        return config

    assert overrides(plain, hf_overrides=change) == {"hf_overrides": change}
    assert overrides(tmp_path / "nothing") == {}
