"""A reward model as an object: load, score, save; alone or as an ensemble.

``score`` takes texts and uses the reward model's own tokenizer and chat template, so whatever wrote
the completions may use another. Completions of one prompt are scored in one packed row behind one
copy of it; the score is read at each completion's last token by its place, whatever pad and EOS
are. What is saved is an ordinary ``*ForSequenceClassification`` folder with one label.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from feedback.errors import InputError, RlaifError
from feedback.records import PromptText, content_id
from feedback.shards import write_json
from train.adapters import apply_adapter
from train.attention import resolve_attention, with_layout
from train.chat import ChatFormat
from train.config import TrainOptions
from train.data import Group
from train.models import (
    backbone,
    base_model,
    load_model,
    load_tokenizer,
    packed_rewards,
    resolve_device,
    resolve_precision,
)
from train.packing import group_tokens, pack_groups, pack_rows

__all__ = [
    "ENSEMBLE",
    "RewardEnsemble",
    "RewardModel",
    "Rule",
    "Scorer",
    "check_pad_token",
    "combine_rewards",
    "ensure_pad_token",
    "has_trained_head",
    "load_reward_model",
    "merge_adapters",
    "save_ensemble",
    "start_head",
    "start_reward_model",
]

logger = logging.getLogger(__name__)

Rule = Literal["mean", "min", "uwo"]
ENSEMBLE = "ensemble.json"
"""File that makes a folder of reward models an ensemble."""
PAD_TOKENS = ("<pad>", "<|pad|>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")


class Scorer(Protocol):
    """Anything that gives completions a reward."""

    def score(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[str],
        *,
        ended: Sequence[bool] | None = None,
    ) -> Tensor:
        """Return one reward per completion, (N,) float32 on the CPU."""
        ...


class RewardModel:
    """One reward model with its tokenizer."""

    def __init__(
        self, model: Any, tokenizer: Any, *, row_tokens: int = 0, attention: str = "auto"
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.chat = ChatFormat(tokenizer)
        self.device: str = base_model(model).device.type
        self.kernel = resolve_attention(attention, self.device)
        self.row_tokens = row_tokens or (32768 if self.device == "cuda" else 2048)

    @classmethod
    def load(
        cls,
        name: str | Path,
        *,
        device: str = "auto",
        precision: Literal["auto", "float32", "bfloat16", "autocast"] = "auto",
        row_tokens: int = 0,
    ) -> RewardModel:
        """Load a saved reward model, ours or any ``*ForSequenceClassification`` with one label.

        Raises:
            InputError: it cannot be loaded, or has no trained head.
        """
        folder = Path(name)
        options = TrainOptions(
            data=(), output=folder, model=str(name), device=device, precision=precision
        )
        tokenizer = load_tokenizer(options)
        model = load_model(options, tokenizer=tokenizer, kind="reward")
        if not has_trained_head(model):
            raise InputError(
                f"{name} is no reward model but {model.config.architectures}: train one with "
                "rlaif reward"
            )
        model.eval()
        return cls(model, tokenizer, row_tokens=row_tokens)

    def score(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[str],
        *,
        ended: Sequence[bool] | None = None,
    ) -> Tensor:
        """Return one reward per completion, (N,) float32 on the CPU.

        Args:
            prompts: texts or chat messages, one per completion; equal ones are computed once.
            completions: texts.
            ended: False where a completion was cut off: no end-of-turn token is put behind it.
                None: all ended.

        Raises:
            InputError: a sequence is longer than the model's context.
        """
        keys = [content_id(prompt) for prompt in prompts]
        first = {key: number for number, key in reversed(list(enumerate(keys)))}
        order = list(dict.fromkeys(keys))
        ids = self.chat.prompt_ids([self.chat.prompt_text(prompts[first[key]]) for key in order])
        prompt_ids = dict(zip(order, ids, strict=True))
        encoded = self.chat.completion_ids(completions)
        end = len(self.chat.end_ids)
        if ended is not None:
            encoded = [
                row if whole or len(row) == end else row[:-end]
                for row, whole in zip(encoded, ended, strict=True)
            ]
        members: dict[str, list[int]] = {}
        for number, key in enumerate(keys):
            members.setdefault(key, []).append(number)
        groups, numbers = [], []
        for key, where in members.items():
            for part in self._parts(len(prompt_ids[key]), [len(encoded[i]) for i in where]):
                inside = [where[i] for i in part]
                rows = tuple(encoded[i] for i in inside)
                groups.append(Group(prompt_id=key, prompt_ids=prompt_ids[key], completions=rows))
                numbers += inside
        rewards = torch.empty(len(completions))
        if groups:
            rewards[torch.tensor(numbers)] = torch.cat(self.score_groups(groups))
        return rewards

    def score_groups(self, groups: Sequence[Group]) -> list[Tensor]:
        """Return the rewards of each group's completions, (K,) float32 on the CPU each."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        for group in groups:
            longest = len(group.prompt_ids) + max(map(len, group.completions))
            if limit and longest > limit:
                words = self.chat.tokenizer.decode(group.prompt_ids, skip_special_tokens=True)
                raise InputError(
                    f"the prompt {words[-40:].strip()!r} with a completion has {longest} tokens, "
                    f"the reward model's context {limit}: shorten it or use a model with more"
                )
        rewards: list[Tensor] = [torch.empty(0)] * len(groups)
        sizes = [group_tokens(group) for group in groups]
        multiple = 128 if self.kernel == "flex" else 1
        for row in pack_rows(sizes, self.row_tokens):
            batch = pack_groups([groups[i] for i in row], multiple=multiple)
            batch = with_layout(batch, self.kernel).to(self.device)
            with torch.no_grad():
                found = packed_rewards(self.model, batch).cpu()
            counts = [len(groups[i].completions) for i in row]
            for i, part in zip(row, found.split(counts), strict=True):
                rewards[i] = part
        return rewards

    def _parts(self, prompt: int, lengths: Sequence[int]) -> Iterable[list[int]]:
        """Yield indices of completions that fit into one row behind their prompt."""
        part: list[int] = []
        size = prompt
        for number, length in enumerate(lengths):
            if part and size + length > self.row_tokens:
                yield part
                part, size = [], prompt
            part.append(number)
            size += length
        if part:
            yield part

    def save(self, folder: Path) -> None:
        """Save model and tokenizer so that transformers and vLLM load them as a classifier.

        Raises:
            InputError: the pad token would hide the end of a completion from other tools.
        """
        base = base_model(self.model)
        check_pad_token(base, self.chat)
        base.config.problem_type = "regression"
        base.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


