"""Where scores come from: opens what a ``RewardSource`` names as one ``Scorer``.

A scorer takes texts, not token ids, so the reward may use another tokenizer and another chat
template than the policy. A completion without a score (a judge's call that failed, None from a
function) is NaN: it costs that sample and nothing else.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from feedback.errors import RecipeError
from feedback.records import PromptText
from train.ppo_config import RewardSource
from train.reward_model import RewardEnsemble, Scorer, load_reward_model

__all__ = ["FunctionReward", "RewardFunction", "load_function", "open_reward"]

RewardFunction = Callable[[list[PromptText], list[str]], Sequence[float | None]]


def open_reward(
    source: RewardSource,
    *,
    device: str = "auto",
    references: Mapping[str, str] | None = None,
) -> Scorer:
    """Return the scorer that ``source`` names, loaded.

    Args:
        source: of any kind but none.
        device: of reward models.
        references: known-good answers by prompt (``content_id`` of it), for pairwise judges.

    Raises:
        InputError: a model, function or template cannot be loaded.
        BackendError: the judge's engine cannot do what is asked of it.
    """
    if source.kind == "function":
        return FunctionReward(load_function(source.function))
    if source.kind == "judge":
        from train.rewards_judge import open_judge_reward

        return open_judge_reward(source, references=references or {})
    if source.kind == "none":
        raise RecipeError("no reward: kind is 'none'")
    members = [
        load_reward_model(name, device=device, precision=source.precision) for name in source.models
    ]
    if len(members) == 1:
        return members[0]
    return RewardEnsemble(members, rule=source.ensemble, uwo_lambda=source.uwo_weight)


def load_function(target: str) -> RewardFunction:
    """Return the function that ``package.module:function`` names.

    Raises:
        RecipeError: there is none.
    """
    module_name, _, name = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise RecipeError(
            f"reward function {target!r}: cannot import {module_name!r} ({error}); run from its "
            "folder, or put that on PYTHONPATH"
        ) from error
    function = vars(module).get(name)
    if not callable(function):
        raise RecipeError(f"reward function {target!r}: {module_name} has no function {name!r}")
    found: RewardFunction = function
    return found


class FunctionReward:
    """A Python function as a scorer.

    Args:
        function: called with the prompts and the completions' texts, lists of equal length.
    """

    def __init__(self, function: RewardFunction):
        self.function = function

    def score(
        self,
        prompts: Sequence[PromptText],
        completions: Sequence[str],
        *,
        ended: Sequence[bool] | None = None,
    ) -> Tensor:
        """Return one reward per completion, (N,) float32 on the CPU; NaN where there is none.

        Raises:
            ValueError: the function returned another number of values.
        """
        values = list(self.function(list(prompts), list(completions)))
        if len(values) != len(completions):
            raise ValueError(
                f"the reward function returned {len(values)} values for {len(completions)} "
                "completions"
            )
        return torch.tensor([math.nan if value is None else float(value) for value in values])
