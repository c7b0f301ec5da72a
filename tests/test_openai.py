"""The endpoint engine: what it sends, what it believes, what it finds out, what it keeps quiet."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fault_proxy
import pytest
from fault_proxy import FaultProxy
from hypothesis import given, settings
from hypothesis import strategies as st

from feedback.backends import JudgeCall, SampleCall
from feedback.backends.chat_bodies import Bodies, Dialect
from feedback.backends.chat_replies import error_message, read_judge, read_sample
from feedback.backends.openai import OpenAIBackend, open_engine
from feedback.backends.opening import open_backend
from feedback.backends.redacting import Redactor
from feedback.backends.retrying import RequestFailed
from feedback.config import EngineOptions
from feedback.errors import BackendError, RecipeError
from feedback.records import Message


def call(text: str = "A or B?", **fields: Any) -> JudgeCall:
    messages = (Message(role="user", content=text),)
    return JudgeCall(**{"call_id": text, "choices": ("A", "B"), "messages": messages, **fields})


def chat(
    alternatives: dict[str, float] | None, *, text: str = "A", reason: str = "stop", **message: Any
) -> bytes:
    logprobs = None
    if alternatives is not None:
        tops = [{"token": token, "logprob": value} for token, value in alternatives.items()]
        logprobs = {"content": [{**tops[0], "top_logprobs": tops}]}
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, **message},
        "finish_reason": reason,
        "logprobs": logprobs,
    }
    return json.dumps({"id": "x", "choices": [choice]}).encode()


def backend(base_url: str, **engine: Any) -> OpenAIBackend:
    extra = {"first_wait_s": 0.002, **engine.pop("extra", {})}
    settings = {"model": "stand-in", "concurrency": 16, "timeout_s": 10.0, **engine}
    return OpenAIBackend(
        EngineOptions(backend="openai", base_url=base_url, extra=extra, **settings)
    )


@pytest.fixture(scope="module")
def proxy() -> Iterator[FaultProxy]:
    with FaultProxy() as proxy:
        yield proxy


# --- reading replies -----------------------------------------------------------------------------


def test_variants_of_a_label_add_up() -> None:
    """``A``, `` A`` and a line break before it are one answer; ``a`` and ``Answer`` are others."""
    raw = chat({" A": math.log(0.3), "A": math.log(0.2), "\nB": math.log(0.1), "a": math.log(0.4)})
    found = read_judge(raw, call(), None).choice_logprobs
    assert found is not None
    assert {label: math.exp(value) for label, value in found.items()} == pytest.approx(
        {"A": 0.5, "B": 0.1}
    )


def test_tokens_named_by_id_are_taken_exactly() -> None:
    raw = chat({"token_id:7": -0.5, "token_id:9": -1.5, "A": -2.5})
    found = read_judge(raw, call(), {"A": 7, "B": 9}).choice_logprobs
    assert found == {"A": -0.5, "B": -1.5}


def test_unlikely_sentinel_is_no_probability() -> None:
    """-9999 stands for 'too unlikely to say': the label counts as not reported."""
    assert read_judge(chat({"A": -0.1, "B": -9999.0}), call(), None).choice_logprobs == {"A": -0.1}


def test_labels_outside_the_alternatives_are_absent() -> None:
    assert read_judge(chat({"Sure": -0.1}), call(), None).choice_logprobs == {}


@pytest.mark.parametrize("fault", fault_proxy.BROKEN_REPLIES)
def test_broken_replies_are_refused(fault: str) -> None:
    raw = fault_proxy.break_reply(chat({"A": -0.5, "B": -1.2}), fault)
    with pytest.raises(RequestFailed, match="invalid reply") as caught:
        read_judge(raw, call(), None)
    assert caught.value.transient


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_mutilated_reply_becomes_a_probability_above_one(data: st.DataObject) -> None:
    """Bytes cut, doubled or changed anywhere: an invalid reply, or sound log-probabilities."""
    raw = bytearray(chat({"A": -0.5, "B": -1.2, "x": -3.0}))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        change = data.draw(st.sampled_from(("cut", "set", "double")))
        if change == "cut":
            del raw[place : place + data.draw(st.integers(1, 20))]
        elif change == "set":
            raw[place] = data.draw(st.integers(0, 255))
        else:
            raw[place:place] = raw[place : place + 5]
        if not raw:
            break
    try:
        found = read_judge(bytes(raw), call(), None).choice_logprobs
    except RequestFailed as failure:
        assert failure.kind == "invalid"
        return
    for value in (found or {}).values():
        assert math.isfinite(value) and value <= 0.0
    assert sum(math.exp(value) for value in (found or {}).values()) <= 1.01


def test_refusals_are_passed_on() -> None:
    reading = read_judge(chat(None, text="", refusal="I will not."), call(), None)
    assert (reading.text, reading.finish_reason) == ("I will not.", "content_filter")
    reading = read_judge(chat(None, text="", reason="content_filter"), call(), None)
    assert (reading.choice_logprobs, reading.finish_reason) == (None, "content_filter")


def test_text_calls_need_text_unless_it_was_cut_off() -> None:
    question = call(choices=None, max_tokens=50)
    with pytest.raises(RequestFailed, match="text is empty"):
        read_judge(chat(None, text=""), question, None)
    assert read_judge(chat(None, text="", reason="length"), question, None).text == ""


def test_samples_come_in_order_or_not_at_all() -> None:
    def choice(index: int) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"content": f"text {index}"},
            "finish_reason": "stop",
            "logprobs": {"content": [{"token": "x", "logprob": -0.5}] * (index + 1)},
        }

    wanted = SampleCall(call_id="s", messages=(), n=3)
    raw = json.dumps({"choices": [choice(2), choice(0), choice(1)]}).encode()
    reading = read_sample(raw, wanted)
    assert reading.texts == ("text 0", "text 1", "text 2")
    assert reading.logps == (-0.5, -1.0, -1.5)
    for wrong in ([choice(0), choice(1)], [choice(0), choice(1), choice(1)]):
        with pytest.raises(RequestFailed, match="choices instead of 3"):
            read_sample(json.dumps({"choices": wrong}).encode(), wanted)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b'{"error": {"message": "no such model", "code": "model_not_found"}}', "no such model m"),
        (b'{"error": "overloaded"}', "overloaded"),
        (b'{"message": "bad"}', "bad"),
        (b'{"detail": "Not Found"}', "Not Found"),
        (b"<html>\xff</html>", "<html>"),
        (b"", ""),
    ],
)
def test_error_messages_of_many_servers(raw: bytes, text: str) -> None:
    assert error_message(raw).startswith(text)


# --- sending -------------------------------------------------------------------------------------


def test_bodies_are_whole_json() -> None:
    bodies = Bodies("m", dialect=Dialect(), extra={"chat_template_kwargs": {"think": False}})
    first = json.loads(bodies.judge(call('quotes " and \u2028 and \u00e9', seed=7)))
    assert first == {
        "model": "m",
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 20,
        "chat_template_kwargs": {"think": False},
        "messages": [{"role": "user", "content": 'quotes " and \u2028 and \u00e9'}],
        "seed": 7,
    }
    schema = {"type": "object", "properties": {"verdict": {"enum": ["A", "B"]}}}
    second = json.loads(bodies.judge(call(choices=None, schema=schema, max_tokens=9)))
    assert second["response_format"]["json_schema"]["schema"] == schema
    assert "logprobs" not in second and "seed" not in second
    sample = json.loads(bodies.sample(SampleCall(call_id="s", messages=(), n=3, top_p=0.9)))
    assert (sample["n"], sample["top_p"], sample["logprobs"]) == (3, 0.9, True)


def test_bodies_follow_the_dialect() -> None:
    bodies = Bodies("m", dialect=Dialect())
    bodies.judge(call())
    bodies.dialect = Dialect(
        max_tokens_field="max_completion_tokens",
        temperature=False,
        seed=False,
        label_ids={"A": 7, "B": 9},
    )
    body = json.loads(bodies.judge(call(seed=3)))
    assert body["max_completion_tokens"] == 1
    assert body["logprob_token_ids"] == [7, 9]
    assert not {"temperature", "seed", "max_tokens", "top_logprobs"} & set(body)
    # A label that was not asked about at start-up is looked for among the alternatives.
    assert json.loads(bodies.judge(call(choices=("A", "C"))))["top_logprobs"] == 20


def test_text_that_is_not_unicode_is_that_calls_error(proxy: FaultProxy) -> None:
    engine = backend(proxy.base_url)
    replies = {reply.call_id: reply for reply in engine.judge([call("good"), call("bad \ud800")])}
    engine.close()
    assert replies["good"].error is None
    assert "cannot be sent as JSON" in (replies["bad \ud800"].error or "")


# --- the stream ----------------------------------------------------------------------------------


def test_every_call_is_answered_once_and_read_lazily(proxy: FaultProxy) -> None:
    """Never more calls taken than can be under way, in the consumer's own thread."""
    engine = backend(proxy.base_url, concurrency=8)
    taken = 0
    thread = threading.get_ident()

    def calls() -> Iterator[JudgeCall]:
        nonlocal taken
        for number in range(500):
            assert threading.get_ident() == thread
            taken += 1
            yield call(f"question {number}")

    seen = []
    for reply in engine.judge(calls()):
        seen.append(reply.call_id)
        assert taken - len(seen) <= 16
        assert reply.error is None
    assert sorted(seen) == sorted(f"question {number}" for number in range(500))
    state = engine.gate_state
    assert state is not None and state.most_in_flight <= 8
    engine.close()


