"""A real HTTP proxy that breaks things, in front of a judge endpoint.

Requests go on to the upstream server (vLLM, say), whose answers are remembered by request body, so
that a fault can be tried thousands of times on what the real server said. Without an upstream, a
stand-in answers in the same form with probabilities that follow from the body.

What is broken is a *plan*: a function of the request's number and body that names a fault.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import random
import threading
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from types import TracebackType
from typing import Any, Self

import aiohttp
from aiohttp import web

Plan = Callable[[int, bytes], str | None]
BROKEN_REPLIES = (
    "malformed",
    "no_logprobs",
    "empty_logprobs",
    "nan",
    "null",
    "minus_inf",
    "above_zero",
    "too_much",
    "two_choices",
    "no_choices",
    "empty_text",
    "not_json",
)
LABEL_IDS = {"A": 65, "B": 66, "C": 67}


def share(fault: str, part: float, *, seed: int = 0) -> Plan:
    """Plan: ``fault`` hits a random share of requests; a repeated request is drawn anew."""
    draw = random.Random(seed)
    return lambda number, body: fault if draw.random() < part else None


def first_time(fault: str) -> Plan:
    """Plan: ``fault`` hits every request the first time its body is seen."""
    seen: set[bytes] = set()

    def plan(number: int, body: bytes) -> str | None:
        if body in seen:
            return None
        seen.add(body)
        return fault

    return plan


def rows(fault: str, part: float) -> Plan:
    """Plan: ``fault`` hits a share of bodies, those always."""
    return lambda number, body: fault if _number(body) < part else None


def burst(fault: str, *, first: int, last: int) -> Plan:
    """Plan: ``fault`` hits all requests with a number in [first, last)."""
    return lambda number, body: fault if first <= number < last else None


def _number(body: bytes) -> float:
    return int.from_bytes(hashlib.sha256(body).digest()[:6], "big") / 2**48


class FaultProxy:
    """Runs in a thread of its own; ``with FaultProxy(...) as proxy: proxy.base_url``.

    Args:
        upstream: base URL of the real server, ending in /v1; None: the stand-in answers.
        plan: what to break; may be replaced while running.
        latency_s: time that every chat request takes.
    """

    def __init__(
        self, upstream: str | None = None, *, plan: Plan | None = None, latency_s: float = 0.0
    ):
        self.upstream = upstream
        self.plan = plan
        self.latency_s = latency_s
        self.broken: Counter[str] = Counter()
        self.requests = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.answered: Counter[bytes] = Counter()
        self._remembered: dict[bytes, tuple[int, bytes]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        self.base_url = f"http://127.0.0.1:{port}/v1"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> int:
        application = web.Application(client_max_size=1 << 26)
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024)
        await site.start()
        self._client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=64))
        port: int = self._runner.addresses[0][1]
        return port

    async def _stop(self) -> None:
        await self._client.close()
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        if not request.path.endswith("/chat/completions"):
            status, reply = await self._upstream(request.path, body, request.method)
            return web.Response(status=status, body=reply, content_type="application/json")
        number, self.requests = self.requests, self.requests + 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            if self.latency_s:
                await asyncio.sleep(self.latency_s)
            fault = self.plan(number, body) if self.plan is not None else None
            if fault is not None:
                self.broken[fault] += 1
            return await self._answer(request, body, fault)
        finally:
            self.in_flight -= 1

    async def _answer(
        self, request: web.Request, body: bytes, fault: str | None
    ) -> web.StreamResponse:
        assert request.transport is not None
        if fault is not None and fault.startswith("hang"):
            await asyncio.sleep(float(fault[5:] or 3600))  # hang, or hang_60 for a minute
            fault = None
        if fault == "drop":
            request.transport.abort()
            return web.Response()
        if fault is not None and fault.startswith("status_"):
            return self._status(fault)
        status, reply = await self._upstream(request.path, body, request.method)
        if fault == "half":
            response = web.StreamResponse(headers={"Content-Length": str(len(reply))})
            await response.prepare(request)
            await response.write(reply[: len(reply) // 2])
            request.transport.close()  # after what was written, unlike abort
            return response
        if fault is not None:
            reply = break_reply(reply, fault)
        else:
            self.answered[body] += 1
        return web.Response(status=status, body=reply, content_type="application/json")

    def _status(self, fault: str) -> web.Response:
        """``status_429``, ``status_429_after_0.2``, ``status_429_date_1``, ``status_400`` ..."""
        _, status, *wait = fault.split("_")
        headers = {}
        if wait and wait[0] == "after":
            headers["Retry-After"] = wait[1]
        elif wait:
            # Dates in another year: only the distance between the two may matter.
            headers = {
                "Date": formatdate(86400 * 365, usegmt=True),
                "Retry-After": formatdate(86400 * 365 + float(wait[1]), usegmt=True),
            }
        error = {"error": {"message": f"made to fail with {status}", "code": None}}
        return web.Response(status=int(status), text=json.dumps(error), headers=headers)

    async def _upstream(self, path: str, body: bytes, method: str) -> tuple[int, bytes]:
        if self.upstream is None:
            return stand_in(path, body)
        key = path.encode() + b"\0" + body
        if key not in self._remembered:
            url = self.upstream.removesuffix("/v1") + path
            headers = {"Content-Type": "application/json"}
            async with self._client.request(
                method, url, data=body or None, headers=headers
            ) as response:
                self._remembered[key] = (response.status, await response.read())
        return self._remembered[key]


def break_reply(reply: bytes, fault: str) -> bytes:
    """Return a chat completion with one thing wrong, under status 200."""
    if fault == "malformed":
        return reply[: int(len(reply) * 0.7)]
    if fault == "not_json":
        return b"<html><body>Bad gateway</body></html>"
    chat = json.loads(reply)
    choice = chat["choices"][0]
    if fault == "two_choices":
        chat["choices"] = [choice, {**choice, "index": 1}]
    elif fault == "no_choices":
        chat["choices"] = []
    elif fault == "no_logprobs":
        choice["logprobs"] = None
    elif fault == "empty_logprobs":
        choice["logprobs"] = {"content": []}
    elif fault == "empty_text":
        choice["message"]["content"] = ""
        choice["logprobs"] = None
    else:
        values = {
            "nan": math.nan,
            "null": None,
            "minus_inf": -math.inf,
            "above_zero": 0.5,
            "too_much": -0.01,
        }
        for entry in choice["logprobs"]["content"][0]["top_logprobs"]:
            entry["logprob"] = values[fault]
    return json.dumps(chat).encode()


def stand_in(path: str, body: bytes) -> tuple[int, bytes]:
    """Answer as vLLM does, with label probabilities that follow from the messages."""
    if path.endswith("/models"):
        return 200, b'{"object": "list", "data": [{"id": "stand-in", "object": "model"}]}'
    request = json.loads(body)
    if path.endswith("/tokenize"):
        return 200, json.dumps({"tokens": _stand_in_tokens(request)}).encode()
    text = json.dumps(request["messages"])
    return 200, json.dumps(_stand_in_chat(request, _number(text.encode()))).encode()


def _stand_in_tokens(request: dict[str, Any]) -> list[int]:
    if "prompt" in request:
        return [ord(character) for character in request["prompt"]]
    turns = request["messages"]
    tokens = [ord(character) for character in turns[0]["content"]] + [1]
    if len(turns) > 1:
        tokens += [ord(character) for character in turns[1]["content"]]
    return tokens


def _stand_in_chat(request: dict[str, Any], number: float) -> dict[str, Any]:
    first = 0.02 + 0.9 * number
    tokens = {65: first, 66: 0.95 - first, 67: 0.01}
    named = bool(request.get("return_tokens_as_token_ids"))
    entries = [
        {"token": f"token_id:{token}" if named else chr(token), "logprob": math.log(value)}
        for token, value in sorted(tokens.items(), key=lambda item: -item[1])
    ]
    text = "A" if first > 0.475 else "B"
    if not request.get("logprobs"):
        text = f"Because of this and that. Verdict: {text}"
    if "response_format" in request:
        text = json.dumps({"verdict": text[-1]})
    choice: dict[str, Any] = {
        "message": {"role": "assistant", "content": text},
        "finish_reason": "stop",
        "logprobs": None,
    }
    if request.get("logprobs"):
        choice["logprobs"] = {"content": [{**entries[0], "top_logprobs": entries}]}
    count = request.get("n", 1)
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "model": request["model"],
        "choices": [{**choice, "index": index} for index in range(count)],
        "usage": {
            "prompt_tokens": len(json.dumps(request["messages"])) // 4,
            "completion_tokens": count,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }
