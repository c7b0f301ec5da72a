"""Which values training options may have, and when an option does something at all.

Two tables. ``LIMITS`` gives the interval of every number, by the option's name. ``Inert`` entries
say of an option that somebody set what else must hold for it to act; a value equal to the class's
own default is never an error, so a recipe may spell defaults out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from feedback.errors import RecipeError, nearest

__all__ = [
    "DPO",
    "LIMITS",
    "LOGGERS",
    "REWARD",
    "RRHF",
    "SFT",
    "SHARED",
    "check_limits",
    "check_loggers",
    "refuse_inert",
]

LIMITS = {
    "epochs": "(0, inf)",
    "max_steps": "[0, inf)",
    "batch_size": "[0, inf)",
    "learning_rate": "[0, inf)",
    "min_learning_rate": "[0, 1]",
    "warmup": "[0, 1]",
    "weight_decay": "[0, inf)",
    "adam_betas": "[0, 1)",
    "adam_epsilon": "(0, inf)",
    "max_grad_norm": "[0, inf)",
    "max_length": "[2, inf)",
    "row_tokens": "[0, inf)",
    "activation_budget": "(0, 1]",
    "logprob_chunk": "[0, inf)",
    "workers": "[-1, inf)",
    "lora_rank": "[0, inf)",
    "lora_alpha": "[0, inf)",
    "lora_dropout": "[0, 1)",
    "eval_share": "[0, 1)",
    "eval_every": "[0, inf)",
    "save_every": "[0, inf)",
    "keep_checkpoints": "[1, inf)",
    "log_every": "[1, inf)",
    "peak_tflops": "[0, inf)",
    "label_smoothing": "[0, 0.5)",
    "margin_scale": "[0, inf)",
    "centring": "[0, inf)",
    "length_decorrelation": "[0, inf)",
    "members": "[1, inf)",
    "uwo_lambda": "[0, inf)",
    "beta": "(0, inf)",
    "nll_weight": "[0, inf)",
    "ld_alpha": "[0, 1]",
    "simpo_gamma": "[0, inf)",
    "rpo_eta": "(0, inf)",
    "drift_warning": "[0, inf)",
    "rank_weight": "[0, inf)",
    "length_penalty": "[0, inf)",
    "margin": "[0, inf)",
}


LOGGERS = (
    "all", "azure_ml", "clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "flyte",
    "kubeflow", "mlflow", "neptune", "none", "swanlab", "tensorboard", "trackio", "wandb",
)  # fmt: skip
"""What ``report_to`` may name: the loggers of transformers."""


class Inert(NamedTuple):
    """An option that acts only under a condition."""

    option: str
    acts: Callable[[Any], bool]
    """Called with the options; False: the option would do nothing."""
    when: str
    """When it does nothing; names of options in braces stand for their values."""
    instead: str | None = None
    """What to change so that it acts; None: nothing would make it."""


def _loss(*names: str) -> Callable[[Any], bool]:
    return lambda options: options.loss in names


def _other_loss(*names: str) -> Callable[[Any], bool]:
    return lambda options: options.loss not in names


def _adapters(options: Any) -> bool:
    return bool(options.lora_rank)


def _ranks(options: Any) -> bool:
    return bool(options.rank_weight)


SHARED = (
    *(
        Inert(name, _adapters, "while lora_rank is 0", "set lora_rank")
        for name in ("lora_alpha", "lora_dropout", "lora_targets")
    ),
    Inert("keep_checkpoints", lambda o: bool(o.save_every), "while save_every is 0",
          "set save_every"),
    Inert("eval_every", lambda o: bool(o.eval_data or o.eval_share),
          "without evaluation data", "give eval_data or eval_share"),
    Inert("activation_budget", lambda o: o.compile != "none", "with compile 'none'",
          "set compile to 'auto' or 'layers'"),
)  # fmt: skip

SFT = (
    Inert("accept_bias", lambda o: False, "in sft, which reads no judge's labels"),
    Inert("min_learning_rate", lambda o: o.schedule != "constant", "with schedule 'constant'",
          "set schedule to 'linear' or 'cosine'"),
    Inert("shape", lambda o: o.model == "scratch", "with a model that exists already ({model})",
          "set model to 'scratch'"),
)  # fmt: skip

REWARD = (
    Inert("tie_nu", _loss("rao-kupper", "davidson"), "with loss {loss!r}",
          "set loss to 'rao-kupper' or 'davidson'"),
    Inert("margin_scale", _loss("bradley-terry"), "with loss {loss!r}",
          "set loss to 'bradley-terry'"),
    Inert("listwise_ties", _loss("plackett-luce"), "with loss {loss!r}",
          "set loss to 'plackett-luce'"),
    *(
        Inert(name, _other_loss("plackett-luce"),
              "with loss 'plackett-luce', which reads rankings, not pairs",
              "set loss to 'bradley-terry'")
        for name in ("soft_labels", "ties", "label_smoothing", "average", "length_decorrelation")
    ),
    Inert("rule", lambda o: o.members > 1, "with one member", "set members above 1"),
    Inert("uwo_lambda", lambda o: o.members > 1 and o.rule == "uwo",
          "but in an ensemble with rule 'uwo'", "set members above 1 and rule to 'uwo'"),
)  # fmt: skip

DPO = (
    Inert("tie_nu", _loss("rao-kupper", "davidson"), "with loss {loss!r}",
          "set loss to 'rao-kupper' or 'davidson'"),
    *(
        Inert(name, _other_loss("listwise"),
              "with loss 'listwise', which reads rankings, not pairs", "choose another loss")
        for name in ("ties", "nll_weight")
    ),
    Inert("soft_labels", _other_loss("rpo", "listwise"),
          "with loss {loss!r}, which does not read the judge's probability",
          "choose another loss"),
    Inert("label_smoothing", _other_loss("rpo", "listwise", "rao-kupper", "davidson"),
          "with loss {loss!r}", "choose another loss"),
    Inert("ld_alpha", _other_loss("simpo", "listwise"), "with loss {loss!r}",
          "choose another loss"),
    Inert("ipo_averaged", _loss("ipo"), "with loss {loss!r}", "set loss to 'ipo'"),
    Inert("simpo_gamma", _loss("simpo"), "with loss {loss!r}", "set loss to 'simpo'"),
    *(
        Inert(name, _loss("rpo"), "with loss {loss!r}", "set loss to 'rpo'")
        for name in ("rpo_eta", "rpo_form")
    ),
    *(
        Inert(name, _other_loss("simpo"), "with loss 'simpo', which has no reference",
              "choose another loss")
        for name in ("reference_model", "reference_cache")
    ),
    Inert("drift_warning", lambda o: not o.drift_warning or o.loss != "simpo",
          "with loss 'simpo', which has no reference to drift from", "choose another loss"),
)  # fmt: skip

RRHF = tuple(
    Inert(name, _ranks, "while rank_weight is 0", "set rank_weight")
    for name in ("margin", "rank_form", "confidence_weights")
)


def check_limits(options: Any) -> None:
    """Refuse numbers outside their interval.

    Raises:
        RecipeError: names the option, its value and the interval.
    """
    for entry in dataclasses.fields(options):
        interval, value = LIMITS.get(entry.name), getattr(options, entry.name)
        if interval is None or value is None:
            continue
        if not all(_inside(number, interval) for number in _numbers(value)):
            raise RecipeError(f"{entry.name} is {value}; it must {_in_words(interval)}")


def check_loggers(names: Sequence[str]) -> None:
    """Refuse loggers that transformers does not know.

    Raises:
        RecipeError: names the nearest.
    """
    for name in names:
        if name not in LOGGERS:
            raise RecipeError(
                f"report_to: unknown logger {name!r}{nearest(name, LOGGERS)} (known: "
                f"{', '.join(LOGGERS)})"
            )


def refuse_inert(options: Any, table: Sequence[Inert]) -> None:
    """Refuse options that were set but would do nothing.

    Raises:
        RecipeError: says when the option does nothing, and the way out.
    """
    defaults = {entry.name: _default(entry) for entry in dataclasses.fields(options)}
    for option, acts, when, instead in table:
        default = defaults[option]
        if getattr(options, option) == default or acts(options):
            continue
        shown = f"at {default!r}" if isinstance(default, str | int | float) else "unset"
        ways = [instead, f"leave it {shown}"] if instead else [f"leave it {shown}"]
        reason = when.format_map(vars(options))
        raise RecipeError(f"{option} does nothing {reason}: {', or '.join(ways)}")


def _default(entry: dataclasses.Field[Any]) -> Any:
    if entry.default_factory is not dataclasses.MISSING:
        return entry.default_factory()
    return entry.default


def _numbers(value: Any) -> Sequence[float]:
    return value if isinstance(value, tuple | list) else (value,)


def _inside(number: float, interval: str) -> bool:
    """Return whether a number lies in an interval written as in mathematics; NaN lies in none."""
    low, high = _ends(interval)
    above = number > low if interval[0] == "(" else number >= low
    return above and (number < high if interval[-1] == ")" else number <= high)


def _in_words(interval: str) -> str:
    low, high = _ends(interval)
    if high < float("inf"):
        return f"lie in {interval}"
    return f"be {'above' if interval[0] == '(' else 'at least'} {low:g}"


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)
