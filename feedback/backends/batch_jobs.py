"""Moves batches along at the provider: upload, submit, look, download.

Every step is written down as soon as it is done. The one step that cannot be undone, creating a
batch, carries the batch's key as metadata: if the process dies between the provider's yes and our
note of it, the next run finds the batch by its key instead of paying for a second one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import openai
import tenacity

from feedback.backends.batch_state import BatchFile, BatchStore
from feedback.backends.redacting import Redactor
from feedback.errors import BackendError

__all__ = ["BatchJobs"]

_TAG = "rlaif_batch"
_ENDED = ("completed", "failed", "expired", "cancelled")
_LOOK_BACK = 500
"""Batches looked through for one whose id was never written down."""
Result = TypeVar("Result")


class BatchJobs:
    """The provider's files and batches.

    Args:
        base_url: None for OpenAI's own.
        key: API key.
        timeout_s: for one request; uploads and downloads get five times as long.
        retries: tries after the first, for failures that may pass.
        headers: further request headers.
        redact: passes over every error text.
    """

    def __init__(
        self,
        base_url: str | None,
        *,
        key: str,
        timeout_s: float,
        retries: int,
        headers: dict[str, str] | None = None,
        redact: Redactor,
    ):
        self._client = openai.OpenAI(
            api_key=key,
            base_url=base_url,
            timeout=timeout_s,
            max_retries=0,
            default_headers=headers,
        )
        self._files = self._client.with_options(timeout=5 * timeout_s).files
        self._retries = retries
        self._redact = redact

    def close(self) -> None:
        """Close the client's connections."""
        self._client.close()

    def submit(self, store: BatchStore, batch: BatchFile) -> None:
        """Upload and create a batch, or go on where an earlier run stopped.

        Raises:
            BackendError: the provider refuses.
        """
        if batch.step == "written":
            path = store.path(batch, ".jsonl")
            batch.file_id = self._call(lambda: self._upload(path)).id
            batch.step = "uploaded"
            store.save(batch)
        if batch.step == "uploaded":
            batch.batch_id = self._find(batch) or self._create(batch)
            batch.step = "submitted"
            batch.status = "submitted"
            store.save(batch)

    def _upload(self, path: Path) -> Any:
        with path.open("rb") as file:
            return self._files.create(file=(path.name, file), purpose="batch")

    def _create(self, batch: BatchFile) -> str:
        assert batch.file_id is not None
        file_id = batch.file_id
        created = self._call(
            lambda: self._client.batches.create(
                input_file_id=file_id,
                endpoint="/v1/chat/completions",
                completion_window="24h",
                metadata={_TAG: batch.key},
            ),
            # A yes that got lost on the way must not lead to a second batch.
            before_retry=lambda: self._find(batch),
        )
        return created if isinstance(created, str) else str(created.id)

    def _find(self, batch: BatchFile) -> str | None:
        """Return the id of a batch that was created from this file, if there is one."""
        page = self._call(lambda: self._client.batches.list(limit=100))
        for number, known in enumerate(page):
            if number >= _LOOK_BACK:
                break
            tag = (known.metadata or {}).get(_TAG)
            if (tag == batch.key or known.input_file_id == batch.file_id) and (
                known.status not in ("failed", "cancelled")
            ):
                return str(known.id)
        return None

    def advance(self, store: BatchStore, batch: BatchFile, *, others: int) -> bool:
        """Take a batch one step further; True when it has ended and its results are on disk.

        Args:
            store: where it is written down.
            batch: the batch.
            others: other batches under way; a full queue is waited for only if there are some.

        Raises:
            BackendError: the provider refuses the batch as a whole.
        """
        if batch.step == "ended":
            return True
        if batch.step != "submitted":
            self.submit(store, batch)
        batch_id = batch.batch_id
        assert batch_id is not None
        now = self._call(lambda: self._client.batches.retrieve(batch_id))
        batch.status = now.status
        if now.status not in _ENDED:
            return False
        if now.status == "failed":
            self._failed(store, batch, now, others)
            return False
        for suffix, file_id in (
            (".output.jsonl", now.output_file_id),
            (".errors.jsonl", now.error_file_id),
        ):
            if file_id is not None:
                self._download(file_id, store.path(batch, suffix))
        batch.step = "ended"
        store.save(batch)
        return True

    def _failed(self, store: BatchStore, batch: BatchFile, now: Any, others: int) -> None:
        """Queue a batch again if the provider's queue was full.

        Raises:
            BackendError: it was refused for another reason.
        """
        errors = (now.errors.data or []) if now.errors is not None else []
        codes = {error.code for error in errors}
        text = self._redact("; ".join(error.message or "" for error in errors[:3]) or "no reason")
        if codes and codes <= {"token_limit_exceeded"} and others > 0:
            batch.step, batch.batch_id = "uploaded", None
            store.save(batch)
            return
        # Nothing of it was answered: the next run must submit these calls anew.
        store.forget(batch)
        raise BackendError(f"the batch of {batch.requests} calls was refused: {text}")

    def _download(self, file_id: str, path: Path) -> None:
        temporary = path.with_suffix(".tmp")

        def fetch() -> None:
            with self._files.with_streaming_response.content(file_id) as response:
                response.stream_to_file(temporary)

        self._call(fetch)
        temporary.replace(path)

    def _call(
        self, request: Callable[[], Result], *, before_retry: Callable[[], Any] | None = None
    ) -> Any:
        """Make a request, trying again what may pass.

        Args:
            request: makes it.
            before_retry: looked at before each further try; what it returns, if anything, counts
                as the result.

        Raises:
            BackendError: it failed for good.
        """
        first = True

        def attempt() -> Any:
            nonlocal first
            if not first and before_retry is not None:
                found = before_retry()
                if found is not None:
                    return found
            first = False
            return request()

        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self._retries + 1),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=60.0),
            retry=tenacity.retry_if_exception(_transient),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except openai.OpenAIError as error:
            text = self._redact(f"{type(error).__name__}: {error}")
            raise BackendError(
                f"the Batch API: {text}. Batches under way are written down; run the command again "
                "to go on"
            ) from None


def _transient(error: BaseException) -> bool:
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError)
