"""Log-probabilities of given completions under a model of ``transformers``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from feedback.backends.chat import ChatTokenizer
from feedback.records import Message

__all__ = ["CompletionLogp", "completion_logps"]

# Logits that exist at one time, in elements: 0.4 GB of float32.
_LOGIT_ELEMENTS = 100_000_000


class CompletionLogp(NamedTuple):
    """Log-probability of one completion in nats, and the number of tokens that it sums over."""

    logp: float
    tokens: int


class _Row(NamedTuple):
    place: int
    ids: list[int]
    prompt: int
    """Tokens of ``ids`` that are the prompt."""


def completion_logps(
    model: Any,
    chat: ChatTokenizer,
    completions: Sequence[tuple[Sequence[Message], str, bool]],
    *,
    budget: int,
) -> list[CompletionLogp]:
    """Return the log-probability of each (messages, completion, whether it ended by itself).

    The end token counts where the completion ended by itself. ``budget`` is in tokens per pass.
    """
    prompts = chat.ids_of([messages for messages, _, _ in completions])
    texts = chat.completion_ids([text for _, text, _ in completions])
    end = chat.end_id()
    rows = []
    for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        tail = [end] if completions[place][2] and end is not None else []
        rows.append(_Row(place, prompt + text + tail, len(prompt)))
    results = [CompletionLogp(0.0, 0)] * len(rows)
    for batch in _batches(rows, budget, model.get_output_embeddings().weight.shape[0]):
        for row, value in zip(batch, _batch_logps(model, batch), strict=True):
            results[row.place] = CompletionLogp(value, len(row.ids) - row.prompt)
    return results


def _batches(rows: list[_Row], budget: int, vocabulary: int) -> Iterator[list[_Row]]:
    budget = max(1, min(budget, _LOGIT_ELEMENTS // vocabulary))
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batch and (len(batch) + 1) * len(row.ids) > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def _batch_logps(model: Any, batch: list[_Row]) -> list[float]:
    import torch

    width = max(len(row.ids) for row in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.long)
    counted = torch.zeros(len(batch), width, dtype=torch.bool)
    for place, row in enumerate(batch):
        ids[place, : len(row.ids)] = torch.tensor(row.ids)
        counted[place, row.prompt : len(row.ids)] = True
    ids, counted = ids.to(model.device), counted.to(model.device)
    with torch.inference_mode():
        # Padding on the right needs no mask: what stands before it cannot see it.
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        targets = ids[:, 1:, None]
        logprobs = logits.float().log_softmax(dim=-1).gather(2, targets)[:, :, 0]
        sums: list[float] = (logprobs * counted[:, 1:]).double().sum(dim=1).tolist()
    return sums
