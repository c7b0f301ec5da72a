"""Packed equals unpacked: values and gradients, for every kernel and model family; block masks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPTJConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    NemotronConfig,
    Qwen2Config,
)

from feedback.errors import InputError
from tests.packed_helpers import SHAPES, make_model, ragged_groups, relative, unpacked_logps
from train.attention import (
    BLOCK,
    attention_inputs,
    block_layout,
    check_supported,
    dense_mask,
    resolve_attention,
    with_layout,
)
from train.config import TrainOptions
from train.data import Group
from train.models import completion_logps, load_model, packed_rewards
from train.packing import pack_groups

KERNELS = ("sdpa", "blocks", "varlen")


def gradients(model: Any, value: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    value.backward()
    return [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("share_prompt", [True, False])
def test_packed_equals_unpacked(kind: str, kernel: Any, share_prompt: bool) -> None:
    model, groups = make_model(kind), ragged_groups()
    expected = unpacked_logps(model, groups)
    weights = torch.linspace(-1, 1, len(expected))
    expected_slopes = gradients(model, (expected * weights).sum())
    batch = with_layout(pack_groups(groups, share_prompt=share_prompt, multiple=8), kernel)
    result = completion_logps(model, batch, chunk=7)
    assert relative(result.logps, expected) < 1e-5
    slopes = gradients(model, (result.logps * weights).sum())
    for slope, wanted in zip(slopes, expected_slopes, strict=True):
        assert relative(slope, wanted) < 1e-5


@pytest.mark.parametrize("kernel", ["sdpa", "blocks"])
def test_packed_equals_unpacked_in_bfloat16(kernel: Any) -> None:
    """Both sides round differently; each stays within 1% of the float32 values."""
    groups = ragged_groups()
    expected = unpacked_logps(make_model(), groups)
    model = make_model(dtype=torch.bfloat16)
    batch = with_layout(pack_groups(groups), kernel)
    assert relative(completion_logps(model, batch).logps, expected) < 1e-2
    assert relative(unpacked_logps(model, groups), expected) < 1e-2


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_group_of_one_token(kernel: Any) -> None:
    model = make_model()
    groups = [Group(prompt_id="a", prompt_ids=[5], completions=[[7]])]
    batch = with_layout(pack_groups(groups), kernel)
    result = completion_logps(model, batch)
    assert relative(result.logps, unpacked_logps(model, groups)) < 1e-5


def test_a_group_does_not_depend_on_its_neighbours() -> None:
    model, groups = make_model(), ragged_groups()
    alone = completion_logps(model, with_layout(pack_groups(groups[2:3]), "blocks")).logps
    together = completion_logps(model, with_layout(pack_groups(groups), "blocks")).logps
    assert torch.allclose(together[3:7], alone, atol=1e-4)


def test_documents_are_causal_and_apart() -> None:
    """A text of n tokens is a one-token prompt and the rest: the usual language-model loss."""
    model = make_model()
    texts = [[4, 8, 15, 16, 23, 42], [3, 1, 4]]
    groups = [Group(prompt_id="", prompt_ids=ids[:1], completions=[ids[1:]]) for ids in texts]
    batch = with_layout(pack_groups(groups), "blocks")
    packed = completion_logps(model, batch).logps.detach()
    for value, ids in zip(packed, texts, strict=True):
        row = torch.tensor([ids])
        loss = model(input_ids=row, labels=row).loss.detach()  # mean over n - 1 tokens
        assert float(value) == pytest.approx(-float(loss) * (len(ids) - 1), rel=1e-5)


def test_the_same_model_still_generates() -> None:
    model = make_model()
    prompt = torch.tensor([[5, 6, 7]])
    model.eval()
    made = model.generate(prompt, max_new_tokens=5, do_sample=False, pad_token_id=0)
    ids = prompt
    for _ in range(5):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert made.tolist() == ids.tolist()


def test_rewards_are_read_at_the_last_token_whatever_the_padding() -> None:
    from transformers import LlamaForSequenceClassification

    from train.models import enable_packing

    base = make_model().config
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**{**base.to_dict(), "num_labels": 1}))
    model.config.pad_token_id = 0
    enable_packing(model)
    groups = ragged_groups()
    expected = []
    for group in groups:
        for completion in group.completions:
            ids = torch.tensor([[*group.prompt_ids, *completion]])
            expected.append(model(input_ids=ids).logits[0, 0])
    batch = with_layout(pack_groups(groups, multiple=64), "blocks")
    assert relative(packed_rewards(model, batch), torch.stack(expected)) < 1e-5


def sparse_groups(seed: int) -> list[Group]:
    random = torch.Generator().manual_seed(seed)

    def length(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=random))

    return [
        Group(
            prompt_id=str(number),
            prompt_ids=[1] * length(1, 300),
            completions=[[2] * length(1, 400) for _ in range(length(1, 4))],
        )
        for number in range(4)
    ]


@pytest.mark.parametrize("seed", range(4))
def test_block_masks_say_what_the_dense_mask_says(seed: int) -> None:
    batch = pack_groups(sparse_groups(seed), multiple=BLOCK)
    size = batch.input_ids.shape[0]
    dense = dense_mask(batch)[0, 0]
    blocks = size // BLOCK
    cells = dense.view(blocks, BLOCK, blocks, BLOCK).transpose(1, 2)
    some, every = cells.any(dim=(2, 3)), cells.all(dim=(2, 3))
    layout = block_layout(batch.runs, size)

    def matrix(counts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(blocks, blocks, dtype=torch.bool)
        for row in range(blocks):
            found[row, indices[0, 0, row, : counts[0, 0, row]].long()] = True
        return found

    partial = matrix(layout.kv_num_blocks, layout.kv_indices)
    full = matrix(layout.full_kv_num_blocks, layout.full_kv_indices)
    assert not (partial & full).any()
    assert torch.equal(partial | full, some)
    assert not (full & ~every).any()
    assert full.sum() >= 0.9 * every.sum()
    assert torch.equal(matrix(layout.q_num_blocks, layout.q_indices), partial.T)
    assert torch.equal(matrix(layout.full_q_num_blocks, layout.full_q_indices), full.T)
    batch = with_layout(batch, "flex")
    mask = attention_inputs(batch)["attention_mask"]
    query, key = torch.arange(size)[:, None], torch.arange(size)[None]
    assert torch.equal(mask.mask_mod(None, None, query, key), dense)


def test_unsupported_attention_is_refused() -> None:
    for config in (
        MistralConfig(sliding_window=128),
        Gemma2Config(),
        Qwen2Config(use_sliding_window=True, sliding_window=16, max_window_layers=0),
    ):
        with pytest.raises(InputError, match="packed rows"):
            check_supported(config)
    for config in (LlamaConfig(), Qwen2Config(), MistralConfig(sliding_window=None)):
        check_supported(config)


SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}
FULL = ["full_attention"] * 2
REFUSED: dict[str, tuple[Any, str]] = {
    "granite": (GraniteConfig(**SMALL, logits_scaling=8.0), "logits_scaling"),
    "cohere": (CohereConfig(**SMALL, logit_scale=0.25), "logit_scale"),
    "gemma2": (Gemma2Config(**SMALL, head_dim=16, layer_types=FULL), "softcapping"),
    "gpt-j": (GPTJConfig(vocab_size=97, n_embd=48, n_layer=2, n_head=3, rotary_dim=8), "apart"),
    "mpt": (MptConfig(vocab_size=97, d_model=48, n_layers=2, n_heads=3), "apart"),
    "nemotron": (NemotronConfig(**SMALL, intermediate_size=80), "apart"),
    "sinks": (
        GptOssConfig(
            **SMALL,
            intermediate_size=80,
            head_dim=16,
            layer_types=FULL,
            num_local_experts=2,
            num_experts_per_tok=1,
        ),
        "attention sinks",
    ),
    "bloom": (BloomConfig(vocab_size=97, hidden_size=48, n_layer=2, n_head=3), "fails"),
    "mamba": (MambaConfig(vocab_size=97, hidden_size=48, num_hidden_layers=2), "fails"),
}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", REFUSED)
def test_models_that_packed_rows_do_not_reproduce_are_refused_at_load(
    name: str, precision: Any, tmp_path: Path
) -> None:
    config, message = REFUSED[name]
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    options = TrainOptions(
        data=(), output=tmp_path, model=str(tmp_path), device="cpu", precision=precision
    )
    with pytest.raises(InputError, match=message):
        load_model(options, tokenizer=None)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast"])
@pytest.mark.parametrize("kind", ["causal", "reward"])
def test_models_that_they_reproduce_are_not(
    kind: Any, precision: Any, tiny_model: Path, tmp_path: Path
) -> None:
    for folder in (tiny_model, tmp_path):
        if folder is tmp_path:
            make_model("qwen3").save_pretrained(folder)
        options = TrainOptions(
            data=(), output=tmp_path, model=str(folder), device="cpu", precision=precision
        )
        load_model(options, tokenizer=None, kind=kind)


def test_kernels_resolve_by_device() -> None:
    assert resolve_attention("auto", "cuda") in ("triton", "flex")
    assert resolve_attention("auto", "cpu") == "blocks"
    with pytest.raises(InputError, match="needs a CUDA device"):
        resolve_attention("flex", "cpu")
    with pytest.raises(InputError, match="unknown attention"):
        resolve_attention("flash", "cpu")
