"""The comparison: equal tokens, jobs that resume, labels that differ as said, and all of it."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from feedback.errors import RecipeError, RlaifError
from feedback.ordering import first_probability, merge_orders
from feedback.records import (
    Candidates,
    Completion,
    JudgeIdentity,
    Preference,
    Verdict,
)
from feedback.shards import ShardWriter, read_manifest, read_rows
from train.best_of_n import best_of_n, best_of_n_kl
from train.compare_config import CompareOptions
from train.compare_jobs import Job, run_jobs
from train.compare_labels import bias_verdicts, gold_preferences
from train.compare_measure import difference, read_outcome
from train.compare_page import render_comparison
from train.compare_plan import Comparison, Data, Lengths, training_job
from train.compare_summary import judges_that_labelled, models_held

META = {"service": "doctor", "given": {"date": "Monday"}, "missing": ["time"], "changed": {}}


def completion(name: str, text: str) -> Completion:
    return Completion(completion_id=name, completion=text, model="m", finish_reason="stop")


def write_rows(folder: Path, kind: str, rows: list[Any], **info: Any) -> Path:
    with ShardWriter[Any](folder, kind) as writer:
        for row in rows:
            writer.append(row)
        writer.finish(info)
    return folder


# --- the plan


def test_every_algorithm_gets_the_same_number_of_tokens(tmp_path: Path) -> None:
    """DPO: 1000 tokens over 10 prompts in batches of 5 are 500 a step, so 4000 are 8 steps."""
    data = Data(*(tmp_path / name for name in ("p", "r", "c", "b", "m")))
    lengths = Lengths(600, 1000, 800, 20.0, 10.0, {"sft": 10, "dpo": 10, "rrhf": 10})
    recipe = {
        "dpo": {"batch_size": 5},
        "rrhf": {"batch-size": 5},
        "sft": {"batch_size": 5},
        "ppo": {"prompts_per_step": 4, "completions_per_prompt": 3, "ppo_epochs": 2},
    }
    jobs = {
        name: training_job(
            name, name=name, seed=7, data=data, lengths=lengths, tokens=4000, recipe=recipe,
            options=CompareOptions(folder=tmp_path), copies=1,
        )
        for name in ("sft", "dpo", "rrhf", "ppo")
    }  # fmt: skip
    assert jobs["dpo"].table["max_steps"] == 8
    assert jobs["rrhf"].table["max_steps"] == 10
    assert jobs["sft"].table["max_steps"] == 13  # 13 * 300 = 3900 is nearest
    # 2 epochs * 4 prompts * (20 + 3 * 10) = 400 a step
    assert jobs["ppo"].table["steps"] == 10
    assert jobs["ppo"].table["copy_every"] == 5
    for job in jobs.values():
        assert job.meta["tokens"] == pytest.approx(4000, rel=0.05)
        assert job.table["seed"] == 7
    assert jobs["ppo"].table["reward"] == {"kind": "model", "models": [str(tmp_path / "m")]}


# --- jobs


def note(table: dict[str, Any]) -> None:
    """A job for tests: leaves a line."""
    with Path(table["file"]).open("a") as file:
        file.write(table["word"] + "\n")
    if table["word"] == "fail":
        raise RlaifError("this one was told to")


def job(name: str, file: Path, *, needs: tuple[str, ...] = (), word: str = "") -> Job:
    return Job(name, f"{__name__}:note", {"file": str(file), "word": word or name}, needs)


def test_jobs_wait_for_what_they_need_and_are_not_run_twice(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    jobs = [job("c", file, needs=("b",)), job("b", file, needs=("a",)), job("a", file)]
    results = run_jobs(jobs, tmp_path, parallel=2, say=lambda line: None)
    assert file.read_text().split() == ["a", "b", "c"]
    assert all(result.peak_mib >= 0 and result.cpu_seconds > 0 for result in results.values())
    again = run_jobs(jobs, tmp_path, parallel=2, say=lambda line: None)
    assert again == results
    changed = [job("c", file, needs=("b",), word="other"), *jobs[1:]]
    run_jobs(changed, tmp_path, parallel=2, say=lambda line: None)
    assert file.read_text().split() == ["a", "b", "c", "other"]
    # A job is done again when one that it needs has changed, and all of them when the data has.
    earlier = [jobs[0], job("b", file, needs=("a",), word="b2"), jobs[2]]
    run_jobs(earlier, tmp_path, parallel=2, say=lambda line: None)
    assert file.read_text().split()[4:] == ["b2", "c"]
    run_jobs(earlier, tmp_path, parallel=2, say=lambda line: None, data="new")
    assert file.read_text().split()[6:] == ["a", "b2", "c"]


def test_a_failed_job_names_its_log_and_what_is_finished_stays(tmp_path: Path) -> None:
    file = tmp_path / "notes"
    jobs = [job("a", file), job("fail", file, needs=("a",))]
    with pytest.raises(RlaifError, match=r"fail failed \(error: this one was told to\)"):
        run_jobs(jobs, tmp_path, parallel=1, say=lambda line: None)
    with pytest.raises(RlaifError):
        run_jobs(jobs, tmp_path, parallel=1, say=lambda line: None)
    assert file.read_text().split() == ["a", "fail", "fail"]


def outlive(table: dict[str, Any]) -> None:
    """A job for tests: says who it is, and would go on for a minute."""
    Path(table["file"]).write_text(str(os.getpid()))
    time.sleep(60)


def test_jobs_end_with_their_comparison_even_when_it_is_killed(tmp_path: Path) -> None:
    """What went on by itself would write into the next run's folders."""
    jobs = [
        Job(name, f"{__name__}:outlive", {"file": str(tmp_path / name)}, ()) for name in ("a", "b")
    ]
    process = multiprocessing.get_context("fork").Process(
        target=run_jobs, args=(jobs, tmp_path), kwargs={"parallel": 2, "say": print}
    )
    process.start()
    files = [tmp_path / "a", tmp_path / "b"]
    wait_until(lambda: all(file.is_file() and file.read_text() for file in files))
    process.kill()
    process.join()
    for file in files:
        wait_until(lambda file=file: not alive(int(file.read_text())))  # type: ignore[misc]


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # A process that has ended and that nobody waited for yet is dead too.
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


