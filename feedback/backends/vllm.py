"""vLLM in this process: token ids in, the log-probabilities of the labels out.

The engine's own loop is driven directly. Calls are tokenised some blocks ahead, in threads beside
it, and queued ahead of the scheduler, so that it never starves while rows are written; each reply
is yielded as soon as its step ends, and there is no batch to wait for. Prefix caching is on: calls
that come one after the other with the same beginning (both orders, all pairs of a prompt) compute
it once.
"""

from __future__ import annotations

import collections
import copy
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from feedback.backends import Capabilities, JudgeCall, JudgeReply, SampleCall, SampleReply
from feedback.backends.chat import ChatTokenizer
from feedback.backends.head import vllm_overrides
from feedback.backends.identity import identity_of
from feedback.backends.opening import adapter_config, local_revision
from feedback.backends.vllm_faults import engine_errors, wake_if_killed
from feedback.config import EngineOptions
from feedback.errors import BackendError
from feedback.records import JudgeIdentity, Usage

__all__ = ["VllmBackend", "engine_settings", "open_engine"]

_BLOCK = 32
"""Calls tokenised together, by one thread."""
_THREADS = min(8, os.cpu_count() or 1)
"""Blocks tokenised at the same time: a question of a thousand tokens takes one core about as long
as a fast engine takes to judge it, and the tokenizer's own threads are off in many set-ups."""
_FIRST_BLOCK = 8
"""The first one is small, so that the engine has work at once."""
_TOP_LOGPROBS = 20
"""Alternatives asked for where the engine cannot be asked for certain tokens."""
_TEMPLATE_ARGUMENTS = "chat_template_kwargs"
"""The one key of ``extra`` that is for the chat template instead of the engine."""
Call = TypeVar("Call", JudgeCall, SampleCall)
Reply = TypeVar("Reply", JudgeReply, SampleReply)


class _Queued(NamedTuple):
    call: Any
    since: float


class _Block(NamedTuple):
    calls: list[Any]
    ids: Future[list[list[int]]]


