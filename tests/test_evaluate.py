"""Evaluation end to end on tiny models: what it writes, that it resumes, and its KL by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from feedback.backends.chat import ChatTokenizer
from feedback.config import EngineOptions
from feedback.errors import RecipeError
from feedback.records import Candidates, prompt_messages
from feedback.shards import read_rows
from train import evaluate
from train.evaluate import EvaluateOptions


@pytest.fixture(scope="module")
def other_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its weights shaken: a policy trained on nothing in particular."""
    folder = tmp_path_factory.mktemp("other-model")
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.02)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(
    tiny_model: Path, other_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> EvaluateOptions:
    folder = tmp_path_factory.mktemp("evaluated")
    prompts = folder / "prompts.jsonl"
    rows = [{"prompt_id": f"p{n}", "prompt": f"Say {n}."} for n in range(6)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    judge = EngineOptions(model=str(tiny_model))
    options = EvaluateOptions(
        policy=EngineOptions(model=str(other_model)),
        start=EngineOptions(model=str(tiny_model)),
        prompts=prompts,
        out=folder / "evaluation",
        judges=(judge, judge),
        completions=2,
        max_tokens=12,
        min_mass=0.0,
    )
    evaluate.run(options)
    return options


def figures(options: EvaluateOptions) -> dict:
    return json.loads((options.out / "evaluation.json").read_text())


def test_it_writes_what_was_measured(evaluated: EvaluateOptions) -> None:
    found = figures(evaluated)
    name = evaluated.start.model
    assert list(found["win_rate"]) == [name, f"{name} (2)"]
    first, second = found["win_rate"].values()
    assert first == second, "the same judge, asked twice, says the same"
    assert first["won"] + first["level"] + first["lost"] == 12
    assert (
        0
        <= first["win_rate"]["low"]
        <= first["win_rate"]["value"]
        <= first["win_rate"]["high"]
        <= 1
    )
    assert first["win_rate"]["prompts"] == 6
    assert found["prompts"] == 6
    assert found["gold"] is None
    assert found["length"]["characters_after"]["value"] > 0


def test_rows_hold_texts_and_what_each_judge_said(evaluated: EvaluateOptions) -> None:
    rows = [json.loads(line) for line in (evaluated.out / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    samples = {row.prompt_id: row for row in read_rows(evaluated.out / "samples-new", Candidates)}
    for row in rows:
        assert row["new"] in [entry.completion for entry in samples[row["prompt_id"]].completions]
        assert len(row["p_new"]) == len(row["consistent"]) == 2
    wins = sum((row["p_new"][evaluated.start.model] > 0.5) for row in rows)
    assert wins == next(iter(figures(evaluated)["win_rate"].values()))["won"]


@torch.inference_mode()
def test_kl_is_the_mean_log_ratio_on_the_new_policys_samples(
    evaluated: EvaluateOptions, other_model: Path, tiny_model: Path
) -> None:
    models = [
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (other_model, tiny_model)
    ]
    chat = ChatTokenizer(AutoTokenizer.from_pretrained(tiny_model))
    gaps, tokens = 0.0, 0
    for row in read_rows(evaluated.out / "samples-new", Candidates):
        prompt = chat.ids(prompt_messages(row.prompt))
        for entry in row.completions:
            tail = chat.tokenizer(entry.completion, add_special_tokens=False)["input_ids"]
            tail = tail + [chat.end_id()] * (entry.finish_reason == "stop")
            ids = torch.tensor([prompt + tail])
            targets = ids[0, len(prompt) :, None]
            new, old = (
                model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).gather(1, targets).sum()
                for model in models
            )
            gaps += float(new - old)
            tokens += len(tail)
    found = figures(evaluated)["kl"]
    assert found["per_token"]["value"] == pytest.approx(gaps / tokens, abs=1e-5)
    assert found["per_completion"]["value"] == pytest.approx(gaps / 12, abs=1e-4)
    assert found["unbiased"] is True


def test_a_second_run_samples_and_asks_nothing(
    evaluated: EvaluateOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    from feedback.backends.transformers import TransformersBackend

    before = figures(evaluated)

    def refuse(*_: object) -> None:
        raise AssertionError("a call was made")
        yield

    monkeypatch.setattr(TransformersBackend, "sample", refuse)
    monkeypatch.setattr(TransformersBackend, "_judge_labels", refuse)
    evaluate.run(evaluated)
    assert figures(evaluated) == before


def test_a_policy_and_a_judge_are_needed(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="needs the trained policy"):
        evaluate.run(EvaluateOptions(out=tmp_path))
    with pytest.raises(RecipeError, match="at least one judge"):
        EvaluateOptions(judges=())
