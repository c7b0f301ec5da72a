"""Requests to hosted APIs through the ``openai`` package.

The package knows the providers' authentication, regions and redirects; its retries are off, because
the gate and the retry policy of this project decide about those. It costs 2 to 5 ms of processor
time per request, which a hosted API hides; a server of one's own goes through ``http``.
"""

from __future__ import annotations

from typing import Any

import openai
import orjson

from feedback.backends.chat_replies import error_message
from feedback.backends.redacting import Redactor
from feedback.backends.retrying import RequestFailed, failure_of_status, retry_after_seconds

__all__ = ["SdkTransport"]


class SdkTransport:
    """As ``HttpTransport``, through ``openai.AsyncOpenAI``; create it inside the event loop."""

    def __init__(
        self,
        base_url: str | None,
        *,
        key: str,
        timeout_s: float,
        headers: dict[str, str] | None = None,
        redact: Redactor,
    ):
        self._redact = redact
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=base_url,
            timeout=timeout_s,
            max_retries=0,
            default_headers=headers,
        )

    async def send(self, body: bytes) -> bytes:
        """Post a chat completion.

        Raises:
            RequestFailed: no reply with status 200 came back.
        """
        fields: dict[str, Any] = orjson.loads(body)
        model, messages = fields.pop("model"), fields.pop("messages")
        create = self._client.chat.completions.with_raw_response.create
        try:
            # Everything else as extra_body: the package's own argument checks must not decide what
            # a compatible endpoint understands.
            reply = await create(model=model, messages=messages, extra_body=fields)
            return reply.content
        except openai.APIStatusError as error:
            raw = error.response.content
            raise failure_of_status(
                error.status_code,
                self._redact(error_message(raw)),
                retry_after=retry_after_seconds(error.response.headers),
            ) from None
        except openai.APITimeoutError:
            raise RequestFailed("timed out", kind="timeout") from None
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            text = self._redact(f"{type(cause).__name__}: {cause}")
            raise RequestFailed(text, kind="network") from None
        except (openai.OpenAIError, ValueError) as error:
            text = self._redact(f"{type(error).__name__}: {error}")
            raise RequestFailed(text, kind="invalid") from None

    async def close(self) -> None:
        """Close the client's connections."""
        await self._client.close()
