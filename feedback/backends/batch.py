"""The OpenAI Batch API: half the price, an answer within a day.

Calls are written to files within the API's limits, uploaded and submitted as each file is full, and
the replies are yielded batch by batch as they end. The ids are on disk before anything is waited
for: a run that was killed, or stopped with Ctrl-C during the long wait, finds its batches again and
pays for nothing twice. What a batch could not answer is a reply with ``error``, and the next run
submits it anew.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import SplitResult

import orjson

from feedback.backends import Capabilities, JudgeCall, JudgeReply, SampleCall, SampleReply
from feedback.backends.batch_jobs import BatchJobs
from feedback.backends.batch_state import (
    BatchFile,
    BatchStore,
    RequestFile,
    ResultLine,
    body_hash,
)
from feedback.backends.chat_bodies import Bodies, Dialect
from feedback.backends.chat_replies import error_message, read_judge, read_sample
from feedback.backends.extras import HostedExtra, extra_of, load_tokenizer
from feedback.backends.http import OPENAI_URL, split_url
from feedback.backends.identity import identity_of
from feedback.backends.openai import OpenAIBackend
from feedback.backends.redacting import Redactor, secrets_of
from feedback.backends.retrying import RequestFailed
from feedback.config import EngineOptions, above, at_least
from feedback.errors import BackendError

__all__ = ["BatchBackend", "BatchExtra", "open_engine"]

Call = TypeVar("Call", JudgeCall, SampleCall)
Reply = TypeVar("Reply", JudgeReply, SampleReply)


@dataclass(frozen=True, kw_only=True)
class BatchExtra(HostedExtra):
    """Keys of ``extra`` that the batch engine understands, besides those of other endpoints."""

    folder: str = "runs/batches"
    """Where submitted batches are written down; keep it until a run has finished."""
    poll_s: float = 30.0
    """Seconds between two looks at the batches."""
    requests_per_file: int = 50_000
    """Requests per batch; the API takes 50,000."""
    bytes_per_file: int = 100_000_000
    """Bytes per batch; the API takes 100 MB."""
    probe: bool = True
    """Ask the endpoint what it can do by a few ordinary requests, before anything is submitted."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least(self, 1, "requests_per_file", "bytes_per_file")
        above(self, 0, "poll_s")


class _Wanted(NamedTuple):
    """A call without its messages, which lie in the request file."""

    call: Any
    since: float


