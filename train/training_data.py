"""A run's groups: read from its shards, made ready for its loss, held-out prompts apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from train.chat import DataReport
from train.data import Group, read_groups, split_by_prompt
from train.trainer import row_tokens_of

__all__ = ["Prepare", "TrainingData", "read_training_data", "warn_of_repeats"]

Prepare = Callable[[list[Group], DataReport], list[Group]]
"""Brings groups into the form that a loss reads; warnings go to the report."""


class TrainingData(NamedTuple):
    """What a run trains on, what it evaluates on, and what was noticed in reading."""

    groups: list[Group]
    held_out: list[Group]
    report: DataReport


def read_training_data(options: Any, tokenizer: Any, prepare: Prepare) -> TrainingData:
    """Read ``data``, and hold prompts out: those of ``eval_data``, or a share of ``data``.

    Args:
        options: of a command that trains on preferences or rankings.
        tokenizer: of the model to train.
        prepare: called on what was read, before the split.

    Raises:
        InputError: rows are wrong, or ``prepare`` refuses them.
        GateRefused: the labels' judge failed its report card, and nobody accepted that.
    """

    def read(sources: Sequence[str]) -> tuple[list[Group], DataReport]:
        groups, report = read_groups(
            sources,
            tokenizer,
            max_length=options.max_length,
            overlong=options.overlong,
            row_tokens=row_tokens_of(options),
            accept_bias=options.accept_bias,
        )
        prepared = prepare(groups, report)
        # Rankings come without pairs and may be trained on as such.
        pairs = [pair for group in prepared for pair in group.pairs]
        report.pairs, report.ties = len(pairs), sum(pair.tie for pair in pairs)
        return prepared, report

    groups, report = read(options.data)
    groups, held_out = split_by_prompt(groups, options.eval_share, seed=options.seed)
    if options.eval_data:
        held_out, _ = read(options.eval_data)
        warn_of_repeats(groups, held_out, report)
    return TrainingData(groups, held_out, report)


def warn_of_repeats(groups: Sequence[Group], held_out: Sequence[Group], report: DataReport) -> None:
    """Warn where ``eval_data`` holds prompts (or whole texts) that are trained on."""
    known = {_content(group) for group in groups}
    repeated = sum(_content(group) in known for group in held_out)
    if repeated:
        report.warn(
            f"{repeated} of {len(held_out)} evaluation rows have a prompt of the training data: "
            "their figures are not about new prompts; take them out of eval_data"
        )


def _content(group: Group) -> tuple[int, ...]:
    """Return the prompt's token ids; of a text, which has only a start token there, all of them."""
    prompt = tuple(map(int, group.prompt_ids))
    return prompt if len(prompt) > 1 else (*prompt, *map(int, group.completions[0]))