def test_error_in_the_calls_comes_after_the_replies(proxy: FaultProxy) -> None:
    """What was already asked is paid for, so it is delivered before the error."""
    engine = backend(proxy.base_url)

    def calls() -> Iterator[JudgeCall]:
        yield from (call(f"question {number}") for number in range(10))
        raise ValueError("the input broke")

    replies = []
    with pytest.raises(ValueError, match="the input broke"):
        for reply in engine.judge(calls()):
            replies.append(reply)
    assert len(replies) == 10
    engine.close()


def test_abandoned_stream_leaves_nothing_behind(proxy: FaultProxy) -> None:
    engine = backend(proxy.base_url)
    stream = engine.judge(call(f"first {number}") for number in range(100))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    names = {reply.call_id for reply in engine.judge([call("second")])}
    assert names == {"second"}
    engine.close()
    engine.close()


def test_two_streams_of_one_engine_at_once(proxy: FaultProxy) -> None:
    engine = backend(proxy.base_url)
    judged = engine.judge(call(f"question {number}") for number in range(40))
    sampled = engine.sample(
        SampleCall(call_id=f"prompt {number}", messages=call().messages, n=2)
        for number in range(40)
    )
    pairs = list(zip(judged, sampled, strict=True))
    assert len(pairs) == 40
    assert all(len(sample.texts) == 2 for _, sample in pairs)
    engine.close()