# --- best of n


def test_best_of_n_keeps_what_the_reward_model_likes_best(tiny_model: Path, tmp_path: Path) -> None:
    from test_reward_model import fresh

    model = fresh(tiny_model, seed=2)
    model.save(tmp_path / "reward")
    texts = ["one", "two words", "three", "four is more"]
    rows = [
        Candidates(
            prompt_id=f"p{place}",
            prompt=f"say {place}",
            completions=[completion(str(number), text) for number, text in enumerate(texts)],
        )
        for place in range(3)
    ]
    samples = write_rows(tmp_path / "samples", "candidates", rows)
    best_of_n(samples, str(tmp_path / "reward"), tmp_path, sizes=[2, 4])
    for size in (2, 4):
        found = list(read_rows(tmp_path / f"n-{size}", Candidates))
        for row, chosen in zip(rows, found, strict=True):
            rewards = model.score([row.prompt] * size, texts[:size])
            assert [entry.completion for entry in chosen.completions] == [
                texts[int(rewards.argmax())]
            ]
    assert best_of_n_kl(1) == 0.0
    assert best_of_n_kl(4) == pytest.approx(math.log(4) - 0.75)


# --- labels


def candidates_row() -> Candidates:
    return Candidates(
        prompt_id="p0",
        prompt="An appointment on Monday, please.",
        completions=[
            completion("a", "What time would you like?"),
            completion("b", "Yes"),
            completion("c", "No"),
        ],
        meta=META,
    )


