"""Critique and revision: what the model is asked, what is kept, what is retried."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted import Scripted, manifest_of, write_candidates
from test_openai import Hosted

from feedback import revision
from feedback.backends import SampleCall, SampleReply
from feedback.config import EngineOptions
from feedback.constitution import load_constitution
from feedback.errors import BackendError, BudgetExceeded, InputError, RecipeError, ShardError
from feedback.records import Candidates, Usage
from feedback.revision import ReviseOptions
from feedback.shards import read_rows


class Reviewer(Scripted):
    """Criticises and revises; ``say`` may answer in its place."""

    def __init__(self, say=None):
        super().__init__("reviewer")
        self.say = say or (lambda call: None)
        self.asked: list[SampleCall] = []

    def sample(self, calls):
        for call in calls:
            self.asked.append(call)
            answer = self.say(call)
            if isinstance(answer, SampleReply):
                yield answer
                continue
            previous = call.messages[1]["content"]
            critique = len(call.messages) == 3
            text = f"Too short: {previous}" if critique else f"{previous} (revised)"
            yield SampleReply(
                call_id=call.call_id,
                texts=(text if answer is None else answer,),
                finish_reasons=("stop",),
                logps=(-3.5,),
                usage=Usage(prompt_tokens=100, completion_tokens=50),
            )


@pytest.fixture
def reviewer(monkeypatch):
    engines = [Reviewer()]
    monkeypatch.setattr(revision, "open_backend", lambda options: engines[-1])
    return engines


def revise(tmp_path: Path, rows=None, **fields) -> list[Candidates]:
    source = tmp_path / "candidates.jsonl"
    if not source.exists():
        write_candidates(source, rows or {"p1": [1, 2], "p2": [3]})
    fields = {"engine": EngineOptions(model="reviewer"), **fields}
    options = ReviseOptions(candidates=source, out=tmp_path / "revised", **fields)
    revision.run(options)
    return list(read_rows(options.out, Candidates))


def test_a_critique_then_a_revision_and_both_are_kept(tmp_path, reviewer):
    first, second = revise(tmp_path)
    assert [row.completion for row in first.completions] == [
        "answer 0 of p1 worth 1",
        "answer 1 of p1 worth 2",
        "answer 0 of p1 worth 1 (revised)",
    ]
    revised = second.completions[1]
    principle = {entry.id: entry for entry in load_constitution("harmlessness").principles}[
        revised.sampling["principle"]
    ]
    assert revised.sampling["revised_from"] == second.completions[0].completion_id
    assert revised.sampling["critique"] == "Too short: answer 0 of p2 worth 3"
    assert (revised.model, revised.finish_reason, revised.logp) == ("reviewer", "stop", -3.5)
    call = next(
        call
        for call in reviewer[-1].asked
        if len(call.messages) == 5 and "p2" in call.messages[0]["content"]
    )
    roles = [turn["role"] for turn in call.messages]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert principle.critique in call.messages[2]["content"]
    assert principle.revise in call.messages[4]["content"]
    assert not any("{" in turn["content"] for turn in call.messages)


def test_rounds_go_on_from_the_revision_by_other_principles(tmp_path, reviewer):
    (row,) = revise(tmp_path, {"p": [1]}, rounds=3)
    texts = [entry.completion for entry in row.completions]
    assert texts[-1].endswith("(revised) (revised) (revised)")
    assert [entry.sampling.get("round") for entry in row.completions] == [None, 1, 2, 3]
    parents = [entry.sampling.get("revised_from") for entry in row.completions[1:]]
    assert parents == [entry.completion_id for entry in row.completions[:-1]]


@pytest.mark.parametrize(("keep", "count"), [("all", 3), ("ends", 2), ("last", 1)])
def test_what_is_kept(tmp_path, reviewer, keep, count):
    (row,) = revise(tmp_path, {"p": [1]}, rounds=2, keep=keep)
    assert len(row.completions) == count
    assert row.completions[-1].sampling["round"] == 2


def test_all_completions_can_be_revised(tmp_path, reviewer):
    first, second = revise(tmp_path, completions="all")
    assert (len(first.completions), len(second.completions)) == (4, 2)


def test_the_same_seed_asks_the_same(tmp_path, reviewer):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    one, same = revise(tmp_path / "a"), None
    reviewer.append(Reviewer())
    same = revise(tmp_path / "b")
    assert one == same
    reviewer.append(Reviewer())
    other = revise(tmp_path / "c", seed=1)
    assert [call.call_id for call in reviewer[0].asked] == [
        call.call_id for call in reviewer[1].asked
    ]
    assert one != other


def test_unchanged_and_empty_revisions_are_no_revisions(tmp_path, reviewer):
    reviewer.append(
        Reviewer(
            lambda call: call.messages[1]["content"].upper() if len(call.messages) == 5 else None
        )
    )
    first, second = revise(tmp_path)
    assert (len(first.completions), len(second.completions)) == (2, 1)
    assert manifest_of(tmp_path / "revised")["counts_of_calls"] == {
        "empty or unchanged revisions": 2,
        "empty critiques": 0,
    }


def test_failed_prompts_are_retried_and_only_they(tmp_path, reviewer, capsys):
    def fail(call):
        if "p2" in call.messages[0]["content"]:
            return SampleReply(call_id=call.call_id, error="overloaded")
        return None

    reviewer.append(Reviewer(fail))
    assert [row.prompt_id for row in revise(tmp_path)] == ["p1"]
    failed = tmp_path / "revised" / "failed.jsonl"
    assert json.loads(failed.read_text()) == {"prompt_id": "p2", "error": "overloaded"}
    assert "1 prompts failed" in capsys.readouterr().out
    reviewer.append(Reviewer())
    assert [row.prompt_id for row in revise(tmp_path)] == ["p1", "p2"]
    assert all("p2" in call.messages[0]["content"] for call in reviewer[-1].asked)
    assert not failed.exists()


def test_an_engine_that_forgets_calls_is_noticed(tmp_path, reviewer):
    class Forgetful(Reviewer):
        def sample(self, calls):
            yield from list(super().sample(calls))[1:]

    reviewer.append(Forgetful())
    with pytest.raises(BackendError, match="2 of 2; the last one: the engine gave no reply"):
        revise(tmp_path)
    assert len(list(read_rows(tmp_path / "revised", Candidates))) < 2
    assert "gave no reply" in (tmp_path / "revised" / "failed.jsonl").read_text()


def test_where_every_prompt_failed_the_run_fails_and_can_be_repeated(tmp_path, reviewer):
    reviewer.append(Reviewer(lambda call: SampleReply(call_id=call.call_id, error="HTTP 401")))
    with pytest.raises(BackendError, match="2 of 2; the last one: HTTP 401"):
        revise(tmp_path)
    reviewer.append(Reviewer())
    assert [row.prompt_id for row in revise(tmp_path)] == ["p1", "p2"]


def test_a_finished_folder_stays_as_it_is(tmp_path, reviewer):
    revise(tmp_path)
    folder = tmp_path / "revised"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    reviewer.append(Reviewer())
    revise(tmp_path)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert reviewer[-1].asked == []


def test_another_seed_needs_another_folder(tmp_path, reviewer):
    revise(tmp_path)
    folder = tmp_path / "revised"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"manifest.json", "run.json", "candidates-00000.jsonl"} <= set(before)
    with pytest.raises(ShardError, match="another seed"):
        revise(tmp_path, seed=4)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    moved = EngineOptions(backend="openai", model="pocket:policy", base_url="http://localhost:9/v1")
    with pytest.raises(ShardError, match="another engine"):
        revise(tmp_path, engine=moved)


def test_another_seed_can_replace_what_was_made(tmp_path, reviewer):
    revise(tmp_path)
    with pytest.raises(ShardError, match="--on-change set-aside") as refused:
        revise(tmp_path, seed=4)
    assert "cache" not in str(refused.value), "nothing is cached here"
    revise(tmp_path, seed=4, on_change="set-aside")
    assert manifest_of(tmp_path / "revised")["seed"] == 4
    assert json.loads((tmp_path / "revised.1" / "run.json").read_text())["seed"] == 0


ROWS = {f"p{number}": [1, 2] for number in range(5)}
PAID = EngineOptions(model="reviewer", backend="openai")


def prices_of(tmp_path: Path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text("[reviewer]\nprompt = 1000.0\ncompletion = 1000.0\n")  # $0.15 a call
    return path


def test_a_dry_run_counts_critiques_and_revisions(tmp_path, reviewer, capsys):
    run = {"engine": PAID, "prices": prices_of(tmp_path), "completions": "all", "rounds": 2}
    write_candidates(tmp_path / "candidates.jsonl", ROWS)
    options = ReviseOptions(
        candidates=tmp_path / "candidates.jsonl", out=tmp_path / "revised", dry_run=True, **run
    )
    revision.run(options)
    said = capsys.readouterr().out
    assert "5 prompts to revise" in said
    # 5 prompts, 2 completions, 2 rounds, a critique (192 tokens) and a revision (256) each.
    assert "at most 40 calls to reviewer; nothing was sent" in said
    assert f"at most {20 * (192 + 256)} tokens of completions" in said
    assert "price: at most $" in said
    assert not options.out.exists() and reviewer[-1].asked == []
    with pytest.raises(InputError, match="max_cost does nothing with backend transformers"):
        revise(tmp_path, max_cost=1.0)


@pytest.mark.parametrize("limit", [{"max_calls": 9}, {"max_cost": 2.5}])
def test_a_limit_stops_cleanly_and_nothing_is_paid_twice(tmp_path, reviewer, limit):
    """No critique without its revision: a row is begun if all of its calls fit."""
    (tmp_path / "whole").mkdir()
    fields = {"engine": PAID, "prices": prices_of(tmp_path), "max_tokens": 50, "rounds": 2}
    whole = revise(tmp_path / "whole", ROWS, **fields)
    asked, stops = [], 0
    while stops < 10:
        reviewer.append(Reviewer())
        try:
            rows = revise(tmp_path, ROWS, **fields, **limit)
        except BudgetExceeded as stop:
            stops += 1
            assert "stopped at --max-" in str(stop)
        else:
            break
        finally:
            asked += [call.call_id for call in reviewer[-1].asked]
            assert len(reviewer[-1].asked) <= limit.get("max_calls", 16)
            assert len(reviewer[-1].asked) % 4 == 0
    assert 1 <= stops < 10
    assert len(asked) == len(set(asked)) == 20
    assert rows == whole


def test_what_a_row_leaves_over_is_there_for_the_next(tmp_path, reviewer):
    """Empty critiques need no revision: 5 rows of up to 2 calls fit into 6."""
    reviewer.append(Reviewer(lambda call: "" if len(call.messages) == 3 else None))
    assert len(revise(tmp_path, ROWS, max_calls=6)) == 5
    assert len(reviewer[-1].asked) == 5


def test_endpoints_are_probed_before_they_are_asked(tmp_path):
    write_candidates(tmp_path / "candidates.jsonl", {"p": [1]})
    with Hosted() as proxy:
        proxy.refuses = ("max_tokens",)
        proxy.says = "Better."
        options = ReviseOptions(
            candidates=tmp_path / "candidates.jsonl",
            out=tmp_path / "revised",
            engine=EngineOptions(backend="openai", model="stand-in", base_url=proxy.base_url),
        )
        revision.run(options)
    (row,) = read_rows(options.out, Candidates)
    assert row.completions[-1].completion == "Better."


def test_options_that_mean_nothing(tmp_path):
    with pytest.raises(RecipeError, match="at least 1"):
        ReviseOptions(candidates=tmp_path, out=tmp_path, rounds=0)
    with pytest.raises(RecipeError, match="top_p"):
        ReviseOptions(candidates=tmp_path, out=tmp_path, top_p=0.0)
