"""The whole chain from one recipe: sample, judge, report, pair, train, evaluate, page.

Each stage is the command of the same name, run in a process of its own (so that a judge's memory is
free before training starts). A stage is fingerprinted by its resolved options and the content of
everything it reads; one whose fingerprint and outputs are unchanged is skipped, and says so. A
stage that was killed is run again and resumes by itself.

``python -m train.pipeline STAGE OPTIONS.json`` runs one stage; ``rlaif run`` calls that.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback.config import build_options, load_recipe, option_values
from feedback.errors import RecipeError, RlaifError, nearest
from feedback.installed import package_versions
from feedback.records import content_id
from feedback.shards import MANIFEST, file_sha256, write_json
from train.commands import COMMANDS, load

__all__ = ["PipelineOptions", "run"]

DEFAULT_STAGES = ("sample", "judge", "report", "pair", "dpo", "evaluate", "page")

# Which option of a stage is filled with which part of the run's folder, where the recipe is silent.
WIRING: dict[str, dict[str, Any]] = {
    "sample": {"out": "candidates"},
    "revise": {"candidates": "candidates", "out": "revised"},
    "sft": {"data": ("revised",), "output": "policy-sft"},
    "judge": {"candidates": "candidates", "out": "verdicts"},
    "report": {"verdicts": "verdicts", "candidates": "candidates", "out": "report-card"},
    "pair": {"verdicts": "verdicts", "candidates": "candidates", "out": "."},
    "reward": {"data": ("preferences",), "output": "reward-model"},
    "dpo": {"data": ("preferences",), "output": "policy-dpo"},
    "rrhf": {"data": ("rankings",), "output": "policy-rrhf"},
    "ppo": {"output": "policy-ppo"},
    "evaluate": {"out": "evaluation", "policy": {"model": "policy-dpo"}},
    "page": {"run": "."},
}


@dataclass(frozen=True, kw_only=True)
class PipelineOptions:
    """The whole chain from one recipe; unchanged stages are skipped."""

    folder: Path
    """Folder of the run; each stage writes a folder of its own inside."""
    stages: tuple[str, ...] = DEFAULT_STAGES
    """Stages to run, in order; each is a command and has a table of that name in the recipe."""
    force: tuple[str, ...] = ()
    """Stages to run even though nothing changed."""
    recipe: str = ""
    """The recipe itself; filled by --recipe."""

    def __post_init__(self) -> None:
        """Refuse stages that do not exist."""
        for stage in (*self.stages, *self.force):
            if stage not in COMMANDS or stage == "run":
                raise RecipeError(f"unknown stage {stage!r}{nearest(stage, COMMANDS)}")


def run(options: PipelineOptions) -> None:
    """Run the stages in order.

    Raises:
        RecipeError: a table or key of the recipe is wrong; all are checked before the first stage.
        RlaifError: a stage failed; what it finished is kept and resumed by the next run.
    """
    recipe = load_recipe(options.recipe) if options.recipe else {}
    if unknown := next((name for name in recipe if name not in COMMANDS), None):
        raise RecipeError(
            f"unknown table [{unknown}]{nearest(unknown, COMMANDS)}", path=options.recipe
        )
    tables = {
        stage: _resolve(stage, recipe, options, revised="revise" in options.stages[:place])
        for place, stage in enumerate(options.stages)
    }
    for number, (stage, table) in enumerate(tables.items(), start=1):
        label = f"[{number}/{len(tables)}] {stage}"
        fingerprint = _fingerprint(stage, table)
        record = options.folder / "stages" / f"{stage}.json"
        if stage not in options.force and _unchanged(record, fingerprint):
            print(f"{label}: unchanged, skipped", flush=True)
            continue
        print(label, flush=True)
        seconds = _run_stage(stage, table, options.folder / "stages")
        outputs = {str(path): content_hash(path) for path in _outputs(stage, table)}
        write_json(
            record,
            {
                "stage": stage,
                "fingerprint": fingerprint,
                "outputs": outputs,
                "seconds": round(seconds, 2),
                "options": table,
                "versions": package_versions(),
            },
        )


def _resolve(
    stage: str, recipe: dict[str, Any], options: PipelineOptions, *, revised: bool = False
) -> dict[str, Any]:
    """Return a stage's table with the run's folders filled in, checked against its options.

    Args:
        stage: a command's name.
        recipe: tables by command.
        options: of the chain.
        revised: a ``revise`` stage stands before this one, which then reads what that one wrote.
    """
    kind = load(COMMANDS[stage].options)
    known = {entry.name for entry in dataclasses.fields(kind)}
    wired = {
        key: _inside(options.folder, value)
        for key, value in _wiring(stage, revised=revised).items()
        if key in known
    }
    table = _merged(wired, recipe.get(stage, {}))
    if "on_change" in known:
        # A changed recipe starts the stage over; what the old one made is kept beside it.
        table.setdefault("on_change", "set-aside")
    option_values(kind, table, path=options.recipe or None)
    build_options(kind, table, path=f"{options.recipe} [{stage}]")
    return table


def _wiring(stage: str, *, revised: bool) -> dict[str, Any]:
    wiring = dict(WIRING.get(stage, {}))
    if stage == "sft" and not revised:
        del wiring["data"]
    if revised and "candidates" in wiring:
        wiring["candidates"] = "revised"
    return wiring


def _inside(folder: Path, value: Any) -> Any:
    """Return the wiring's names as paths inside the run's folder."""
    if isinstance(value, tuple):
        return [str(folder / name) for name in value]
    if isinstance(value, dict):
        return {key: _inside(folder, name) for key, name in value.items()}
    return str(folder / value)


def _merged(wired: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return the wiring with the recipe's values over it, nested tables included."""
    merged = dict(wired)
    for key, value in given.items():
        name = key.replace("-", "_")
        if isinstance(value, dict) and isinstance(merged.get(name), dict):
            value = _merged(merged[name], value)
        merged[name] = value
    return merged


