"""Bodies of chat-completion requests, as bytes, and the dialect that an endpoint speaks.

What does not change between calls is serialised once; a call adds its messages and its seed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

from feedback.backends import JudgeCall, SampleCall
from feedback.backends.turns import merge_system

__all__ = ["Bodies", "Dialect"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """Which of the optional request fields an endpoint understands."""

    max_tokens_field: str = "max_tokens"
    """Newer hosted models want ``max_completion_tokens``."""
    temperature: bool = True
    seed: bool = True
    top_logprobs: int = 20
    """Alternatives per position to ask for; 0: the endpoint gives no log-probabilities."""
    sample_logprobs: bool = True
    """Whether completions may be asked for with the log-probabilities of their tokens."""
    system_role: bool = True
    """Whether system turns are taken; else their text goes to the head of the first user turn."""
    label_ids: dict[str, int] = field(default_factory=dict)
    """Token id of each label, where the endpoint returns any named token's log-probability
    (vLLM's ``logprob_token_ids``); empty elsewhere."""


class Bodies:
    """Builds request bodies for one model on one endpoint.

    Args:
        model: name that the endpoint knows.
        dialect: replaceable as the endpoint becomes known.
        extra: further fields of every body, as the user gave them.
    """

    def __init__(self, model: str, *, dialect: Dialect, extra: dict[str, Any] | None = None):
        self.model = model
        self._extra = dict(extra or {})
        self._heads: dict[Any, bytes] = {}
        self._dialect = dialect

    @property
    def dialect(self) -> Dialect:
        """The fields in use."""
        return self._dialect

    @dialect.setter
    def dialect(self, dialect: Dialect) -> None:
        self._dialect = dialect
        self._heads.clear()

    def token_ids(self, choices: tuple[str, ...] | None) -> dict[str, int] | None:
        """Return the labels' token ids if the reply will name tokens by id, else None."""
        ids = self._dialect.label_ids
        if not choices or not all(label in ids for label in choices):
            return None
        return {label: ids[label] for label in choices}

    def judge(self, call: JudgeCall) -> bytes:
        """Return the body of a judge call.

        Raises:
            ValueError: a message holds text that is not valid Unicode.
        """
        schema = call.schema and orjson.dumps(call.schema)
        key = (call.choices, call.max_tokens, call.temperature, schema)
        head = self._heads.get(key)
        if head is None:
            head = self._heads[key] = self._head(self._judge_fields(call))
        return self._join(head, call.messages, call.seed)

    def sample(self, call: SampleCall, *, n: int | None = None, seed: int | None = None) -> bytes:
        """Return the body of a sample call; ``n`` and ``seed`` replace the call's own.

        Raises:
            ValueError: a message holds text that is not valid Unicode.
        """
        fields: dict[str, Any] = {
            "n": call.n if n is None else n,
            self._dialect.max_tokens_field: call.max_tokens,
            "top_p": call.top_p,
        }
        if self._dialect.temperature:
            fields["temperature"] = call.temperature
        if self._dialect.sample_logprobs:
            fields["logprobs"] = True
        key = tuple(fields.items())
        head = self._heads.get(key)
        if head is None:
            head = self._heads[key] = self._head(fields)
        return self._join(head, call.messages, call.seed if seed is None else seed)

    def _judge_fields(self, call: JudgeCall) -> dict[str, Any]:
        dialect = self._dialect
        fields: dict[str, Any] = {dialect.max_tokens_field: call.max_tokens}
        if dialect.temperature:
            fields["temperature"] = call.temperature
        if call.choices is not None:
            fields["logprobs"] = True
            ids = self.token_ids(call.choices)
            if ids is None:
                fields["top_logprobs"] = dialect.top_logprobs
            else:
                fields["logprob_token_ids"] = list(ids.values())
                fields["return_tokens_as_token_ids"] = True
        if call.schema is not None:
            fields["response_format"] = {
                "type": "json_schema",
                "json_schema": {"name": "verdict", "strict": True, "schema": call.schema},
            }
        return fields

    def _head(self, fields: dict[str, Any]) -> bytes:
        whole = orjson.dumps({"model": self.model, **fields, **self._extra})
        return whole[:-1] + b',"messages":'

    def _join(self, head: bytes, messages: tuple[Any, ...], seed: int | None) -> bytes:
        turns = messages if self._dialect.system_role else merge_system(messages)
        try:
            text = orjson.dumps(turns)
        except TypeError as error:
            raise ValueError(f"the messages cannot be sent as JSON: {error}") from None
        if seed is None or not self._dialect.seed:
            return b"%b%b}" % (head, text)
        return b'%b%b,"seed":%d}' % (head, text, seed)
