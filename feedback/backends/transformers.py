"""The in-process engine on ``transformers``, CPU or GPU: judges by label tokens, and samples.

Questions are read a window at a time, grouped by the prefix they share (``prefix``) and batched by
length under a token budget. A question for text, and every sampling call, is decoded token by token
(``decode``). No setting of torch's threads is touched here.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from feedback.backends import Capabilities, JudgeCall, JudgeReply, SampleCall, SampleReply
from feedback.backends.chat import ChatTokenizer
from feedback.backends.decode import Drawn, Generated, generate
from feedback.backends.head import float32_head
from feedback.backends.identity import identity_of
from feedback.backends.opening import local_revision
from feedback.backends.prefix import (
    Group,
    Stem,
    last_logits,
    members_of,
    plan_batches,
    plan_stems,
)
from feedback.backends.scoring import CompletionLogp, completion_logps
from feedback.config import EngineOptions
from feedback.errors import BackendError
from feedback.records import JudgeIdentity, Message, Usage

__all__ = ["TransformersBackend", "open_engine"]

# Calls that are planned together.
_WINDOW_CALLS = 1024
# A forward pass over more tokens than this only empties a processor's caches.
_CPU_BATCH_TOKENS = 2048
# Decoding holds keys and values for this many times the budget of a forward pass.
_DECODE_BATCHES = 4
# Largest difference in logits at which the shared prefix counts as equal to a plain forward pass;
# rounding in 16-bit types is far below what a model that cannot share produces.
_SHARING_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.5, "float16": 0.1}
Item = TypeVar("Item")
Work = TypeVar("Work", "_Asked", "_Drawing")
Result = TypeVar("Result")


class _Asked(NamedTuple):
    call: JudgeCall
    ids: list[int]


class _Drawing(NamedTuple):
    call: SampleCall
    ids: list[int]


class TransformersBackend:
    """One model of ``transformers`` with its tokenizer, in this process.

    Args:
        model: causal language model, on its device, in eval mode.
        chat: its tokenizer.
        identity: what verdicts record.
        batch_tokens: tokens per forward pass.
        max_length: longest prompt plus reply, in tokens.
    """

    def __init__(
        self,
        model: Any,
        chat: ChatTokenizer,
        *,
        identity: JudgeIdentity,
        batch_tokens: int = 16384,
        max_length: int = 4096,
    ):
        self.model = model
        self.chat = chat
        self.identity = identity
        self.batch_tokens = batch_tokens
        self.max_length = max_length
        self.stop_ids = chat.stop_ids(model.generation_config.eos_token_id)
        self.shares_prefixes = self._can_share_prefixes()

    def prepare(self, labels: tuple[str, ...]) -> Capabilities:
        """Check the labels against the tokenizer.

        Raises:
            BackendError: a label is not a single token where the reply starts.
        """
        self.chat.label_ids(labels)
        notes = [] if self.chat.templated else ["no chat template: messages are sent as plain text"]
        if not self.shares_prefixes:
            notes.append("this model's cache cannot be shared between questions")
        return Capabilities(logprobs=True, note="; ".join(notes))

    def judge(self, calls: Iterable[JudgeCall]) -> Iterator[JudgeReply]:
        """Yield one reply per call, a window of calls at a time."""
        for window in _windows(calls):
            labels: list[_Asked] = []
            texts: list[_Asked] = []
            conversations = [call.messages for call in window]
            for call, ids in zip(window, self.chat.ids_of(conversations), strict=True):
                if problem := self._too_long(ids, call.max_tokens):
                    yield JudgeReply(call_id=call.call_id, error=problem)
                elif call.choices and call.max_tokens == 1:
                    labels.append(_Asked(call, ids))
                else:
                    texts.append(_Asked(call, ids))
            yield from self._judge_labels(labels)
            yield from self._judge_texts(texts)

    def _judge_labels(self, asked: list[_Asked]) -> Iterator[JudgeReply]:
        rows = [item.ids for item in asked]
        if self.shares_prefixes:
            stems = plan_stems(rows)
        else:
            stems = [Stem(0, [Group(0, [place])]) for place in range(len(rows))]
        budget = self.batch_tokens
        if self.model.device.type == "cpu":
            budget = min(budget, _CPU_BATCH_TOKENS)
        for planned in plan_batches(rows, stems, budget):
            for batch, logits, seconds in _halving(
                planned, lambda part: last_logits(self.model, rows, part)
            ):
                shared = _shared_tokens(batch)
                for member, row in zip(members_of(batch), logits, strict=True):
                    yield self._label_reply(asked[member], row, shared[member], seconds)

    def _label_reply(self, item: _Asked, logits: Any, cached: int, seconds: float) -> JudgeReply:
        choices = item.call.choices or ()
        logprobs = logits.log_softmax(dim=-1)
        token = int(logprobs.argmax())
        values = logprobs[self.chat.label_ids(choices)].tolist()
        return JudgeReply(
            call_id=item.call.call_id,
            text=self.chat.decode([token]),
            finish_reason="length",
            choice_logprobs=dict(zip(choices, values, strict=True)),
            usage=Usage(prompt_tokens=len(item.ids), cached_tokens=cached, completion_tokens=1),
            latency_s=seconds,
        )

    def _judge_texts(self, asked: list[_Asked]) -> Iterator[JudgeReply]:
        for planned in self._decode_batches(asked, lambda item: item.call.max_tokens):
            for batch, (texts, first), seconds in _halving(planned, self._generate_texts):
                for item, text, logits in zip(batch, texts, first, strict=True):
                    yield self._text_reply(item, text, logits, seconds)

    def _generate_texts(self, batch: Sequence[_Asked]) -> tuple[list[Generated], Any]:
        rows = [
            Drawn(place, call.max_tokens, call.temperature, 1.0, call.seed or 0)
            for place, call in enumerate(item.call for item in batch)
        ]
        return generate(self.model, [item.ids for item in batch], rows, stop_ids=self.stop_ids)

    def _text_reply(self, item: _Asked, text: Generated, logits: Any, seconds: float) -> JudgeReply:
        choices = item.call.choices
        logprobs = None
        if choices:
            values = logits.log_softmax(dim=-1)[self.chat.label_ids(choices)].tolist()
            logprobs = dict(zip(choices, values, strict=True))
        return JudgeReply(
            call_id=item.call.call_id,
            text=self.chat.decode(text.ids),
            finish_reason=text.finish_reason,
            choice_logprobs=logprobs,
            usage=Usage(
                prompt_tokens=len(item.ids),
                completion_tokens=len(text.ids) + (text.finish_reason == "stop"),
            ),
            latency_s=seconds,
        )

    def sample(self, calls: Iterable[SampleCall]) -> Iterator[SampleReply]:
        """Yield the completions of each call, a window of calls at a time."""
        for window in _windows(calls):
            ready: list[_Drawing] = []
            prompts = self.chat.ids_of([call.messages for call in window])
            for call, ids in zip(window, prompts, strict=True):
                if problem := self._too_long(ids, call.max_tokens):
                    yield SampleReply(call_id=call.call_id, error=problem)
                else:
                    ready.append(_Drawing(call, ids))
            for planned in self._decode_batches(
                ready, lambda item: item.call.max_tokens, lambda item: item.call.n
            ):
                for batch, texts, seconds in _halving(planned, self._generate_samples):
                    drawn = iter(texts)
                    for item in batch:
                        own = list(itertools.islice(drawn, item.call.n))
                        yield self._sample_reply(item, own, seconds)

    def _generate_samples(self, batch: Sequence[_Drawing]) -> list[Generated]:
        rows = [
            Drawn(place, call.max_tokens, call.temperature, call.top_p, call.seed or 0, number)
            for place, call in enumerate(item.call for item in batch)
            for number in range(call.n)
        ]
        prompts = [item.ids for item in batch]
        return generate(self.model, prompts, rows, stop_ids=self.stop_ids)[0]

    def _sample_reply(self, item: _Drawing, texts: list[Generated], seconds: float) -> SampleReply:
        return SampleReply(
            call_id=item.call.call_id,
            texts=tuple(self.chat.decode(text.ids) for text in texts),
            finish_reasons=tuple(text.finish_reason for text in texts),
            logps=tuple(text.logp for text in texts),
            usage=Usage(
                prompt_tokens=len(item.ids),
                completion_tokens=sum(
                    len(text.ids) + (text.finish_reason == "stop") for text in texts
                ),
            ),
            latency_s=seconds,
        )

    def logps(
        self, completions: Iterable[tuple[Sequence[Message], str, bool]]
    ) -> Iterator[CompletionLogp]:
        """Yield the log-probability of each (messages, completion, whether it ended by itself).

        In the order given; at temperature 1, the end token's included where the text ended.
        """
        for window in _windows(completions):
            yield from completion_logps(self.model, self.chat, window, budget=self.batch_tokens)

    def close(self) -> None:
        """Drop the model and free its memory."""
        import gc

        import torch

        del self.model
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _too_long(self, ids: list[int], max_tokens: int) -> str | None:
        if len(ids) + max_tokens <= self.max_length:
            return None
        return (
            f"prompt of {len(ids)} tokens and reply of {max_tokens} exceed the model's "
            f"{self.max_length}"
        )

    def _decode_batches(
        self,
        items: list[Work],
        reply_tokens: Callable[[Work], int],
        copies: Callable[[Work], int] = lambda _: 1,
    ) -> Iterator[list[Work]]:
        """Yield items of like prompt length, as many as keys and values may be held for."""
        budget = self.batch_tokens * _DECODE_BATCHES
        batch: list[Work] = []
        rows = longest = 0
        for item in sorted(items, key=lambda item: len(item.ids)):
            longest = max(longest, reply_tokens(item))
            if batch and (rows + copies(item)) * (len(item.ids) + longest) > budget:
                yield batch
                batch, rows, longest = [], 0, reply_tokens(item)
            batch.append(item)
            rows += copies(item)
        if batch:
            yield batch

    def _can_share_prefixes(self) -> bool:
        """Try the shared prefix on invented rows: equal to plain forward passes, or not used."""
        import torch

        size = self.model.get_input_embeddings().weight.shape[0]
        row = [(7 * place + 3) % size for place in range(24)]
        rows = [row[:12] + row[20:], row[:12] + row[14:], row[:16]]
        plain = [Stem(0, [Group(0, [place])]) for place in range(len(rows))]
        shared_plan = [Stem(6, [Group(12, [0, 1]), Group(9, [2])])]
        tolerance = _SHARING_TOLERANCE.get(str(self.model.dtype).removeprefix("torch."), 1e-3)
        with torch.inference_mode():
            expected = last_logits(self.model, rows, plain)
            try:
                shared = last_logits(self.model, rows, shared_plan)
            except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
                return False  # a recurrent state is no list of keys and values
        return bool((shared - expected).abs().max() <= tolerance)


def _shared_tokens(batch: Sequence[Stem]) -> dict[int, int]:
    """Return for each row how many of its tokens were computed for another row."""
    shared: dict[int, int] = {}
    for stem in batch:
        for place, group in enumerate(stem.groups):
            for number, member in enumerate(group.members):
                first = 0 if place == 0 else stem.prefix
                shared[member] = group.prefix if number else first
    return shared


def _windows(items: Iterable[Item]) -> Iterator[list[Item]]:
    source = iter(items)
    while window := list(itertools.islice(source, _WINDOW_CALLS)):
        yield window


def _halving(
    items: list[Item], run: Callable[[Sequence[Item]], Result]
) -> Iterator[tuple[list[Item], Result, float]]:
    """Yield (items, result, seconds) of ``run``; halves the batch when memory runs out.

    Raises:
        BackendError: memory runs out on a single item.
    """
    import torch

    start = time.perf_counter()
    try:
        with torch.inference_mode():
            result = run(items)
    except torch.OutOfMemoryError as error:
        if len(items) == 1:
            raise BackendError(
                f"out of GPU memory on one item; lower batch_tokens or max_model_len: {error}"
            ) from error
    else:
        yield items, result, time.perf_counter() - start
        return
    torch.cuda.empty_cache()
    middle = len(items) // 2
    yield from _halving(items[:middle], run)
    yield from _halving(items[middle:], run)


def open_engine(options: EngineOptions, path: str) -> TransformersBackend:
    """Load the model at ``path`` (a folder or a Hub name).

    Raises:
        BackendError: it cannot be loaded, or is no causal language model with a tokenizer.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = options.dtype
    if dtype == "auto" and device == "cpu":
        dtype = "float32"  # 16-bit arithmetic is slower there, and its rounding moves verdicts
    extra = dict(options.extra)
    template_arguments = extra.pop("chat_template_kwargs", {})
    hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(path, **hub)
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **hub, **extra)
    except (OSError, ValueError, TypeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise BackendError(f"cannot load {options.model!r} with transformers: {first}") from error
    if options.lora is not None:
        model = _with_adapter(model, options.lora)
    model = model.to(device).eval()
    float32_head(model)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    revision = local_revision(path) or getattr(model.config, "_commit_hash", None)
    return TransformersBackend(
        model,
        ChatTokenizer(tokenizer, template_arguments=template_arguments),
        identity=identity_of(options, revision=revision),
        batch_tokens=options.batch_tokens,
        max_length=min(filter(None, (options.max_model_len, limit, 1 << 20))),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Load without the library's own progress bars, which would break ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _with_adapter(model: Any, folder: str) -> Any:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, folder).merge_and_unload()
    except (OSError, ValueError) as error:
        raise BackendError(f"cannot load the adapter {folder!r}: {error}") from error
