"""The connection pool against a server that behaves in every way a server can."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from feedback.backends.connections import ExchangeBroken, HttpReply, Pool

Behaviour = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    return await reader.readexactly(size)


def exchange(
    behaviour: Behaviour, *, requests: int = 1, timeout_s: float = 5.0, pause_s: float = 0.0
) -> tuple[list[HttpReply | BaseException], int]:
    """Send requests one after the other; return replies or errors, and connections accepted."""

    async def main() -> tuple[list[HttpReply | BaseException], int]:
        connections = 0

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            try:
                await behaviour(reader, writer, connections)
            except (asyncio.IncompleteReadError, ConnectionError):
                pass
            finally:
                writer.close()

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        pool = Pool("127.0.0.1", port, tls=False, connect_s=2.0)
        results: list[HttpReply | BaseException] = []
        for number in range(requests):
            body = b"request %d" % number
            data = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            try:
                results.append(await pool.exchange(data, timeout_s=timeout_s))
            except (ExchangeBroken, OSError) as error:
                results.append(error)
            await asyncio.sleep(pause_s)
        await pool.close()
        server.close()
        await asyncio.sleep(0.01)
        return results, connections

    return asyncio.run(main())


async def polite(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
    while True:
        body = await read_request(reader)
        writer.write(
            b"HTTP/1.1 200 OK\r\nX-A: 1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        )


def test_one_connection_serves_many_requests() -> None:
    replies, connections = exchange(polite, requests=50)
    assert [reply.body for reply in replies] == [b"request %d" % n for n in range(50)]
    assert replies[0].headers == {"x-a": "1", "content-length": "9"}
    assert connections == 1


def test_chunked_in_single_bytes() -> None:
    async def chunked(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        while True:
            await read_request(reader)
            reply = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            reply += b"3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
            for place in range(len(reply)):
                writer.write(reply[place : place + 1])
                await writer.drain()

    replies, connections = exchange(chunked, requests=3)
    assert [reply.body for reply in replies] == [b"abcde"] * 3
    assert connections == 1


def test_interim_replies_are_passed_over() -> None:
    async def interim(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        while True:
            await read_request(reader)
            writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + OK)

    replies, _ = exchange(interim, requests=2)
    assert [(reply.status, reply.body) for reply in replies] == [(200, b"ok")] * 2


def test_body_without_length_ends_with_its_connection() -> None:
    async def endless(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nuntil the end")

    replies, connections = exchange(endless, requests=2)
    assert [reply.body for reply in replies] == [b"until the end"] * 2
    assert connections == 2


def test_connection_close_is_honoured() -> None:
    async def closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await read_request(reader)
        writer.write(OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"))
        await reader.read()

    replies, connections = exchange(closing, requests=3)
    assert [reply.body for reply in replies] == [b"ok"] * 3
    assert connections == 3


def test_kept_connection_that_was_closed_is_replaced_in_silence() -> None:
    """The server hangs up between two requests, as servers do with idle connections."""

    async def one_each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await read_request(reader)
        writer.write(OK)

    replies, connections = exchange(one_each, requests=4, pause_s=0.02)
    assert [reply.body for reply in replies] == [b"ok"] * 4
    assert connections == 4


def test_server_that_takes_a_second_request_and_hangs_up() -> None:
    """Once in silence on a new connection, which is not reused: then it is an error."""

    async def rude(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, n: int) -> None:
        await read_request(reader)
        if n == 1:
            writer.write(OK)
            await read_request(reader)

    (first, second), connections = exchange(rude, requests=2)
    assert isinstance(first, HttpReply)
    assert isinstance(second, ExchangeBroken) and second.unanswered
    assert connections == 2


@pytest.mark.parametrize(
    "sent",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf of it",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nhalf of",
    ],
)
def test_half_a_reply_is_no_reply(sent: bytes) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await read_request(reader)
        writer.write(sent)

    (error,), _ = exchange(half)
    assert isinstance(error, ExchangeBroken) and not error.unanswered
    assert "middle of the reply" in str(error)


def test_what_is_not_http() -> None:
    async def noise(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await read_request(reader)
        writer.write(b"220 smtp.example.com ready\r\n")
        await reader.read()

    (error,), _ = exchange(noise)
    assert isinstance(error, ExchangeBroken) and "not HTTP" in str(error)


def test_deadline_covers_the_whole_reply() -> None:
    """A server that sends a byte now and then does not keep a request alive."""

    async def dripping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while not writer.is_closing():
            writer.write(b".")
            await asyncio.sleep(0.01)

    (error,), _ = exchange(dripping, timeout_s=0.2)
    assert isinstance(error, TimeoutError)


def test_unasked_reply_is_never_taken_for_the_next_one() -> None:
    """Two replies to one request: the second must not answer the second request."""

    async def double(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, _: int) -> None:
        while True:
            body = await read_request(reader)
            reply = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
            writer.write(reply + reply)

    replies, connections = exchange(double, requests=4, pause_s=0.01)
    assert [reply.body for reply in replies] == [b"request %d" % n for n in range(4)]
    assert connections == 4


def test_nobody_listens() -> None:
    async def main() -> None:
        pool = Pool("127.0.0.1", 9, tls=False, connect_s=2.0)
        with pytest.raises(OSError):
            await pool.exchange(b"GET / HTTP/1.1\r\n\r\n", timeout_s=2.0)

    asyncio.run(main())


def test_cancelled_request_takes_its_connection_along() -> None:
    """The late reply of a cancelled request must not reach the next one."""

    async def main() -> tuple[bytes, int]:
        connections = 0
        answer = asyncio.Event()

        async def slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            body = await read_request(reader)
            if connections == 1:
                await answer.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
            writer.close()

        server = await asyncio.start_server(slow, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        pool = Pool("127.0.0.1", port, tls=False, connect_s=2.0)

        def request(body: bytes) -> bytes:
            return b"POST / HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)

        first = asyncio.ensure_future(pool.exchange(request(b"first"), timeout_s=5.0))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        answer.set()
        reply = await pool.exchange(request(b"second"), timeout_s=5.0)
        await pool.close()
        server.close()
        return reply.body, connections

    assert asyncio.run(main()) == (b"second", 2)
