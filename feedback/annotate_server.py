"""The page's server: blind pairs out, answers in.

It listens on this machine only, unless told otherwise, and answers nothing but addresses that begin
with a key drawn at each start, so that neither other web pages nor other people can reach it by
guessing. What it sends of a pair is a drawn name, the prompt and two texts; ids, model names,
verdicts and strata stay here. The page shows texts as text (never as markup), and its policy lets
it load nothing from anywhere else.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec
from aiohttp import web

from feedback.annotate import AnnotateOptions
from feedback.annotate_log import AnnotationLog, Answer, Entry, now
from feedback.annotate_sample import Item, sample_items, text_folder
from feedback.errors import InputError
from feedback.page.components import environment
from feedback.page.text import conversation, visible
from feedback.progress import say
from feedback.records import content_id
from feedback.shards import file_sha256
from feedback.templates import load_rubric

__all__ = ["Sitting", "application", "serve"]

_FOLDER = Path(__file__).parent / "page" / "templates"
_LONGEST_NAME = 60
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_FILES = {"annotate.js": "text/javascript", "annotate.css": "text/css", "page.css": "text/css"}


class _Said(msgspec.Struct, forbid_unknown_fields=True):
    """What the page sends."""

    name: str
    pair: str = ""
    answer: Literal["left", "right", "tie", "skip", ""] = ""


class _Shown(NamedTuple):
    """A pair as one annotator sees it."""

    item: Item
    left: Literal["a", "b"]


class Sitting:
    """What one run of the page knows: pairs, their drawn names, and who has seen what since when.

    Args:
        items: pairs in the order in which they are shown.
        log: where answers go.
        votes: people wanted per pair; 0: everybody.
        seed: of which text stands left.
    """

    def __init__(
        self, items: Sequence[Item], log: AnnotationLog, *, votes: int = 0, seed: int = 0
    ) -> None:
        self.log = log
        self._votes = votes
        self._seed = seed
        # Names drawn anew at each start: ids may tell which model wrote what.
        self._items = {secrets.token_urlsafe(9): item for item in items}
        self._names = {item.key: name for name, item in self._items.items()}
        self._since: dict[tuple[str, str], float] = {}

    def next_pair(self, annotator: str) -> dict[str, Any]:
        """Return the first pair that this person has not answered and that still wants votes."""
        answered = self.log.answers(annotator)
        wanted = [
            name
            for name, item in self._items.items()
            if item.key not in answered
            and (not self._votes or self.log.votes(item.key, but=annotator) < self._votes)
        ]
        # Where votes are limited, what others have finished is not this person's to do.
        mine = sum(key in self._names for key in answered)
        place = {"done": mine, "total": mine + len(wanted), "undo": bool(answered)}
        if not wanted:
            return {**place, "finished": True}
        return {**place, **self._show(wanted[0], annotator)}

    def _show(self, name: str, annotator: str) -> dict[str, Any]:
        item, left = self._shown(name, annotator)
        self._since[annotator, name] = time.monotonic()
        texts = (item.a, item.b) if left == "a" else (item.b, item.a)
        return {
            "pair": name,
            "prompt": visible(conversation(item.prompt)),
            "left": visible(texts[0]),
            "right": visible(texts[1]),
        }

    def _shown(self, name: str, annotator: str) -> _Shown:
        if name not in self._items:
            raise InputError("this pair is not part of the sitting; reload the page")
        item = self._items[name]
        drawn = content_id("side", self._seed, annotator, *item.key)
        return _Shown(item, "a" if int(drawn, 16) % 2 == 0 else "b")

    def answer(self, said: _Said) -> dict[str, Any]:
        """Record an answer and return the next pair; an answer given before is not given twice."""
        item, left = self._shown(said.pair, said.name)
        if not said.answer:
            raise InputError("no answer")
        if item.key not in self.log.answers(said.name):
            self.log.append(self._entry(said, item, left))
        return self.next_pair(said.name)

    def _entry(self, said: _Said, item: Item, left: Literal["a", "b"]) -> Entry:
        right: Literal["a", "b"] = "b" if left == "a" else "a"
        labels: dict[str, Answer] = {"left": left, "right": right, "tie": "tie", "skip": "skip"}
        since = self._since.pop((said.name, said.pair), None)
        return Entry(
            time=now(),
            annotator=said.name,
            prompt_id=item.key[0],
            a=item.key[1],
            b=item.key[2],
            label=labels[said.answer],
            left=left,
            seconds=None if since is None else round(time.monotonic() - since, 2),
        )

    def undo(self, annotator: str) -> dict[str, Any]:
        """Take the person's last answer back and show that pair again."""
        last = self.log.last(annotator)
        if last is None:
            return self.next_pair(annotator)
        self.log.append(msgspec.structs.replace(last, label="undo", time=now(), seconds=None))
        found = self.next_pair(annotator)
        name = self._names.get(last.key)
        if name is None:
            return found
        return {**found, "finished": False, **self._show(name, annotator)}


