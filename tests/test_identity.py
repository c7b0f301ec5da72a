"""Judges of one name that answer differently are told apart: ids, cache, folders, panels."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, write_candidates

from feedback import labeling
from feedback.backends.identity import engine_record, identity_of, reply_settings
from feedback.backends.openai import OpenAIBackend
from feedback.config import EngineOptions
from feedback.errors import RecipeError, ShardError
from feedback.judge_options import JudgeOptions
from feedback.panel import PanelJudge, PanelOptions
from feedback.records import Verdict
from feedback.shards import read_rows


def server(port: int, **fields: Any) -> EngineOptions:
    url = f"http://127.0.0.1:{port}/v1"
    return EngineOptions(backend="openai", model="judge", base_url=url, **fields)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[EngineOptions | str, Scripted]:
    """Engines opened so far by port; the one on 18001 says .9 of each first reply, others .2."""
    known: dict[EngineOptions | str, Scripted] = {}

    def opened(options: EngineOptions) -> Scripted:
        share = 0.9 if options.base_url and "18001" in options.base_url else 0.2
        engine = Scripted("judge", p=lambda first, second, call: share)
        engine.identity = identity_of(options)
        known[options.base_url or options.lora or options.model] = engine
        return engine

    monkeypatch.setattr(labeling, "open_backend", opened)
    return known


def judge(folder: Path, out: str, engine: EngineOptions, **fields: Any) -> list[Verdict]:
    candidates = folder / "candidates.jsonl"
    if not candidates.exists():
        write_candidates(candidates, {"p": [1, 2, 3], "q": [3, 1, 2]})
    values = {"candidates": candidates, "out": folder / out, "engine": engine, **fields}
    labeling.run(JudgeOptions(**values))
    return list(read_rows(folder / out, Verdict))


def firsts(rows: list[Verdict]) -> set[float]:
    return {round(row.probs[0], 3) for row in rows if row.probs}


def test_a_server_on_another_port_is_another_judge(
    tmp_path: Path, asked: dict[Any, Scripted]
) -> None:
    first = judge(tmp_path, "one", server(18001))
    second = judge(tmp_path, "two", server(18002))  # the same cache file
    assert (firsts(first), firsts(second)) == ({0.9}, {0.2})
    assert not any(row.cached for row in second)
    assert not {row.verdict_id for row in first} & {row.verdict_id for row in second}
    with pytest.raises(ShardError, match=r"begun with another engine .*18001.*18002"):
        judge(tmp_path, "one", server(18002))


def test_the_same_server_is_the_same_judge(tmp_path: Path, asked: dict[Any, Scripted]) -> None:
    first = judge(tmp_path, "one", server(18001, concurrency=4))
    again = judge(tmp_path, "two", server(18001, concurrency=8, timeout_s=3.0))
    assert all(row.cached for row in again)
    assert [row.verdict_id for row in again] == [row.verdict_id for row in first]


@pytest.mark.parametrize("cache", ["auto", "none"])
def test_a_panel_of_two_servers_has_both_their_verdicts(
    tmp_path: Path, asked: dict[Any, Scripted], cache: str
) -> None:
    panel = PanelOptions(judges=(PanelJudge(engine=server(18002)),))
    rows = judge(tmp_path, "panel", server(18001), panel=panel, cache=cache)
    assert len({row.verdict_id for row in rows}) == len(rows) == 24
    by_member = {number: [row for row in rows if row.meta["member"] == number] for number in (0, 1)}
    assert (firsts(by_member[0]), firsts(by_member[1])) == ({0.9}, {0.2})
    assert judge(tmp_path, "panel", server(18001), panel=panel, cache=cache) == rows
    assert not asked["http://127.0.0.1:18002/v1"].calls  # all of it was found again


def test_a_panel_of_one_judge_twice_is_refused(tmp_path: Path, asked: dict[Any, Scripted]) -> None:
    panel = PanelOptions(judges=(PanelJudge(engine=server(18001, concurrency=3)),))
    with pytest.raises(RecipeError, match="two judges have the same engine"):
        judge(tmp_path, "panel", server(18001), panel=panel)
    judge(tmp_path, "one", server(18001))
    judge(tmp_path, "two", server(18001))
    judges = [
        EngineOptions(backend="replay", replay_from=str(tmp_path / name)) for name in ("one", "two")
    ]
    panel = PanelOptions(judges=(PanelJudge(engine=judges[1]),))
    for engine in asked.values():
        engine.calls.clear()
    with pytest.raises(RecipeError, match="two judges are"):
        judge(tmp_path, "panel", judges[0], panel=panel)


def adapter(folder: Path, weights: bytes) -> str:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 8}')
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return str(folder)


def test_another_adapter_is_another_judge(tmp_path: Path, asked: dict[Any, Scripted]) -> None:
    names = [adapter(tmp_path / name, name.encode()) for name in ("lora1", "lora2")]
    one, two = (EngineOptions(backend="vllm", model="judge", lora=name) for name in names)
    rows = judge(tmp_path, "out", one)
    with pytest.raises(ShardError, match=r"begun with another engine .*adapter"):
        judge(tmp_path, "out", two)
    other = judge(tmp_path, "other", two)
    assert not {row.verdict_id for row in rows} & {row.verdict_id for row in other}
    copy = adapter(tmp_path / "elsewhere" / "lora1", b"lora1")
    assert identity_of(one) == identity_of(dataclasses.replace(one, lora=copy))


def test_request_fields_make_another_judge(tmp_path: Path, asked: dict[Any, Scripted]) -> None:
    bodies: list[dict[str, Any]] = [{}, {"reasoning_effort": "low"}, {"reasoning_effort": "high"}]
    ids = []
    for number, body in enumerate(bodies):
        engine = server(18001, extra={"body": body, "first_wait_s": 0.1 * number + 0.1})
        rows = judge(tmp_path, f"out{number}", engine)
        assert not any(row.cached for row in rows)
        ids.append({row.verdict_id for row in rows})
    assert not ids[0] & ids[1] and not ids[1] & ids[2] and not ids[0] & ids[2]


def test_only_what_shapes_replies_counts() -> None:
    plain = EngineOptions(backend="vllm", model="m")
    fast = dataclasses.replace(
        plain, extra={"max_num_seqs": 8}, gpu_memory=0.5, tensor_parallel=2, enforce_eager=True
    )
    assert identity_of(plain) == identity_of(fast)
    for other in ({"backend": "transformers"}, {"dtype": "float16"}, {"extra": {"seed": 3}}):
        assert identity_of(plain) != identity_of(dataclasses.replace(plain, **other))
    hosted = EngineOptions(backend="openai", model="m")
    assert reply_settings(hosted) == {}
    # One judge, whether it is asked now or in a batch.
    assert identity_of(hosted) == identity_of(dataclasses.replace(hosted, backend="batch"))
    deployment = "https://host.example/deployments/a/v1"
    assert identity_of(hosted) != identity_of(dataclasses.replace(hosted, base_url=deployment))
    with_key = "https://user:pw@host.example/v1?key=secret"
    record = engine_record(dataclasses.replace(hosted, base_url=with_key))
    assert record == {"model": "m", "endpoint": "host.example"}


def test_a_named_server_may_move() -> None:
    one, two = (
        OpenAIBackend(server(port, extra={"server": "our judge"})) for port in (18001, 18002)
    )
    assert one.identity == two.identity
    assert one.identity.endpoint == "our judge"
