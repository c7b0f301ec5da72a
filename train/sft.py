"""``rlaif sft``: supervised fine-tuning on packed documents, from a checkpoint or from scratch.

    L = - sum over counted tokens of log pi(token | what stands before it in its document) / count

The count runs over all rows of the optimiser step, so short and long documents weigh by their
tokens, whichever rows they landed in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from feedback.errors import InputError
from train.batches import Counts
from train.config import SftOptions
from train.data import Group, split_by_prompt
from train.documents import read_documents
from train.models import add_adapters, load_model, load_tokenizer, packed_logprobs
from train.packing import PackedBatch
from train.results import announce, finished, fit
from train.trainer import StepLoss
from train.training_data import warn_of_repeats

__all__ = ["SftObjective", "run"]


class SftObjective:
    """Mean negative log-likelihood per counted token."""

    name = "sft"

    def __init__(self, *, chunk: int = 0):
        self.chunk = chunk

    def counts(self, groups: Sequence[Group]) -> Counts:
        """Return the number of tokens that carry loss."""
        return {"tokens": float(sum(counted_tokens(group) for group in groups))}

    def loss(self, model: Any, batch: PackedBatch, counts: Mapping[str, float]) -> StepLoss:
        """Return the row's share of the step's mean."""
        logprobs = packed_logprobs(model, batch, chunk=self.chunk).logprobs
        total = -logprobs.sum()
        return StepLoss(total / counts["tokens"], {"nll": (total, float(len(batch.targets)))})


def counted_tokens(group: Group) -> int:
    """Return how many completion tokens of a group carry loss."""
    masks = group.loss_masks or (None,) * len(group.completions)
    return sum(
        len(ids) if mask is None else sum(map(bool, mask))
        for ids, mask in zip(group.completions, masks, strict=True)
    )


def run(options: SftOptions) -> None:
    """Train as the options say and print the result's line.

    Raises:
        InputError: rows or options are wrong.
    """
    if options.engine == "trl":
        from train.trl_engine import run_sft

        run_sft(options)
        return
    if (done := finished(options, "sft")) is not None:
        announce(done)
        return
    if options.model == "scratch" and options.tokenizer is None:
        raise InputError("a model from scratch needs --tokenizer: a folder with a tokenizer")
    tokenizer = load_tokenizer(options)
    read: dict[str, Any] = {
        "max_length": options.max_length,
        "overlong": options.overlong,
        "completion_only": options.completion_only,
    }
    groups, report = read_documents(options.data, tokenizer, **read)
    groups, held_out = split_by_prompt(groups, options.eval_share, seed=options.seed)
    if options.eval_data:
        held_out, _ = read_documents(options.eval_data, tokenizer, **read)
        warn_of_repeats(groups, held_out, report)
    model = load_model(options, tokenizer=tokenizer, shape=options.shape)
    trained = fit(
        options,
        command="sft",
        model=add_adapters(model, options),
        tokenizer=tokenizer,
        objective=SftObjective(chunk=options.logprob_chunk),
        groups=groups,
        eval_groups=held_out,
        report=report,
    )
    announce(trained)