def test_n_can_be_split_into_requests(proxy: FaultProxy) -> None:
    engine = backend(proxy.base_url, extra={"split_n": True})
    before = proxy.requests
    (reply,) = engine.sample([SampleCall(call_id="s", messages=call().messages, n=4, seed=1)])
    engine.close()
    assert len(reply.texts) == len(reply.logps) == 4
    assert proxy.requests - before == 4
    assert reply.usage.completion_tokens == 4


def test_concurrency_falls_when_throttled_and_the_run_goes_on() -> None:
    """A server that bears four requests at a time and refuses the rest."""
    with FaultProxy(latency_s=0.005) as proxy:
        proxy.plan = lambda number, body: "status_429" if proxy.in_flight > 4 else None
        engine = backend(proxy.base_url, concurrency=64, max_retries=0)
        replies = list(engine.judge(call(f"question {number}") for number in range(200)))
        state = engine.gate_state
        engine.close()
    assert [reply.error for reply in replies] == [None] * 200
    assert state is not None and state.decreases > 0
    assert state.limit < 32


# --- start-up ------------------------------------------------------------------------------------


def test_probe_of_a_server_that_names_tokens(proxy: FaultProxy) -> None:
    engine = backend(proxy.base_url)
    found = engine.prepare(("A", "B"))
    assert (found.logprobs, found.max_logprobs, found.structured_output) == (True, None, True)
    assert "log-probabilities of any label" in found.note
    assert engine.bodies.dialect.label_ids == {"A": 65, "B": 66}
    (reply,) = engine.judge([call()])
    assert reply.choice_logprobs is not None and set(reply.choice_logprobs) == {"A", "B"}
    engine.close()


