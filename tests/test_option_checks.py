"""Training options that would do nothing, or lie out of range, are errors with a way out."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from feedback.errors import RecipeError
from train.cli import parse_options
from train.config import (
    DpoOptions,
    ModelShape,
    RewardOptions,
    RrhfOptions,
    SftOptions,
    TrainOptions,
)
from train.option_checks import LIMITS, LOGGERS

KINDS = {"sft": SftOptions, "reward": RewardOptions, "dpo": DpoOptions, "rrhf": RrhfOptions}
REQUIRED: dict[str, Any] = {"data": ("rows",), "output": Path("out")}


def build(command: str, **fields: Any) -> TrainOptions:
    return KINDS[command](**REQUIRED, **fields)


# Command, the option that does nothing, what else is set; then what makes the option act.
INERT: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    ("dpo", {"lora_targets": ("q_proj",)}, {}, {"lora_rank": 4}),
    ("dpo", {"lora_alpha": 8.0}, {}, {"lora_rank": 4}),
    ("rrhf", {"lora_dropout": 0.1}, {}, {"lora_rank": 4}),
    ("sft", {"keep_checkpoints": 3}, {}, {"save_every": 10}),
    ("reward", {"eval_every": 5}, {}, {"eval_share": 0.1}),
    ("reward", {"eval_every": 5}, {}, {"eval_data": ("held-out",)}),
    ("dpo", {"activation_budget": 0.5}, {"compile": "none"}, {"compile": "auto"}),
    ("sft", {"min_learning_rate": 0.1}, {"schedule": "constant"}, {"schedule": "linear"}),
    ("sft", {"shape": ModelShape(layers=2)}, {}, {"model": "scratch"}),
    ("reward", {"rule": "min"}, {}, {"members": 2}),
    ("reward", {"uwo_lambda": 1.0}, {"members": 2}, {"members": 2, "rule": "uwo"}),
    ("reward", {"tie_nu": 2.0}, {}, {"loss": "davidson"}),
    ("reward", {"margin_scale": 1.0}, {"loss": "davidson"}, {}),
    ("reward", {"listwise_ties": "davidson"}, {}, {"loss": "plackett-luce"}),
    ("reward", {"average": "pair"}, {"loss": "plackett-luce"}, {}),
    ("reward", {"length_decorrelation": 1.0}, {"loss": "plackett-luce"}, {}),
    ("reward", {"soft_labels": False}, {"loss": "plackett-luce"}, {}),
    ("reward", {"label_smoothing": 0.1}, {"loss": "plackett-luce"}, {}),
    ("reward", {"ties": "drop"}, {"loss": "plackett-luce"}, {}),
    ("dpo", {"nll_weight": 0.1}, {"loss": "listwise"}, {}),
    ("dpo", {"soft_labels": False}, {"loss": "listwise"}, {"loss": "rao-kupper"}),
    ("dpo", {"soft_labels": False}, {"loss": "rpo"}, {"loss": "ipo"}),
    ("dpo", {"drift_warning": 0.2}, {"loss": "simpo"}, {"loss": "listwise"}),
    ("dpo", {"simpo_gamma": 1.0}, {}, {"loss": "simpo"}),
    ("dpo", {"rpo_eta": 2.0}, {}, {"loss": "rpo"}),
    ("dpo", {"rpo_form": "squared"}, {"loss": "ipo"}, {"loss": "rpo"}),
    ("dpo", {"reference_model": "x"}, {"loss": "simpo"}, {}),
    ("rrhf", {"margin": 0.5}, {"rank_weight": 0.0}, {}),
    ("rrhf", {"rank_form": "logistic"}, {"rank_weight": 0.0}, {}),
    ("rrhf", {"confidence_weights": True}, {"rank_weight": 0.0}, {}),
]


@pytest.mark.parametrize(("command", "option", "others", "mended"), INERT, ids=str)
def test_an_option_that_does_nothing_is_refused(
    command: str, option: dict[str, Any], others: dict[str, Any], mended: dict[str, Any]
) -> None:
    name = next(iter(option))
    with pytest.raises(RecipeError, match=rf"^{name} does nothing .*leave it (at|unset)"):
        build(command, **option, **others)
    build(command, **option, **mended)
    default = next(e for e in dataclasses.fields(KINDS[command]) if e.name == name)
    spelled = {} if default.default is dataclasses.MISSING else {name: default.default}
    build(command, **spelled, **others)  # the default, spelled out, is not an error


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        ("dpo", {"beta": 0.0}),
        ("dpo", {"beta": -0.1}),
        ("dpo", {"beta": math.nan}),
        ("dpo", {"nll_weight": -1.0}),
        ("dpo", {"loss": "simpo", "simpo_gamma": -1.0}),
        ("sft", {"learning_rate": -1e-4}),
        ("sft", {"warmup": 2.0}),
        ("sft", {"adam_betas": (0.9, 1.0)}),
        ("sft", {"lora_rank": -1}),
        ("sft", {"keep_checkpoints": 0, "save_every": 5}),
        ("reward", {"centring": -0.1}),
        ("reward", {"eval_share": 1.0}),
        ("rrhf", {"rank_weight": -1.0}),
    ],
    ids=str,
)
def test_a_value_out_of_range_is_refused(command: str, fields: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"it must (lie in|be at least|be above)"):
        build(command, **fields)


def test_every_limit_is_of_an_option_and_admits_its_default() -> None:
    options = [build(command) for command in KINDS]
    known = {entry.name for kind in options for entry in dataclasses.fields(kind)}
    assert set(LIMITS) <= known


def test_an_unknown_logger_is_refused_by_its_nearest() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(INTEGRATION_TO_CALLBACK) <= set(LOGGERS)
    with pytest.raises(RecipeError, match="did you mean 'tensorboard'"):
        build("dpo", report_to=("tensorbord",))


def test_a_command_without_other_engines_says_so(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="rrhf has only the packed engine"):
        parse_options(RrhfOptions, "rrhf", ["--data", "x", "--output", "y", "--engine", "trl"])
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[rrhf]\nengine = "trl"\n')
    with pytest.raises(RecipeError, match=r"mine.toml: rrhf has only the packed engine"):
        parse_options(RrhfOptions, "rrhf", ["--recipe", str(recipe)])


def test_recipe_and_command_line_are_checked_together(tmp_path: Path) -> None:
    """A recipe may leave to the command line what makes its options act."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[dpo]\noutput = "out"\neval_every = 10\nlora_targets = ["all-linear"]\n')
    words = ["--recipe", str(recipe), "--data", "rows"]
    options = parse_options(DpoOptions, "dpo", [*words, "--eval-share", "0.1"])
    assert (options.eval_every, options.eval_share) == (10, 0.1)
    with pytest.raises(RecipeError, match="eval_every does nothing without evaluation data"):
        parse_options(DpoOptions, "dpo", words)