def test_gold_labels_turn_the_pairs_that_the_judge_got_wrong(tmp_path: Path) -> None:
    row = candidates_row()
    pairs = [
        Preference(prompt=row.prompt, chosen=chosen, rejected=rejected, margin=0.4, p_chosen=0.7,
                   prompt_id="p0")
        for chosen, rejected in (("Yes", "What time would you like?"), ("Yes", "No"))
    ]  # fmt: skip
    candidates = write_rows(tmp_path / "candidates", "candidates", [row])
    preferences = write_rows(tmp_path / "preferences", "preferences", pairs)
    assert gold_preferences(candidates, preferences, tmp_path / "gold") == 2
    turned, level = read_rows(tmp_path / "gold", Preference)
    assert (turned.chosen, turned.rejected) == ("What time would you like?", "Yes")
    assert (turned.p_chosen, turned.tie) == (1.0, False)
    assert (level.p_chosen, level.tie) == (0.5, True)  # both are worth nothing


def verdict(first: str, second: str, p: float) -> Verdict:
    return Verdict(
        verdict_id=f"{first}{second}", prompt_id="p0", kind="pairwise", shown=[first, second],
        outcome="decided", judge=JudgeIdentity(model="j"), template="pairwise",
        template_sha256="x", probs=[p, 1 - p], winner=first if p > 0.5 else second,
    )  # fmt: skip


@pytest.mark.parametrize("orders", ["both", "one"])
def test_a_planted_length_bias_moves_the_log_odds_as_said(tmp_path: Path, orders: Any) -> None:
    """a has 25 characters and b 3: gaps of 22 and -22, deviation 22, so +-1.5 in log-odds."""
    candidates = write_rows(tmp_path / "candidates", "candidates", [candidates_row()])
    rows = [verdict("a", "b", 0.3), verdict("b", "a", 0.6)]
    source = write_rows(tmp_path / "verdicts", "verdicts", rows, orders="both", judge="j")
    bias_verdicts(source, candidates, tmp_path / "biased", strength=1.5, orders=orders)
    found = {row.verdict_id: row for row in read_rows(tmp_path / "biased", Verdict)}
    assert read_manifest(tmp_path / "biased")["orders"] == orders
    assert len(found) == (2 if orders == "both" else 1)
    for name, p, shift in (("ab", 0.3, 1.5), ("ba", 0.6, -1.5)):
        if name in found:
            wanted = 1 / (1 + math.exp(-(math.log(p / (1 - p)) + shift)))
            assert first_probability(found[name]) == pytest.approx(wanted)
            assert found[name].winner == "a"
    merged = merge_orders(list(found.values()), orders=orders)
    assert merged.p is not None
    assert merged.p > 0.5


# --- results


