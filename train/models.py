"""Load a model and its tokenizer, make it read packed rows, and ask it for what losses need.

``enable_packing`` teaches a transformers model one more way to be called: ``model(packed=request)``
runs its backbone over a packed row and then only the head that was asked for. Because this happens
inside the model's own forward, wrappers (DDP, FSDP2, DeepSpeed, PEFT) see an ordinary call; called
without ``packed`` the model is as it was, generation included.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import transformers
from accelerate import PartialState
from torch import Tensor, nn

from feedback.errors import InputError
from train.adapters import load_pretrained
from train.attention import (
    NAME,
    AttentionKind,
    attention_inputs,
    check_supported,
    resolve_attention,
)
from train.config import ModelShape, TrainOptions
from train.logprobs import TokenLogprobs, sum_per_completion, token_logprobs
from train.model_checks import own_values, require_same_values
from train.packing import PackedBatch
from train.quantized import keep_as_stored, quantization

__all__ = [
    "CompletionLogps",
    "add_adapters",
    "backbone",
    "base_model",
    "compile_layers",
    "completion_logps",
    "enable_packing",
    "load_model",
    "load_tokenizer",
    "packed_hidden",
    "packed_logprobs",
    "packed_rewards",
    "resolve_device",
    "resolve_model",
    "resolve_precision",
    "without_adapters",
]

logger = logging.getLogger(__name__)


class _Request(NamedTuple):
    """What a packed call returns: hidden states, token log-probabilities, or rewards."""

    batch: PackedBatch
    head: Literal["hidden", "logprobs", "rewards"]
    temperature: float = 1.0
    chunk: int = 0
    entropy: bool = False


class CompletionLogps(NamedTuple):
    """Log-probabilities of the C completions of a row."""

    logps: Tensor
    """(C,) float32: sum over counted tokens, in nats."""
    lengths: Tensor
    """(C,) counted tokens."""
    logprobs: Tensor
    """(T,) float32: per token."""


def resolve_device(device: str) -> str:
    """Return ``cuda`` or ``cpu`` for ``auto``, and what was asked for otherwise.

    Raises:
        InputError: CUDA was asked for and there is none.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"device {device!r} was asked for, but no CUDA device is visible")
    return "cuda" if device.startswith("cuda") else device


def resolve_precision(precision: str, device: str) -> Literal["float32", "bfloat16", "autocast"]:
    """Return the precision that ``auto`` means on ``device``.

    Float32 master copies of bfloat16 weights live in one process: with several, it is autocast.
    """
    if precision == "auto" and device == "cuda":
        return "bfloat16" if PartialState().num_processes == 1 else "autocast"
    return "float32" if precision == "auto" else precision  # type: ignore[return-value]


def resolve_model(name: str) -> str:
    """Return the folder of an embedded ``pocket:`` model, and any other name as it is."""
    if name.startswith("pocket:"):
        from feedback.pocket import model_path

        return str(model_path(name))
    return name


