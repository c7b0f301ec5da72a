"""The first option of a command may go without its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedback.errors import RecipeError
from feedback.importing import ImportOptions
from feedback.merge import MergeOptions
from feedback.report import ReportOptions
from feedback.versions import DiffOptions
from train.cli import parse_options


def test_first_option_without_its_name() -> None:
    options = parse_options(ReportOptions, "report", ["runs/x/verdicts", "--seed", "3"])
    assert options.verdicts == Path("runs/x/verdicts")
    assert options.seed == 3
    named = parse_options(ReportOptions, "report", ["--seed", "3", "--verdicts", "runs/x/verdicts"])
    assert named == options


def test_a_missing_first_option_is_named() -> None:
    with pytest.raises(RecipeError, match="needs --source, --out"):
        parse_options(ImportOptions, "import", ["--format", "mt_bench"])


def test_bare_words_go_to_the_first_options_in_order() -> None:
    options = parse_options(DiffOptions, "diff", ["v1", "me/set@tag", "--examples", "2"])
    assert (options.old, options.new, options.examples) == (Path("v1"), Path("me/set@tag"), 2)
    merged = parse_options(MergeOptions, "merge", ["a", "b", "c", "--out", "all"])
    assert merged.sources == (Path("a"), Path("b"), Path("c")) and merged.out == Path("all")


def test_a_word_too_many_is_an_error() -> None:
    with pytest.raises(SystemExit):
        parse_options(DiffOptions, "diff", ["a", "b", "c"])