class RewardEnsemble:
    """Several reward models as one: mean, worst case, or mean minus a share of the variance."""

    def __init__(
        self, members: Sequence[Scorer], *, rule: Rule = "mean", uwo_lambda: float = 0.5
    ) -> None:
        if not members:
            raise InputError("an ensemble needs at least one reward model")
        self.members = list(members)
        self.rule = rule
        self.uwo_lambda = uwo_lambda

    def score_members(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[str],
        *,
        ended: Sequence[bool] | None = None,
    ) -> Tensor:
        """Return every member's rewards, (M, N) float32 on the CPU."""
        return torch.stack([m.score(prompts, completions, ended=ended) for m in self.members])

    def score(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[str],
        *,
        ended: Sequence[bool] | None = None,
    ) -> Tensor:
        """Return one reward per completion, (N,) float32 on the CPU."""
        rewards = self.score_members(prompts, completions, ended=ended)
        return combine_rewards(rewards, rule=self.rule, uwo_lambda=self.uwo_lambda)


def combine_rewards(rewards: Tensor, *, rule: Rule = "mean", uwo_lambda: float = 0.5) -> Tensor:
    """Return the ensemble's rewards (N,) from its members' (M, N).

    ``mean``; ``min``: worst case; ``uwo``: mean minus ``uwo_lambda`` times the members' variance
    (uncertainty-weighted optimisation). Source: Coste et al., arXiv 2310.02743.
    """
    if rule == "min":
        return rewards.min(dim=0).values
    if rule == "uwo":
        return rewards.mean(dim=0) - uwo_lambda * rewards.var(dim=0, correction=0)
    return rewards.mean(dim=0)


def merge_adapters(
    model: Any, tokenizer: Any, options: TrainOptions, *, groups: Sequence[Group]
) -> None:
    """Replace the adapters saved in the output folder by the whole model, which every tool loads.

    Args:
        model: trained, with its adapters.
        tokenizer: of the model.
        options: of the run.
        groups: some to compare scores on, where the weights under the adapters are quantised.

    Raises:
        RlaifError: the merged model scores otherwise than the trained one; the adapters stay.
    """
    folder = options.output
    if options.quantize == "none":
        merged = RewardModel(model.merge_and_unload(), tokenizer)
    else:
        # Merged in place the weights would be rounded to 4 or 8 bits once more, and the adapters
        # away with it.
        merged = RewardModel(_dequantised(options, tokenizer), tokenizer)
        model.eval()
        _require_same_scores(RewardModel(model, tokenizer), merged, groups, folder)
    merged.save(folder)
    for stale in folder.glob("adapter_*"):
        stale.unlink()


