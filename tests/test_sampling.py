"""Sampling: nothing twice, nothing lost, repeats drawn again, bad prompts named by line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_openai import Hosted

from feedback import sampling
from feedback.backends import Capabilities, SampleCall, SampleReply
from feedback.config import EngineOptions
from feedback.errors import BackendError, BudgetExceeded, InputError, RecipeError, ShardError
from feedback.records import Candidates, JudgeIdentity, Usage, normalise_text
from feedback.sampling import SampleOptions
from feedback.shards import read_manifest, read_rows


class ScriptedPolicy:
    """Answers by a function of (call, number of the completion); counts its calls."""

    def __init__(self, name: str, answer: Callable[[SampleCall, int], str | None]):
        self.identity = JudgeIdentity(model=name)
        self.answer = answer
        self.calls: list[SampleCall] = []
        self.stop_after: int | None = None
        self.closed = 0
        self.prepared = 0

    def prepare(self, labels: tuple[str, ...]) -> Capabilities:
        self.prepared += 1
        return Capabilities(logprobs=True)

    def sample(self, calls: Iterable[SampleCall]) -> Iterator[SampleReply]:
        window: list[SampleCall] = []
        for call in calls:
            if self.stop_after is not None and len(self.calls) >= self.stop_after:
                raise KeyboardInterrupt
            self.calls.append(call)
            window.append(call)
            if len(window) == 3:
                # Out of order, as engines answer.
                yield from map(self.reply, reversed(window))
                window.clear()
        yield from map(self.reply, reversed(window))

    def reply(self, call: SampleCall) -> SampleReply:
        texts = [self.answer(call, number) for number in range(call.n)]
        if any(text is None for text in texts):
            return SampleReply(call_id=call.call_id, error="HTTP 500")
        return SampleReply(
            call_id=call.call_id,
            texts=tuple(str(text) for text in texts),
            finish_reasons=("stop",) * call.n,
            logps=(-1.5,) * call.n,
            usage=Usage(prompt_tokens=10, completion_tokens=20 * call.n),
        )

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def policies(monkeypatch: pytest.MonkeyPatch) -> dict[str, ScriptedPolicy]:
    known: dict[str, ScriptedPolicy] = {}

    def opened(options: EngineOptions) -> ScriptedPolicy:
        return known[options.model]

    monkeypatch.setattr(sampling, "open_backend", opened)
    return known


def unique(call: SampleCall, number: int) -> str:
    return f"{call.messages[-1]['content']} / {call.temperature} / {call.seed} / {number}"


def write_prompts(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def options(tmp_path: Path, count: int = 7, **settings: Any) -> SampleOptions:
    prompts = tmp_path / "prompts.jsonl"
    if not prompts.exists():
        write_prompts(prompts, [{"prompt_id": f"p{n}", "prompt": f"Q{n}"} for n in range(count)])
    return SampleOptions(
        **{
            "prompts": prompts,
            "out": tmp_path / "candidates",
            "engine": EngineOptions(model="a"),
            **settings,
        }
    )


def rows_of(folder: Path) -> dict[str, Candidates]:
    rows = list(read_rows(folder, Candidates))
    assert len({row.prompt_id for row in rows}) == len(rows), "a prompt stands there twice"
    return {row.prompt_id: row for row in rows}


def test_each_prompt_gets_its_completions_with_their_origin(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    policies["a"] = ScriptedPolicy("a", unique)
    sampling.run(options(tmp_path, completions=4, temperatures=(0.7, 1.2), top_p=0.9))
    rows = rows_of(tmp_path / "candidates")
    assert set(rows) == {f"p{n}" for n in range(7)}
    for row in rows.values():
        assert [entry.sampling["temperature"] for entry in row.completions] == [0.7, 0.7, 1.2, 1.2]
        assert {entry.model for entry in row.completions} == {"a"}
        assert {entry.finish_reason for entry in row.completions} == {"stop"}
        assert len({entry.completion_id for entry in row.completions}) == 4
        for entry in row.completions:
            assert entry.logp == -1.5
            assert entry.sampling["top_p"] == 0.9
            assert isinstance(entry.sampling["seed"], int)
    assert policies["a"].closed == 1


def test_seeds_are_reproducible_and_differ_by_prompt(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    policies["a"] = ScriptedPolicy("a", unique)
    sampling.run(options(tmp_path, out=tmp_path / "one"))
    sampling.run(options(tmp_path, out=tmp_path / "two"))
    sampling.run(options(tmp_path, out=tmp_path / "other", seed=1))
    one, two, other = (rows_of(tmp_path / name) for name in ("one", "two", "other"))
    assert one == two
    assert all(one[name].completions != other[name].completions for name in one)
    assert len({call.seed for call in policies["a"].calls[:7]}) == 7


def test_repeats_and_empty_completions_are_drawn_again(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    first: set[str] = set()

    def answer(call: SampleCall, number: int) -> str:
        prompt = call.messages[-1]["content"]
        if prompt not in first:
            if number == 3:
                first.add(prompt)
            return ["Same.", "  same. ", "", "Other."][number]
        return unique(call, number)

    policies["a"] = ScriptedPolicy("a", answer)
    sampling.run(options(tmp_path, completions=4))
    for row in rows_of(tmp_path / "candidates").values():
        texts = [normalise_text(entry.completion) for entry in row.completions]
        assert len(texts) == 4
        assert len(set(texts)) == 4
        assert "" not in texts
    drawn = read_manifest(tmp_path / "candidates")["drawn"]
    assert (drawn["repeated"], drawn["empty"], drawn["kept"], drawn["drawn"]) == (7, 7, 28, 42)


def test_a_policy_that_only_repeats_itself_is_left_short_and_counted(
    tmp_path: Path, policies: dict[str, ScriptedPolicy], capsys: pytest.CaptureFixture[str]
) -> None:
    policies["a"] = ScriptedPolicy("a", lambda call, number: "always")
    sampling.run(options(tmp_path, completions=3, refills=2))
    rows = rows_of(tmp_path / "candidates")
    assert [len(row.completions) for row in rows.values()] == [1] * 7
    assert read_manifest(tmp_path / "candidates")["drawn"]["short"] == 7
    assert "7 prompts have fewer completions" in capsys.readouterr().out
    # First 3, then 2 more, then 2 more.
    assert [call.n for call in policies["a"].calls] == [3] * 7 + [2] * 14


def test_kept_repeats_are_a_fair_sample(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    policies["a"] = ScriptedPolicy("a", lambda call, number: ["x", "x", ""][number])
    sampling.run(options(tmp_path, completions=3, repeats="keep"))
    for row in rows_of(tmp_path / "candidates").values():
        assert [entry.completion for entry in row.completions] == ["x", "x", ""]
        assert len({entry.completion_id for entry in row.completions}) == 3


def test_several_policies_share_the_completions(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    policies["a"] = ScriptedPolicy("a", lambda call, number: "a" + unique(call, number))
    policies["b"] = ScriptedPolicy("b", lambda call, number: "b" + unique(call, number))
    sampling.run(options(tmp_path, completions=5, more=(EngineOptions(model="b"),)))
    for row in rows_of(tmp_path / "candidates").values():
        assert [entry.model for entry in row.completions] == ["a", "a", "a", "b", "b"]
    left = [path.name for path in (tmp_path / "candidates").iterdir() if "stage" in path.name]
    assert not left


@pytest.mark.parametrize("stop", range(0, 22, 2))
def test_an_interrupted_run_goes_on_without_loss_or_doubles(
    tmp_path: Path, policies: dict[str, ScriptedPolicy], stop: int
) -> None:
    def answer(name: str) -> Callable[[SampleCall, int], str]:
        # Every third seed repeats itself, so that refills are part of the run.
        return lambda call, number: (
            name if (call.seed or 0) % 3 == 0 else name + unique(call, number)
        )

    def fresh() -> None:
        policies["a"] = ScriptedPolicy("a", answer("a"))
        policies["b"] = ScriptedPolicy("b", answer("b"))

    settings: dict[str, Any] = {"completions": 4, "more": (EngineOptions(model="b"),)}
    fresh()
    sampling.run(options(tmp_path, out=tmp_path / "whole", **settings))
    fresh()
    budget = stop
    for policy in policies.values():
        policy.stop_after = budget
    interrupted = True
    while interrupted:
        interrupted = False
        try:
            sampling.run(options(tmp_path, **settings))
        except KeyboardInterrupt:
            interrupted = True
            for policy in policies.values():
                policy.stop_after = len(policy.calls) + 5
    assert rows_of(tmp_path / "candidates") == rows_of(tmp_path / "whole")


def test_failed_prompts_are_retried_by_the_next_run_and_only_those(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    def failing(call: SampleCall, number: int) -> str | None:
        return None if call.messages[-1]["content"] in ("Q2", "Q5") else unique(call, number)

    policies["a"] = ScriptedPolicy("a", failing)
    sampling.run(options(tmp_path, refills=1))
    assert set(rows_of(tmp_path / "candidates")) == {"p0", "p1", "p3", "p4", "p6"}
    failed = [
        json.loads(line) for line in (tmp_path / "candidates/failed.jsonl").read_text().splitlines()
    ]
    assert {row["prompt_id"]: row["error"] for row in failed} == {
        "p2": "HTTP 500",
        "p5": "HTTP 500",
    }
    assert read_manifest(tmp_path / "candidates")["failed"] == 2
    policies["a"] = ScriptedPolicy("a", unique)
    sampling.run(options(tmp_path, refills=1))
    assert {call.messages[-1]["content"] for call in policies["a"].calls} == {"Q2", "Q5"}
    assert len(rows_of(tmp_path / "candidates")) == 7
    assert not (tmp_path / "candidates/failed.jsonl").exists()


def test_a_finished_folder_opens_no_model(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    policies["a"] = ScriptedPolicy("a", unique)
    sampling.run(options(tmp_path))
    before = (tmp_path / "candidates/candidates-00000.jsonl").read_bytes()
    policies.clear()
    sampling.run(options(tmp_path))
    assert (tmp_path / "candidates/candidates-00000.jsonl").read_bytes() == before


def test_a_run_that_is_stopped_says_what_it_did(
    tmp_path: Path, policies: dict[str, ScriptedPolicy], capsys: pytest.CaptureFixture[str]
) -> None:
    policies["a"] = ScriptedPolicy("a", unique)
    policies["a"].stop_after = 5
    with pytest.raises(KeyboardInterrupt):
        sampling.run(options(tmp_path))
    assert "7 prompts, 12 completions kept of 12 drawn in this run" in capsys.readouterr().out


def test_where_every_prompt_failed_the_run_fails_and_can_be_repeated(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    policies["a"] = ScriptedPolicy("a", lambda call, number: None)
    for _ in range(2):
        with pytest.raises(BackendError, match="7 of 7; the last one: HTTP 500"):
            sampling.run(options(tmp_path))
    policies["a"] = ScriptedPolicy("a", unique)
    sampling.run(options(tmp_path))
    assert len(rows_of(tmp_path / "candidates")) == 7


def test_other_settings_are_not_mixed_into_a_folder(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    policies["a"] = ScriptedPolicy("a", unique)
    sampling.run(options(tmp_path))
    folder = tmp_path / "candidates"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"manifest.json", "run.json", "candidates-00000.jsonl"} <= set(before)
    with pytest.raises(ShardError, match="begun with another top_p"):
        sampling.run(options(tmp_path, top_p=0.5))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_completions_of_another_server_are_not_mixed_into_a_folder(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    policies["a"] = ScriptedPolicy("a", unique)
    for engine in (
        EngineOptions(backend="openai", model="a", base_url="http://127.0.0.1:18001/v1"),
        EngineOptions(backend="openai", model="a", extra={"body": {"top_k": 3}}),
    ):
        out = tmp_path / str(engine.base_url is None)
        sampling.run(options(tmp_path, out=out, engine=engine))
        other = EngineOptions(backend="openai", model="a", base_url="http://127.0.0.1:18002/v1")
        with pytest.raises(ShardError, match="begun with another engines"):
            sampling.run(options(tmp_path, out=out, engine=other))


def test_system_message_gold_and_meta_travel(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    own = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "Hi"}]
    write_prompts(
        tmp_path / "prompts.jsonl",
        [{"prompt": "plain", "gold": "G", "meta": {"k": 1}}, {"prompt": own}],
    )
    policies["a"] = ScriptedPolicy("a", unique)
    sampling.run(options(tmp_path, system="Ours."))
    systems = {call.messages[-1]["content"]: call.messages[0] for call in policies["a"].calls}
    assert systems["plain"] == {"role": "system", "content": "Ours."}
    assert systems["Hi"] == {"role": "system", "content": "Mine."}
    rows = list(read_rows(tmp_path / "candidates", Candidates))
    plain = next(row for row in rows if row.prompt == "plain")
    assert (plain.gold, plain.meta) == ("G", {"k": 1})
    assert all(row.prompt in ("plain", own) for row in rows), "the system message is not the prompt"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("[]", 'has no "prompt"'),
        ('{"text": "x"}', 'has no "prompt"'),
        ('{"prompt": "  "}', "empty"),
        ('{"prompt": [{"role": "user", "content": ""}]}', "empty"),
        ('{"prompt": 7}', "not a prompt row"),
        ('{"prompt": "x", "prompt_id": "p0"}', r"'p0' occurs twice \(first in line 1\)"),
        ('{"prompt": "x", "promt_id": "p9"}', "unknown field 'promt_id'; did you mean 'prompt_id'"),
    ],
)
def test_bad_prompts_name_file_and_line(
    tmp_path: Path, policies: dict[str, ScriptedPolicy], line: str, reason: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps({"prompt_id": "p0", "prompt": "fine"}) + "\n\n" + line + "\n")
    with pytest.raises(InputError, match=reason) as caught:
        sampling.run(options(tmp_path))
    assert f"{path}:3:" in str(caught.value)
    assert not (tmp_path / "candidates").exists(), "half-written"


def test_missing_file_and_senseless_options(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        sampling.run(options(tmp_path, prompts=tmp_path / "none.jsonl"))
    for settings in ({"completions": 0}, {"temperatures": ()}, {"top_p": 0.0}, {"max_tokens": 0}):
        with pytest.raises(RecipeError):
            options(tmp_path, **settings)


# --- what it costs -------------------------------------------------------------------------------

PAID: dict[str, Any] = {
    "engine": EngineOptions(model="a", backend="openai"),
    "more": (EngineOptions(model="b", backend="batch"),),
    "temperatures": (0.5, 1.0),
}
"""Two policies, each of two completions, at two temperatures: two calls per prompt and policy."""


def prices_of(tmp_path: Path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text(
        "[a]\nprompt = 1000.0\ncompletion = 10000.0\n"  # $0.21 a call, as ScriptedPolicy answers
        "[b]\nprompt = 1000.0\ncompletion = 10000.0\nbatch = 0.5\n"
    )
    return path


def test_a_dry_run_says_what_each_policy_would_be_sent(
    tmp_path: Path, policies: dict[str, ScriptedPolicy], capsys: pytest.CaptureFixture[str]
) -> None:
    paid = options(tmp_path, **PAID, prices=prices_of(tmp_path), max_tokens=100, dry_run=True)
    sampling.run(paid)
    said = capsys.readouterr().out
    assert "7 prompts to sample" in said
    assert "14 calls to a; nothing was sent" in said and "14 calls to b" in said
    # "Q0" and its role: round(2 / 4) + 4 tokens.
    assert "about 56 prompt tokens (estimated at 4 characters each) and at most 1400 tokens" in said
    assert "price: at most $14.0560" in said and "price: at most $7.0280" in said
    assert not (tmp_path / "candidates").exists()
    sampling.run(options(tmp_path, dry_run=True))
    assert "price: none, the model runs on this machine" in capsys.readouterr().out


def test_a_dry_run_on_a_folder_that_was_begun_counts_what_is_left_and_changes_nothing(
    tmp_path: Path, policies: dict[str, ScriptedPolicy], capsys: pytest.CaptureFixture[str]
) -> None:
    policies["a"] = ScriptedPolicy("a", unique)
    with pytest.raises(BudgetExceeded):
        sampling.run(options(tmp_path, max_calls=3))
    folder = tmp_path / "candidates"
    with (folder / "candidates-00000.jsonl").open("a") as file:
        file.write('{"prompt_id": "p6", "torn')
    before = {path: path.read_bytes() for path in folder.iterdir()}
    sampling.run(options(tmp_path, dry_run=True))
    assert "4 prompts to sample" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("limit", [{"max_calls": 5}, {"max_cost": 0.9}])
def test_a_limit_stops_cleanly_and_the_next_run_goes_on(
    tmp_path: Path, policies: dict[str, ScriptedPolicy], limit: dict[str, float]
) -> None:
    """Whole rows only, nothing asked twice, and the same completions as without a limit."""
    paid = {**PAID, "prices": prices_of(tmp_path), "max_tokens": 20}
    for name in "ab":
        policies[name] = ScriptedPolicy(name, unique)
    sampling.run(options(tmp_path, out=tmp_path / "whole", **paid))
    asked: list[str] = []
    stops = 0
    while True:
        for name in "ab":
            policies[name] = ScriptedPolicy(name, unique)
        try:
            sampling.run(options(tmp_path, **paid, **limit))
        except BudgetExceeded as stop:
            stops += 1
            assert "stopped at --max-" in str(stop) and "run the same command again" in str(stop)
        else:
            break
        finally:
            calls = [call for policy in policies.values() for call in policy.calls]
            asked += [call.call_id for call in calls]
            cost = sum(0.21 if call in policies["a"].calls else 0.105 for call in calls)
            assert len(calls) <= limit.get("max_calls", 28)
            assert cost <= limit.get("max_cost", 5.0)
    assert stops > 2
    assert len(asked) == len(set(asked)) == 28
    assert rows_of(tmp_path / "candidates") == rows_of(tmp_path / "whole")


def test_a_prompt_that_failed_before_a_limit_is_asked_again(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    policies["a"] = ScriptedPolicy(
        "a", lambda call, number: None if call.messages[0]["content"] == "Q0" else "good"
    )
    with pytest.raises(BudgetExceeded):
        sampling.run(options(tmp_path, completions=1, refills=0, max_calls=3))
    policies["a"] = ScriptedPolicy("a", unique)
    sampling.run(options(tmp_path, completions=1, refills=0))
    assert set(rows_of(tmp_path / "candidates")) == {f"p{number}" for number in range(7)}
    assert len(policies["a"].calls) == 5


def test_attempts_that_gave_nothing_count_towards_the_limit(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    class Wasteful(ScriptedPolicy):
        on_waste: Callable[[str, Usage], bool]

        def __init__(self) -> None:
            super().__init__("a", unique)
            self.on_waste = lambda call_id, usage: True
            self.again: list[bool] = []

        def reply(self, call: SampleCall) -> SampleReply:
            wasted = Usage(prompt_tokens=500)
            self.again.append(self.on_waste(call.call_id, wasted))
            reply = super().reply(call)
            return dataclasses.replace(reply, usage=reply.usage + wasted)

    policies["a"] = policy = Wasteful()
    paid: dict[str, Any] = {
        "engine": PAID["engine"],
        "prices": prices_of(tmp_path),
        "max_tokens": 20,
    }
    paid["completions"] = 1
    with pytest.raises(BudgetExceeded, match=r"--max-cost \$2 with 3 calls .* \$2.1300 spent"):
        sampling.run(options(tmp_path, max_cost=2.0, **paid))
    assert policy.again == [True, True, False]


def test_a_finished_folder_stays_as_it_is(
    tmp_path: Path, policies: dict[str, ScriptedPolicy], capsys: pytest.CaptureFixture[str]
) -> None:
    """What was judged names it by its manifest, which must not change."""
    policies["a"] = ScriptedPolicy("a", unique)
    sampling.run(options(tmp_path))
    folder = tmp_path / "candidates"
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert read_manifest(folder)["drawn"]["drawn"] == 28
    again = EngineOptions(model="a", batch_tokens=1000)
    sampling.run(options(tmp_path, engine=again, max_calls=1))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert "is finished: nothing to sample" in capsys.readouterr().out
    assert len(policies["a"].calls) == 7


def test_limits_that_cannot_be_kept_are_refused_before_anything_is_asked(
    tmp_path: Path, policies: dict[str, ScriptedPolicy]
) -> None:
    policies["a"] = ScriptedPolicy("a", unique)
    unknown = EngineOptions(model="b", backend="openai")
    for settings, problem in (
        ({"max_cost": 1.0}, "max_cost does nothing with backend transformers"),
        ({"more": (unknown,), "max_cost": 1.0}, "--max-cost needs the price of 'b'"),
        ({"more": (EngineOptions(base_url="http://x/v1"),)}, r"more\[0\]\.base_url does nothing"),
    ):
        with pytest.raises(InputError, match=problem):
            sampling.run(options(tmp_path, **settings))
    for settings in ({"max_calls": 0}, {"max_cost": -1.0}):
        with pytest.raises(RecipeError):
            options(tmp_path, **settings)
    assert policies["a"].calls == []


def test_endpoints_are_probed_before_they_are_sampled(tmp_path: Path) -> None:
    """One that wants ``max_completion_tokens`` and gives no log-probabilities of completions."""
    with Hosted() as proxy:
        proxy.refuses = ("max_tokens", "logprobs")
        engine = EngineOptions(model="stand-in", backend="openai", base_url=proxy.base_url)
        sampling.run(options(tmp_path, engine=engine, completions=2, repeats="keep"))
    rows = rows_of(tmp_path / "candidates")
    assert [len(row.completions) for row in rows.values()] == [2] * 7
    assert {entry.logp for row in rows.values() for entry in row.completions} == {None}


def test_an_empty_prompt_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no prompts"):
        sampling.run(options(tmp_path, count=0))
    assert not (tmp_path / "candidates").exists()


def test_shipped_sets_are_known_by_name(root: Path) -> None:
    assert (
        sampling.prompt_source(Path("booking-train")) == root / "prompts/sets/booking-train.jsonl"
    )
    assert sampling.prompt_source(Path("mine.jsonl")) == Path("mine.jsonl")