def application(sitting: Sitting, *, key: str, rubric: str | None = None) -> web.Application:
    """Return the server's routes, all under ``/key/``."""

    async def page(_: web.Request) -> web.Response:
        text = environment().get_template("annotate.html.jinja").render(rubric=rubric)
        return web.Response(text=text, content_type="text/html")

    async def file(request: web.Request) -> web.Response:
        name = request.match_info["file"]
        if name not in _FILES:
            raise web.HTTPNotFound
        text = (_FOLDER / name).read_text(encoding="utf-8")
        return web.Response(text=text, content_type=_FILES[name])

    def told(act: Callable[[_Said], dict[str, Any]]) -> Callable[..., Awaitable[web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            if request.content_type != "application/json":
                raise web.HTTPUnsupportedMediaType
            try:
                said = msgspec.json.decode(await request.read(), type=_Said)
                said.name = _checked_name(said.name)
                return web.json_response(act(said))
            except (msgspec.DecodeError, InputError) as error:
                return web.json_response({"error": str(error)}, status=400)

        return handle

    made = web.Application(client_max_size=2**16, middlewares=[_with_headers])
    made.router.add_get(f"/{key}/", page)
    made.router.add_get(f"/{key}/{{file}}", file)
    made.router.add_post(f"/{key}/next", told(lambda said: sitting.next_pair(said.name)))
    made.router.add_post(f"/{key}/answer", told(sitting.answer))
    made.router.add_post(f"/{key}/undo", told(lambda said: sitting.undo(said.name)))
    return made


@web.middleware
async def _with_headers(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        response = await handler(request)
    except web.HTTPException as error:
        error.headers.update(_HEADERS)
        raise
    response.headers.update(_HEADERS)
    return response


def _checked_name(name: str) -> str:
    """Return who labels, white space collapsed.

    Raises:
        InputError: the name is empty, very long, or has characters that hide others.
    """
    name = " ".join(name.split())
    if not 0 < len(name) <= _LONGEST_NAME:
        raise InputError(f"a name of 1 to {_LONGEST_NAME} characters is needed")
    if visible(name) != name:
        raise InputError("the name holds characters that cannot be seen")
    return name


def serve(options: AnnotateOptions) -> None:
    """Serve the page until interrupted, then say what there is and what to do with it.

    Raises:
        InputError: texts or verdicts are missing, or the address cannot be listened on.
        ShardError: the folder holds gold that was not made here, or another process writes it.
    """
    items = sample_items(options)
    rubric = None if options.rubric is None else load_rubric(options.rubric)
    log = AnnotationLog(options.folder, items)
    try:
        sitting = Sitting(items, log, votes=options.votes, seed=options.seed)
        _say_sample(options, items)
        asyncio.run(_listen(application(sitting, key=_key(), rubric=rubric), options))
    finally:
        texts = text_folder(options)
        log.close(
            candidates=str(texts),
            candidates_sha256=file_sha256(texts) if texts.is_file() else None,
            strata=list(options.strata or ()),
            allocation=options.allocation,
            seed=options.seed,
        )
    _say_end(options, log)


def _key() -> str:
    return secrets.token_urlsafe(12)


async def _listen(app: web.Application, options: AnnotateOptions) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, options.host, options.port)
        try:
            await site.start()
        except OSError as error:
            raise InputError(
                f"cannot listen on {options.host}:{options.port}: {error.strerror}; choose another "
                "--port (0 takes a free one)"
            ) from error
        say(f"label here: {_address(app, runner, options)}")
        say("stop with Ctrl-C; the same command continues")
        await _interrupted()
    finally:
        await runner.cleanup()


def _address(app: web.Application, runner: web.AppRunner, options: AnnotateOptions) -> str:
    port = runner.addresses[0][1]
    host = f"[{options.host}]" if ":" in options.host else options.host
    page = next(iter(app.router.resources())).canonical
    return f"http://{host}:{port}{page}"


async def _interrupted() -> None:
    """Wait for Ctrl-C or a polite kill."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        # Windows has no handlers in its loop; there Ctrl-C ends the loop by itself.
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, stop.set)
    await stop.wait()


def _say_sample(options: AnnotateOptions, items: Sequence[Item]) -> None:
    strata: dict[str, int] = {}
    for item in items:
        strata[item.stratum] = strata.get(item.stratum, 0) + 1
    listed = "; ".join(f"{name}: {count}" for name, count in sorted(strata.items()) if name)
    say(f"{len(items):,} pairs" + (f" ({listed})" if listed else ""))
    if options.allocation == "equal":
        say(
            "strata are drawn in equal numbers: figures over all of this gold speak of that "
            "mixture; each row's meta has the weight that undoes it"
        )


def _say_end(options: AnnotateOptions, log: AnnotationLog) -> None:
    rows = log.gold()
    people = {name for row in rows for name in row.annotators}
    say(f"\n{len(rows):,} gold pairs by {len(people)} people: {options.folder}")
    if rows and options.verdicts is not None:
        say(f"next: rlaif report {options.verdicts} --gold {options.folder}")
        say(
            f"      rlaif calibrate {options.verdicts} --gold {options.folder} "
            f"--out {options.folder.parent / 'calibration.json'}"
        )