class VllmBackend:
    """One model in vLLM.

    Args:
        engine: a ``vllm.LLM``.
        chat: its tokenizer.
        identity: what verdicts record.
        adapter: a ``vllm.lora.request.LoRARequest``, or None.
    """

    def __init__(
        self, engine: Any, chat: ChatTokenizer, *, identity: JudgeIdentity, adapter: Any = None
    ):
        from vllm import SamplingParams

        self.chat = chat
        self.identity = identity
        self._llm = engine
        self._engine = engine.llm_engine
        self._errors = engine_errors()
        self._dead = False
        wake_if_killed(self._engine.engine_core)
        self._adapter = adapter
        config = self._engine.vllm_config
        self.max_length: int = config.model_config.max_model_len
        # Two full steps' worth: one runs, one waits.
        self._ahead = 2 * config.scheduler_config.max_num_seqs
        self.names_tokens = "logprob_token_ids" in SamplingParams.__struct_fields__
        self._stop_ids = sorted(chat.stop_ids())
        self._numbers = itertools.count()
        self._texts: dict[int, str] = {}
        self._judge_params: dict[Any, Any] = {}

    def prepare(self, labels: tuple[str, ...]) -> Capabilities:
        """Check the labels against the tokenizer.

        Raises:
            BackendError: a label is not a single token where the reply starts.
        """
        self.chat.label_ids(labels)
        note = "" if self.chat.templated else "no chat template: messages are sent as plain text"
        return Capabilities(
            logprobs=True,
            max_logprobs=None if self.names_tokens else _TOP_LOGPROBS,
            structured_output=True,
            note=note,
        )

    def judge(self, calls: Iterable[JudgeCall]) -> Iterator[JudgeReply]:
        """Yield one reply per call, as they finish.

        Raises:
            BackendError: the engine died.
        """
        return self._run(calls, self._params_of, self._judge_reply, _failed_judge)

    def sample(self, calls: Iterable[SampleCall]) -> Iterator[SampleReply]:
        """Yield one reply per call, as they finish.

        Raises:
            BackendError: the engine died.
        """
        return self._run(calls, self._sampling_of, self._sample_reply, _failed_sample)

    def close(self) -> None:
        """Shut the engine down and free its memory."""
        import gc

        self._engine.engine_core.shutdown()
        del self._llm, self._engine
        gc.collect()

    # --- the loop ------------------------------------------------------------------------------

    def _run(
        self,
        calls: Iterable[Call],
        params_of: Callable[[Call], Any],
        read: Callable[[Call, Any, float], Reply],
        failed: Callable[[Call, str], Reply],
    ) -> Iterator[Reply]:
        queued: dict[str, _Queued] = {}
        threads = _THREADS if self.chat.threaded else 1
        with ThreadPoolExecutor(threads, thread_name_prefix="tokenise") as pool:
            blocks = self._blocks(iter(calls), pool)
            coming = collections.deque(itertools.islice(blocks, threads))
            try:
                while True:
                    while coming and self._wants(coming[0], len(queued)):
                        for call, problem in self._queue(coming.popleft(), queued, params_of):
                            yield failed(call, problem)
                        coming.extend(itertools.islice(blocks, 1))
                    if not queued:
                        return
                    for output in self._step():
                        if output.finished:
                            call, since = queued.pop(output.request_id)
                            yield read(call, output, time.monotonic() - since)
            finally:
                # Abandoned by the consumer: nothing of it may reach the next stream.
                if queued and not self._dead:
                    self._abandon(queued)

    def _blocks(self, source: Iterator[Any], pool: ThreadPoolExecutor) -> Iterator[_Block]:
        """Yield blocks of calls whose token ids are being made in the pool."""
        size = _FIRST_BLOCK
        while calls := list(itertools.islice(source, size)):
            conversations = [call.messages for call in calls]
            yield _Block(calls, pool.submit(self.chat.ids_of, conversations))
            size = _BLOCK

    def _wants(self, block: _Block, queued: int) -> bool:
        """Whether to hand over a block now; it is waited for only when work runs out."""
        return queued < self._ahead and (queued < _BLOCK or block.ids.done())

    def _queue(
        self, block: _Block, queued: dict[str, _Queued], params_of: Callable[[Any], Any]
    ) -> Iterator[tuple[Any, str]]:
        """Hand a block to the engine; yield the calls that it refuses, with the reason."""
        for call, ids in zip(block.calls, block.ids.result(), strict=True):
            if problem := self._too_long(call, ids):
                yield call, problem
                continue
            name = str(next(self._numbers))
            try:
                self._engine.add_request(
                    name,
                    {"type": "token", "prompt_token_ids": ids},
                    params_of(call),
                    lora_request=self._adapter,
                )
            except self._errors.refused as error:
                yield call, f"refused by vLLM: {error}"
                continue
            except self._errors.died as error:
                raise self._death(error) from error
            queued[name] = _Queued(call, time.monotonic())

    def _too_long(self, call: Any, ids: list[int]) -> str | None:
        if len(ids) + call.max_tokens <= self.max_length:
            return None
        return (
            f"prompt of {len(ids)} tokens and reply of {call.max_tokens} exceed the model's "
            f"{self.max_length}"
        )

    def _step(self) -> list[Any]:
        try:
            outputs: list[Any] = self._engine.step()
        except self._errors.died as error:
            raise self._death(error) from error
        return outputs

    def _death(self, error: Exception) -> BackendError:
        self._dead = True
        return BackendError(
            f"vLLM stopped: {str(error).rstrip('.')}. What is finished is kept; lower gpu_memory "
            "or max_model_len if it ran out of memory, and run the command again"
        )

    def _abandon(self, queued: dict[str, _Queued]) -> None:
        self._engine.abort_request(list(queued))
        while self._engine.has_unfinished_requests():
            self._step()

    # --- judge calls ---------------------------------------------------------------------------

    def _params_of(self, call: JudgeCall) -> Any:
        if call.schema is None:
            # Nothing in it depends on the messages, and vLLM copies it before it writes to it.
            key = (call.choices, call.max_tokens, call.temperature, call.seed)
            params = self._judge_params.get(key)
            if params is None:
                params = self._judge_params[key] = self._new_params(call)
            return params
        return self._new_params(call)

    def _new_params(self, call: JudgeCall) -> Any:
        from vllm.sampling_params import StructuredOutputsParams

        fields: dict[str, Any] = {}
        if call.choices is not None:
            if self.names_tokens:
                fields["logprob_token_ids"] = self.chat.label_ids(call.choices)
            else:
                fields["logprobs"] = _TOP_LOGPROBS
        if call.schema is not None:
            fields["structured_outputs"] = StructuredOutputsParams(json=call.schema)
        one_token = call.choices is not None and call.max_tokens == 1
        return _sampling_params(
            max_tokens=call.max_tokens,
            temperature=call.temperature,
            seed=call.seed,
            detokenize=not one_token,
            stop_token_ids=None if one_token else self._stop_ids,
            **fields,
        )

    def _judge_reply(self, call: JudgeCall, output: Any, seconds: float) -> JudgeReply:
        completion = output.outputs[0]
        choices = None
        if call.choices is not None:
            if not completion.logprobs:
                return _failed_judge(call, "vLLM returned no log-probabilities")
            first = completion.logprobs[0]
            ids = self.chat.label_ids(call.choices)
            choices = {
                label: first[token].logprob
                for label, token in zip(call.choices, ids, strict=True)
                if token in first
            }
        text = completion.text
        if not text and choices is not None and len(completion.token_ids) == 1:
            text = self._text_of(completion.token_ids[0])
        return JudgeReply(
            call_id=call.call_id,
            text=text,
            finish_reason=completion.finish_reason,
            choice_logprobs=choices,
            usage=_usage(output),
            latency_s=seconds,
        )

    def _text_of(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = self.chat.decode([token])
        return text

    # --- sample calls --------------------------------------------------------------------------

    def _sampling_of(self, call: SampleCall) -> Any:
        return _sampling_params(
            n=call.n,
            max_tokens=call.max_tokens,
            temperature=call.temperature,
            top_p=call.top_p,
            seed=call.seed,
            logprobs=0,  # of the sampled token alone; vLLM then sums them
            stop_token_ids=self._stop_ids,
        )

    def _sample_reply(self, call: SampleCall, output: Any, seconds: float) -> SampleReply:
        completions = sorted(output.outputs, key=lambda completion: completion.index)
        return SampleReply(
            call_id=call.call_id,
            texts=tuple(completion.text for completion in completions),
            finish_reasons=tuple(completion.finish_reason for completion in completions),
            logps=tuple(completion.cumulative_logprob for completion in completions),
            usage=_usage(output),
            latency_s=seconds,
        )


def _sampling_params(**fields: Any) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(output_kind=RequestOutputKind.FINAL_ONLY, **fields)


def _usage(output: Any) -> Usage:
    return Usage(
        prompt_tokens=len(output.prompt_token_ids or ()),
        cached_tokens=output.num_cached_tokens or 0,
        completion_tokens=sum(len(completion.token_ids) for completion in output.outputs),
    )


def _failed_judge(call: JudgeCall, problem: str) -> JudgeReply:
    return JudgeReply(call_id=call.call_id, error=problem)


def _failed_sample(call: SampleCall, problem: str) -> SampleReply:
    return SampleReply(call_id=call.call_id, error=problem)


def open_engine(options: EngineOptions, path: str) -> VllmBackend:
    """Start vLLM on the model at ``path`` (a folder or a Hub name).

    ``options.extra`` goes to ``vllm.LLM``, but for ``chat_template_kwargs``.

    Raises:
        BackendError: the model cannot be loaded or does not fit.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # A fork of a process whose torch has threads can wait for ever on a lock that one of them held.
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    settings = engine_settings(options)
    settings |= vllm_overrides(
        path, settings, revision=options.revision, trust_remote_code=options.trust_remote_code
    )
    failures: tuple[type[Exception], ...] = (ValueError, TypeError, OSError, *engine_errors().died)
    adapter = None if options.lora is None else LoRARequest("judge", 1, options.lora)
    try:
        engine: Any = LLM(model=path, **settings)
    except failures as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise BackendError(f"vLLM cannot load {options.model!r}: {first}") from error
    return VllmBackend(
        engine,
        ChatTokenizer(
            # A copy: this one works in a thread beside the engine's detokenizer.
            copy.deepcopy(engine.get_tokenizer()),
            template_arguments=options.extra.get(_TEMPLATE_ARGUMENTS),
        ),
        identity=identity_of(options, revision=local_revision(path)),
        adapter=adapter,
    )


def engine_settings(options: EngineOptions) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM`` besides the model; those in ``extra`` win.

    Raises:
        BackendError: the folder of the adapter holds none.
    """
    settings: dict[str, Any] = {
        "dtype": options.dtype,
        "tensor_parallel_size": options.tensor_parallel,
        "gpu_memory_utilization": options.gpu_memory,
        "max_model_len": options.max_model_len,
        "enforce_eager": options.enforce_eager,
        "trust_remote_code": options.trust_remote_code,
        "revision": options.revision,
        "enable_prefix_caching": True,
        "max_logprobs": _TOP_LOGPROBS,
        "disable_log_stats": True,
    }
    if options.lora is not None:
        settings |= {"enable_lora": True, "max_lora_rank": _lora_rank(options.lora)}
    settings |= options.extra
    settings.pop(_TEMPLATE_ARGUMENTS, None)
    return settings


def _lora_rank(folder: str) -> int:
    """The adapter's rank, which vLLM must be told before it loads one.

    Raises:
        BackendError: the folder holds no LoRA adapter.
    """
    try:
        return int(adapter_config(folder)["r"])
    except (KeyError, ValueError) as error:
        raise BackendError(f"{folder} holds no LoRA adapter: no rank ({error})") from error
