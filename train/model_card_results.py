"""The model card's part on results: metrics of the run, and how it did in evaluation."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from feedback.dataset_card_making import public_model
from feedback.markdown import code, plain, table

__all__ = ["evaluation_sections", "metrics_section"]

_REWARD_REPORT = "report.json"
_LABELS = {
    "win_rate": "win rate",
    "preference": "mean probability of the new policy",
    "consistent_win_rate": "win rate where both orders agree",
    "at_equal_length": "win rate at equal length",
    "preference_at_equal_length": "mean probability at equal length",
}


def metrics_section(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield the run's figures, as they were logged last."""
    figures = {
        name: value
        for name, value in record["figures"].items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if record.get("stopped"):
        yield f"The run was stopped: {plain(record['stopped'])}."
    yield "## Metrics"
    yield "As logged last; of training unless the name begins with `eval`."
    yield table(["figure", "value"], [[code(k), f"{v:.6g}"] for k, v in figures.items()])


def evaluation_sections(
    folder: Path, record: Mapping[str, Any], *, labelled_by: Collection[str] = ()
) -> Iterator[str]:
    """Yield the reward model's report and the evaluations of this very run that lie beside it.

    Args:
        folder: of the run.
        record: content of ``training.json``.
        labelled_by: judges of the training labels; an evaluation by one of them is called that.
    """
    yield "## Evaluation"
    found = [*_reward_report(folder)]
    for path in _evaluations(folder):
        found += _evaluation(json.loads(path.read_text(encoding="utf-8")), labelled_by)
    if not found:
        found = ["None is recorded." if not _held_out(record) else
                 "None besides the held-out figures above."]  # fmt: skip
    yield from found


def _held_out(record: Mapping[str, Any]) -> bool:
    return any(name.startswith("eval") for name in record["figures"])


def _evaluations(folder: Path) -> list[Path]:
    """Return evaluations beside the folder that are of it, and younger than its weights."""
    trained = folder / "training.json"
    if not trained.is_file():
        return []
    found = []
    for path in sorted(folder.parent.glob("*/evaluation.json")):
        policy = json.loads(path.read_text(encoding="utf-8")).get("policy", "")
        younger = path.stat().st_mtime >= trained.stat().st_mtime
        if Path(policy).name == folder.name and younger:
            found.append(path)
    return found


def _evaluation(evaluation: Mapping[str, Any], labelled_by: Collection[str]) -> Iterator[str]:
    yield f"Against {code(public_model(evaluation['start']))} on {evaluation['prompts']:,} prompts:"
    rows: list[list[str]] = []
    for judge, rates in evaluation["win_rate"].items():
        for name, words in _LABELS.items():
            own = " (which labelled the training data)" if judge in labelled_by else ""
            rows += _row(f"{words}, by {code(public_model(judge))}{own}", rates.get(name))
    for part, words in (("gold", "programmatic check"), ("length", "length"), ("kl", "KL")):
        for name, value in (evaluation.get(part) or {}).items():
            rows += _row(f"{words}: {plain(name.replace('_', ' '))}", value)
    yield table(["figure", "value", "95% interval", "n"], rows)
    others = [judge for judge in evaluation["win_rate"] if judge not in labelled_by]
    if others and labelled_by:
        names = ", ".join(code(public_model(judge)) for judge in others)
        yield f"{names} labelled no training row."


def _row(words: str, estimate: Any) -> list[list[str]]:
    """Return one row of an estimate; nothing where it has no value."""
    if not isinstance(estimate, Mapping) or estimate.get("value") is None:
        return []
    low, high = estimate.get("low"), estimate.get("high")
    span = "" if low is None or high is None else f"{low:.3f} to {high:.3f}"
    return [[words, f"{estimate['value']:.3f}", span, f"{estimate['n']:,}"]]


def _reward_report(folder: Path) -> Iterator[str]:
    path = folder / _REWARD_REPORT
    if not path.is_file():
        return
    report = json.loads(path.read_text(encoding="utf-8"))
    yield f"As a reward model, on {plain(report['data'])} ({report['pairs']:,} pairs):"
    rows = _row("accuracy", {"n": report["pairs"], **report["accuracy"]})
    ece = report["calibration"]["ece"]
    if ece is not None:
        rows.append(["calibration error (ECE)", f"{ece:.3f}", "", f"{report['pairs']:,}"])
    yield table(["figure", "value", "95% interval", "n"], rows)
    bins = report["calibration"].get("bins") or []
    shown = [
        row
        for part in bins
        for row in _row(f"{part['confidence']:.3f}", {"n": part["accuracy"]["pairs"],
                                                      **part["accuracy"]})
    ]  # fmt: skip
    if shown:
        yield table(["its confidence", "agrees with the judge", "95% interval", "pairs"], shown)
