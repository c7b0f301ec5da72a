"""A local server that speaks the files and batches routes of the Batch API.

A batch is answered by a runner: ``vllm run-batch``, the real thing, in a process of its own, or a
stand-in that answers at once.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aiohttp import web
from fault_proxy import stand_in

Runner = Callable[[Path, Path], None]
"""Reads the request file, writes the output file."""


def vllm_run_batch(model: Path, name: str) -> Runner:
    """Return a runner that is vLLM's own."""

    def run(requests: Path, output: Path) -> None:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch"]
        command += ["-i", str(requests), "-o", str(output), "--model", str(model)]
        command += ["--served-model-name", name, "--enforce-eager", "--dtype", "float32"]
        command += ["--max-model-len", "4096", "--max-logprobs", "20"]
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise RuntimeError(done.stderr[-4000:])

    return run


def answer_at_once(requests: Path, output: Path) -> None:
    """Answer every request as the stand-in judge does."""
    with output.open("w") as file:
        for number, line in enumerate(requests.read_text().splitlines()):
            request = json.loads(line)
            status, body = stand_in(request["url"], json.dumps(request["body"]).encode())
            response = {"status_code": status, "request_id": f"r{number}", "body": json.loads(body)}
            row = {"id": f"b{number}", "custom_id": request["custom_id"], "response": response}
            file.write(json.dumps({**row, "error": None}) + "\n")


class BatchServer:
    """``with BatchServer(folder, runner) as server: server.base_url``.

    Args:
        folder: for uploaded and produced files.
        runner: answers batches.
    """

    def __init__(self, folder: Path, runner: Runner = answer_at_once):
        self.folder = folder
        self.runner = runner
        self.batches: dict[str, dict[str, Any]] = {}
        self.looks_until_done = 0
        self.refusal: dict[str, Any] | None = None
        """Validation error that the next batch fails with."""
        self.lose_next: str = ""
        """Method and path whose next reply is lost after the work was done."""
        self.problems: list[BaseException] = []
        self.headers: list[Mapping[str, str]] = []
        """Of every upload and of every batch created."""
        self._numbers = itertools.count(1)
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
        asyncio.run_coroutine_threadsafe(self._runner.cleanup(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def files(self) -> int:
        """Request files uploaded."""
        return len(list(self.folder.glob("file-*")))

    async def _start(self) -> int:
        application = web.Application(client_max_size=1 << 28)
        application.add_routes(
            [
                web.post("/v1/files", self._upload),
                web.get("/v1/files/{id}/content", self._content),
                web.post("/v1/batches", self._create),
                web.get("/v1/batches", self._list),
                web.get("/v1/batches/{id}", self._look),
            ]
        )
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        port: int = self._runner.addresses[0][1]
        return port

    def _reply(self, request: web.Request, value: Any) -> web.Response:
        if self.lose_next == f"{request.method} {request.path}":
            self.lose_next = ""
            assert request.transport is not None
            request.transport.abort()
        return web.json_response(value)

    async def _upload(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers)
        form = await request.post()
        name = f"file-{next(self._numbers)}"
        upload = form["file"]
        assert isinstance(upload, web.FileField) and form["purpose"] == "batch"
        (self.folder / name).write_bytes(upload.file.read())
        row = {"id": name, "object": "file", "purpose": "batch", "filename": upload.filename}
        return self._reply(request, {**row, "bytes": 1, "created_at": 1, "status": "processed"})

    async def _content(self, request: web.Request) -> web.StreamResponse:
        return web.FileResponse(self.folder / request.match_info["id"])

    async def _create(self, request: web.Request) -> web.Response:
        self.headers.append(request.headers)
        wanted = await request.json()
        name = f"batch_{next(self._numbers)}"
        batch = {
            "id": name,
            "object": "batch",
            "created_at": 1,
            "status": "validating",
            "looks": 0,
            **wanted,
        }
        self.batches[name] = batch
        if self.refusal is not None:
            batch |= {"status": "failed", "errors": {"object": "list", "data": [self.refusal]}}
            self.refusal = None
        else:
            batch["work"] = self._loop.run_in_executor(None, self._answer, batch)
        return self._reply(request, _public(batch))

    def _answer(self, batch: dict[str, Any]) -> None:
        output = f"output-{batch['id']}"
        try:
            self.runner(self.folder / batch["input_file_id"], self.folder / output)
        except BaseException as error:
            self.problems.append(error)
            raise
        batch["output_file_id"] = output

    async def _look(self, request: web.Request) -> web.Response:
        batch = self.batches[request.match_info["id"]]
        batch["looks"] += 1
        if batch["status"] in ("validating", "in_progress"):
            done = batch["work"].done() and batch["looks"] > self.looks_until_done
            batch["status"] = "completed" if done else "in_progress"
            if done and batch["work"].exception() is not None:
                batch["status"] = "expired"
        return self._reply(request, _public(batch))

    async def _list(self, request: web.Request) -> web.Response:
        rows = [_public(batch) for batch in reversed(self.batches.values())]
        return self._reply(request, {"object": "list", "data": rows, "has_more": False})


def _public(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in ("work", "looks")}
