"""A chat endpoint that answers every request after a fixed time, for measuring clients.

It speaks enough HTTP/1.1 and chat completions for every client that is compared, costs about 20 us
of processor time per request, and counts what it saw. Pin it to a core of its own:

    taskset -c 1 python benchmarks/judge_server.py --port 8177 --latency-ms 50

``GET /stats`` returns and resets the counts. A request whose text holds ``--reject`` gets HTTP 400:
a bad row stays bad however often it is sent, as it does at a real provider.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import time

import orjson

COUNTED = ("requests", "rejected", "most_in_flight")
_LENGTH = re.compile(rb"content-length:\s*(\d+)", re.IGNORECASE)
_LOGPROBS = re.compile(rb'"logprobs":\s*true')


class _Endpoint:
    """The counts and the prepared replies."""

    def __init__(self, latency_s: float, answer: str, reject: bytes):
        self.latency_s = latency_s
        self.reject = reject
        self.in_flight = 0
        self.reset()
        self.plain = _chat(answer, logprobs=False)
        self.with_logprobs = _chat(answer, logprobs=True)
        self.bad = _response(
            b"400 Bad Request",
            orjson.dumps(
                {"error": {"message": "this row is bad", "type": "invalid_request_error"}}
            ),
        )
        self.models = _response(
            b"200 OK",
            orjson.dumps({"object": "list", "data": [{"id": "mock", "object": "model"}]}),
        )

    def reset(self) -> None:
        self.requests = self.rejected = self.most_in_flight = 0

    def stats(self) -> bytes:
        counts = {name: getattr(self, name) for name in COUNTED}
        self.reset()
        return _response(b"200 OK", orjson.dumps(counts))


def _chat(answer: str, *, logprobs: bool) -> bytes:
    tops = [
        {"token": token, "logprob": logprob, "bytes": None}
        for token, logprob in ((answer[-1:], -0.105), ("B" if answer[-1:] != "B" else "A", -2.4))
    ]
    position = {**tops[0], "token": answer[-1:], "top_logprobs": tops}
    reply = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "mock",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer},
                "finish_reason": "stop",
                "logprobs": {"content": [position]} if logprobs else None,
            }
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101},
    }
    return _response(b"200 OK", orjson.dumps(reply))


def _response(status: bytes, body: bytes) -> bytes:
    return (
        b"HTTP/1.1 %b\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
        b"Connection: keep-alive\r\n\r\n%b" % (status, len(body), body)
    )


class _Connection(asyncio.Protocol):
    """One client connection; requests on it are answered in order."""

    def __init__(self, endpoint: _Endpoint, loop: asyncio.AbstractEventLoop):
        self.endpoint = endpoint
        self.loop = loop
        self.buffer = b""
        self.transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while True:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end]
            found = _LENGTH.search(head)
            size = end + 4 + (int(found[1]) if found else 0)
            if len(self.buffer) < size:
                if b"100-continue" in head.lower():
                    self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
                return
            body, self.buffer = self.buffer[end + 4 : size], self.buffer[size:]
            self.answer(head, body)

    def answer(self, head: bytes, body: bytes) -> None:
        endpoint = self.endpoint
        if head.startswith(b"GET /stats"):
            self.transport.write(endpoint.stats())
            return
        if head.startswith(b"GET"):
            self.transport.write(endpoint.models)
            return
        endpoint.requests += 1
        endpoint.in_flight += 1
        endpoint.most_in_flight = max(endpoint.most_in_flight, endpoint.in_flight)
        if endpoint.reject in body:
            endpoint.rejected += 1
            reply = endpoint.bad
        else:
            reply = endpoint.with_logprobs if _LOGPROBS.search(body) else endpoint.plain
        if endpoint.latency_s:
            self.loop.call_later(endpoint.latency_s, self.send, reply)
        else:
            self.send(reply)

    def send(self, reply: bytes) -> None:
        self.endpoint.in_flight -= 1
        if not self.transport.is_closing():
            self.transport.write(reply)


async def _main(options: argparse.Namespace) -> None:
    loop = asyncio.get_running_loop()
    endpoint = _Endpoint(options.latency_ms / 1000, options.answer, options.reject.encode())
    server = await loop.create_server(
        lambda: _Connection(endpoint, loop), "127.0.0.1", options.port, backlog=4096
    )
    print(f"ready on {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--latency-ms", type=float, default=50.0)
    parser.add_argument("--answer", default="A")
    parser.add_argument("--reject", default="[reject this row]")
    try:
        import uvloop

        uvloop.run(_main(parser.parse_args()))
    except KeyboardInterrupt:
        pass
