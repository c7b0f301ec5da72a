"""Trains a pocket model on dialogue text and on judge questions at once.

Rows are packed whole into lines of fixed length, each attending to itself alone. The loss has three
parts, each a mean over its own tokens: the dialogues (weight 1), the judge's answers (``answer_weight``)
and the judge's questions (``question_weight``, on a random share of their tokens). A common mean would
drown the answers, of which there is one for some two hundred other tokens. Predicting the question
itself, two replies after a conversation, teaches what a reply to it should hold, long before the
answers alone would.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from recipes.pocket_model.rows import MAX_TOKENS, Rows

__all__ = ["Schedule", "Stage", "build_model", "train", "warm_up"]

_QUESTION_SHARE = 0.4


@dataclass(frozen=True)
class Schedule:
    """How one run of ``train`` goes."""

    learning_rate: float
    final_share: float
    """Learning rate at the end, as a share of the peak."""
    seed: int
    warmup: int = 100
    answer_weight: float = 1.0
    question_weight: float = 0.5
    line_length: int = 4096
    lines: int = 16
    deadline: float = math.inf
    """Clock time by which to be done: the learning rate then falls by time where rows would take longer."""


class Stage(NamedTuple):
    """Rows that are trained on in one shuffled pass; fetched when their turn comes."""

    fetch: Callable[[], tuple[Rows, Rows]]
    """Returns the dialogue rows and the judge rows."""
    passes_text: float
    share: float
    """Share of the whole run that this stage is, for the learning rate."""


def build_model(
    *, seed: int, feed_forward: int, device: str, layers: int, width: int, vocabulary: int
) -> Any:
    """Return a freshly initialised Llama of the pocket shape, in float32, with this module's attention."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("packed", _Attention(device))
    AttentionMaskInterface.register("packed", lambda *_, **__: None)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 32,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=None,
        pad_token_id=0,
        eos_token_id=1,
    )
    config._attn_implementation = "packed"
    model = LlamaForCausalLM(config).to(device)
    if device == "cuda":
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    return model


