"""The card of a trained model: data, judge, recipe, metrics, curves, evaluation.

Made from what the run's folder holds (``training.json``, its log, a reward model's report) and an
evaluation beside it; nothing else is known or claimed. ``write_model_card`` leaves README.md and
the picture of the curves in the folder at the end of every run; publishing makes the card again,
with what only the person who publishes knows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feedback.dataset_card_making import making_sections, public_model
from feedback.dataset_card_trust import bias_sections
from feedback.errors import InputError
from feedback.hub_metadata import check_languages, check_license, header, is_repository
from feedback.markdown import code, fence, plain, quote, table
from feedback.provenance import Origin, origins_in
from feedback.recipe_text import recipe_table
from feedback.shards import write_text
from train.commands import COMMANDS, load
from train.model_card_results import evaluation_sections, metrics_section
from train.training_curves import CURVES, draw_curves

__all__ = ["ModelDetails", "model_card", "write_ensemble_card", "write_model_card"]

RECORD = "training.json"
_DONE = {
    "sft": "supervised fine-tuning",
    "reward": "training as a reward model",
    "dpo": "direct preference optimisation",
    "rrhf": "RRHF (ranked responses)",
    "ppo": "proximal policy optimisation",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDetails:
    """What no record of a run knows, and the person who publishes may say."""

    license: str | None = None
    """Licence identifier of the Hub, or ``other``."""
    language: tuple[str, ...] = ()
    """ISO 639 codes."""
    tags: tuple[str, ...] = ()
    """Tags besides the card's own."""
    datasets: tuple[str, ...] = ()
    """Data sets on the Hub that it was trained on."""
    judge_terms: str | None = None
    """The terms attached to the judge's outputs, in the user's words."""
    citation: str | None = None
    """BibTeX or text."""


def write_model_card(folder: Path, record: Mapping[str, Any] | None = None) -> Path:
    """Write README.md and the picture of the curves into a run's folder; return README.md.

    Args:
        folder: of the run.
        record: content of ``training.json``; None: as it lies in the folder.

    Raises:
        InputError: the folder holds no finished run, or its log is damaged.
    """
    draw_curves(folder)
    path = folder / "README.md"
    write_text(path, model_card(folder, record=record))
    return path


def model_card(
    folder: Path,
    *,
    repo: str | None = None,
    details: ModelDetails | None = None,
    record: Mapping[str, Any] | None = None,
) -> str:
    """Return README.md of a trained model, with its YAML header.

    Args:
        folder: of a finished training run.
        repo: ``user/name`` on the Hub; None: named by the folder.
        details: what the person who publishes says.
        record: content of ``training.json``; None: as it lies in the folder.

    Raises:
        InputError: the folder holds no finished run; a licence or language the Hub would refuse.
    """
    record = _read_record(folder) if record is None else record
    details = details or ModelDetails()
    name = (repo or folder.name).rpartition("/")[2]
    origins = _origins(record)
    base = code(public_model(record["options"]["model"]))
    parts = [
        f"# {plain(name)}",
        f"{base} after {_DONE[record['command']]} with `rlaif {record['command']}`"
        + (", on labels of an AI judge." if any(o.judging for o in origins) else "."),
        *_data(record),
        *_judge(origins, details),
        *_recipe(record),
        *metrics_section(record),
        *_curves(folder),
        *evaluation_sections(folder, record, labelled_by=_labelled_by(origins, record)),
        *_loading(record["command"], repo or folder.name),
        *_citation(details.citation),
    ]
    adapter = (folder / "adapter_config.json").is_file()
    return (
        _header(record, details, adapter=adapter) + "\n" + "\n\n".join(filter(None, parts)) + "\n"
    )


def write_ensemble_card(folder: Path, members: Sequence[str], *, rule: str) -> Path:
    """Write README.md of an ensemble of reward models; return it.

    Args:
        folder: of the ensemble; its report lies in it.
        members: subfolders of finished runs; data and recipe are theirs in common.
        rule: how their scores are combined.

    Raises:
        InputError: a member's folder holds no finished run.
    """
    record = _read_record(folder / members[0])
    record["options"] |= {"rule": rule}
    links = ", ".join(f"[{plain(name)}]({name}/README.md)" for name in members)
    parts = [
        f"# {plain(folder.name)}",
        f"{code(public_model(record['options']['model']))} after {_DONE['reward']} with "
        f"`rlaif reward`: an ensemble of {len(members)} reward models, trained from different "
        f"seeds and combined by rule {code(rule)}. Each has a card of its own: {links}.",
        *_data(record),
        *_judge(_origins(record), ModelDetails()),
        *_recipe(record),
        *evaluation_sections(folder, record),
        "## Loading",
        fence(
            "from train.reward_model import load_reward_model\n"
            f"scores = load_reward_model({json.dumps(folder.name)}).score(prompts, completions)",
            "python",
        ),
    ]
    path = folder / "README.md"
    text = _header(record, ModelDetails(), adapter=False) + "\n" + "\n\n".join(parts) + "\n"
    write_text(path, text)
    return path


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        raise InputError(f"no {RECORD}: no training run has finished here", path=folder)
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _header(record: Mapping[str, Any], details: ModelDetails, *, adapter: bool) -> str:
    options = record["options"]
    base = str(options["model"])
    known = is_repository(base) and not Path(base).exists()
    task = "text-classification" if record["command"] == "reward" else "text-generation"
    return header(
        {
            "license": details.license and check_license(details.license),
            "language": check_languages(details.language),
            "library_name": "peft" if adapter else "transformers",
            "pipeline_tag": task,
            "base_model": base if known else None,
            "base_model_relation": ("adapter" if adapter else "finetune") if known else None,
            "datasets": list(details.datasets),
            "tags": list(dict.fromkeys(("rlaif", record["command"], *details.tags))),
        }
    )