def test_probe_through_the_package(proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-a-real-key")
    engine = backend(proxy.base_url, extra={"transport": "sdk"})
    found = engine.prepare(("A", "B"))
    assert (found.logprobs, found.max_logprobs) == (True, 20)
    lean = backend(proxy.base_url)
    calls = [call(f"question {number}") for number in range(20)]
    by_package = {reply.call_id: reply.choice_logprobs for reply in engine.judge(calls)}
    assert by_package == {reply.call_id: reply.choice_logprobs for reply in lean.judge(calls)}
    engine.close()
    lean.close()


def test_labels_of_several_tokens_are_refused(proxy: FaultProxy) -> None:
    engine = backend(proxy.base_url)
    with pytest.raises(BackendError, match="label 'Tie' is 3 tokens"):
        engine.prepare(("A", "B", "Tie"))
    engine.close()


class Hosted(FaultProxy):
    """A hosted API: no tokenizer, and as particular about fields as the ``refuses`` say."""

    refuses: tuple[str, ...] = ()
    logprobs = True
    system_role = True
    says = "A"

    async def _upstream(self, path: str, body: bytes, method: str) -> tuple[int, bytes]:
        if not path.endswith("/chat/completions"):
            return (200, b'{"data": [{"id": "other-model"}]}') if "models" in path else (404, b"")
        request = json.loads(body)
        for name in self.refuses:
            field, _, most = name.partition("<=")
            if field in request and (not most or request[field] > int(most)):
                hint = " Use 'max_completion_tokens' instead." if field == "max_tokens" else ""
                text = f"Unsupported value: '{field}'.{hint}"
                return 400, json.dumps({"error": {"message": text}}).encode()
        if not self.system_role and request["messages"][0]["role"] == "system":
            return 400, b'{"error": {"message": "System role not supported"}}'
        if not self.logprobs:
            return 200, chat(None)
        said = {self.says: -0.01, "x": -6.0}
        reply = json.loads(chat(said if request.get("logprobs") else None, text=self.says))
        choices = [{**reply["choices"][0], "index": n} for n in range(request.get("n", 1))]
        return 200, json.dumps({**reply, "choices": choices}).encode()


def test_probe_learns_the_dialect() -> None:
    """Renamed, capped and refused fields are found out and never sent again."""
    with Hosted() as proxy:
        proxy.refuses = ("max_tokens", "temperature", "top_logprobs<=5", "seed")
        engine = backend(proxy.base_url)
        found = engine.prepare(("A",))
        dialect = engine.bodies.dialect
        assert (dialect.max_tokens_field, dialect.temperature) == ("max_completion_tokens", False)
        assert dialect.top_logprobs == found.max_logprobs == 5
        (reply,) = engine.judge([call()])
        assert reply.error is None
        engine.close()


@pytest.mark.parametrize("labels", [("A",), ()])
def test_endpoint_without_system_role_gets_the_text_in_the_users_turn(
    labels: tuple[str, ...], proxy: FaultProxy
) -> None:
    turns = (Message(role="system", content="Judge."), Message(role="user", content="A or B?"))
    with Hosted() as hosted:
        hosted.system_role = False
        engine = backend(hosted.base_url)
        assert "takes no system role" in engine.prepare(labels).note
        (judged,) = engine.judge([call(choices=labels or None, messages=turns)])
        (sampled,) = engine.sample([SampleCall(call_id="s", messages=turns)])
        assert (judged.error, sampled.error) == (None, None)
        sent = [json.loads(body)["messages"] for body in hosted.answered]
        assert [Message(role="user", content="Judge.\n\nA or B?")] in sent
        engine.close()
    engine = backend(proxy.base_url)
    assert "system role" not in engine.prepare(labels).note
    assert engine.bodies.dialect.system_role
    engine.close()


def test_endpoint_without_logprobs_is_refused() -> None:
    with Hosted() as proxy:
        proxy.logprobs = False
        engine = backend(proxy.base_url)
        with pytest.raises(BackendError, match=r"no log-probabilities for stand-in.*rationale"):
            engine.prepare(("A", "B"))
        assert engine.prepare(()).logprobs is False
        engine.close()


def test_label_that_a_hosted_tokenizer_splits_is_refused() -> None:
    with Hosted() as proxy:
        proxy.says = "T"
        engine = backend(proxy.base_url)
        with pytest.raises(BackendError, match="label 'Tie' is not a single token"):
            engine.prepare(("Tie",))
        engine.close()


def test_unknown_model_wrong_key_and_nobody_there() -> None:
    with Hosted() as proxy:
        proxy.plan = lambda number, body: "status_404"
        engine = backend(proxy.base_url)
        with pytest.raises(BackendError, match=r"No model 'stand-in' there.*other-model"):
            engine.prepare(("A", "B"))
        proxy.plan = lambda number, body: "status_401"
        with pytest.raises(BackendError, match="Check the key"):
            engine.prepare(("A", "B"))
        engine.close()
        plain = backend(proxy.base_url.removesuffix("/v1"))
        proxy.plan = lambda number, body: "status_404"
        with pytest.raises(
            BackendError, match=r"HTTP 404: .*\. base_url lacks /v1, .* or no model"
        ):
            plain.prepare(("A", "B"))
        plain.close()
    engine = backend("http://127.0.0.1:9/v1")
    with pytest.raises(BackendError, match="Is the server running"):
        engine.prepare(("A", "B"))
    engine.close()


def test_hosted_apis_need_a_key_and_use_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(BackendError, match=r"api\.openai\.com needs a key: set .* OPENAI_API_KEY"):
        open_engine(EngineOptions(backend="openai", model="m"), "m")
    monkeypatch.setenv("OTHER_KEY", "sk-not-a-real-key")
    options = {"backend": "openai", "model": "m", "api_key_env": "OTHER_KEY"}
    assert OpenAIBackend(EngineOptions(**options)).uses_sdk  # type: ignore[arg-type]
    for base_url, sdk in (
        ("https://eu.api.openai.com/v1", True),
        ("http://127.0.0.1:8000/v1", False),
        ("https://judge.example.org/v1", False),
        ("https://not-openai.com/v1", False),
    ):
        engine = OpenAIBackend(EngineOptions(base_url=base_url, **options))  # type: ignore[arg-type]
        assert engine.uses_sdk is sdk, base_url


def test_proxies_of_the_environment_are_left_to_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.example.org:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert backend("https://judge.example.org/v1").uses_sdk
    assert not backend("http://127.0.0.1:8000/v1").uses_sdk


def test_a_tokenizer_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="cannot load the tokenizer"):
        backend("http://127.0.0.1:1/v1", extra={"tokenizer": str(tmp_path)})
    with pytest.raises(RecipeError, match=r"does nothing without extra\.tokenizer"):
        backend("http://127.0.0.1:1/v1", extra={"max_length": 100})


