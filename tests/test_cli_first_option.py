"""The first option of a command may go without its name."""

from __future__ import annotations

from pathlib import Path

import pytest

from feedback.errors import RecipeError
from feedback.importing import ImportOptions
from feedback.report import ReportOptions
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
