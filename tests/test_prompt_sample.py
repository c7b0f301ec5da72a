"""The bounded sample behind a card: whole prompts, the same ones every time, and honest figures."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_gate import leave

from feedback.card import make_card
from feedback.gate import check_gate
from feedback.observations import collect
from feedback.prompt_sample import PromptSample
from feedback.records import Verdict
from feedback.report import ReportOptions
from feedback.report_run import read_evidence, run_report
from feedback.shards import read_rows
from feedback.simulation import Planted, simulate

PROMPTS = 400


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Verdicts of a judge with a known leaning, on many prompts."""
    planted = simulate(Planted(soft=True), prompts=PROMPTS)
    return leave(planted, tmp_path_factory.mktemp("sample"), gold=False)


def drawn(verdicts: list[Verdict], most: int, **kinds: object) -> PromptSample:
    sample = PromptSample(most, **kinds)  # type: ignore[arg-type]
    sample.read(verdicts)
    return sample


def test_whole_prompts_whatever_the_order_of_the_rows(folder: Path) -> None:
    rows = list(read_rows(folder, Verdict))
    sample = drawn(rows, len(rows) // 5)
    kept = list(sample.verdicts())
    assert len(rows) // 20 < len(kept) <= len(rows) // 5
    prompts = {row.prompt_id for row in kept}
    assert len(kept) == sum(row.prompt_id in prompts for row in rows)
    random.Random(1).shuffle(rows)
    other = drawn(rows, len(rows) // 5)
    assert {row.verdict_id for row in other.verdicts()} == {row.verdict_id for row in kept}
    record = sample.record()
    assert record is not None
    assert record["of_verdicts"] == len(rows) and record["verdicts"] == len(kept)


def test_everything_where_it_fits(folder: Path) -> None:
    rows = list(read_rows(folder, Verdict))
    sample = drawn(rows, len(rows))
    assert list(sample.verdicts()) == rows and sample.record() is None


def test_prompts_with_gold_are_always_in(folder: Path) -> None:
    rows = list(read_rows(folder, Verdict))
    gold = frozenset(sorted({row.prompt_id for row in rows})[:7])
    sample = drawn(rows, 100, always=gold)
    assert gold <= {row.prompt_id for row in sample.verdicts()}


def test_the_sample_says_what_the_whole_says(folder: Path) -> None:
    """The interval of the sampled figure holds the figure of all verdicts, and says its own n."""
    rows = list(read_rows(folder, Verdict))
    small = make_card(collect(drawn(rows, len(rows) // 3).verdicts()), replicates=200)
    whole = make_card(collect(rows), replicates=200)
    full = {figure.name: figure.estimate for _, figure in whole.figures()}
    for _, figure in small.figures():
        if figure.name in ("position_bias.order_consistency", "length_bias.prefer_longer"):
            value = full[figure.name].value
            assert value is not None
            assert figure.estimate.low is not None and figure.estimate.high is not None
            assert figure.estimate.low <= value <= figure.estimate.high
            assert figure.estimate.n < full[figure.name].n


@pytest.mark.parametrize(("prompts", "kept"), [(8_333, 49_680), (83_333, 31_032)])
def test_a_tenth_of_the_rows_can_keep_more_of_them(prompts: int, kept: int, root: Path) -> None:
    """The share is halved until the rest fits, which is why memory is bounded and not constant.

    These are the sizes of ``benchmarks/shards_scale.py``, 12 verdicts a prompt.
    """
    sample = PromptSample(50_000 // 12)
    rows: Any = (SimpleNamespace(prompt_id=f"prompt-{number}") for number in range(prompts))
    sample.read(rows)
    assert 12 * sum(1 for _ in sample.verdicts()) == kept
    assert f"{kept:,}" in (root / "docs/judging.md").read_text(encoding="utf-8")


def test_report_and_gate_say_that_they_drew(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "card"
    run_report(ReportOptions(verdicts=folder, out=out, most_verdicts=300, replicates=50))
    assert "drawn by their ids" in capsys.readouterr().out.replace("\n", " ")
    assert "verdicts used" in (out / "report.html").read_text()
    recorded = check_gate(out / "report.json").card["source"]["sampled"]
    assert recorded["prompts"] >= 1 and recorded["of_verdicts"] == len(
        list(read_rows(folder, Verdict))
    )
    assert read_evidence([folder], most=None).source["sampled"] is None