def _output_keys(stage: str) -> list[str]:
    return [key for key in WIRING.get(stage, {}) if key in ("out", "output")]


def _outputs(stage: str, table: dict[str, Any]) -> list[Path]:
    """Return what a stage has written: its output folder, or for ``pair`` the two row folders."""
    folders = [Path(table[key]) for key in _output_keys(stage) if key in table]
    if stage == "pair":
        folders = [folder / name for folder in folders for name in ("preferences", "rankings")]
    if stage == "page":
        folders = [Path(table["run"]) / "report.html"]
    return [folder for folder in folders if folder.exists()]


def _fingerprint(stage: str, table: dict[str, Any]) -> str:
    """Return the hash of a stage's options and of the content of each file or folder they name."""
    outputs = {table[key] for key in _output_keys(stage) if key in table}
    inputs = {
        word: content_hash(Path(word))
        for word in sorted(set(_words(table)) - outputs)
        if stage != "page" and _is_path(word)
    }
    if stage == "page":
        inputs = {"now": str(time.time_ns())}
    return content_id(stage, table, inputs, length=64)


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _words(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _words(item)


def _is_path(word: str) -> bool:
    return bool(word) and len(word) < 1024 and "\n" not in word and Path(word).exists()


def content_hash(path: Path) -> str:
    """Return a hash of a file, of a finished shard folder's manifest, or of a folder's files."""
    if path.is_file():
        return file_sha256(path)
    if (path / MANIFEST).is_file():
        return file_sha256(path / MANIFEST)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and not file.name.startswith("."):
            digest.update(f"{file.relative_to(path)}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def _unchanged(record: Path, fingerprint: str) -> bool:
    if not record.is_file():
        return False
    known = json.loads(record.read_text(encoding="utf-8"))
    if known["fingerprint"] != fingerprint:
        return False
    return all(
        Path(path).exists() and content_hash(Path(path)) == sha256
        for path, sha256 in known["outputs"].items()
    )


def _run_stage(stage: str, table: dict[str, Any], folder: Path) -> float:
    """Run one stage in a process of its own; return its wall time in seconds."""
    resolved = folder / f"{stage}-options.json"
    write_json(resolved, table)
    started = time.monotonic()
    command = [sys.executable, "-m", "train.pipeline", stage, str(resolved)]
    code = subprocess.run(command, check=False).returncode
    if code:
        error = RlaifError(f"stage {stage!r} ended with exit code {code}; run again to continue it")
        error.exit_code = code if code > 0 else 1
        raise error
    return time.monotonic() - started


def _stage_main(stage: str, resolved: Path) -> int:
    """Run one stage from its resolved options file; the child process of ``_run_stage``."""
    table = json.loads(resolved.read_text(encoding="utf-8"))
    function: Callable[[Any], Any] = load(COMMANDS[stage].function)
    try:
        result = function(build_options(load(COMMANDS[stage].options), table))
    except RlaifError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(_stage_main(sys.argv[1], Path(sys.argv[2])))
