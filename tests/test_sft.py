"""Supervised fine-tuning: the loss is the language model's, from scratch and from a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from feedback.errors import InputError, RecipeError
from tests.packed_helpers import make_model, relative
from train.attention import with_layout
from train.batches import Packing, StepDataset
from train.config import ModelShape, SftOptions
from train.data import Group
from train.packing import pack_groups
from train.sft import SftObjective, run


def documents() -> list[Group]:
    """Four documents of different lengths, one with a masked token."""
    texts = [[4, 8, 15, 16, 23, 42], [3, 1, 4], [2, 7, 1, 8, 2, 8], [9, 9]]
    groups = [Group(prompt_id="", prompt_ids=ids[:1], completions=[ids[1:]]) for ids in texts]
    groups[2] = Group(
        prompt_id="",
        prompt_ids=[2],
        completions=[[7, 1, 8, 2, 8]],
        loss_masks=[[True, False, True, True, True]],
    )
    return groups


def test_the_loss_and_gradient_are_the_unpacked_models() -> None:
    groups, objective = documents(), SftObjective(chunk=3)
    counts = objective.counts(groups)
    assert counts == {"tokens": 5.0 + 2 + 4 + 1}
    model = make_model()
    loss = objective.loss(model, with_layout(pack_groups(groups), "blocks"), counts).loss
    loss.backward()
    slopes = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    total = torch.zeros(())
    for group in groups:
        ids = torch.tensor([[*group.prompt_ids, *group.completions[0]]])
        labels = ids.clone()
        if group.loss_masks:
            labels[0, 1:][~torch.tensor(group.loss_masks[0])] = -100
        counted = int((labels[0, 1:] >= 0).sum())
        total = total + model(input_ids=ids, labels=labels).loss * counted
    expected = total / 12
    expected.backward()
    assert relative(loss, expected) < 1e-5
    for slope, weight in zip(slopes, model.parameters(), strict=True):
        assert relative(slope, weight.grad) < 1e-5


def test_how_a_step_is_cut_does_not_matter() -> None:
    """Short and long rows weigh by their tokens, not by their number."""
    groups, objective, model = documents(), SftObjective(), make_model()
    losses = []
    for row_tokens, pack in ((64, True), (10, True), (64, False)):
        packing = Packing(
            batch_size=4, row_tokens=row_tokens, attention="sdpa", pack=pack, shuffle=False
        )
        step = StepDataset(groups, packing, objective.counts)[0, 0]
        parts = [objective.loss(model, batch, step.counts).loss for batch in step.batches]
        losses.append(torch.stack(parts).sum())
    assert relative(losses[1], losses[0]) < 1e-6
    assert relative(losses[2], losses[0]) < 1e-6


def train(tmp_path: Path, model: str, rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "learning_rate": 3e-3,
        "batch_size": 8,
        "epochs": 4.0,
        "log_every": 5,
        "device": "cpu",
        "row_tokens": 1024,
        "max_length": 128,
    }
    output = tmp_path / "out"
    run(SftOptions(data=(str(data),), output=output, model=model, **(settings | fields)))
    record: dict[str, Any] = json.loads((output / "training.json").read_text())
    return record


ROWS = [{"prompt": f"number {i % 7}", "completion": f"it is {i % 7} indeed"} for i in range(56)]


def test_from_scratch_it_learns_to_answer_and_to_stop(tmp_path: Path, tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shape = ModelShape(
        layers=2,
        width=64,
        heads=4,
        kv_heads=2,
        mlp=128,
        max_positions=256,
        init_std=0.08,  # so small a model learns to look back much later from the usual 0.02
    )
    record = train(
        tmp_path,
        "scratch",
        ROWS,
        tokenizer=str(tiny_model),
        shape=shape,
        epochs=80.0,
        learning_rate=1e-2,
    )
    assert record["figures"]["loss"] < 0.1
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.num_key_value_heads == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "number 3"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    made = model.generate(**ids, max_new_tokens=40, do_sample=False)[0, ids.input_ids.shape[1] :]
    assert tokenizer.decode(made) == "it is 3 indeed<eos>"


def test_from_a_checkpoint_with_evaluation(tmp_path: Path, tiny_model: Path) -> None:
    record = train(tmp_path, str(tiny_model), ROWS, eval_share=0.2, eval_every=10)
    figures = record["figures"]
    assert figures["loss"] < 0.7 * figures["first_loss"]
    assert figures["eval_loss"] == pytest.approx(figures["eval_nll"], rel=1e-4)
    lines = (tmp_path / "out" / "loss.jsonl").read_text().splitlines()
    assert sum("eval_loss" in json.loads(line) for line in lines) >= 2


def test_gradient_checkpointing_changes_nothing(tmp_path: Path, tiny_model: Path) -> None:
    plain = train(tmp_path, str(tiny_model), ROWS, epochs=1.0)
    again = train(
        tmp_path, str(tiny_model), ROWS, epochs=1.0, gradient_checkpointing=True, resume=False
    )
    assert again["figures"]["loss"] == pytest.approx(plain["figures"]["loss"], rel=1e-5)


def test_a_model_from_scratch_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="needs --tokenizer"):
        train(tmp_path, "scratch", ROWS)


def test_shapes_that_do_not_divide_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(InputError, match="multiple of heads"):
        train(tmp_path, "scratch", ROWS, tokenizer=str(tiny_model), shape=ModelShape(width=66))


def test_an_option_that_would_do_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="accept_bias does nothing in sft"):
        SftOptions(data=(), output=tmp_path, accept_bias=("length_bias.prefer_longer",))


def test_packed_equals_unpacked_in_bfloat16() -> None:
    groups, objective = documents(), SftObjective(chunk=3)
    model = make_model(dtype=torch.bfloat16)
    batch = with_layout(pack_groups(groups), "blocks")
    loss = objective.loss(model, batch, objective.counts(groups)).loss
    slopes = torch.cat([g.flatten().float() for g in _gradients(model, loss)])
    total = torch.zeros(())
    for group in groups:
        ids = torch.tensor([[*group.prompt_ids, *group.completions[0]]])
        logprobs = model(input_ids=ids).logits[0].float().log_softmax(-1)
        mask = group.loss_masks[0] if group.loss_masks else [True] * len(group.completions[0])
        first = len(group.prompt_ids) - 1
        for place, (token, counted) in enumerate(zip(group.completions[0], mask, strict=True)):
            total = total - logprobs[first + place, int(token)] * bool(counted)
    expected = total / objective.counts(groups)["tokens"]
    plain = torch.cat([g.flatten().float() for g in _gradients(model, expected)])
    assert relative(loss, expected) < 1e-2
    assert relative(slopes, plain) < 1e-2


def _gradients(model: Any, loss: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()))
