"""Chunked log-probabilities against plain ones: values, gradients, entropies, the label shift."""

from __future__ import annotations

import math

import pytest
import torch

from train.logprobs import (
    chunk_size,
    predictor_positions,
    sum_per_completion,
    token_logprobs,
)


def test_two_tokens_by_hand() -> None:
    """Logits (0, 0) and (0, ln 3): probabilities 1/2 and 3/4."""
    hidden = torch.tensor([[0.0], [1.0]])
    head = torch.tensor([[0.0], [math.log(3)]])
    result = token_logprobs(hidden, head, targets=torch.tensor([0, 1]), entropy=True)
    assert result.logprobs.tolist() == pytest.approx([math.log(0.5), math.log(0.75)])
    second = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert result.entropies is not None
    assert result.entropies.tolist() == pytest.approx([math.log(2), second])


@pytest.mark.parametrize("chunk", [1, 5, 7, 100])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunks_change_neither_values_nor_gradients(chunk: int, temperature: float) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(23, 12, requires_grad=True)
    head = torch.randn(41, 12, requires_grad=True)
    bias = torch.randn(41, requires_grad=True)
    targets = torch.randint(0, 41, (23,))
    weights = torch.randn(23)
    logits = (hidden @ head.T + bias) / temperature
    plain = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    expected = torch.autograd.grad((plain * weights).sum(), (hidden, head, bias))
    result = token_logprobs(
        hidden, head, targets=targets, head_bias=bias, temperature=temperature, chunk=chunk
    )
    assert torch.allclose(result.logprobs, plain, atol=1e-5)
    gradients = torch.autograd.grad((result.logprobs * weights).sum(), (hidden, head, bias))
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, wanted, atol=1e-5)


def test_gradient_against_finite_differences() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(4, 3, dtype=torch.float64)
    head = torch.randn(6, 3)
    targets = torch.tensor([0, 5, 2, 2])

    def value(point: torch.Tensor) -> torch.Tensor:
        return token_logprobs(point.float(), head, targets=targets, chunk=3).logprobs.sum()

    point = hidden.float().requires_grad_()
    value(point).backward()
    step = 1e-2
    for row in range(4):
        for column in range(3):
            moved = torch.zeros_like(hidden)
            moved[row, column] = step
            slope = (value(hidden + moved) - value(hidden - moved)) / (2 * step)
            assert point.grad is not None
            assert float(slope) == pytest.approx(float(point.grad[row, column]), abs=2e-3)


def test_bfloat16_sums_in_float32() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 32).bfloat16(), torch.randn(300, 32).bfloat16()
    targets = torch.randint(0, 300, (50,))
    exact = (hidden.double() @ head.double().T).log_softmax(-1)
    exact = exact.gather(1, targets[:, None])[:, 0]
    result = token_logprobs(hidden, head, targets=targets, chunk=16)
    assert result.logprobs.dtype == torch.float32
    error = (result.logprobs.double() - exact).norm() / exact.norm()
    assert error < 1e-2


def test_no_more_logits_than_a_chunk_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    import train.logprobs as module

    seen = []
    plain = module._logits

    def spy(hidden, weight, bias, scale):
        seen.append(hidden.shape[0])
        return plain(hidden, weight, bias, scale)

    monkeypatch.setattr(module, "_logits", spy)
    hidden = torch.randn(100, 4, requires_grad=True)
    head = torch.randn(9, 4)
    token_logprobs(hidden, head, targets=torch.zeros(100, dtype=torch.long), chunk=30)[
        0
    ].sum().backward()
    assert seen == [30, 30, 30, 10] * 2  # forward, then again in backward


def test_frozen_head_gets_no_gradient() -> None:
    hidden = torch.randn(5, 4, requires_grad=True)
    head = torch.randn(9, 4)
    token_logprobs(hidden, head, targets=torch.zeros(5, dtype=torch.long))[0].sum().backward()
    assert hidden.grad is not None
    assert head.grad is None


def test_the_first_token_is_predicted_by_the_prompts_last() -> None:
    tokens = torch.tensor([5, 6, 7, 8, 9])
    firsts = torch.tensor([5, 5, 7, 7, 7])
    lasts = torch.tensor([4, 4, 4, 4, 4])
    found = predictor_positions(tokens, firsts=firsts, prompt_lasts=lasts)
    assert found.tolist() == [4, 5, 4, 7, 8]


def test_sums_per_completion() -> None:
    values = torch.tensor([1.0, 2.0, 4.0])
    sums = sum_per_completion(values, torch.tensor([0, 0, 2]), completions=3)
    assert sums.tolist() == [3.0, 0.0, 4.0]


def test_chunks_shrink_with_the_vocabulary() -> None:
    assert chunk_size(49_152) == 3840
    assert chunk_size(151_936) == 1280
    assert chunk_size(100) == 16384
