"""What broke in other labellers does not break here; ``docs/defects.md`` lists it, case by case.

Most cases are proved by the tests that the table names; those that had none of their own are here.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fault_proxy import FaultProxy
from scripted import Scripted, manifest_of, write_candidates

from feedback import labeling
from feedback.backends import JudgeCall
from feedback.backends.openai import OpenAIBackend
from feedback.config import EngineOptions
from feedback.errors import BackendError, InputError
from feedback.intervals import Resampler
from feedback.judge_options import JudgeOptions
from feedback.pairing import PairOptions
from feedback.pairing import run as pair
from feedback.parsing import parse_reply
from feedback.position import order_consistency
from feedback.records import JudgeIdentity, Message, Preference, Prompt, Verdict
from feedback.report_run import card_of_folder
from feedback.shards import ShardWriter, read_rows
from feedback.simulation import Planted, simulate
from feedback.slices import slice_table
from feedback.templates import load_template, prompts_folder, render

TEMPLATES = sorted(path.stem for path in (prompts_folder() / "judges").glob("*.toml"))
_NAMED = re.compile(r"`(test_\w+)\.py::(test_\w+)`")


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> dict[str, Scripted]:
    """Scripted judges in place of engines; the gate is held open."""
    from feedback import pairing_run

    known: dict[str, Scripted] = {}
    monkeypatch.setattr(labeling, "open_backend", lambda options: known[options.model])
    monkeypatch.setattr(pairing_run, "_check_gate", lambda options: {"status": "passed"})
    return known


def label(folder: Path, rows: dict[str, list[float]], **fields: Any) -> list[Preference]:
    """Judge and pair; return the preferences."""
    candidates = write_candidates(folder / "candidates.jsonl", rows)
    out = folder / "verdicts"
    engine = EngineOptions(model="judge")
    labeling.run(JudgeOptions(candidates=candidates, out=out, engine=engine, **fields))
    pair(PairOptions(verdicts=out, candidates=candidates, out=folder))
    return list(read_rows(folder / "preferences", Preference))


def test_every_case_of_the_table_names_tests_that_exist(root: Path) -> None:
    table = (root / "docs" / "defects.md").read_text(encoding="utf-8")
    rows = [line for line in table.splitlines() if line.startswith("| ") and "`test_" in line]
    assert len(rows) >= 40
    named = set(_NAMED.findall(table))
    for module, test in sorted(named):
        source = (root / "tests" / f"{module}.py").read_text(encoding="utf-8")
        assert f"def {test}(" in source, f"{module}.py has no {test}"


# --- reading -------------------------------------------------------------------------------------


def test_a_blank_line_in_a_rationale_moves_no_rating() -> None:
    """distilabel's UltraFeedback reads such a reply as ratings [3, None, 5] of two generations."""
    text = "It is clear.\n\nIt is also right, more or less.\n\n\nRating: 3"
    assert parse_reply(text, load_template("rating-rationale"), shown=1).score == 3
    both = '{"rationale": "Clear.\\n\\nRight.\\n\\n", "scores": {"first": 3, "second": 5}}'
    template = load_template("rating-structured")
    weights = {"first": 1.0, "second": 1.0}
    assert parse_reply(both, template, shown=1, criteria=weights).score == 4
    ranking = parse_reply(
        "A has more.\n\nB has less.\n\nB > A", load_template("listwise-rationale"), shown=2
    )
    assert ranking.ranking == [["B"], ["A"]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_reply_that_repeats_the_question_is_no_verdict(name: str) -> None:
    """prometheus-eval found its own instruction in replies, and everything scored 5."""
    template = load_template(name)
    shown = {"rating": 1, "listwise": 3}.get(template.kind, 2)
    asked = render(
        template,
        prompt="Is it so?",
        completions=["It is so.", "It is not so.", "Perhaps."][:shown],
        rubric="Be right.",
        principle="Be kind.",
        gold="It is.",
    )[-1]["content"]
    for echo in (asked, asked[-200:], asked.strip().splitlines()[-1]):
        reading = parse_reply(echo, template, shown=shown)
        assert reading.outcome in ("unparsed", "truncated"), echo


# --- labels --------------------------------------------------------------------------------------


def test_equal_ratings_are_a_tie_between_two_texts(
    tmp_path: Path, engine: dict[str, Scripted]
) -> None:
    """distilabel's FormatTextGenerationDPO takes maximum and minimum: the same text twice."""
    engine["judge"] = Scripted("judge")
    (row,) = label(tmp_path, {"p": [4, 4]}, template="rating")
    assert row.tie and row.p_chosen == 0.5 and row.margin == 0
    assert row.chosen != row.rejected


def test_a_completion_without_rating_is_in_no_pair(
    tmp_path: Path, engine: dict[str, Scripted]
) -> None:
    """There, a rating of None is a TypeError; in others it is the lowest score."""

    def say(call: JudgeCall) -> str:
        value = round(Scripted.values(call)[0])
        return "I would rather not say." if value == 1 else f"Fine.\n\nRating: {value}"

    engine["judge"] = Scripted("judge", text=say)
    rows = label(tmp_path, {"p": [4, 1, 2]}, template="rating-rationale")
    assert [(row.chosen, row.rejected) for row in rows] == [
        ("answer 0 of p worth 4", "answer 2 of p worth 2")
    ]
    assert manifest_of(tmp_path / "verdicts")["counts"] == {"decided": 2, "unparsed": 1}
    assert manifest_of(tmp_path / "preferences")["comparisons"]["no label: unparsed"] == 2


def test_rows_with_and_without_probabilities_share_a_folder(
    tmp_path: Path, engine: dict[str, Scripted]
) -> None:
    """distilabel lost the whole pipeline to a schema mismatch when some rows had no logprobs."""
    datasets = pytest.importorskip("datasets")
    engine["judge"] = Scripted("judge", fail=lambda call: Scripted.values(call) == [1.0, 2.0])
    rows = label(tmp_path, {"p": [1, 2, 3], "q": [1, 3]})
    assert len(rows) == 3
    kept = {row.probs is None for row in read_rows(tmp_path / "verdicts", Verdict)}
    assert kept == {True, False}
    shards = [str(path) for path in (tmp_path / "preferences").glob("*.jsonl")]
    loaded = datasets.load_dataset("json", data_files=shards, cache_dir=str(tmp_path / "hf"))
    assert len(loaded["train"]) == 3


def test_where_every_call_failed_there_is_an_error_and_no_row(
    tmp_path: Path, engine: dict[str, Scripted]
) -> None:
    """llm-comparator divides by zero there."""
    engine["judge"] = Scripted("judge", fail=lambda call: True)
    with pytest.raises(BackendError, match="everything that was asked failed, 4 of 4"):
        label(tmp_path, {"p": [1, 2], "q": [2, 1]})
    source = {"verdicts": tmp_path / "verdicts", "candidates": tmp_path / "candidates.jsonl"}
    with pytest.raises(InputError, match="no comparison holds a label"):
        pair(PairOptions(**source, out=tmp_path))
    assert not list(read_rows(tmp_path / "preferences", Preference))
    figures = dict(card_of_folder(tmp_path / "verdicts").figures())
    assert figures  # a card of failures, not a crash


# --- what a run leaves behind --------------------------------------------------------------------


def test_appending_rewrites_nothing(tmp_path: Path) -> None:
    """alpaca_eval writes its whole store anew for each chunk: the more rows, the dearer a row."""
    written: list[int] = []
    with ShardWriter[Prompt](tmp_path, "prompts", rows_per_shard=100) as writer:
        first = tmp_path / "prompts-00000.jsonl"
        for number in range(250):
            before = first.read_bytes()
            node = first.stat().st_ino
            writer.append(Prompt(prompt_id=f"p{number}", prompt="x"))
            after = first.read_bytes()
            assert after.startswith(before) and first.stat().st_ino == node
            written.append(len(after) - len(before))
    assert max(written) < 100 and written[100:] == [0] * 150


def test_a_slow_call_holds_nobody_up() -> None:
    """Barriers of chunks (alpaca_eval 128, distilabel 50) wait for their slowest call."""

    def calls() -> list[JudgeCall]:
        return [
            JudgeCall(
                call_id=str(number),
                messages=(Message(role="user", content=f"Topic {number}?"),),
                choices=("A", "B"),
            )
            for number in range(300)
        ]

    with FaultProxy(plan=lambda number, body: "hang_3" if b"Topic 3?" in body else None) as proxy:
        backend = OpenAIBackend(
            EngineOptions(
                backend="openai", model="stand-in", base_url=proxy.base_url, concurrency=16
            )
        )
        order = [reply.call_id for reply in backend.judge(calls())]
        backend.close()
    assert order[-1] == "3" and len(set(order)) == 300


def test_only_declared_packages_are_imported(root: Path) -> None:
    """``import distilabel`` fails where ``requests`` happens not to be installed."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    declared = {
        re.split(r"[^A-Za-z0-9_.-]", line)[0].lower().replace("_", "-")
        for lines in (project["dependencies"], *project["optional-dependencies"].values())
        for line in lines
    }
    known = importlib.metadata.packages_distributions()
    ours = {"feedback", "train", *sys.stdlib_module_names}
    for path in sorted((root / "feedback").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            for name in {name.partition(".")[0] for name in names} - ours:
                owners = {owner.lower().replace("_", "-") for owner in known.get(name, [name])}
                assert owners & declared, f"{path.name} imports {name}, which nothing declares"


def test_every_option_that_is_read_exists(root: Path) -> None:
    """A synth_pref script tests ``args.command``, which its parser never defines: it cannot run."""
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for package in ("feedback", "train")
        for path in sorted((root / package).rglob("*.py"))
    ]
    classes = {
        node.name: node
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Options")
    }

    def defined(name: str) -> set[str]:
        if name not in classes:
            return set()
        names = {part.name for part in classes[name].body if isinstance(part, ast.FunctionDef)}
        names |= {
            part.target.id
            for part in classes[name].body
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
        }
        bases = [base.id for base in classes[name].bases if isinstance(base, ast.Name)]
        return names.union(*map(defined, bases))

    read = 0
    for function in (node for tree in trees for node in ast.walk(tree)):
        if not isinstance(function, ast.FunctionDef):
            continue
        kinds = {
            argument.arg: argument.annotation.id
            for argument in function.args.args
            if isinstance(argument.annotation, ast.Name) and argument.annotation.id in classes
        }
        for node in ast.walk(function):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.value, ast.Name)
                and node.value.id in kinds
            ):
                kind = kinds[node.value.id]
                assert node.attr in defined(kind), f"{function.name}: {kind} has no {node.attr}"
                read += 1
    assert read > 500


def test_every_category_has_its_own_rows() -> None:
    """arena-hard's loop over categories filters what the one before left: the second is empty."""
    pairs = simulate(Planted(soft=True), prompts=24).pairs()
    before = len(pairs)
    for _ in range(2):
        table = slice_table(pairs, "topic", Resampler(pairs.prompt, replicates=50))
        assert len(table.rows) == 4
        for value, count, consistency, *_ in table.rows:
            alone = pairs.take(np.array([meta["topic"] == value for meta in pairs.meta]))
            assert count == len(alone) > 0
            assert consistency == order_consistency(alone)
        assert sum(row[1] for row in table.rows) == before == len(pairs)


def test_nothing_waits_for_a_person(root: Path) -> None:
    """FastChat's gen_judgment stops at "Press Enter to confirm", in a job that nobody watches."""
    for path in sorted((root / "feedback").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("input", "breakpoint"), path.name


def test_a_verdict_names_the_judge_that_gave_it() -> None:
    """Enough to compute every label again without a call stands in the row itself."""
    fields = set(Verdict.__dataclass_fields__)
    assert fields >= {
        *("judge", "template", "template_sha256", "sampling", "seed", "shown", "probs", "mass"),
        *("reply", "usage", "cost", "attempts", "latency_s", "error", "outcome"),
    }
    assert set(JudgeIdentity.__dataclass_fields__) >= {"model", "revision", "endpoint"}
