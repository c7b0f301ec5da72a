"""The sampler against the model itself, against ``generate``, and against the distribution."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from train.sampler import CachedSampler, GenerateSampler, SamplingPlan, draw_tokens


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


PROMPTS = [[7, 8, 9], [20, 21, 22, 23, 24, 25], [40], [7, 8, 9, 10]]
PLAN = SamplingPlan(max_tokens=12, stop_ids=frozenset({1, 60, 61, 62, 63, 64, 65}))


def full_logprobs(model: Any, prompt: list[int], completion: list[int], temperature: float) -> Any:
    ids = torch.tensor([prompt + completion])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("kind", [CachedSampler, GenerateSampler])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_models_own(model: Any, kind: Any, temperature: float) -> None:
    plan = SamplingPlan(max_tokens=12, stop_ids=PLAN.stop_ids, temperature=temperature, top_p=0.9)
    with torch.no_grad():
        found = kind(model).sample(PROMPTS, n=3, plan=plan, seeds=range(5, 5 + 4))
        for prompt, samples in zip(PROMPTS, found, strict=True):
            assert len(samples) == 3
            for sample in samples:
                wanted = full_logprobs(model, prompt, sample.token_ids, temperature)
                torch.testing.assert_close(torch.tensor(sample.logprobs), wanted, atol=1e-4, rtol=0)


def test_completions_end_at_the_first_stop_token(model: Any) -> None:
    samples = [
        sample
        for group in CachedSampler(model).sample(PROMPTS, n=8, plan=PLAN, seeds=range(1, 1 + 4))
        for sample in group
    ]
    assert {sample.ended for sample in samples} == {True, False}
    for sample in samples:
        stops = [token in PLAN.stop_ids for token in sample.token_ids]
        assert not any(stops[:-1])
        assert stops[-1] == sample.ended
        assert sample.ended or len(sample.token_ids) == PLAN.max_tokens
        assert len(sample.logprobs) == len(sample.token_ids)


def test_batching_does_not_change_the_draws(model: Any) -> None:
    whole = CachedSampler(model).sample(PROMPTS, n=4, plan=PLAN, seeds=range(3, 3 + 4))
    small = SamplingPlan(max_tokens=12, stop_ids=PLAN.stop_ids, batch_tokens=1)
    single = CachedSampler(model).sample(PROMPTS, n=4, plan=small, seeds=range(3, 3 + 4))
    by_generate = GenerateSampler(model).sample(PROMPTS, n=4, plan=PLAN, seeds=range(3, 3 + 4))
    ids = [[sample.token_ids for sample in group] for group in whole]
    assert ids == [[sample.token_ids for sample in group] for group in single]
    assert ids == [[sample.token_ids for sample in group] for group in by_generate]
    # The middle two prompts alone, with their seeds, as another process would have them.
    part = CachedSampler(model).sample(PROMPTS[1:3], n=4, plan=PLAN, seeds=[4, 5])
    assert ids[1:3] == [[sample.token_ids for sample in group] for group in part]
    other = CachedSampler(model).sample(PROMPTS, n=4, plan=PLAN, seeds=range(4, 4 + 4))
    assert ids != [[sample.token_ids for sample in group] for group in other]


def test_greedy_is_generates_greedy(model: Any) -> None:
    plan = SamplingPlan(max_tokens=10, stop_ids=frozenset({1}), temperature=0.0)
    found = CachedSampler(model).sample([PROMPTS[1]], n=1, plan=plan, seeds=[0])[0][0]
    wanted = model.generate(
        input_ids=torch.tensor([PROMPTS[1]]), max_new_tokens=10, do_sample=False, pad_token_id=0
    )[0, len(PROMPTS[1]) :]
    assert found.token_ids == wanted.tolist()


def test_draws_follow_the_distribution() -> None:
    """Even uniform numbers hit each token in proportion to its probability."""
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    uniform = (torch.arange(1000) + 0.5) / 1000

    def shares(**settings: Any) -> list[float]:
        plan = SamplingPlan(max_tokens=1, stop_ids=frozenset(), **settings)
        logits = probabilities.log().repeat(1000, 1)
        tokens, logprobs = draw_tokens(logits, uniform, plan)
        sharpened = (probabilities.log() / (settings.get("temperature") or 1.0)).softmax(0)
        if not settings.get("banned_ids"):
            torch.testing.assert_close(logprobs.exp(), sharpened[tokens])
        return (torch.bincount(tokens, minlength=4) / 1000).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.002)
    squared = probabilities.square() / probabilities.square().sum()
    assert shares(temperature=0.5) == pytest.approx(squared.tolist(), abs=0.002)
    assert shares(top_p=0.75) == pytest.approx([0.625, 0.375, 0.0, 0.0], abs=0.002)
    assert shares(top_p=0.5) == [1.0, 0.0, 0.0, 0.0]
    assert shares(top_k=3) == pytest.approx([0.5 / 0.95, 0.3 / 0.95, 0.15 / 0.95, 0], abs=0.002)
    assert shares(banned_ids=frozenset({0})) == pytest.approx([0.0, 0.6, 0.3, 0.1], abs=0.002)
    assert shares(temperature=0.0) == [1.0, 0.0, 0.0, 0.0]


def test_the_model_is_left_as_it_was(model: Any) -> None:
    """In training mode, and with the layers that training compiled, which sampling does not use."""
    model.train()
    calls: list[int] = []
    layer = model.model.layers[0]
    layer._compiled_call_impl = lambda *arguments, **keywords: calls.append(1)
    CachedSampler(model).sample([[7]], n=1, plan=PLAN, seeds=[0])
    assert model.training
    assert layer._compiled_call_impl is not None
    assert not calls
    layer._compiled_call_impl = None
    model.eval()