class BatchBackend:
    """One model behind the Batch API.

    Args:
        options: as for the ``openai`` engine; ``extra`` as in ``BatchExtra``.

    Raises:
        BackendError: the key is not in the environment, or ``base_url`` is no http(s) URL.
    """

    def __init__(self, options: EngineOptions):
        self.options = options
        self.extra, url, key = settings_of(options)
        self.identity = identity_of(options)
        self.bodies = Bodies(options.model, dialect=Dialect(), extra=self.extra.body)
        self._redact = Redactor(secrets_of(url, key, self.extra.headers))
        self._jobs = BatchJobs(
            options.base_url,
            key=key or "none",
            timeout_s=options.timeout_s,
            retries=options.max_retries,
            headers=self.extra.headers,
            redact=self._redact,
        )
        self.chat = load_tokenizer(self.extra)
        self.max_length = self.extra.max_length

    def prepare(self, labels: tuple[str, ...]) -> Capabilities:
        """Ask the same model, outside of a batch, what it can do.

        Raises:
            BackendError: as ``OpenAIBackend.prepare``.
        """
        if not self.extra.probe:
            note = f"{self.options.model}, in batches: not probed"
            return Capabilities(logprobs=True, max_logprobs=20, note=note)
        extra = {"transport": "sdk", "body": self.extra.body, "headers": self.extra.headers}
        online = OpenAIBackend(dataclasses.replace(self.options, extra=extra))
        try:
            found = online.prepare(labels)
        finally:
            online.close()
        self.bodies.dialect = online.bodies.dialect
        return dataclasses.replace(found, note=f"{found.note}; in batches, within 24 hours")

    def judge(self, calls: Iterable[JudgeCall]) -> Iterator[JudgeReply]:
        """Yield one reply per call, batch by batch as they end.

        Raises:
            BackendError: the API refuses a batch as a whole, or cannot be reached.
        """
        return self._run(calls, self.bodies.judge, self._read_judge, _failed_judge)

    def sample(self, calls: Iterable[SampleCall]) -> Iterator[SampleReply]:
        """Yield one reply per call, batch by batch as they end.

        Raises:
            BackendError: as ``judge``.
        """
        return self._run(calls, self.bodies.sample, self._read_sample, _failed_sample)

    def close(self) -> None:
        """Close the connections; batches under way go on at the provider."""
        self._jobs.close()

    def _store_name(self) -> str:
        judge = self.identity
        return " ".join(filter(None, (judge.endpoint, self.bodies.model, judge.setup)))

    # --- submitting ----------------------------------------------------------------------------

    def _run(
        self,
        calls: Iterable[Call],
        body_of: Callable[[Call], bytes],
        read: Callable[[Call, bytes, float], Reply],
        failed: Callable[[Call, str], Reply],
    ) -> Iterator[Reply]:
        store = BatchStore(Path(self.extra.folder), self._store_name())
        try:
            wanted: dict[str, dict[str, _Wanted]] = {}
            batches: dict[str, BatchFile] = {}
            for item in self._submit_all(store, calls, body_of, batches, wanted):
                yield failed(*item)
            yield from self._collect_all(store, batches, wanted, read, failed)
        finally:
            store.close()

    def _submit_all(
        self,
        store: BatchStore,
        calls: Iterable[Any],
        body_of: Callable[[Any], bytes],
        batches: dict[str, BatchFile],
        wanted: dict[str, dict[str, _Wanted]],
    ) -> Iterator[tuple[Any, str]]:
        """Find or submit every call; yield those that cannot be sent, with the reason."""
        known = store.known_calls()
        limits = {
            "most_requests": self.extra.requests_per_file,
            "most_bytes": self.extra.bytes_per_file,
        }
        file = RequestFile(store, **limits)
        fresh: dict[str, _Wanted] = {}

        def submit() -> None:
            nonlocal fresh
            batch = file.finish()
            batches[batch.key], wanted[batch.key] = batch, fresh
            fresh = {}
            self._jobs.submit(store, batch)

        try:
            for call in calls:
                try:
                    body = body_of(call)
                except ValueError as error:
                    yield call, str(error)
                    continue
                light = _Wanted(dataclasses.replace(call, messages=()), time.monotonic())
                earlier = known.get((call.call_id, body_hash(body)))
                if earlier is not None:
                    batches[earlier.key] = earlier
                    wanted.setdefault(earlier.key, {})[call.call_id] = light
                    continue
                line = _request_line(call.call_id, body)
                if file.requests and not file.fits(line):
                    submit()
                if not file.fits(line):
                    yield call, f"a request of {len(line)} bytes is larger than a batch may be"
                    continue
                file.add(line)
                fresh[call.call_id] = light
            if file.requests:
                submit()
        finally:
            file.close()

    # --- waiting and reading -------------------------------------------------------------------

    def _collect_all(
        self,
        store: BatchStore,
        batches: dict[str, BatchFile],
        wanted: dict[str, dict[str, _Wanted]],
        read: Callable[[Any, bytes, float], Any],
        failed: Callable[[Any, str], Any],
    ) -> Iterator[Any]:
        waiting = list(batches.values())
        while waiting:
            still = []
            for batch in waiting:
                if self._jobs.advance(store, batch, others=len(waiting) - 1):
                    yield from self._results(store, batch, wanted[batch.key], read, failed)
                else:
                    still.append(batch)
            waiting = still
            if waiting:
                time.sleep(self.extra.poll_s)

    def _results(
        self,
        store: BatchStore,
        batch: BatchFile,
        calls: dict[str, _Wanted],
        read: Callable[[Any, bytes, float], Any],
        failed: Callable[[Any, str], Any],
    ) -> Iterator[Any]:
        open_calls = dict(calls)
        bad = set(batch.bad)
        for result in store.results(batch):
            found = open_calls.get(result.custom_id)
            if found is None or result.custom_id in bad:
                continue
            try:
                body = self._body_of(result)
                reply = read(found.call, body, time.monotonic() - found.since)
            except RequestFailed as failure:
                batch.bad.append(result.custom_id)
                reply = failed(found.call, str(failure))
                reply = dataclasses.replace(reply, usage=failure.usage)
            del open_calls[result.custom_id]
            yield reply
        for found in open_calls.values():
            problem = f"the batch ended ({batch.status}) without a readable reply to this call"
            yield failed(found.call, problem)
        store.save(batch)

    def _body_of(self, result: ResultLine) -> bytes:
        """Return the body of a successful result.

        Raises:
            RequestFailed: the result is an error.
        """
        response = result.response
        if response is not None and response.status_code == 200 and not result.error:
            return bytes(response.body)
        if result.error is not None and result.error.message:
            text = f"{result.error.message} {result.error.code or ''}".strip()
        elif response is not None:
            text = f"HTTP {response.status_code}: {error_message(bytes(response.body))}"
        else:
            text = "no result"
        raise RequestFailed(self._redact(f"in the batch: {text}"), kind="refused")

    def _read_judge(self, call: JudgeCall, body: bytes, seconds: float) -> JudgeReply:
        reading = read_judge(body, call, self.bodies.token_ids(call.choices))
        return JudgeReply(
            call_id=call.call_id,
            text=reading.text,
            finish_reason=reading.finish_reason,
            choice_logprobs=reading.choice_logprobs,
            usage=reading.usage,
            latency_s=seconds,
        )

    def _read_sample(self, call: SampleCall, body: bytes, seconds: float) -> SampleReply:
        reading = read_sample(body, call)
        return SampleReply(
            call_id=call.call_id,
            texts=reading.texts,
            finish_reasons=reading.finish_reasons,
            logps=reading.logps,
            usage=reading.usage,
            latency_s=seconds,
        )