def _origins(record: Mapping[str, Any]) -> list[Origin]:
    """Return the judgings behind the training data, or behind PPO's reward models."""
    found: dict[str, Origin] = {}
    for entry in (*record.get("data", []), *record.get("reward_data", [])):
        manifest = entry.get("manifest")
        if manifest:
            name = Path(entry["source"]).name
            for origin in origins_in(name, manifest, entry["identity"]):
                key = origin.judging.get("manifest_sha256") or origin.manifest_sha256
                found.setdefault(key, origin)
    return list(found.values())


def _labelled_by(origins: Sequence[Origin], record: Mapping[str, Any]) -> set[str]:
    """Return the judges whose verdicts the policy was trained on."""
    judges = {str(judge["model"]) for origin in origins for judge in origin.judges}
    reward = record["options"].get("reward") or {}
    return judges | ({str(reward["judge"]["model"])} if reward.get("kind") == "judge" else set())


def _data(record: Mapping[str, Any]) -> Iterator[str]:
    yield "## Data"
    entries = [*record.get("data", []), *record.get("reward_data", [])]
    if entries:
        rows = [
            [
                code(Path(entry["source"]).name),
                f"{entry['rows']:,}" if "rows" in entry else "",
                code(entry["identity"]),
            ]
            for entry in entries
        ]
        yield table(["source", "rows", "identity (hash of the manifest, or of the files)"], rows)
    if record["command"] == "ppo":
        options = record["options"]
        prompts = ", ".join(code(Path(name).name) for name in options["prompts"])
        yield f"Prompts: {prompts}; {record['figures'].get('prompts', 0):,} were used."
        yield f"Reward: {_reward(options['reward'])}."
    report = record.get("data_report")
    if report:
        counted = [f"{report['groups']:,} prompts", f"{report['completions']:,} completions"]
        if report.get("rankings"):
            counted.append(f"{report['rankings']:,} rankings")
        if report["pairs"]:
            counted.append(f"{report['pairs']:,} pairs ({report['ties']:,} ties)")
        yield ", ".join(counted) + "."
        if report["warnings"]:
            warned = "\n".join(f"- {plain(message)}" for message in report["warnings"])
            yield f"Warnings while reading:\n\n{warned}"


def _reward(source: Mapping[str, Any]) -> str:
    """Return where PPO's rewards came from, in words."""
    if source["kind"] == "model":
        models = ", ".join(code(public_model(name)) for name in source["models"])
        return f"reward model {models}" + (
            f", combined by {source['ensemble']}" if len(source["models"]) > 1 else ""
        )
    if source["kind"] == "judge":
        judge = code(public_model(source["judge"]["model"]))
        return f"judge {judge} with template {code(source['template'])}"
    return f"function {code(source['function'])}" if source["function"] else "none"


def _judge(origins: Sequence[Origin], details: ModelDetails) -> Iterator[str]:
    judged = [origin for origin in origins if origin.judging]
    if judged:
        yield "## Judge"
        yield from making_sections(judged)[1:]
        for origin in judged:
            yield from bias_sections(origin)
    if details.judge_terms:
        yield f"Terms attached to the judge's outputs:\n\n{quote(details.judge_terms)}"


def _recipe(record: Mapping[str, Any]) -> Iterator[str]:
    command = record["command"]
    lines = recipe_table(command, record["options"], load(COMMANDS[command].options))
    yield "## Recipe"
    yield f"`rlaif {command} --recipe recipe.toml --output OUT` with:"
    yield fence("\n".join(lines), "toml")
    versions = record.get("versions", {})
    yield f"Made with {', '.join(f'{plain(k)} {plain(v)}' for k, v in versions.items())}."


def _curves(folder: Path) -> Iterator[str]:
    if (folder / CURVES).is_file():
        yield "## Curves"
        yield f"![What was logged during training, over steps]({CURVES})"


def _loading(command: str, name: str) -> Iterator[str]:
    kind = "AutoModelForSequenceClassification" if command == "reward" else "AutoModelForCausalLM"
    yield "## Loading"
    yield fence(
        f"from transformers import AutoTokenizer, {kind}\n"
        f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(name)})\n"
        f"model = {kind}.from_pretrained({json.dumps(name)})",
        "python",
    )


def _citation(citation: str | None) -> Iterator[str]:
    if citation:
        yield "## Citation"
        yield fence(citation.strip(), "bibtex" if citation.lstrip().startswith("@") else "text")
