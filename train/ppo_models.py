"""PPO's networks: policy and value head as one module, and the reference they are held to.

One call reads a packed row through both, so that wrappers (DDP) see a single forward. The value of
a state is read where the next token is predicted: at the same positions as the log-probabilities.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from feedback.errors import InputError
from train.chat import ChatFormat
from train.logprobs import token_logprobs
from train.models import (
    add_adapters,
    base_model,
    compile_layers,
    load_model,
    load_tokenizer,
    packed_hidden,
    packed_logprobs,
    without_adapters,
)
from train.packing import PackedBatch
from train.ppo_config import PpoOptions
from train.reward_model import ENSEMBLE, has_trained_head
from train.whole import make_whole

__all__ = [
    "Networks",
    "PolicyAndValue",
    "Scored",
    "load_networks",
    "reference_logprobs",
    "save_policy",
]

logger = logging.getLogger(__name__)


class Scored(NamedTuple):
    """What policy and value head say of the T counted completion tokens of a row; (T,) float32."""

    logprobs: Tensor
    """Empty where only values were asked for."""
    entropies: Tensor | None
    values: Tensor


class PolicyAndValue(nn.Module):
    """The two networks that PPO trains.

    Args:
        policy: causal language model that reads packed rows (adapters included).
        value_model: sequence classifier with one label that reads packed rows; None: a head of one
            linear layer on the policy's hidden states.
    """

    def __init__(self, policy: Any, value_model: Any = None):
        super().__init__()
        self.policy = policy
        self.value_model = value_model
        self.value_head: nn.Linear | None = None
        if value_model is None:
            weight = base_model(policy).get_output_embeddings().weight
            # float32 whatever the policy is: values are small differences.
            self.value_head = nn.Linear(weight.shape[1], 1, device=weight.device)
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        batch: PackedBatch,
        *,
        temperature: float,
        chunk: int = 0,
        entropy: bool = False,
        values_only: bool = False,
    ) -> Scored:
        """Return log-probabilities at ``temperature`` and values of a row's completion tokens."""
        if self.value_head is not None:
            return self._forward_shared(batch, self.value_head, temperature, chunk, entropy)
        hidden = packed_hidden(self.value_model, batch)[batch.predictors]
        values = base_model(self.value_model).score(hidden)[:, 0].float()
        if values_only:
            return Scored(values.new_empty(0), None, values)
        found = packed_logprobs(
            self.policy, batch, temperature=temperature, chunk=chunk, entropy=entropy
        )
        return Scored(found.logprobs, found.entropies, values)

    def _forward_shared(
        self, batch: PackedBatch, head: nn.Linear, temperature: float, chunk: int, entropy: bool
    ) -> Scored:
        hidden = packed_hidden(self.policy, batch)[batch.predictors]
        output = base_model(self.policy).get_output_embeddings()
        found = token_logprobs(
            hidden,
            output.weight.to(hidden.dtype),
            targets=batch.targets,
            head_bias=output.bias,
            temperature=temperature,
            chunk=chunk,
            entropy=entropy,
        )
        return Scored(found.logprobs, found.entropies, head(hidden.float())[:, 0])

    def value_module(self) -> nn.Module:
        """Return what the value optimiser trains."""
        return self.value_model if self.value_head is None else self.value_head

    def trained_state(self) -> dict[str, Tensor]:
        """Return copies of the trained weights by name, on the CPU; with adapters, only those."""
        return {name: p.detach().cpu().clone() for name, p in self._trained()}

    @torch.no_grad()
    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Take over weights from ``trained_state``."""
        for name, parameter in self._trained():
            parameter.copy_(state[name])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)


class Networks(NamedTuple):
    """Everything that holds weights in a run, the reward apart."""

    module: PolicyAndValue
    reference: Any
    """Frozen model; None: the policy with its adapters off."""
    tokenizer: Any
    chat: ChatFormat
    models_held: int
    """Full sets of weights in memory: policy, value model, reference."""


def load_networks(options: PpoOptions) -> Networks:
    """Load policy, value model and reference.

    Raises:
        InputError: one of them cannot be loaded.
    """
    engine = options.engine_options()
    tokenizer = load_tokenizer(engine)
    policy = load_model(engine, tokenizer=tokenizer)
    reference = None
    if not options.lora_rank:
        reference = load_model(engine, tokenizer=tokenizer, name=options.reference_model)
        reference.requires_grad_(False)
        reference.eval()
    policy = add_adapters(policy, engine)
    value_model = _load_value_model(options, tokenizer) if options.value == "separate" else None
    for model in filter(None, (policy, value_model)):
        if options.gradient_checkpointing:
            base_model(model).gradient_checkpointing_enable({"use_reentrant": False})
            base_model(model).enable_input_require_grads()
            # transformers recomputes in training mode only, which without dropout changes nothing
            # else; the samplers decode in eval mode.
            model.train()
    for model in filter(None, (policy, value_model, reference)):
        compile_layers(model, options.compile)
    return Networks(
        module=PolicyAndValue(policy, value_model),
        reference=reference,
        tokenizer=tokenizer,
        chat=ChatFormat(tokenizer),
        models_held=1 + (value_model is not None) + (reference is not None),
    )


def _load_value_model(options: PpoOptions, tokenizer: Any) -> Any:
    """Load what was named, the reward model, or the policy; a head that is new is one of zeros.

    Raises:
        InputError: what was named reads other tokens than the policy writes.
    """
    from transformers.utils import logging as transformers_logging

    name = options.value_model or _matching_reward_model(options, tokenizer)
    engine = options.engine_options(model=name, lora=False)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # that a head is missing is no mistake here
    try:
        model = load_model(engine, tokenizer=tokenizer, kind="reward", name=name)
    finally:
        transformers_logging.set_verbosity(verbosity)
    named = options.value_model
    if named not in (None, options.model) and not _reads_tokens_of(options, named, tokenizer):
        raise InputError(
            f"value_model {named!r} reads the policy's tokens, but its tokenizer gives them other "
            "ids: name a model with the policy's tokenizer"
        )
    if not has_trained_head(model):
        nn.init.zeros_(base_model(model).score.weight)
    return model


def _matching_reward_model(options: PpoOptions, tokenizer: Any) -> str | None:
    """Return the first reward model if it reads the policy's token ids, else None."""
    if options.reward.kind != "model":
        return None
    name = options.reward.models[0]
    index = Path(name) / ENSEMBLE
    if index.is_file():
        name = str(Path(name) / json.loads(index.read_text(encoding="utf-8"))["members"][0])
    if _reads_tokens_of(options, name, tokenizer):
        return name
    logger.warning(
        "reward model %s has another tokenizer than the policy: the value model starts from the "
        "policy with a head of zeros instead",
        name,
    )
    return None


def _reads_tokens_of(options: PpoOptions, name: str | None, tokenizer: Any) -> bool:
    """Return whether the tokenizer of the model ``name`` gives every token the policy's id."""
    engine = dataclasses.replace(options.engine_options(model=name), tokenizer=None)
    other = load_tokenizer(engine).get_vocab()
    return all(other.get(token) == number for token, number in tokenizer.get_vocab().items())


def save_policy(networks: Networks, options: PpoOptions, folder: Path) -> None:
    """Write policy and tokenizer; adapters over an adapter are written as one whole model."""
    networks.module.policy.save_pretrained(folder, safe_serialization=True)
    make_whole(options.engine_options(), folder)
    networks.tokenizer.save_pretrained(folder)


@torch.no_grad()
def reference_logprobs(
    networks: Networks, batch: PackedBatch, *, temperature: float, chunk: int = 0
) -> Tensor:
    """Return the reference's log-probabilities of a row's completion tokens, (T,) float32."""
    if networks.reference is not None:
        found = packed_logprobs(networks.reference, batch, temperature=temperature, chunk=chunk)
        return found.logprobs
    policy = networks.module.policy
    with without_adapters(policy):
        return packed_logprobs(policy, batch, temperature=temperature, chunk=chunk).logprobs
