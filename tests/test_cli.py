"""The command line: every command answers --help lightly, and mistakes end in one clear line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from feedback.config import build_options, load_recipe
from feedback.templates import load_rubric, load_template, prompts_folder
from train.cli import main
from train.commands import COMMANDS

HEAVY = "{'torch', 'vllm', 'transformers', 'trl', 'datasets'}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_loads_nothing_heavy(name: str) -> None:
    code = (
        "import sys\nfrom train.cli import main\n"
        f"try:\n    main([{name!r}, '--help'])\n"
        "except SystemExit as end:\n    assert not end.code\n"
        f"heavy = {HEAVY} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: rlaif" in done.stdout


def test_overview_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name}" in shown for name in COMMANDS)


def test_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["jugde"]) == 2
    assert "did you mean 'judge'?" in capsys.readouterr().err


def test_unknown_option_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "--betta", "0.1"]) == 2
    assert "did you mean '--beta'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--max-calls", "many"], "--max-calls takes a whole number, not 'many'"),
        (["--engine.concurrency=1.5"], "--engine.concurrency takes a whole number, not '1.5'"),
        (["--max_cost", "--seed"], "--max_cost takes a number, not '--seed'"),
    ],
)
def test_words_where_a_number_belongs(
    words: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["judge", "--candidates", "x", "--out", "y", *words]) == 2
    assert capsys.readouterr().err == f"error: rlaif judge: {problem}\n"


@pytest.mark.parametrize("words", [["judge", "--help"], ["--help"]])
def test_a_reader_that_goes_away_is_no_traceback(words: list[str]) -> None:
    """As ``rlaif judge --help | head -1`` has it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "train.cli", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 128 + 13
    process.stderr.close()


def test_missing_options_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "--beta", "0.1"]) == 2
    assert "rlaif dpo needs --data, --output" in capsys.readouterr().err


def test_unknown_recipe_key_names_file_and_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text("[dpo]\nbeta_ = 0.2\n")
    assert main(["dpo", "--recipe", str(recipe)]) == 2
    shown = capsys.readouterr().err
    assert str(recipe) in shown and "did you mean 'beta'?" in shown


def test_wrong_type_in_recipe_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[dpo]\nbeta = "strong"\n')
    assert main(["dpo", "--recipe", str(recipe)]) == 2
    assert "beta is 'strong'" in capsys.readouterr().err


def test_missing_and_broken_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dpo", "--recipe", str(tmp_path / "none.toml")]) == 2
    assert "no such recipe" in capsys.readouterr().err
    broken = tmp_path / "broken.toml"
    broken.write_text("[dpo\n")
    assert main(["dpo", "--recipe", str(broken)]) == 2
    assert "not valid TOML" in capsys.readouterr().err


def recipes() -> list[Path]:
    return sorted((Path(__file__).parent.parent / "recipes").glob("**/*.toml"))


@pytest.mark.parametrize("path", recipes(), ids=lambda path: path.name)
def test_every_recipe_in_the_tree_loads(path: Path) -> None:
    import importlib

    for stage, table in load_recipe(path).items():
        assert stage in COMMANDS, f"{path}: [{stage}] is no command"
        module, _, name = COMMANDS[stage].options.partition(":")
        build_partial(getattr(importlib.import_module(module), name), table, path)


def build_partial(kind: type, table: dict[str, object], path: Path) -> None:
    from feedback.config import option_values, required_fields

    values = option_values(kind, table, path=path)
    if not set(required_fields(kind)) - set(values):
        build_options(kind, table, path=path)


@pytest.mark.parametrize("path", sorted(prompts_folder().glob("judges/*.toml")), ids=str)
def test_every_template_in_the_tree_loads(path: Path) -> None:
    template = load_template(str(path))
    assert template.name == path.stem
    assert template.compare_with
    assert load_rubric(template.rubric)
