"""The recipes that the docs show are recipes."""

from __future__ import annotations

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
