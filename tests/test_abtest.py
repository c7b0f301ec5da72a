"""The A/B test end to end: real judges on a made-up gold set; every misuse ends in a clear line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from feedback.abtest import AbtestOptions, ArmOptions
from feedback.abtest_run import abtest
from feedback.config import EngineOptions, build_options, recipe_table
from feedback.errors import InputError, RecipeError
from feedback.records import Candidates, Completion, GoldPair, Preference, encode

JUDGE = EngineOptions(model="pocket:judge")


def made(number: int) -> Candidates:
    times = ["5 pm", "6:30 pm", "7 pm", "8:15 pm"]
    cities = ["San Jose", "Oakland", "Seattle", "Chicago", "Boston"]
    time, city = times[number % 4], cities[number % 5]
    prompt = f"I'd like to book a table for {number % 7 + 2} in {city} at {time}."
    good = f"Sure. At which restaurant would you like a table for {number % 7 + 2} in {city}?"
    bad = ["Figure it out yourself.", "What is the weather like on the moon today?"][number % 2]
    texts = {"good": good, "bad": bad}
    return Candidates(
        prompt_id=f"p{number}",
        prompt=prompt,
        completions=[
            Completion(completion_id=name, completion=text, model="people")
            for name, text in texts.items()
        ],
    )


def write(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(b"".join(encode(row) + b"\n" for row in rows))
    return path


@pytest.fixture
def options(tmp_path: Path) -> AbtestOptions:
    rows = [made(number) for number in range(24)]
    gold = [GoldPair(prompt_id=row.prompt_id, a="good", b="bad", label="a") for row in rows]
    return AbtestOptions(
        candidates=write(tmp_path / "candidates.jsonl", rows),
        gold=write(tmp_path / "gold.jsonl", gold),
        out=tmp_path / "out",
        arms=(
            ArmOptions(template="pairwise", rubric="booking", engine=JUDGE),
            ArmOptions(template="pairwise-numbers", rubric="booking", engine=JUDGE),
        ),
    )


def test_two_templates_are_compared_and_written(
    options: AbtestOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    result = abtest(options)
    assert result is not None
    assert [figures.name for figures in result.figures] == ["pairwise", "pairwise-numbers"]
    assert result.figures[0].accuracy.value is not None
    assert result.figures[0].accuracy.value > 0.8
    assert result.figures[0].calls == 48
    written = json.loads((options.out / "abtest.json").read_text())
    assert written["comparisons"][0]["conclusion"] in ("equivalent", "undecided")
    page = (options.out / "abtest.html").read_text()
    assert "pairwise-numbers" in page and "http://" not in page.replace("http://www.w3.org", "")
    # A second run asks nothing again: the verdicts are on disk.
    before = (options.out / "arms" / "pairwise" / "verdicts-00000.jsonl").read_bytes()
    abtest(options)
    assert (options.out / "arms" / "pairwise" / "verdicts-00000.jsonl").read_bytes() == before


def test_the_default_recipe_runs_as_it_stands(root: Path, tmp_path: Path) -> None:
    """``make abtest`` on a fresh clone, cut to 20 pairs."""
    path = root / "recipes" / "abtest.toml"
    given = build_options(AbtestOptions, recipe_table(path, "abtest"), path=path)
    for source in (given.candidates, given.gold, *given.training):
        assert (root / source).is_file(), source
    result = abtest(
        replace(
            given,
            candidates=root / given.candidates,
            gold=root / given.gold,
            training=tuple(root / source for source in given.training),
            out=tmp_path / "out",
            max_calls=200,
        )
    )
    assert result is not None
    assert len(result.names) == 5 and len(result.items) == 20
    assert result.figures[0].accuracy.value is not None
    assert result.figures[0].accuracy.value > 0.8


def test_looks_and_halving(options: AbtestOptions) -> None:
    arms = (*options.arms, ArmOptions(template="pairwise-brief", engine=JUDGE))
    result = abtest(replace(options, arms=arms, halving=True, looks=2, out=options.out / "more"))
    assert result is not None
    assert len(result.names) == 2 and result.names[0] == "pairwise"
    assert any("halving" in note for note in result.notes)
    assert result.comparisons[0].e_value is not None
    assert len(result.items) <= 12


def test_a_judge_no_better_than_a_coin_is_said_so(options: AbtestOptions, tmp_path: Path) -> None:
    """Gold turned round: the same verdicts are now nearly all wrong."""
    rows = [made(number) for number in range(24)]
    gold = [GoldPair(prompt_id=row.prompt_id, a="good", b="bad", label="b") for row in rows]
    result = abtest(replace(options, gold=write(tmp_path / "turned.jsonl", gold)))
    assert result is not None
    assert "right less often than a coin on this gold: pairwise, pairwise-numbers" in result.notes
    few = abtest(replace(options, max_calls=8, out=tmp_path / "few"))
    assert few is not None
    assert (
        "not shown to be better than a coin on this gold: pairwise, pairwise-numbers" in few.notes
    )


def test_halving_keeps_to_its_calls(options: AbtestOptions) -> None:
    arms = (*options.arms, ArmOptions(template="pairwise-brief", engine=JUDGE))
    result = abtest(replace(options, arms=arms, halving=True, max_calls=60))
    assert result is not None
    asked = [
        line
        for path in (options.out / "arms").glob("*/verdicts-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert 40 <= len(asked) <= 60
    # What chose the survivor takes no part in the comparison.
    assert len(result.items) == 60 // 2 // 4


def test_too_few_pairs_are_said_before_anything_is_asked(
    options: AbtestOptions, capsys: pytest.CaptureFixture[str]
) -> None:
    abtest(replace(options, max_calls=8))
    said = capsys.readouterr().out
    assert "warning: with so few pairs the likely answer is 'undecided'" in said
    assert "2 gold pairs to compare 2 arms on" in said and "80% needs" in said


def test_plan_asks_nothing(options: AbtestOptions, capsys: pytest.CaptureFixture[str]) -> None:
    assert abtest(replace(options, plan=True)) is None
    assert not (options.out / "arms").exists()
    assert "24 gold pairs" in capsys.readouterr().out


def test_identical_arms_are_refused(options: AbtestOptions) -> None:
    twice = replace(options, arms=(options.arms[0], replace(options.arms[0], name="again")))
    with pytest.raises(RecipeError, match="arms 1 and 2 are identical"):
        abtest(twice)
    with pytest.raises(RecipeError, match="two or more"):
        abtest(replace(options, arms=options.arms[:1]))


def test_gold_with_ties_only_is_refused(options: AbtestOptions, tmp_path: Path) -> None:
    ties = [GoldPair(prompt_id="p0", a="good", b="bad", label="tie")]
    with pytest.raises(InputError, match="all 1 gold pairs are ties"):
        abtest(replace(options, gold=write(tmp_path / "ties.jsonl", ties)))


def test_gold_about_other_texts_is_refused(options: AbtestOptions, tmp_path: Path) -> None:
    lost = [GoldPair(prompt_id="p0", a="good", b="other", label="a")]
    with pytest.raises(InputError, match="'other' are not all in"):
        abtest(replace(options, gold=write(tmp_path / "lost.jsonl", lost)))


def test_prompts_shared_with_training_are_refused(options: AbtestOptions, tmp_path: Path) -> None:
    row = made(3)
    seen = Preference(
        prompt=row.prompt, chosen="x", rejected="y", margin=1.0, p_chosen=1.0, prompt_id="t"
    )
    folder = tmp_path / "preferences"
    folder.mkdir()
    write(folder / "preferences-00000.jsonl", [seen])
    with pytest.raises(InputError, match="shares 1 prompts"):
        abtest(replace(options, training=(folder,)))


def test_a_template_that_never_parses_is_refused(options: AbtestOptions, tmp_path: Path) -> None:
    template = tmp_path / "mute.toml"
    template.write_text(
        'name = "mute"\nkind = "pairwise"\nmode = "rationale"\nlabels = ["YES", "NO"]\n'
        'max_tokens = 4\ncompare_with = "nothing"\n'
        'user = "{prompt} {completion_a} {completion_b} Say hello."\n'
    )
    mute = ArmOptions(template=str(template), engine=JUDGE)
    with pytest.raises(InputError, match="arm 'mute' gave no verdict on any of 24 pairs"):
        abtest(replace(options, arms=(options.arms[0], mute)))
