"""Reads chat-completion replies, and refuses every one that could turn into an invented verdict.

Only the fields that are needed are parsed. A reply with the wrong number of choices, without the
log-probabilities that were asked for, with one that is NaN, infinite or above zero, or with
probabilities that add up to more than one is an invalid reply: it is asked again, and in the end
it is a failed call, never a label.

Which tokens count as a label: where tokens are named by id, exactly the label's token. Elsewhere
the tokens whose text is the label once white space around it is stripped (``A`` and `` A`` begin
the same answer), added up; upper and lower case stay different.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Annotated, NamedTuple

import msgspec

from feedback.backends import JudgeCall, SampleCall
from feedback.backends.retrying import RequestFailed
from feedback.records import Usage

__all__ = ["JudgeReading", "SampleReading", "error_message", "read_judge", "read_sample"]

UNLIKELY = -9999.0
"""What OpenAI and vLLM report for a token too unlikely to have a number."""
_EXCESS = 1e-3
"""Rounding allowed above probability one."""
_REFUSED = ("content_filter", "refusal")


class _Alternative(msgspec.Struct):
    token: str
    logprob: float


class _Position(msgspec.Struct):
    token: str
    logprob: float
    top_logprobs: list[_Alternative] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Position] | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    refusal: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    index: int = 0
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Cached(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: Annotated[int, msgspec.Meta(ge=0)] = 0
    completion_tokens: int | None = None
    prompt_tokens_details: _Cached | None = None


class _Chat(msgspec.Struct):
    choices: list[_Choice]
    usage: _Usage | None = None


class _UsageAlone(msgspec.Struct):
    usage: _Usage | None = None


class _ErrorBody(msgspec.Struct):
    message: str | None = None
    code: str | int | None = None
    type: str | None = None


class _ErrorReply(msgspec.Struct):
    error: _ErrorBody | str | None = None
    message: str | None = None
    detail: str | None = None


_chat = msgspec.json.Decoder(_Chat)
_usage_alone = msgspec.json.Decoder(_UsageAlone)
_error = msgspec.json.Decoder(_ErrorReply)


class JudgeReading(NamedTuple):
    """What a reply to a judge call says."""

    text: str
    finish_reason: str | None
    choice_logprobs: dict[str, float] | None
    usage: Usage


class SampleReading(NamedTuple):
    """What a reply to a sample call says; parallel tuples, one entry per completion."""

    texts: tuple[str, ...]
    finish_reasons: tuple[str | None, ...]
    logps: tuple[float | None, ...]
    usage: Usage


def read_judge(raw: bytes, call: JudgeCall, ids: Mapping[str, int] | None) -> JudgeReading:
    """Read the reply to a judge call.

    Args:
        raw: the body of a reply with status 200.
        call: what was asked.
        ids: token id of each label, where tokens were asked for by id.

    Raises:
        RequestFailed: the reply is invalid; of kind ``invalid``, so it may be asked again, and with
            the tokens that it was billed for.
    """
    chat = _decode(raw)
    with _billed(chat):
        return _judge_reading(chat, call, ids)


def _judge_reading(chat: _Chat, call: JudgeCall, ids: Mapping[str, int] | None) -> JudgeReading:
    if len(chat.choices) != 1:
        raise _invalid(f"{len(chat.choices)} choices instead of 1")
    choice = chat.choices[0]
    reason = choice.finish_reason
    text = choice.message.content or ""
    usage = _usage(chat.usage)
    if choice.message.refusal:
        return JudgeReading(choice.message.refusal, "content_filter", None, usage)
    if reason in _REFUSED:
        return JudgeReading(text, "content_filter", None, usage)
    if call.choices is None:
        if not text and reason != "length":
            raise _invalid("the text is empty")
        return JudgeReading(text, reason, None, usage)
    positions = choice.logprobs.content if choice.logprobs is not None else None
    if not positions:
        raise _invalid("no log-probabilities")
    return JudgeReading(text, reason, _label_logprobs(positions[0], call.choices, ids), usage)


def read_sample(raw: bytes, call: SampleCall, *, n: int | None = None) -> SampleReading:
    """Read the reply to a sample call for ``n`` completions (the call's own number if None).

    Raises:
        RequestFailed: as ``read_judge``.
    """
    chat = _decode(raw)
    with _billed(chat):
        return _sample_reading(chat, call.n if n is None else n)


def _sample_reading(chat: _Chat, wanted: int) -> SampleReading:
    choices = sorted(chat.choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(wanted)):
        raise _invalid(f"{len(choices)} choices instead of {wanted}")
    return SampleReading(
        texts=tuple(choice.message.content or "" for choice in choices),
        finish_reasons=tuple(choice.finish_reason for choice in choices),
        logps=tuple(_sum_logprobs(choice.logprobs) for choice in choices),
        usage=_usage(chat.usage),
    )


def error_message(raw: bytes) -> str:
    """Return what an error reply says, as text of unknown content: redact it before use."""
    try:
        reply = _error.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return raw[:400].decode("utf-8", errors="replace")
    if isinstance(reply.error, _ErrorBody):
        parts = (reply.error.message, str(reply.error.code or ""))
        return " ".join(part for part in parts if part)
    return reply.error or reply.message or reply.detail or ""


def _decode(raw: bytes) -> _Chat:
    try:
        return _chat.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        # NaN and Infinity are not JSON: a reply that holds one ends here too.
        failure = _invalid(f"not a chat completion: {error}")
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
            failure.usage = _usage(_usage_alone.decode(raw).usage)
        raise failure from None


@contextlib.contextmanager
def _billed(chat: _Chat) -> Iterator[None]:
    """Note on a reply that cannot be used what it cost."""
    try:
        yield
    except RequestFailed as failure:
        failure.usage = _usage(chat.usage)
        raise


def _label_logprobs(
    position: _Position, choices: tuple[str, ...], ids: Mapping[str, int] | None
) -> dict[str, float]:
    alternatives = position.top_logprobs or [_Alternative(position.token, position.logprob)]
    wanted = (
        {label: label for label in choices}
        if ids is None
        else {f"token_id:{ids[label]}": label for label in choices}
    )
    found: dict[str, float] = {}
    total = 0.0
    for entry in alternatives:
        logprob = _valid(entry.logprob)
        if logprob <= UNLIKELY:
            continue
        total += math.exp(logprob)
        label = wanted.get(entry.token.strip())
        if label is not None:
            known = found.get(label)
            found[label] = logprob if known is None else _add(known, logprob)
    if total > 1.0 + _EXCESS * len(alternatives):
        raise _invalid(f"probabilities of one token add up to {total:.3f}")
    if ids is not None and not found:
        raise _invalid("the log-probabilities of other tokens than those asked for")
    return found


def _add(first: float, second: float) -> float:
    high, low = max(first, second), min(first, second)
    return min(high + math.log1p(math.exp(low - high)), 0.0)


def _valid(logprob: float) -> float:
    if not math.isfinite(logprob):
        raise _invalid(f"a log-probability is {logprob}")
    if logprob > _EXCESS:
        raise _invalid(f"a log-probability is {logprob:g}, above zero")
    return min(logprob, 0.0)


def _sum_logprobs(logprobs: _Logprobs | None) -> float | None:
    if logprobs is None or logprobs.content is None:
        return None
    return math.fsum(_valid(position.logprob) for position in logprobs.content)


def _usage(usage: _Usage | None) -> Usage:
    if usage is None:
        return Usage()
    details = usage.prompt_tokens_details
    return Usage(
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=(details.cached_tokens or 0) if details is not None else 0,
        completion_tokens=usage.completion_tokens or 0,
    )


def _invalid(what: str) -> RequestFailed:
    return RequestFailed(f"invalid reply: {what}", kind="invalid")