def test_unknown_keys_of_extra_are_named_whole_with_those_that_are_known() -> None:
    for backend_name, near in (("openai", "split_n"), ("batch", "poll_s")):
        options = EngineOptions(
            backend=backend_name,  # type: ignore[arg-type]
            model="m",
            base_url="http://127.0.0.1:1/v1",
            extra={near[:-1]: 1},
        )
        with pytest.raises(RecipeError) as caught:
            open_backend(options)
        assert f"engine.extra: unknown key '{near[:-1]}'; did you mean '{near}'?" in str(
            caught.value
        )
        assert "knows body, " in str(caught.value) and "tokenizer" in str(caught.value)


def test_bad_options() -> None:
    with pytest.raises(RecipeError, match=r"unknown key 'transprot'.*'transport'"):
        backend("http://127.0.0.1:1/v1", extra={"transprot": "http"})
    for base_url in ("127.0.0.1:8000", "ftp://host/v1", "http://host:99999/v1"):
        with pytest.raises(BackendError, match="not an http"):
            backend(base_url)


# --- secrets -------------------------------------------------------------------------------------


def test_redactor_removes_what_it_knows_and_what_it_recognises() -> None:
    redact = Redactor(("geheim12345", "user:geheim12345"))
    text = (
        "geheim12345 Z2VoZWltMTIzNDU= http://user:pw@host/v1?api_key=abc123 Authorization: Bearer "
        "abcdef123456\nsk-proj-abc123xyz\nx-api-key: zzz"
    )
    cleaned = redact(text)
    for hidden in ("geheim", "Z2Vo", "user:pw", "abc123", "abcdef", "sk-proj", "zzz"):
        assert hidden not in cleaned, cleaned
    assert "\n" not in cleaned
    assert len(redact("x" * 10_000)) == 400


def test_identity_is_a_host_name() -> None:
    """No credentials, no query; the port is in the fingerprint beside it."""
    engine = backend("https://user:pw@host.example:8443/v1?key=x")
    assert engine.identity.endpoint == "host.example"


@pytest.mark.parametrize("transport", ["http", "sdk"])
def test_errors_hold_no_key(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in replies, not in exceptions, not in their causes, whatever the server echoes."""
    secret = "sk-secret-0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", secret)

    class Echo(FaultProxy):
        async def _upstream(self, path: str, body: bytes, method: str) -> tuple[int, bytes]:
            text = f"Incorrect API key provided: {secret}. Headers: Authorization: Bearer {secret}"
            return 401, json.dumps({"error": {"message": text}}).encode()

    with Echo() as proxy:
        engine = backend(proxy.base_url, extra={"transport": transport}, max_retries=0)
        (reply,) = engine.judge([call()])
        assert "Incorrect API key" in (reply.error or "") and secret not in repr(reply)
        with pytest.raises(BackendError) as caught:
            engine.prepare(("A", "B"))
        problem: BaseException | None = caught.value
        while problem is not None:
            assert secret not in repr(problem) + str(problem)
            problem = problem.__cause__
        engine.close()
    assert secret not in repr(engine.identity)


def test_broken_connections_name_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "sk-secret-0123456789abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    with FaultProxy(plan=lambda number, body: "drop") as proxy:
        for transport in ("http", "sdk"):
            engine = backend(proxy.base_url, extra={"transport": transport}, max_retries=1)
            (reply,) = engine.judge([call()])
            assert reply.attempts == 2
            assert reply.error and secret not in reply.error
            engine.close()