def write_evaluation(folder: Path, *, wins: list[float], kl: float) -> Path:
    folder.mkdir(parents=True)
    rows = [
        {"prompt_id": f"p{place}", "prompt": "x", "new": "What time?", "start": "Yes" * 5,
         "p_new": {"judge": p}}
        for place, p in enumerate(wins)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    record = {"kl": {"per_completion": {"value": kl}}}
    (folder / "evaluation.json").write_text(json.dumps(record))
    (folder / "rewards.json").write_text(json.dumps({"new": [1.0, 3.0], "start": [0.0, 0.0]}))
    pairs = [
        Candidates(
            prompt_id=f"p{place}",
            prompt="x",
            completions=[
                completion("new-0", "What time?"),
                completion("old-0", "Yes" * 5),
                completion("old-1", "No"),  # meets nobody
            ],
            meta=META,
        )
        for place in range(len(wins))
    ]
    write_rows(folder / "pairs", "candidates", pairs)
    return folder


def test_seeds_are_pooled_by_prompt_and_their_spread_is_shown(tmp_path: Path) -> None:
    """Seed 1 wins 2 of 4, seed 2 wins 4 of 4: pooled 0.75, spread of 0.5 and 1.0 is 0.354."""
    one = write_evaluation(tmp_path / "one", wins=[0.9, 0.8, 0.2, 0.1], kl=1.0)
    two = write_evaluation(tmp_path / "two", wins=[0.9, 0.8, 0.7, 0.6], kl=3.0)
    both = read_outcome([one, two])
    rate = both.win_rates["judge"].win_rate
    assert rate.value == pytest.approx(0.75)
    assert rate.prompts == 4
    assert both.spread["win_rate"] == pytest.approx(0.35355, abs=1e-4)
    assert both.kl == 2.0
    assert both.reward == 2.0
    assert both.start == {"gold": 0.0, "reward": 0.0, "length": 15.0}
    assert both.length_gain == len("What time?") - 15
    assert both.gold is not None
    assert both.gold_gain is not None
    assert both.gold.value == both.gold_gain.value == 1.0
    gap = difference(read_outcome([two]), read_outcome([one]))
    assert gap.value == pytest.approx(0.5)
    assert gap.n == 4
    assert difference(read_outcome([two]), read_outcome([one]), "length").value == 0.0
    assert read_outcome([one], kl=0.3).kl == 0.3


def test_the_win_rate_where_both_orders_agree_is_a_number(tmp_path: Path) -> None:
    """Of four meetings the orders agree on two, one won: 0.5; not known of older evaluations."""
    folder = write_evaluation(tmp_path / "one", wins=[0.9, 0.8, 0.2, 0.9], kl=1.0)
    assert read_outcome([folder]).win_rates["judge"].consistent_win_rate.value is None
    lines = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    for line, agrees in zip(lines, [True, False, True, False], strict=True):
        line["consistent"] = {"judge": agrees}
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_outcome([folder]).win_rates["judge"].consistent_win_rate.value == 0.5


def test_models_held_are_those_of_the_run_that_was_made(tmp_path: Path) -> None:
    """PPO with adapters and a shared head holds one set of weights, beside three reward models."""
    shared = plan_of(tmp_path)
    run = tmp_path / "policies" / "ppo-0"
    run.mkdir(parents=True)
    figures = {"models_held": 1, "reward_models_held": 3}
    (run / "training.json").write_text(json.dumps({"figures": figures}))
    assert models_held(shared, "ppo") == 4
    assert models_held(shared, "dpo") == 1
    assert models_held(shared, "bon") == 2
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "ensemble.json").write_text('{"members": ["a", "b", "c"]}')
    assert models_held(shared, "bon") == 4


def plan_of(folder: Path, judge: str = "second") -> Comparison:
    lengths = Lengths(600, 1000, 800, 20.0, 10.0, {"sft": 10, "dpo": 10, "rrhf": 10})
    evaluated = {"prompts": "x", "judges": [{"model": judge}], "policy": {"model": "p"}}
    return Comparison(
        options=CompareOptions(folder=folder),
        recipe={"evaluate": evaluated},
        data=Data(*(folder / name for name in ("p", "r", "c", "b", "m"))),
        lengths=lengths,
        tokens=4000,
    )


def test_a_judge_that_labelled_and_scores_is_named(tmp_path: Path) -> None:
    """By the record of the labels, and on the page."""
    judging = {"judge": {"model": "first"}, "manifest_sha256": "v" * 64}
    write_rows(tmp_path / "p", "preferences", [], provenance={"judging": judging})
    assert judges_that_labelled(plan_of(tmp_path, "first")) == ["first"]
    assert judges_that_labelled(plan_of(tmp_path, "second")) == []
    record: dict[str, Any] = {
        "methods": {}, "tokens": 1, "seeds": [0], "judges": ["first"], "best_of": 2,
        "judges_that_labelled": ["first"],
    }  # fmt: skip
    assert "of which first labelled what was trained on" in render_comparison(record)
    assert "checks that labelled nothing" in render_comparison(
        {**record, "judges_that_labelled": []}
    )


