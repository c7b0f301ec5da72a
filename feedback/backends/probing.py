"""Finds out what a chat endpoint can do, by asking it with a handful of tiny requests.

Looked at, in this order: whether it answers and knows the model; which request fields it refuses;
whether it returns log-probabilities, and how many alternatives; whether it returns those of any
named token (vLLM's ``logprob_token_ids``); whether every label is one token there; whether it takes
system turns; whether a JSON schema is followed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import Any, NamedTuple, Protocol, runtime_checkable

import msgspec
import orjson

from feedback.backends import Capabilities, JudgeCall, SampleCall
from feedback.backends.chat_bodies import Bodies, Dialect
from feedback.backends.chat_replies import JudgeReading, read_judge
from feedback.backends.http import Transport
from feedback.backends.retrying import RequestFailed
from feedback.errors import BackendError, nearest
from feedback.records import Message, Usage

__all__ = ["Found", "probe", "served_length"]

_TRIES = 4
"""Tries of a probe against failures that may pass."""
_FEWER = {20: 10, 10: 8, 8: 5, 5: 2}
"""Next number of alternatives to try; hosted APIs allow 20, 8 or 5."""


_VERSION = re.compile(r"/v\d")
_USER = Message(role="user", content="Which?")
_ASK = "Which letter or word comes first in this list? Answer {labels}, nothing else."
_SAY = "Repeat this and nothing else: {label}"
_WITH_SYSTEM = (Message(role="system", content="Answer with one letter."), _USER)
_NO_USAGE = Usage()


class Found(NamedTuple):
    """What an endpoint can do, and how to talk to it."""

    capabilities: Capabilities
    dialect: Dialect


@runtime_checkable
class _Asking(Protocol):
    """A transport that reaches other paths of the server too."""

    async def ask(
        self, path: str, body: bytes | None = None, *, at_root: bool = False
    ) -> bytes: ...


class _Tokens(msgspec.Struct):
    tokens: list[int]


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[_Model]


async def probe(
    transport: Transport,
    bodies: Bodies,
    labels: tuple[str, ...],
    *,
    endpoint: str,
    path: str = "/v1",
) -> Found:
    """Ask the endpoint what it can do.

    Args:
        transport: to the endpoint.
        bodies: its dialect is changed on the way to what the endpoint accepts.
        labels: labels whose log-probabilities will be wanted; empty: text only.
        endpoint: its name in messages.
        path: the path of its base URL, for advice when nothing is found there.

    Raises:
        BackendError: it cannot be reached, does not know the model, gives no log-probabilities, or
            splits a label into several tokens.
    """
    prober = _Prober(transport, bodies, endpoint, path)
    if not labels:
        await prober.ask(_question("Say hello."))
        await prober.check_system_role()
        await prober.check_sampling()
        return prober.found(labels, structured=await prober.follows_schema(("yes", "no")))
    ids = await prober.label_ids(labels)
    await prober.find_logprobs(labels, ids)
    if not bodies.dialect.label_ids:
        await prober.check_single_tokens(labels)
    await prober.check_system_role()
    return prober.found(labels, structured=await prober.follows_schema(labels))


async def served_length(transport: Transport, model: str) -> int | None:
    """Return the longest question and reply of a model in tokens, where its server says so."""
    if not isinstance(transport, _Asking):
        return None
    try:
        served = msgspec.json.decode(await transport.ask("models"), type=_Models).data
    except (RequestFailed, msgspec.DecodeError):
        return None
    return next((entry.max_model_len for entry in served if entry.id == model), None)


def _question(text: str, **fields: Any) -> JudgeCall:
    return JudgeCall(call_id="probe", messages=(Message(role="user", content=text),), **fields)


class _Prober:
    def __init__(self, transport: Transport, bodies: Bodies, endpoint: str, path: str):
        self.transport = transport
        self.bodies = bodies
        self.endpoint = endpoint
        self.path = path
        self.notes: list[str] = []

    async def ask(self, call: JudgeCall) -> JudgeReading:
        """Send one call, adapting the dialect to what the endpoint refuses."""
        failure: RequestFailed | None = None
        waits = 0
        for _ in range(_TRIES + len(dataclasses.fields(Dialect)) + len(_FEWER)):
            ids = self.bodies.token_ids(call.choices)
            try:
                return read_judge(await self.transport.send(self.bodies.judge(call)), call, ids)
            except RequestFailed as error:
                if error.kind == "invalid" and call.choices is None:
                    return JudgeReading("", None, None, _NO_USAGE)  # it answers; that is enough
                failure = error
                if error.transient:
                    waits += 1
                    if waits >= _TRIES:
                        break
                    await asyncio.sleep(min(error.retry_after or 0.1 * 4**waits, 30.0))
                elif not self._adapt(str(error)):
                    break
        assert failure is not None
        raise await self._explain(failure)

    def _adapt(self, refusal: str) -> bool:
        """Drop or rename the field that a refusal names; False if it names none of ours."""
        dialect = self.bodies.dialect
        text = refusal.lower()
        if "max_completion_tokens" in text and dialect.max_tokens_field == "max_tokens":
            changed = dataclasses.replace(dialect, max_tokens_field="max_completion_tokens")
        elif "top_logprobs" in text and dialect.top_logprobs in _FEWER:
            changed = dataclasses.replace(dialect, top_logprobs=_FEWER[dialect.top_logprobs])
        elif "logprob_token_ids" in text and dialect.label_ids:
            changed = dataclasses.replace(dialect, label_ids={})
        elif "temperature" in text and dialect.temperature:
            changed = dataclasses.replace(dialect, temperature=False)
            self.notes.append("ignores temperature")
        elif "seed" in text and dialect.seed:
            changed = dataclasses.replace(dialect, seed=False)
            self.notes.append("takes no seed")
        else:
            return False
        self.bodies.dialect = changed
        return True

    async def _explain(self, failure: RequestFailed) -> BackendError:
        """Turn a probe's last failure into one line that says what to do."""
        where = f"{self.endpoint}: {failure}"
        if failure.status in (401, 403):
            return BackendError(f"{where}. Check the key in the environment (api_key_env)")
        if failure.status == 404:
            names = await self._models()
            known = f"; it serves {', '.join(names[:5])}" if names else ""
            close = nearest(self.bodies.model, names)
            model = f"o model {self.bodies.model!r} there{close}{known}"
            if _VERSION.search(self.path) is None:
                return BackendError(
                    f"{where}. base_url lacks /v1, under which such servers answer; or n{model}"
                )
            return BackendError(f"{where}. N{model}; or base_url is another server's")
        if failure.kind in ("network", "timeout"):
            return BackendError(f"{where}. Is the server running, and is base_url right?")
        return BackendError(where)

    async def _models(self) -> list[str]:
        if not isinstance(self.transport, _Asking):
            return []
        try:
            raw = await self.transport.ask("models")
            return [model.id for model in msgspec.json.decode(raw, type=_Models).data]
        except (RequestFailed, msgspec.DecodeError):
            return []

    async def label_ids(self, labels: tuple[str, ...]) -> dict[str, int]:
        """Return each label's token id where the server tokenises for us (vLLM), else nothing.

        Raises:
            BackendError: a label is several tokens.
        """
        if not isinstance(self.transport, _Asking):
            return {}
        start = await self._tokens(messages=[_USER], add_generation_prompt=True)
        if start is None:
            return {}
        found: dict[str, int] = {}
        for label in labels:
            # In context: the token that continues the opened reply, which a template's last
            # characters may merge with. Templates that cannot be continued: the label alone.
            whole = await self._tokens(
                messages=[_USER, {"role": "assistant", "content": label}],
                add_generation_prompt=False,
                continue_final_message=True,
            )
            if whole is None or whole[: len(start)] != start:
                whole = await self._tokens(prompt=label, add_special_tokens=False)
                tokens = whole or []
            else:
                tokens = whole[len(start) :]
            if len(tokens) != 1:
                raise BackendError(
                    f"label {label!r} is {len(tokens)} tokens for {self.bodies.model} at "
                    f"{self.endpoint}; a verdict is read from one: use a template with other labels"
                )
            found[label] = tokens[0]
        if len(set(found.values())) < len(found):
            raise BackendError(f"two of the labels {', '.join(labels)} are the same token")
        return found

    async def _tokens(self, **fields: Any) -> list[int] | None:
        assert isinstance(self.transport, _Asking)
        body = orjson.dumps({"model": self.bodies.model, **fields})
        try:
            raw = await self.transport.ask("tokenize", body, at_root=True)
            return msgspec.json.decode(raw, type=_Tokens).tokens
        except (RequestFailed, msgspec.DecodeError):
            return None

    async def find_logprobs(self, labels: tuple[str, ...], ids: dict[str, int]) -> None:
        """Settle how log-probabilities are asked for.

        Raises:
            BackendError: there is no way to get them.
        """
        call = _question(_ASK.format(labels=" or ".join(labels)), choices=labels, max_tokens=1)
        if ids:
            plain = self.bodies.dialect
            self.bodies.dialect = dataclasses.replace(plain, label_ids=ids)
            try:
                reading = await self.ask(call)
            except BackendError:
                reading = None
            if (
                reading is not None
                and self.bodies.dialect.label_ids
                and set(reading.choice_logprobs or {}) == set(labels)
            ):
                return
            self.bodies.dialect = dataclasses.replace(self.bodies.dialect, label_ids={})
        try:
            await self.ask(call)
        except BackendError as error:
            if "no log-probabilities" in str(error) or "logprobs" in str(error):
                raise BackendError(
                    f"{self.endpoint} returns no log-probabilities for {self.bodies.model}: use a "
                    "template of mode rationale or structured, or another endpoint "
                    f"({error})"
                ) from None
            raise

    async def check_single_tokens(self, labels: tuple[str, ...]) -> None:
        """Look for labels that the endpoint's tokenizer splits, by having each one said.

        Raises:
            BackendError: one is split: the first token is a piece of it.
        """
        unseen = []
        for label in labels:
            call = _question(_SAY.format(label=label), choices=(label,), max_tokens=2)
            reading = await self.ask(call)
            if label in (reading.choice_logprobs or {}):
                continue
            said = reading.text.strip()
            if said.startswith(label) or label.startswith(said or "\0"):
                raise BackendError(
                    f"label {label!r} is not a single token for {self.bodies.model} at "
                    f"{self.endpoint}; a verdict is read from one: use a template with other labels"
                )
            unseen.append(label)
        if unseen:
            self.notes.append(f"label tokens not confirmed: {', '.join(unseen)}")

    async def check_system_role(self) -> None:
        """Look whether a system turn is refused; what a template says in one is then merged."""
        call = JudgeCall(call_id="probe", messages=_WITH_SYSTEM)
        plain = self.bodies.dialect
        try:
            await self.ask(call)
        except BackendError:
            self.bodies.dialect = dataclasses.replace(plain, system_role=False)
            try:
                await self.ask(call)
            except BackendError:  # something else is wrong, which each call will say for itself
                self.bodies.dialect = plain
            else:
                self.notes.append("takes no system role: its text goes to the user's turn")

    async def check_sampling(self) -> None:
        """Look whether completions may be asked for with their tokens' log-probabilities."""
        call = SampleCall(call_id="probe", messages=(_USER,), max_tokens=1)
        try:
            await self.transport.send(self.bodies.sample(call))
        except RequestFailed as failure:
            if not failure.transient and "logprobs" in str(failure).lower():
                self.bodies.dialect = dataclasses.replace(
                    self.bodies.dialect, sample_logprobs=False
                )
                self.notes.append("gives no log-probabilities of completions")

    async def follows_schema(self, labels: tuple[str, ...]) -> bool:
        """Return whether a JSON schema shapes the reply."""
        schema = {
            "type": "object",
            "properties": {"verdict": {"type": "string", "enum": list(labels)}},
            "required": ["verdict"],
            "additionalProperties": False,
        }
        call = _question(_ASK.format(labels=" or ".join(labels)), max_tokens=64, schema=schema)
        try:
            raw = await self.transport.send(self.bodies.judge(call))
            text = read_judge(raw, call, None).text
        except RequestFailed:
            return False
        # Schemas allow white space between tokens, and a weak model may fill its reply with it: the
        # beginning of a fitting object is as good as the whole.
        compact = "".join(text.split())
        fitting = [f'{{"verdict":"{label}"}}' for label in labels]
        return len(compact) > 2 and any(whole.startswith(compact) for whole in fitting)

    def found(self, labels: tuple[str, ...], *, structured: bool) -> Found:
        """Sum up."""
        dialect = self.bodies.dialect
        exact = bool(dialect.label_ids)
        ways = []
        if labels:
            ways.append(
                "log-probabilities of any label"
                if exact
                else f"log-probabilities of the {dialect.top_logprobs} likeliest tokens"
            )
        ways.append("structured output" if structured else "no structured output")
        return Found(
            Capabilities(
                logprobs=bool(labels),
                max_logprobs=None if exact or not labels else dialect.top_logprobs,
                structured_output=structured,
                note=f"{self.bodies.model} at {self.endpoint}: " + ", ".join(ways + self.notes),
            ),
            dialect,
        )