def _request_line(call_id: str, body: bytes) -> bytes:
    return b'{"custom_id":%b,"method":"POST","url":"/v1/chat/completions","body":%b}' % (
        orjson.dumps(call_id),
        body,
    )


def _failed_judge(call: JudgeCall, problem: str) -> JudgeReply:
    return JudgeReply(call_id=call.call_id, error=problem)


def _failed_sample(call: SampleCall, problem: str) -> SampleReply:
    return SampleReply(call_id=call.call_id, error=problem)


class BatchSettings(NamedTuple):
    """What the options say of the Batch API."""

    extra: BatchExtra
    url: SplitResult
    key: str | None


def settings_of(options: EngineOptions) -> BatchSettings:
    """Read and check the options; nothing is loaded or sent.

    Raises:
        BackendError: the key is not in the environment, or ``base_url`` is no http(s) URL.
        RecipeError: ``extra`` holds an unknown key, or one that does nothing.
    """
    extra = extra_of(BatchExtra, options)
    url = split_url(options.base_url or OPENAI_URL)
    key = os.environ.get(options.api_key_env)
    if not key and options.base_url is None:
        raise BackendError(f"the Batch API needs a key: set {options.api_key_env}")
    return BatchSettings(extra, url, key)


def check_options(options: EngineOptions) -> None:
    """Raise what opening would raise, without opening; see ``settings_of``."""
    settings_of(options)


def open_engine(options: EngineOptions, path: str) -> BatchBackend:
    """Return the backend; ``path`` is not used, since the endpoint holds the model."""
    return BatchBackend(options)