def _dequantised(options: TrainOptions, tokenizer: Any) -> Any:
    """Return the trained model on the values that the quantised weights stand for.

    Not on the original ones: the adapters have learnt around the rounding.
    """
    model = load_model(options, tokenizer=tokenizer, kind="reward")
    start_reward_model(model, tokenizer, seed=options.seed)
    precision = resolve_precision(options.precision, resolve_device(options.device))
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = apply_adapter(model.dequantize(dtype), options.output)
    model.eval()
    return model


def _require_same_scores(
    trained: RewardModel, merged: RewardModel, groups: Sequence[Group], folder: Path
) -> None:
    expected, found = (torch.cat(one.score_groups(groups)) for one in (trained, merged))
    difference = float((found - expected).square().mean().sqrt())
    spread = float(expected.std(correction=0))
    if not difference <= 0.1 * max(1.0, spread):
        raise RlaifError(
            f"{folder}: the merged reward model's scores differ from the trained one's by "
            f"{difference:.3g} in the mean (their spread is {spread:.3g}); what was trained is in "
            "the adapters there, and goes on the quantised model"
        )


def save_ensemble(folder: Path, members: Sequence[str], *, rule: Rule, uwo_lambda: float) -> None:
    """Make ``folder`` an ensemble of the reward models in its subfolders ``members``."""
    write_json(
        folder / ENSEMBLE, {"members": list(members), "rule": rule, "uwo_lambda": uwo_lambda}
    )


def load_reward_model(
    name: str | Path,
    *,
    device: str = "auto",
    precision: Literal["auto", "float32", "bfloat16", "autocast"] = "auto",
) -> RewardModel | RewardEnsemble:
    """Load a reward model or, where the folder says so, an ensemble.

    Raises:
        InputError: it cannot be loaded.
    """
    index = Path(name) / ENSEMBLE
    if not index.is_file():
        return RewardModel.load(name, device=device, precision=precision)
    found = json.loads(index.read_text(encoding="utf-8"))
    members = [
        RewardModel.load(Path(name) / member, device=device, precision=precision)
        for member in found["members"]
    ]
    return RewardEnsemble(members, rule=found["rule"], uwo_lambda=found["uwo_lambda"])


def has_trained_head(model: Any) -> bool:
    """Return whether the model came with a head for one score per sequence."""
    kinds: Sequence[str] = base_model(model).config.architectures or ()
    return any(kind.endswith("ForSequenceClassification") for kind in kinds)


def start_reward_model(model: Any, tokenizer: Any, *, seed: int) -> list[str]:
    """Make a loaded model ready to be trained and saved as a reward model; return warnings.

    A head that came trained is kept; a new one is drawn from ``seed``.
    """
    # Other tools squash a lone label's score by a sigmoid unless it is marked as a regression.
    base_model(model).config.problem_type = "regression"
    if not has_trained_head(model):
        start_head(model, seed=seed)
    warning = ensure_pad_token(model, tokenizer)
    return [] if warning is None else [warning]


def start_head(model: Any, *, seed: int) -> None:
    """Draw the score head's weights: normal, standard deviation 1 / sqrt(H + 1).

    Rewards of the untrained model then have a spread of about one on normalised hidden states
    (Huang et al., arXiv 2403.17031).
    """
    weight = base_model(model).score.weight
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1) ** 0.5
    with torch.no_grad():
        weight.copy_(drawn)


def ensure_pad_token(model: Any, tokenizer: Any) -> str | None:
    """Give tokenizer and model a pad token that ends no completion; return a warning if changed.

    transformers and vLLM read a padded sequence's score at its last token that is not padding. Were
    padding the token that ends completions, they would read the token before the end.
    """
    base = base_model(model)
    ends = set(ChatFormat(tokenizer).end_ids)
    warning = None
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        old = tokenizer.pad_token
        vocabulary = tokenizer.get_vocab()
        spare = [t for t in PAD_TOKENS if t in vocabulary and vocabulary[t] not in ends]
        if spare:
            tokenizer.pad_token = spare[0]
        else:
            tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > backbone(model).get_input_embeddings().weight.shape[0]:
            base.resize_token_embeddings(len(tokenizer))
        warning = (
            f"the pad token was {old!r}, which ends completions or is missing; the reward model is "
            f"saved with {tokenizer.pad_token!r}"
        )
        logger.warning(warning)
    base.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return warning


def check_pad_token(base: Any, chat: ChatFormat) -> None:
    """Refuse a pad token with which other tools would read the score at the wrong token."""
    pad = base.config.get_text_config().pad_token_id
    if pad is None or pad in chat.end_ids or pad != chat.tokenizer.pad_token_id:
        raise InputError(
            f"pad token id {pad} is missing, ends completions, or differs from the tokenizer's "
            f"({chat.tokenizer.pad_token_id}): call ensure_pad_token before training"
        )
