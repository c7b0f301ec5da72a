"""What is wrong with a PPO run's inputs, found before the first step and not when a step meets it.

Errors name the prompt as its author knows it, by its id and its first words. What is only doubtful
is a warning with counts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from feedback.errors import InputError
from feedback.records import content_id
from train.models import base_model
from train.ppo_config import PpoOptions, RewardSource
from train.ppo_models import Networks
from train.reward_model import RewardEnsemble, RewardModel, Scorer
from train.rewards_judge import JudgeReward, excerpt
from train.rollout import PromptTokens

__all__ = ["check_contexts", "check_scorer", "guard_doubts", "reward_models", "warn_too_long"]

logger = logging.getLogger(__name__)


def warn_too_long(dropped: int, kept: int, options: PpoOptions, *, what: str) -> None:
    """Say how many prompts were left out, where any were."""
    if dropped:
        logger.warning(
            "%s: %d of %d are longer than max_prompt_tokens (%d) and left out",
            what,
            dropped,
            dropped + kept,
            options.max_prompt_tokens,
        )


def check_contexts(
    networks: Networks, prompts: Sequence[PromptTokens], options: PpoOptions
) -> None:
    """Refuse prompts that leave no room for a completion in what policy and value model read.

    Raises:
        InputError: with the number of such prompts.
    """
    models = {
        "policy": networks.module.policy,
        "reference": networks.reference,
        "value model": networks.module.value_model,
    }
    sizes = [len(item.ids) for item in prompts]
    for name, model in models.items():
        if model is not None:
            _check_room(name, model, prompts, sizes, options)


def check_scorer(
    scorer: Scorer, prompts: Sequence[PromptTokens], options: PpoOptions, *, option: str
) -> None:
    """Refuse prompts that a scorer cannot score: without gold, or too long for a reward model.

    Args:
        scorer: the reward, or the guard's gold scorer.
        prompts: that it will meet.
        options: of the run.
        option: where the scorer's own options are (reward, guard.gold).

    Raises:
        InputError: with the number of such prompts.
    """
    if isinstance(scorer, JudgeReward) and scorer.needs_gold:
        _check_gold(prompts, option)
    for model in reward_models(scorer):
        # By its own tokenizer; how long the completions are in it is known only once they are read.
        texts = [model.chat.prompt_text(item.prompt) for item in prompts]
        sizes = [len(ids) for ids in model.chat.prompt_ids(texts)]
        _check_room("reward model", model.model, prompts, sizes, options)


def reward_models(scorer: Any) -> Iterator[RewardModel]:
    """Yield the reward models that a scorer holds, those of ensembles one by one."""
    if isinstance(scorer, RewardModel):
        yield scorer
    elif isinstance(scorer, RewardEnsemble):
        for member in scorer.members:
            yield from reward_models(member)


def _check_gold(prompts: Sequence[PromptTokens], option: str) -> None:
    without = [item for item in prompts if not item.gold]
    if without:
        others = f", and {len(without) - 1} more of {len(prompts)}" if len(without) > 1 else ""
        raise InputError(
            f"{_name(without[0])} has no gold answer to compare completions with{others}: add "
            f"'gold' to it, or use --{option}.template rating"
        )


def _check_room(
    name: str, model: Any, prompts: Sequence[PromptTokens], sizes: Sequence[int],
    options: PpoOptions,
) -> None:  # fmt: skip
    limit = getattr(base_model(model).config.get_text_config(), "max_position_embeddings", None)
    long = [
        item
        for item, size in zip(prompts, sizes, strict=True)
        if limit and size + options.max_tokens > limit
    ]
    if long:
        raise InputError(
            f"{len(long)} of {len(prompts)} prompts with max_tokens ({options.max_tokens}) more do "
            f"not fit the {name}'s context of {limit} tokens, the first is {_name(long[0])}: lower "
            "max_prompt_tokens or max_tokens, or use a model that reads more"
        )


def _name(item: PromptTokens) -> str:
    return f"prompt_id {item.prompt_id} ({excerpt(item.prompt)})"


def guard_doubts(
    options: PpoOptions, prompts: Iterable[PromptTokens], held_out: Sequence[PromptTokens]
) -> list[str]:
    """Return why the guard may not notice overoptimisation; empty where nothing speaks for it."""
    found = []
    if _same_source(options.reward, options.guard.gold):
        found.append(
            "guard.gold is the reward itself: what the policy exploits in it rises there too; name "
            "another model, judge or function"
        )
    trained_on = {content_id(item.prompt) for item in prompts}
    known = sum(content_id(item.prompt) in trained_on for item in held_out)
    if known:
        found.append(
            f"{known} of the guard's {len(held_out)} prompts are trained on too; name other "
            "guard.prompts, or none to hold some out"
        )
    return found


def _same_source(reward: RewardSource, gold: RewardSource) -> bool:
    if reward.kind != gold.kind:
        return False
    if reward.kind == "judge":
        one, two = reward.judge, gold.judge
        return (one.model, one.base_url, one.lora) == (two.model, two.base_url, two.lora)
    if reward.kind == "function":
        return reward.function == gold.function
    return bool(set(reward.models) & set(gold.models))