def test_compare_needs_its_recipe() -> None:
    from train.compare import run

    with pytest.raises(RecipeError, match="compare needs --recipe"):
        run(CompareOptions())
    with pytest.raises(RecipeError, match="best_of must be at least 2"):
        CompareOptions(best_of=1)
    with pytest.raises(RecipeError, match="different numbers"):
        CompareOptions(seeds=(1, 1))


RECIPE = """
[compare]
folder = "{folder}"
seeds = [0]
algorithms = [{algorithms}]
parts = [{parts}]
best_of = 2
copies = 1
jobs = 2
[sample]
prompts = "booking-train"
limit = 8
completions = 3
max_tokens = 12
engine = {{ model = "{model}", device = "cpu" }}
[judge]
min_mass = 0.0
engine = {{ model = "{model}", device = "cpu" }}
[pair]
accept_bias = ["evidence", "outcomes", "position_bias"]
[reward]
model = "{model}"
batch_size = 3
device = "cpu"
[sft]
model = "{model}"
batch_size = 3
device = "cpu"
[dpo]
model = "{model}"
batch_size = 3
device = "cpu"
[rrhf]
model = "{model}"
batch_size = 3
device = "cpu"
[ppo]
model = "{model}"
prompts_per_step = 3
completions_per_prompt = 2
ppo_epochs = 1
max_tokens = 12
device = "cpu"
[evaluate]
prompts = "booking-eval"
limit = 8
max_tokens = 12
min_mass = 0.0
start = {{ model = "{model}", device = "cpu" }}
completions = 2
judges = [{{ model = "{model}", device = "cpu" }}]
"""


@pytest.mark.slow
def test_the_whole_comparison_on_a_tiny_model(tiny_model: Path, tmp_path: Path) -> None:
    """Every part runs, and a comparison that is asked for more does only what is new."""
    from train.cli import main

    recipe, folder = tmp_path / "compare.toml", tmp_path / "compare"

    def compare(algorithms: str, parts: str) -> dict[str, Any]:
        words = {"algorithms": algorithms, "parts": parts, "folder": folder, "model": tiny_model}
        recipe.write_text(RECIPE.format(**words))
        assert main(["compare", "--recipe", str(recipe)]) == 0
        found: dict[str, Any] = json.loads((folder / "comparison.json").read_text())
        return found

    def times() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (folder / "jobs").iterdir()}

    record = compare('"sft", "bon", "dpo", "rrhf", "ppo"', '"methods"')
    assert set(record["methods"]) == {"sft", "bon", "dpo", "rrhf", "ppo"}
    for algorithm, row in record["methods"].items():
        rate = row["win_rate"][str(tiny_model)]["win_rate"]
        assert rate["prompts"] == 8
        assert row["kl"] is not None
        assert row["peak_mib"] > 0
        if algorithm != "bon":
            assert row["tokens"] == pytest.approx(record["tokens"], rel=0.5)
            names = [point["name"] for point in record["curves"][algorithm]]
            assert len(names) == 3  # the start, a copy on the way, the end
            assert {"start", f"{algorithm}-0"} < set(names)
    assert record["methods"]["bon"]["kl"] == pytest.approx(best_of_n_kl(2))
    page = (folder / "comparison.html").read_text()
    for heading in ("Against the starting policy", "Gold against KL", "Equal tokens"):
        assert heading in page
    assert page == render_comparison(record)
    before = times()
    record = compare('"bon", "ppo"', '"methods", "labels", "bias"')
    assert before.items() <= times().items()
    assert set(record["bias"]["labels"]) == {"hard", "soft", "corrected"}
    for row in record["bias"]["labels"].values():
        assert set(row) == {"bon", "ppo"}
        assert row["ppo"]["length_change"]["n"] == row["ppo"]["gold_change"]["n"] == 8
    assert record["labels"]["win_rate_difference"]["n"] == 8
    page = (folder / "comparison.html").read_text()
    for heading in ("against gold labels", "A judge that likes length"):
        assert heading in page