class _Attention:
    """Attention under a row mask, in the form that transformers calls.

    A GPU reads a block mask and skips what it leaves out; a CPU, where that kernel has no backward
    pass, reads the same mask as a plain matrix.
    """

    def __init__(self, device: str) -> None:
        self._block = torch.compile(flex_attention, dynamic=False) if device == "cuda" else None

    def __call__(
        self,
        module: Any,
        query: Any,
        key: Any,
        value: Any,
        attention_mask: Any,
        scaling: Any = None,
        **_: Any,
    ) -> Any:
        if self._block is None:
            attend = torch.nn.functional.scaled_dot_product_attention
            out = attend(query, key, value, attn_mask=attention_mask, scale=scaling)
        else:
            out = self._block(query, key, value, block_mask=attention_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None


_make_block_mask = torch.compile(create_block_mask)


def _row_mask(rows: Any) -> Any:
    """Return the mask under which a token sees the earlier tokens of its own row, (B, T) row numbers given."""

    def same_row(line: Any, head: Any, query: Any, key: Any) -> Any:
        return (query >= key) & (rows[line, query] == rows[line, key])

    height, length = rows.shape
    if rows.device.type == "cpu":
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        return (causal & (rows[:, :, None] == rows[:, None, :]))[:, None]
    return _make_block_mask(same_row, height, None, length, length, device=rows.device.type)


class _Batch(NamedTuple):
    ids: np.ndarray
    positions: np.ndarray
    rows: np.ndarray
    """Which row a token belongs to; -1 for padding."""
    text: np.ndarray
    """Flat indices of the dialogue tokens that count."""
    answers: np.ndarray
    """Flat indices of the answers' tokens."""
    questions: np.ndarray
    """Flat indices of the questions' tokens that count."""
    progress: float
    """Share of the stage that was used up before this batch."""


def _batches(
    text: Rows, judge: Rows, passes_text: float, schedule: Schedule, rng: np.random.Generator
) -> Iterator[_Batch]:
    """Pack all rows, shuffled together, into batches of one fixed shape; the last, partly filled one is dropped."""
    order: list[tuple[int, int]] = []
    for number in range(math.ceil(passes_text)):
        share = min(1.0, passes_text - number)
        order += [
            (0, row)
            for row in rng.permutation(len(text.answers))[: round(share * len(text.answers))]
        ]
    order += [(1, row) for row in range(len(judge.answers))]
    order = [order[place] for place in rng.permutation(len(order))]
    length, height = schedule.line_length, schedule.lines
    sources = (text, judge)
    place = 0
    while True:
        ids = np.zeros((height, length), np.int64)
        positions = np.zeros((height, length), np.int64)
        rows = np.full((height, length), -1, np.int32)
        begun = place
        counted: list[list[np.ndarray]] = [[np.zeros(0, np.int64)] for _ in range(3)]
        for line in range(height):
            filled = number = 0
            while place < len(order):
                kind, row = order[place]
                begin, end = sources[kind].begins[row : row + 2]
                size = end - begin
                if filled + size > length:
                    break
                where = slice(filled, filled + size)
                ids[line, where] = sources[kind].ids[begin:end]
                positions[line, where] = np.arange(size)
                rows[line, where] = number
                first = line * length + filled
                answer = int(sources[kind].answers[row])
                counted[kind].append(first + np.arange(answer, size))
                if kind == 1:
                    counted[2].append(first + np.arange(1, answer))
                filled, number, place = filled + size, number + 1, place + 1
        if place >= len(order):
            return
        questions = np.concatenate(counted[2])
        questions = questions[rng.random(len(questions)) < _QUESTION_SHARE]
        yield _Batch(
            ids,
            positions,
            rows,
            np.concatenate(counted[0]),
            np.concatenate(counted[1]),
            questions,
            begun / len(order),
        )


def _ahead(batches: Iterator[_Batch], depth: int = 4) -> Iterator[_Batch]:
    """Pack the next batches in a thread while the GPU works on this one."""
    waiting: queue.Queue[_Batch | Exception | None] = queue.Queue(depth)

    def fill() -> None:
        try:
            for batch in batches:
                waiting.put(batch)
            waiting.put(None)
        except Exception as error:
            waiting.put(error)

    threading.Thread(target=fill, daemon=True).start()
    while (batch := waiting.get()) is not None:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _losses(model: Any, batch: _Batch, schedule: Schedule) -> tuple[Any, list[Any]]:
    """Return the weighted loss, and its three parts."""
    device = model.device
    ids, positions, rows = (
        torch.from_numpy(part).to(device, non_blocking=True) for part in batch[:3]
    )
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        hidden = model.model(
            input_ids=ids, position_ids=positions, attention_mask=_row_mask(rows), use_cache=False
        ).last_hidden_state
        parts = [
            _token_loss(model, hidden, ids, torch.from_numpy(where).to(device))
            if len(where)
            else hidden.sum() * 0.0
            for where in (batch.text, batch.answers, batch.questions)
        ]
    return parts[0] + schedule.answer_weight * parts[1] + schedule.question_weight * parts[2], parts


def _token_loss(model: Any, hidden: Any, ids: Any, where: Any) -> Any:
    """Mean cross-entropy of the tokens at flat indices ``where``, each predicted from the one before."""
    logits = model.lm_head(hidden.flatten(0, 1)[where - 1])
    return torch.nn.functional.cross_entropy(logits.float(), ids.flatten()[where])


def warm_up(model: Any, schedule: Schedule) -> None:
    """Run one step on made-up tokens, so that the kernels are compiled while the rows are being made."""
    shape = (schedule.lines, schedule.line_length)
    where = np.arange(1, 200)
    batch = _Batch(
        np.ones(shape, np.int64),
        np.zeros(shape, np.int64),
        np.zeros(shape, np.int32),
        where,
        where,
        where,
        0.0,
    )
    _losses(model, batch, schedule)[0].backward()
    model.zero_grad(set_to_none=True)


def train(
    model: Any, stages: list[Stage], schedule: Schedule, *, log: Callable[[str], None]
) -> None:
    """Train ``model`` in place, stage after stage, under one learning-rate curve (warm-up, then cosine)."""
    device = model.device
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups, lr=schedule.learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda"
    )
    rng = np.random.default_rng(schedule.seed)
    model.train()
    step, before, started = 0, 0.0, time.time()
    for stage in stages:
        text, judge = stage.fetch()
        log(
            f"  stage of {len(text.ids):,} dialogue tokens x {stage.passes_text} and {len(judge.ids):,} judge tokens"
        )
        begun, seen = time.time(), 0
        for batch in _ahead(_batches(text, judge, stage.passes_text, schedule, rng)):
            by_time = (time.time() - started) / (schedule.deadline - started)
            progress = max(before + stage.share * batch.progress, by_time)
            if progress >= 1.0:
                log(f"  out of time after {step} steps, at {batch.progress:.2f} of this stage")
                return
            decay = 0.5 * (1 + math.cos(math.pi * progress))
            warm = min(1.0, (step + 1) / schedule.warmup)
            for group in optimizer.param_groups:
                group["lr"] = (
                    schedule.learning_rate
                    * warm
                    * (schedule.final_share + (1 - schedule.final_share) * decay)
                )
            loss, parts = _losses(model, batch, schedule)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            seen += batch.ids.size
            if step % 250 == 0:
                texts, answers, questions = (part.item() for part in parts)
                log(
                    f"  step {step} progress {progress:.2f} text {texts:.3f} answers {answers:.3f} "
                    f"questions {questions:.3f} {seen / (time.time() - begun):,.0f} tokens/s"
                )
        before += stage.share
