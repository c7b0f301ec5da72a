"""The lean way to an OpenAI-compatible server: one keep-alive pool, bytes in, bytes out.

A judge's reply is a few hundred bytes, so on a fast server the client's own work per request sets
the speed. Nothing here parses, copies or logs what it does not need. Proxies are left to the
``openai`` package.
"""

from __future__ import annotations

import base64
import urllib.request
from typing import Protocol
from urllib.parse import SplitResult, unquote, urlsplit

from feedback.backends.chat_replies import error_message
from feedback.backends.connections import ExchangeBroken, Pool
from feedback.backends.redacting import Redactor
from feedback.backends.retrying import RequestFailed, failure_of_status, retry_after_seconds
from feedback.errors import BackendError

__all__ = ["OPENAI_URL", "HttpTransport", "Transport", "needs_proxy", "split_url"]

OPENAI_URL = "https://api.openai.com/v1"
"""Where requests go without a base_url."""


class Transport(Protocol):
    """Carries one request body to an endpoint, once."""

    async def send(self, body: bytes) -> bytes:
        """Return the body of a reply with status 200.

        Raises:
            RequestFailed: anything else happened.
        """
        ...

    async def close(self) -> None:
        """Close the connections."""
        ...


class HttpTransport:
    """Requests over one pool of kept-alive connections; create it inside the event loop.

    Args:
        base_url: up to and including ``/v1``; credentials in it become a header.
        key: sent as a bearer token; None sends none.
        timeout_s: for one request, from its start to the last byte of its reply.
        headers: further request headers.
        redact: passes over every error text.

    Raises:
        BackendError: ``base_url`` is no http or https URL, or a header holds a line break.
    """

    def __init__(
        self,
        base_url: str,
        *,
        key: str | None,
        timeout_s: float,
        headers: dict[str, str] | None = None,
        redact: Redactor,
    ):
        url = split_url(base_url)
        self._redact = redact
        self._timeout_s = timeout_s
        self._path = url.path.rstrip("/")
        self._query = f"?{url.query}" if url.query else ""
        tls = url.scheme == "https"
        host = url.hostname or ""
        self._pool = Pool(
            host, url.port or (443 if tls else 80), tls=tls, connect_s=min(timeout_s, 15.0)
        )
        sent = {
            "Host": url.netloc.rpartition("@")[2],
            "Accept": "application/json",
            "Content-Type": "application/json",
            "User-Agent": "rlaif",
        }
        if key:
            sent["Authorization"] = f"Bearer {key}"
        elif url.username:
            pair = f"{unquote(url.username)}:{unquote(url.password or '')}".encode()
            sent["Authorization"] = f"Basic {base64.b64encode(pair).decode()}"
        self._headers = _header_lines({**sent, **(headers or {})})
        self._chat = self._head("POST", f"{self._path}/chat/completions{self._query}")

    def _head(self, method: str, target: str) -> bytes:
        return f"{method} {target} HTTP/1.1\r\n".encode() + self._headers + b"Content-Length: "

    async def send(self, body: bytes) -> bytes:
        """Post a chat completion.

        Raises:
            RequestFailed: no reply with status 200 came back.
        """
        return await self._exchange(self._chat, body)

    async def ask(self, path: str, body: bytes | None = None, *, at_root: bool = False) -> bytes:
        """Get (or, with a body, post to) another path of the server; probing uses it.

        Args:
            path: under the base URL.
            body: JSON.
            at_root: the path hangs beside ``/v1``, not under it (vLLM's ``/tokenize``).

        Raises:
            RequestFailed: no reply with status 200 came back.
        """
        root = self._path.removesuffix("/v1") if at_root else self._path
        head = self._head("GET" if body is None else "POST", f"{root}/{path}{self._query}")
        return await self._exchange(head, body or b"")

    async def _exchange(self, head: bytes, body: bytes) -> bytes:
        request = b"%b%d\r\n\r\n%b" % (head, len(body), body)
        try:
            reply = await self._pool.exchange(request, timeout_s=self._timeout_s)
        except TimeoutError:
            raise RequestFailed("timed out", kind="timeout") from None
        except (ExchangeBroken, OSError) as error:
            text = str(error) if isinstance(error, ExchangeBroken) else f"no connection: {error}"
            raise RequestFailed(self._redact(text), kind="network") from None
        if reply.status == 200:
            return reply.body
        raise failure_of_status(
            reply.status,
            self._redact(error_message(reply.body)),
            retry_after=retry_after_seconds(reply.headers),
        )

    async def close(self) -> None:
        """Close the pool."""
        await self._pool.close()


def needs_proxy(base_url: str) -> bool:
    """Whether the environment names a proxy for this URL."""
    url = urlsplit(base_url)
    if not url.hostname or urllib.request.proxy_bypass(url.hostname):
        return False
    return url.scheme in urllib.request.getproxies()


def split_url(base_url: str) -> SplitResult:
    """Return the parts of an endpoint's URL.

    Raises:
        BackendError: it is no http(s) URL.
    """
    try:
        url = urlsplit(base_url)
        if url.scheme in ("http", "https") and url.hostname and url.port != 0:
            return url
    except ValueError:
        pass
    # Not quoted: it may hold credentials.
    raise BackendError("base_url is not an http(s) URL such as http://127.0.0.1:8000/v1")


def _header_lines(headers: dict[str, str]) -> bytes:
    for name, value in headers.items():
        if any(character in name + value for character in "\r\n\0"):
            raise BackendError(f"the request header {name!r} holds a line break")
    return "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