def load_tokenizer(options: TrainOptions) -> Any:
    """Load the tokenizer, with the chat template given in the options.

    Raises:
        InputError: there is none in the folder.
    """
    from transformers import AutoTokenizer

    name = options.tokenizer or resolve_model(options.model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=options.revision, trust_remote_code=options.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise InputError(f"no tokenizer in {name!r}: {error}") from error
    if options.chat_template is not None:
        if not options.chat_template.is_file():
            raise InputError("no such chat template", path=options.chat_template)
        tokenizer.chat_template = options.chat_template.read_text(encoding="utf-8")
    return tokenizer


def load_model(
    options: TrainOptions,
    *,
    tokenizer: Any,
    kind: Literal["causal", "reward"] = "causal",
    name: str | None = None,
    shape: ModelShape | None = None,
) -> Any:
    """Load (or make) the model that ``options`` names, ready for packed rows, on its device.

    Args:
        options: model, precision, dropout, adapters and device are read.
        tokenizer: its size and special tokens go into a model made from scratch.
        kind: ``causal`` has a language-model head, ``reward`` one score per sequence.
        name: another model than ``options.model`` (a reference).
        shape: of a model from scratch, when ``options.model`` is ``scratch``.

    Raises:
        InputError: the model cannot be loaded, or its attention is not supported.
    """
    transformers.utils.logging.disable_progress_bar()
    device = resolve_device(options.device)
    precision = resolve_precision(options.precision, device)
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    wanted = name or options.model
    if wanted == "scratch":
        model = _from_scratch(shape or ModelShape(), tokenizer, options.seed).to(dtype)
    else:
        model = _from_pretrained(resolve_model(wanted), options, kind, dtype)
    if not options.dropout:
        _switch_off_dropout(model)
    if options.quantize == "none":
        # Of several processes each has a device of its own, which accelerate chooses.
        model.to(PartialState().device if device == "cuda" else device)
    keep_as_stored(model)
    if wanted == "scratch" or not _is_here(model):
        enable_packing(model)
    else:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            _enable_checked_packing(model, kind, resolve_attention(options.attention, device))
    return model


def _is_here(model: Any) -> bool:
    """Return whether this process holds the weights; sharded loading fills in one process's."""
    state = PartialState(cpu=next(model.parameters()).device.type == "cpu")
    whole = all(weight.numel() and not weight.is_meta for weight in model.parameters())
    return state.is_local_main_process and whole


@torch.no_grad()
def _enable_checked_packing(
    model: Any, kind: Literal["causal", "reward"], kernel: AttentionKind
) -> None:
    check_supported(model.config)
    training = model.training
    model.eval()
    expected = own_values(model, kind)
    enable_packing(model)

    def packed_values(batch: PackedBatch) -> list[Tensor]:
        states = packed_hidden(model, batch)[batch.predictors]
        return [states, *([packed_logprobs(model, batch).logprobs] if kind == "causal" else [])]

    require_same_values(packed_values, model, kernel, expected)
    model.train(training)


def _from_pretrained(name: str, options: TrainOptions, kind: str, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    arguments: dict[str, Any] = {
        "dtype": dtype,
        "revision": options.revision if name == options.model else None,
        "trust_remote_code": options.trust_remote_code,
    }
    if options.quantize != "none":
        arguments["quantization_config"] = quantization(options.quantize)
    loader = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    if kind == "reward":
        arguments["num_labels"] = 1
    return load_pretrained(loader, name, **arguments)


def _from_scratch(shape: ModelShape, tokenizer: Any, seed: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    if shape.width % shape.heads or shape.heads % shape.kv_heads:
        raise InputError(
            f"width {shape.width} must be a multiple of heads {shape.heads}, and heads of kv_heads "
            f"{shape.kv_heads}"
        )
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.width,
        intermediate_size=shape.mlp,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.max_positions,
        tie_word_embeddings=shape.tied,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        initializer_range=shape.init_std,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with _seeded(seed):
        return LlamaForCausalLM(config)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draw new weights from ``seed``, and leave the process's own random state as it was."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "attention_dropout" in vars(module):
            module.attention_dropout = 0.0


def base_model(model: Any) -> Any:
    """Return the transformers model inside wrappers (DDP, compiled, PEFT)."""
    from accelerate.utils import extract_model_from_parallel
    from peft import PeftModel

    model = extract_model_from_parallel(model, keep_fp32_wrapper=True)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: Any) -> Any:
    """Return the decoder stack without its head."""
    base = base_model(model)
    return getattr(base, base.base_model_prefix)


def enable_packing(model: Any) -> None:
    """Make ``model`` read packed rows; plain calls and generation work as before.

    Raises:
        InputError: the architecture does something packed rows do not reproduce.
    """
    base = base_model(model)
    check_supported(base.config)
    if any(name.endswith(".sinks") for name, _ in base.named_parameters()):
        raise InputError(
            f"model type {base.config.model_type!r} has attention sinks, which packed rows do not "
            "reproduce; use another model, or --engine trl where the command has it"
        )
    try:
        base.set_attn_implementation(NAME)
    except ValueError as error:
        raise InputError(f"model type {base.config.model_type!r}: {error}") from error
    if not hasattr(type(base), "reads_packed_rows"):
        base.__class__ = _packed_class(type(base))  # type: ignore[arg-type]


@functools.cache
def _packed_class(kind: Any) -> type:
    """Return a subclass whose forward takes packed requests too.

    A class, not a function on the object: a copied model must run its own weights. It keeps the
    name, which transformers writes into ``config.json``.
    """

    @functools.wraps(kind.forward)
    def forward(self: Any, *args: Any, packed: _Request | None = None, **kwargs: Any) -> Any:
        if packed is None:
            return kind.forward(self, *args, **kwargs)
        return _packed_forward(self, packed)

    names = {"forward": forward, "reads_packed_rows": True, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names | {"__module__": kind.__module__})


def _packed_forward(base: Any, request: _Request) -> Any:
    batch = request.batch
    hidden: Tensor = getattr(base, base.base_model_prefix)(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        use_cache=False,
        **attention_inputs(batch),
    ).last_hidden_state[0]
    if request.head == "hidden":
        return hidden
    if request.head == "rewards":
        return _rewards(base.score, hidden[batch.last_tokens])
    head = base.get_output_embeddings()
    # Prompts end here: only positions that predict a counted token reach the head.
    chosen, weight, bias = hidden[batch.predictors], head.weight, head.bias
    if torch.is_autocast_enabled(chosen.device.type):
        chosen = chosen.to(torch.get_autocast_dtype(chosen.device.type))
    return token_logprobs(
        chosen,
        weight.to(chosen.dtype),
        targets=batch.targets,
        head_bias=bias,
        temperature=request.temperature,
        chunk=request.chunk,
        entropy=request.entropy,
    )


def _rewards(head: Any, hidden: Tensor) -> Tensor:
    """Return the head's scores in float32: bfloat16 would round rewards to three digits."""
    if not isinstance(head, nn.Linear):  # wrapped, beside adapters
        return head(hidden)[:, 0].float()
    with torch.autocast(hidden.device.type, enabled=False):
        return nn.functional.linear(hidden.float(), head.weight.float())[:, 0]


def packed_hidden(model: Any, batch: PackedBatch) -> Tensor:
    """Return the last hidden states of a row, (S, H)."""
    return model(packed=_Request(batch, "hidden"))


def packed_rewards(model: Any, batch: PackedBatch) -> Tensor:
    """Return a reward model's score at each completion's last token, (C,) float32."""
    return model(packed=_Request(batch, "rewards"))


def packed_logprobs(
    model: Any,
    batch: PackedBatch,
    *,
    temperature: float = 1.0,
    chunk: int = 0,
    entropy: bool = False,
) -> TokenLogprobs:
    """Return the log-probability of every counted completion token, (T,) float32."""
    result = model(packed=_Request(batch, "logprobs", temperature, chunk, entropy))
    return TokenLogprobs(*result)


def completion_logps(model: Any, batch: PackedBatch, *, chunk: int = 0) -> CompletionLogps:
    """Return the summed log-probability of every completion of a row."""
    tokens = packed_logprobs(model, batch, chunk=chunk)
    logps = sum_per_completion(tokens.logprobs, batch.owners, completions=len(batch))
    return CompletionLogps(logps, batch.lengths, tokens.logprobs)


def compile_layers(model: Any, mode: str, *, activation_budget: float = 0.9) -> None:
    """Compile every decoder layer, unless that is done already.

    Args:
        model: with a list of ``layers`` in its backbone.
        mode: layers, none, or auto (on CUDA).
        activation_budget: share of a layer's activations kept for its backward pass, in (0, 1].
    """
    stack = backbone(model)
    cuda = next(stack.parameters()).is_cuda
    if mode == "none" or (mode == "auto" and not cuda):
        return
    # Rows come in a few lengths, and each is a graph of its own.
    torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
    torch._functorch.config.activation_memory_budget = activation_budget
    for layer in stack.layers:
        if layer._compiled_call_impl is None:
            layer.compile(dynamic=False)


def add_adapters(
    model: Any, options: TrainOptions, *, modules_to_save: tuple[str, ...] = ()
) -> Any:
    """Return the model with LoRA adapters drawn from the seed, or as it is with ``lora_rank`` 0.

    Raises:
        InputError: the output embedding is among the targets, or none of the targets exist.
    """
    if not options.lora_rank:
        return model
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    if "lm_head" in options.lora_targets:
        raise InputError("lora_targets: adapters on lm_head are not supported; train it whole")
    if options.quantize != "none":
        model = prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=options.gradient_checkpointing
        )
    targets = options.lora_targets
    config = LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        lora_dropout=options.lora_dropout,
        target_modules=targets[0] if targets == ("all-linear",) else list(targets),
        modules_to_save=list(modules_to_save) or None,
        task_type="CAUSAL_LM" if not modules_to_save else "SEQ_CLS",
    )
    try:
        with _seeded(options.seed):
            return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"lora_targets {targets}: {error}") from error


@contextlib.contextmanager
def without_adapters(model: Any) -> Iterator[None]:
    """Run the block with LoRA adapters switched off: the model as it was before training."""
    from peft import PeftModel

    context = model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()
    with context:
        yield
