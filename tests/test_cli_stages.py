"""The commands sample, judge, pair and evaluate as users call them: clear errors, no secret."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripted import Scripted, write_candidates

from feedback import labeling
from feedback.config import EngineOptions, recipe_of
from feedback.labeling import JudgeOptions
from train.cli import main


def lines(path: Path, *rows: object) -> str:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return str(path)


def refused(words: list[str], capsys: pytest.CaptureFixture[str], *expected: str) -> None:
    """The command ends with exit code 2 and one line that holds all of ``expected``."""
    assert main(words) == 2
    shown = capsys.readouterr().err.strip()
    assert shown.startswith("error: ")
    assert len(shown.splitlines()) == 1, shown
    for part in expected:
        assert part in shown


def test_sample_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    path = lines(tmp_path / "p.jsonl", {"prompt": "x"}, '{"prompt": ')
    refused(["sample", "--prompts", path, "--out", str(out)], capsys, f"{path}:2:", "not JSON")
    path = lines(tmp_path / "p.jsonl", {"prompt": "x"}, {"prompt": "x"})
    refused(["sample", "--prompts", path, "--out", str(out)], capsys, f"{path}:2:", "occurs twice")
    refused(["sample", "--prompts", "none.jsonl", "--out", str(out)], capsys, "no such file")
    assert not out.exists()


def test_judge_names_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    path = lines(tmp_path / "c.jsonl", {"prompt_id": "p", "prompt": "", "completions": []})
    refused(["judge", "--candidates", path, "--out", str(out)], capsys, f"{path}:1:", "empty")
    write_candidates(Path(path), {"p": [1.0, 2.0]})
    judge = ["judge", "--candidates", path, "--out", str(out)]
    refused([*judge, "--template", "pairwize"], capsys, "did you mean 'pairwise'")
    refused([*judge, "--rubric", "bookings"], capsys, "did you mean 'booking'")
    refused([*judge, "--min-mass", "2"], capsys, "min_mass is 2.0")
    refused([*judge, "--engine.model", str(tmp_path / "none")], capsys, "cannot load")
    assert not out.exists()


def test_a_flag_may_stand_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    candidates = write_candidates(tmp_path / "c.jsonl", {"p": [1.0, 2.0]})
    words = ["judge", "--candidates", str(candidates), "--out", str(tmp_path / "out")]
    for flag in (["--dry-run"], ["--dry-run", "True"], ["--dry_run"]):
        assert main([*words, *flag, "--seed", "3"]) == 0
        assert main([*words, "--seed", "3", *flag]) == 0
        assert capsys.readouterr().out.count("nothing was sent") == 2
    assert not (tmp_path / "out").exists()


def test_labels_that_are_not_single_tokens(
    tmp_path: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str], root: Path
) -> None:
    template = (root / "prompts/judges/pairwise-brief.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(template.replace('["A", "B"]', '["First", "Second"]'))
    candidates = write_candidates(tmp_path / "c.jsonl", {"p": [1.0, 2.0]})
    words = ["judge", "--candidates", str(candidates), "--out", str(tmp_path / "out")]
    words += ["--template", str(path), "--engine.model", str(tiny_model)]
    refused(words, capsys, "label 'First' is no single token", "A and B")
    assert not (tmp_path / "out").exists()


def test_pair_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pair", "--verdicts", str(tmp_path), "--candidates", "c", "--out", str(tmp_path)]
    refused(words, capsys, "has not finished")
    refused(["evaluate"], capsys, "needs the trained policy")


def test_a_spending_limit_has_an_exit_code_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(labeling, "open_backend", lambda options: Scripted("judge"))
    candidates = write_candidates(tmp_path / "c.jsonl", {"p": [1.0, 2.0, 3.0]})
    words = ["judge", "--candidates", str(candidates), "--out", str(tmp_path / "out")]
    assert main([*words, "--max-calls", "4"]) == 3
    assert "--max-calls 4" in capsys.readouterr().err
    assert main(words) == 0


def test_ctrl_c_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(call: object) -> bool:
        if len(engine.calls) > 3:
            raise KeyboardInterrupt
        return False

    engine = Scripted("j", fail=interrupt)
    monkeypatch.setattr(labeling, "open_backend", lambda options: engine)
    candidates = write_candidates(tmp_path / "c.jsonl", {"p": [1.0, 2.0, 3.0]})
    words = ["judge", "--candidates", str(candidates), "--out", str(tmp_path / "out")]
    assert main(words) == 130
    said = capsys.readouterr()
    assert "run the same command to continue" in said.err
    assert said.out.count("3 verdicts in ") == 1
    assert "(decided 3)" in said.out


SECRETS = ("sk-the-key", "pass-word", "query-secret", "header-secret")


def secret_engine(base_url: str) -> EngineOptions:
    return EngineOptions(
        backend="openai",
        model="m",
        base_url=base_url,
        max_retries=0,
        timeout_s=2.0,
        extra={"headers": {"X-Token": "header-secret"}, "total_s": 3.0, "transport": "http"},
    )


def test_no_secret_reaches_any_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A dead endpoint, which makes the loudest errors; everything written is searched."""
    from feedback.errors import RlaifError

    monkeypatch.setenv("OPENAI_API_KEY", "sk-the-key")
    base_url = "http://user:pass-word@127.0.0.1:9/v1?token=query-secret"
    options = JudgeOptions(
        candidates=write_candidates(tmp_path / "c.jsonl", {"p": [1.0, 2.0]}),
        out=tmp_path / "out" / "verdicts",
        engine=secret_engine(base_url),
    )
    said = ""
    try:
        labeling.run(options)
    except RlaifError as error:
        said = str(error)
    captured = capsys.readouterr()
    said += captured.out + captured.err + json.dumps(recipe_of(options))
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            said += path.read_bytes().decode(errors="replace")
    for secret in SECRETS:
        assert secret not in said
    assert '"X-Token"' in said, "the names of headers are kept"
