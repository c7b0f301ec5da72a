"""The report of a run: whatever stages are there are shown, and nothing is invented."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from test_gate import leave

from feedback.errors import InputError
from feedback.page import PageOptions
from feedback.page import run as write_page
from feedback.page.run_report import write_run_report
from feedback.records import Preference
from feedback.report import ReportOptions
from feedback.report import run as report
from feedback.shards import ShardWriter, write_json
from feedback.simulation import Planted, simulate


def estimate(value: float | None, reach: float = 0.1) -> dict[str, object]:
    low, high = (None, None) if value is None else (value - reach, value + reach)
    return {"value": value, "low": low, "high": high, "n": 40, "prompts": 40, "method": "m"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with every stage."""
    folder = tmp_path_factory.mktemp("run-x")
    verdicts = leave(simulate(Planted(soft=True), prompts=40), folder, gold=False)
    report(ReportOptions(verdicts=verdicts, replicates=100))
    with ShardWriter[Preference](folder / "preferences", "preferences") as writer:
        for number in range(30):
            p = 0.5 + number / 60
            writer.append(
                Preference(
                    prompt=[{"role": "user", "content": f"ask {number}"}],
                    chosen=[{"role": "assistant", "content": f"good {number}"}],
                    rejected=[{"role": "assistant", "content": "bad " * 20}],
                    margin=2 * p - 1,
                    p_chosen=p,
                    prompt_id=f"p{number // 2}",
                    tie=number == 0,
                )
            )
        writer.finish({"gate": {"status": "accepted", "accepted": ["length_bias"]}})
    (folder / "policy-dpo").mkdir()
    rows = [{"step": step, "loss": 1 / step, "rewards/margins": step / 9} for step in range(1, 9)]
    (folder / "policy-dpo/loss.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluation = {
        "policy": "new",
        "start": "old",
        "win_rate": {
            "second-judge": {"win_rate": estimate(0.71), "at_equal_length": estimate(None)}
        },
        "gold": {"before": estimate(0.5), "after": estimate(0.8), "gain": estimate(0.3)},
        "kl": {"per_token": estimate(0.02, 0.01), "unbiased": True},
    }
    write_json(folder / "evaluation/evaluation.json", evaluation)
    replies = [
        {
            "prompt": f"q{number}",
            "start": f"old {number}",
            "new": f"new {number}",
            "p_new": {"j": p},
        }
        for number, p in enumerate((0.2, 0.9, 0.6, None))
    ]
    (folder / "evaluation/rows.jsonl").write_text("\n".join(map(json.dumps, replies)))
    write_json(folder / "stages/judge.json", {"stage": "judge", "seconds": 90.0})
    return folder


def test_every_stage_has_its_part(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_page(PageOptions(run=finished))
    assert f"report: {finished / 'report.html'}" in " ".join(capsys.readouterr().out.split())
    page = (finished / "report.html").read_text(encoding="utf-8")
    sections = re.findall(r'<section id="([^"]+)"', page)
    assert sections == [
        "result",
        "before-after",
        "judge",
        "labels",
        "examples",
        "policy-dpo",
        "verdicts",
        "provenance",
    ]
    words = " ".join(page.split())
    assert "Win rate by second-judge" in words
    assert "71.0%" in words
    assert "Gold check, gain" in words
    assert "wall time" in words
    assert "1.5 minutes" in words
    assert "accepted by name: length_bias" in words
    assert words.index("new 1") < words.index("new 2") < words.index("new 0")  # best to worst
    assert "new 3" not in words
    assert words.count('aria-label="rewards/margins over step') == 1


def test_examples_are_the_surest_to_the_least_sure(finished: Path, tmp_path: Path) -> None:
    path = write_run_report(finished, out=tmp_path / "page.html", examples=2, browse_rows=0)
    words = " ".join(path.read_text(encoding="utf-8").split())
    assert "The surest label. P(chosen preferred) = 0.983" in words
    assert "The least sure label. P(chosen preferred) = 0.517" in words
    assert "All verdicts" not in words


def test_a_run_of_one_stage(tmp_path: Path) -> None:
    leave(simulate(Planted(), prompts=10), tmp_path, gold=False)
    page = write_run_report(tmp_path).read_text(encoding="utf-8")
    assert re.findall(r'<section id="([^"]+)"', page) == ["judge", "verdicts", "provenance"]
    assert "60 calls and how they ended" in page


def test_nothing_to_show_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no finished stage"):
        write_run_report(tmp_path)
    with pytest.raises(InputError, match="no such folder"):
        write_run_report(tmp_path / "none")


def test_a_damaged_evaluation_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/evaluation.json").write_text("{")
    with pytest.raises(InputError, match=r"evaluation\.json: not valid JSON"):
        write_run_report(tmp_path)
