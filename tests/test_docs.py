"""The recipes that the docs show are recipes."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from feedback.config import option_values
from train.commands import COMMANDS, load

_BLOCK = re.compile(r"```toml\n(.*?)```", re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """Return every TOML block of the docs with its page's name."""
    pages = sorted((Path(__file__).parent.parent / "docs").glob("*.md"))
    return [(page.name, block) for page in pages for block in _BLOCK.findall(page.read_text())]


@pytest.mark.parametrize(("page", "block"), blocks())
def test_recipes_of_the_docs_hold_known_keys(page: str, block: str) -> None:
    for name, table in tomllib.loads(block).items():
        option_values(load(COMMANDS[name].options), table, path=f"{page} [{name}]")


def test_the_claim_about_reply_parsers_is_what_was_measured(root: Path) -> None:
    """Rows, styles and shares as in the result, and nothing left out in silence."""
    result = json.loads((root / "benchmarks/results/parse.json").read_text(encoding="utf-8"))
    page = (root / "docs/judging.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if "recorded replies of published judges" in line)
    figures, sources = result["figures"], result["runs"]["sources"]
    words = {6: "six", 8: "eight"}
    checked = {row["style"] for row in sources if any(key.startswith("checked") for key in row)}
    assert f"{figures['rows_all']:,} recorded replies" in line
    assert f"in {words[figures['styles']]} styles" in line
    assert f"in the {figures['rows']:,} that can be checked ({words[len(checked)]} styles)" in line
    assert f"{figures['agreement']:.1%} read as stored" in line
    assert f"over all rows, {figures['agreement_all_rows']:.1%}" in line
    for row in sources:
        left = sum(
            count
            for key, count in row.items()
            if key.startswith(("verdict stored apart", "shown order not recorded"))
        )
        assert not left or (f"(style `{row['style']}`) | " in page and f" {left} " in page)
    assert f"The {figures['rows_all'] - figures['rows']:,} recorded replies" in page


def test_the_rounds_of_the_docs_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's script as it stands, on fewer prompts and in two rounds."""
    page = (Path(__file__).parent.parent / "docs" / "rounds.md").read_text()
    script = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    script = script.replace("limit=24", "limit=8").replace("rounds=3", "rounds=2")
    exec(script, {})
    policy = tmp_path / "runs" / "rounds" / "policy"
    weights = policy / "round-2" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    exec(script, {})  # everything is done: nothing is trained again
    assert weights.stat().st_mtime_ns == before
    assert not (policy / "round-3").exists()
