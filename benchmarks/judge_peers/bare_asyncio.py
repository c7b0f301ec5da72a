"""No client at all: raw HTTP/1.1 over asyncio streams, 256 connections. The ceiling."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

from measuring import report

CONNECTIONS = 256


def body(row: dict[str, str]) -> bytes:
    """Return the request that our own client sends for this row."""
    text = f"{row['prompt']}\n\nReply A: {row['a']}\n\nReply B: {row['b']}\n\nA or B?"
    request = {
        "model": "mock",
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 20,
        "messages": [{"role": "user", "content": text}],
    }
    return json.dumps(request).encode()


async def work_through(requests: Iterator[bytes]) -> int:
    """Send requests over one connection until there are none left."""
    url = urlsplit(sys.argv[1])
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    answered = 0
    for request in requests:
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: mock\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
            % (len(request), request)
        )
        head = await reader.readuntil(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        reply = json.loads(await reader.readexactly(size))
        answered += "choices" in reply
    writer.close()
    return answered


async def run(rows: list[dict[str, str]]) -> int:
    """Return the rows that were answered."""
    requests = iter([body(row) for row in rows])
    counts = await asyncio.gather(*(work_through(requests) for _ in range(CONNECTIONS)))
    return sum(counts)


if __name__ == "__main__":
    report(lambda rows: asyncio.run(run(rows)))
