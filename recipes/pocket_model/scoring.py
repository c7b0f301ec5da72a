"""Asks a loaded pocket model for verdict probabilities, in both orders, and measures what it says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from feedback.records import Message
from feedback.templates import load_rubric, load_template, render
from recipes.pocket_model.chat import chat_text
from recipes.pocket_model.contests import Contest

__all__ = ["Answers", "calibration_error", "compare", "label_probabilities", "perplexity"]


class Answers(NamedTuple):
    """Both orders of some comparisons. All arrays have one entry a comparison."""

    first: np.ndarray
    """P(first reply better) when it is shown first."""
    second: np.ndarray
    """P(first reply better) when it is shown second."""
    mass: np.ndarray
    """Probability of both labels together, mean of the two orders."""

    @property
    def preferred(self) -> np.ndarray:
        """P(first reply better), mean of both orders."""
        return (self.first + self.second) / 2

    @property
    def consistency(self) -> float:
        """Share of comparisons with the same winner in both orders."""
        return float(np.mean((self.first > 0.5) == (self.second > 0.5)))


def label_probabilities(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Sequence[Message]],
    labels: Sequence[str],
    *,
    batch_tokens: int | None = None,
) -> np.ndarray:
    """Return (questions, labels): each label's probability as the first token of the answer.

    Raises:
        ValueError: a label is not one token.
    """
    if batch_tokens is None:
        # A batch beyond a processor's caches only slows it down.
        batch_tokens = 2048 if model.device.type == "cpu" else 32768
    label_ids = []
    for label in labels:
        ids = tokenizer.encode(label).ids
        if len(ids) != 1:
            raise ValueError(f"label {label!r} is {len(ids)} tokens, not one")
        label_ids.append(ids[0])
    encoded = [
        tokenizer.encode(chat_text(question, add_generation_prompt=True)).ids
        for question in questions
    ]
    order = sorted(range(len(encoded)), key=lambda place: len(encoded[place]))
    result = np.zeros((len(encoded), len(labels)))
    begin = 0
    while begin < len(order):
        end = begin + 1
        while end < len(order) and (end - begin + 1) * len(encoded[order[end]]) <= batch_tokens:
            end += 1
        places = order[begin:end]
        width = len(encoded[places[-1]])
        # Padding stands on the right, where causal attention cannot see it.
        ids = torch.tensor(
            [encoded[place] + [0] * (width - len(encoded[place])) for place in places],
            device=model.device,
        )
        last = torch.tensor([len(encoded[place]) - 1 for place in places], device=model.device)
        with torch.no_grad():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
            logits = model.lm_head(
                hidden[torch.arange(len(places), device=model.device), last]
            ).float()
        result[places] = logits.softmax(-1)[:, label_ids].double().cpu().numpy()
        begin = end
    return result


def compare(
    model: Any,
    tokenizer: Any,
    pairs: Sequence[Contest],
    *,
    template: str = "pairwise",
    rubric: str = "booking",
) -> Answers:
    """Ask about each contest's first two replies, in both orders."""
    loaded, criteria = load_template(template), load_rubric(rubric)
    questions = [
        render(loaded, prompt=list(pair.prompt), completions=shown, rubric=criteria)
        for pair in pairs
        for shown in (pair.replies[:2], pair.replies[1::-1])
    ]
    raw = label_probabilities(model, tokenizer, questions, loaded.labels)
    mass = raw.sum(1)
    first_shown = raw[:, 0] / mass
    return Answers(first_shown[0::2], 1 - first_shown[1::2], mass.reshape(-1, 2).mean(1))


def calibration_error(chance: np.ndarray, right: np.ndarray, *, bins: int = 10) -> float:
    """Return the expected calibration error of ``chance`` (P that the verdict is right, >= 0.5)."""
    edges = np.minimum(((chance - 0.5) / 0.5 * bins).astype(int), bins - 1)
    error = 0.0
    for number in range(bins):
        inside = edges == number
        if inside.any():
            error += inside.mean() * abs(chance[inside].mean() - right[inside].mean())
    return float(error)


def perplexity(model: Any, tokenizer: Any, dialogues: Sequence[Sequence[Message]]) -> float:
    """Return the perplexity per token of whole dialogues in chat format."""
    encoded = sorted(
        (tokenizer.encode(chat_text(dialogue)).ids[:2048] for dialogue in dialogues), key=len
    )
    total, count = 0.0, 0
    for begin in range(0, len(encoded), 16):
        batch = encoded[begin : begin + 16]
        width = max(map(len, batch))
        ids = torch.tensor(
            [tokens + [0] * (width - len(tokens)) for tokens in batch], device=model.device
        )
        targets = torch.tensor(
            [tokens[1:] + [-100] * (width - len(tokens)) for tokens in batch], device=model.device
        )
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), reduction="sum"
        ).item()
        count += int((targets >= 0).sum())
    return float(np.exp(total / count))
