"""A pool of kept-alive HTTP/1.1 connections to one host, for many small requests.

asyncio carries the bytes and does TLS, llhttp (through ``httptools``) parses the replies; between
them is only what a judge needs: one request at a time per connection, a deadline, and an exact word
for how an exchange broke. General clients spend several times more processor time per request,
which is what limits them on a fast server (``benchmarks/judge_client.py`` compares).
"""

from __future__ import annotations

import asyncio
import ssl
from typing import Any, NamedTuple

import httptools

__all__ = ["ExchangeBroken", "HttpReply", "Pool"]

_LONGEST_BODY = 64 << 20
_FRAMING = (b"content-length", b"transfer-encoding")


class ExchangeBroken(Exception):
    """No whole reply came. ``unanswered``: not one byte of it did."""

    def __init__(self, message: str, *, unanswered: bool = False):
        super().__init__(message)
        self.unanswered = unanswered


class HttpReply(NamedTuple):
    """One reply. Header names are lower case."""

    status: int
    headers: dict[str, str]
    body: bytes


class _Connection(asyncio.Protocol):
    """One connection; also the callbacks that httptools calls while it parses."""

    def __init__(self, pool: Pool):
        self._pool = pool
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._waiting: asyncio.Future[HttpReply] | None = None
        self._headers: list[tuple[bytes, bytes]] = []
        self._parts: list[bytes] = []
        self._size = 0
        self._framed = False
        self._in_body = False
        self._answered = False
        self.used = False
        self.closed = False

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if self._waiting is None:
            self.abort()  # nobody asked: whatever this is, it is not the next reply
            return
        self._answered = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self.fail(ExchangeBroken(f"the reply is not HTTP: {error}"))

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._pool.drop(self)
        if self._in_body and not self._framed and error is None:
            self._complete(keep=False)  # a body without length ends with its connection
        elif self._answered:
            self.fail(ExchangeBroken("the connection closed in the middle of the reply"))
        else:
            detail = f": {error}" if error else ""
            self.fail(ExchangeBroken(f"the connection closed unanswered{detail}", unanswered=True))

    # httptools' side

    def on_message_begin(self) -> None:
        if self._waiting is None:
            self.abort()  # more than was asked for: it must not pass for the next reply
        self._headers.clear()
        self._parts.clear()
        self._size = 0
        self._framed = self._in_body = False

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._headers.append((name, value))
        if name in _FRAMING:
            self._framed = True

    def on_headers_complete(self) -> None:
        self._in_body = True

    def on_body(self, body: bytes) -> None:
        self._size += len(body)
        if self._size > _LONGEST_BODY:
            self.fail(ExchangeBroken(f"the reply is longer than {_LONGEST_BODY >> 20} MiB"))
            return
        self._parts.append(body)

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:  # 1xx come before the reply proper
            self._complete(keep=self._parser.should_keep_alive())

    # the pool's side

    def exchange(self, data: bytes) -> asyncio.Future[HttpReply]:
        """Send a request; the future gets its reply."""
        assert self._waiting is None and self._transport is not None
        self._answered = self._in_body = False
        self._waiting = waiting = self._pool.loop.create_future()
        self._transport.write(data)
        return waiting

    def _complete(self, *, keep: bool) -> None:
        waiting, self._waiting = self._waiting, None
        self._in_body = False
        if waiting is None or waiting.done():
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in self._headers}
        body = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        waiting.set_result(HttpReply(self._parser.get_status_code(), headers, body))
        self.used = True
        if keep:
            self._pool.give_back(self)
        else:
            self.abort()

    def fail(self, error: Exception) -> None:
        """End the exchange under way, and the connection."""
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        self.closed = True
        if self._transport is not None:
            self._transport.abort()


class Pool:
    """Connections to one host; create it inside the event loop.

    Args:
        host: name or address.
        port: of the server.
        tls: whether to speak TLS; the system's certificates decide.
        connect_s: longest time for a connection to be set up.
    """

    def __init__(self, host: str, port: int, *, tls: bool, connect_s: float):
        self.loop = asyncio.get_running_loop()
        self._address: dict[str, Any] = {"host": host, "port": port}
        if tls:
            self._address |= {"ssl": ssl.create_default_context(), "server_hostname": host}
        self._connect_s = connect_s
        # Last in, first out: the connection used last is the least likely to have been closed.
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def exchange(self, data: bytes, *, timeout_s: float) -> HttpReply:
        """Send one request and return its reply.

        A kept connection that turns out to be closed, which a server may do at any time, is
        replaced once without a word; every other fault is the caller's to judge.

        Raises:
            TimeoutError: no whole reply within ``timeout_s``.
            ExchangeBroken: the connection or the reply broke.
            OSError: no connection came about.
        """
        connection = await self._take(timeout_s)
        kept = connection.used
        try:
            return await self._exchange_on(connection, data, timeout_s)
        except ExchangeBroken as error:
            if not (kept and error.unanswered):
                raise
        return await self._exchange_on(await self._connect(timeout_s), data, timeout_s)

    async def _exchange_on(
        self, connection: _Connection, data: bytes, timeout_s: float
    ) -> HttpReply:
        waiting = connection.exchange(data)
        timer = self.loop.call_later(timeout_s, connection.fail, TimeoutError())
        try:
            return await waiting
        except asyncio.CancelledError:
            connection.abort()  # its reply would be taken for that of the next request
            raise
        finally:
            timer.cancel()

    async def _take(self, timeout_s: float) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if not connection.closed:
                return connection
        return await self._connect(timeout_s)

    async def _connect(self, timeout_s: float) -> _Connection:
        async with asyncio.timeout(min(self._connect_s, timeout_s)):
            _, connection = await self.loop.create_connection(
                lambda: _Connection(self), **self._address
            )
        self._open.add(connection)
        return connection

    def give_back(self, connection: _Connection) -> None:
        """Keep a connection for the next request."""
        self._idle.append(connection)

    def drop(self, connection: _Connection) -> None:
        """Forget a connection that closed."""
        self._open.discard(connection)

    async def close(self) -> None:
        """Close every connection."""
        for connection in tuple(self._open):
            connection.abort()
        self._idle.clear()
        await asyncio.sleep(0)  # one turn of the loop, in which the sockets close
