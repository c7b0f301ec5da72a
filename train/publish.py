"""``rlaif publish``: shard folders become a data set, and a trained model's folder a model.

Of a model only what loads without running code leaves: weights as safetensors, the tokenizer, JSON
and the card. Pickled weights are refused; what only resuming needs stays behind, and is named.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from feedback.errors import InputError
from feedback.progress import say
from feedback.publish import PublishOptions, publish, stop_at
from feedback.publish_hub import HubRepository
from feedback.publish_manifest import CARD, KIND, MANIFEST, public_card, public_manifest
from feedback.publish_plan import require_terms
from feedback.publish_scan import describe
from feedback.publish_tree import PublishedTree
from feedback.records import content_id
from feedback.scan import KINDS, ScanReport, find, redact, scan
from feedback.shards import SCHEMA_VERSION, file_sha256, write_json, write_text
from train.model_card import RECORD, ModelDetails, model_card

__all__ = ["is_model", "publish_model", "run"]

_CONFIGS = ("config.json", "adapter_config.json")
_PICKLED = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib")
_RESUMING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state", "state")
_KEPT = (".safetensors", ".json", ".jsonl", ".jinja", ".model", ".txt", ".png")
_PLACES = ("_name_or_path", "name_or_path", "base_model_name_or_path")
_VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
"""Files whose texts are the tokenizer's, not people's: anything can be found in them."""


class _Model(NamedTuple):
    """A model's files that leave, and those that stay."""

    files: dict[str, Path | str]
    """By name: a file as it is, or the text that takes its place."""
    left: list[str]
    found: ScanReport


def run(options: PublishOptions) -> None:
    """Publish a model's folder, or shard folders."""
    if any(is_model(folder) for folder in options.folders):
        publish_model(options)
    else:
        publish(options)


def is_model(folder: Path) -> bool:
    """Return whether a folder is a model's, or an adapter's."""
    return any((folder / name).is_file() for name in _CONFIGS)


def publish_model(options: PublishOptions) -> str:
    """Publish the folder of one trained model; return where it is.

    Raises:
        InputError: the weights are pickled, something was found that must not leave, the terms
            are not stated, or the Hub refused.
        BackendError: the Hub or the way to it failed; the same command continues.
    """
    if len(options.folders) > 1:
        raise InputError("publish a model's folder by itself", path=options.folders[1])
    (folder,) = options.folders
    options.check()
    record = _record(folder)
    trained_on = (*record.get("data", []), *record.get("reward_data", []))
    manifests = [source["manifest"] for source in trained_on if "manifest" in source]
    require_terms([*manifests, record.get("options", {})], options.judge_terms)
    model = _gather(folder, options)
    for line in describe(model.found, model.found.counts):
        say(line)
    stop_at(options, model.found.counts)
    if model.left:
        say(f"left behind: {', '.join(model.left)}")
    if options.to is not None:
        return _to_folder(model, folder, options, options.to)
    return _to_hub(model, folder, options)


def _record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return record


def _gather(folder: Path, options: PublishOptions) -> _Model:
    """Return the files that leave, scanned.

    Raises:
        InputError: weights are pickled, or there are none.
    """
    files: dict[str, Path | str] = {}
    left = []
    report = ScanReport()
    replaced: set[str] = {kind for kind in KINDS if options.redact and kind not in options.allow}
    for path in sorted(folder.iterdir()):
        if path.suffix in _PICKLED and not path.stem.startswith(_RESUMING):
            raise InputError(
                "is a pickle, which runs code when it is loaded; save the weights as safetensors "
                "(model.save_pretrained) and remove it",
                path=path,
            )
        if not path.is_file() or path.suffix not in _KEPT or path.name == MANIFEST:
            left += [path.name] if path.name != CARD else []
        elif path.suffix in (".safetensors", ".model", ".png") or path.name in _VOCABULARY:
            files[path.name] = path
        else:
            files[path.name] = _scanned(path, report, replaced, options.region)
    if not any(name.endswith(".safetensors") for name in files):
        raise InputError("holds no weights as safetensors", path=folder)
    return _Model(files, left, report)


def _scanned(path: Path, report: ScanReport, replaced: set[str], region: str) -> Path | str:
    """Return a text file, or its text where something in it is replaced; counts what was found."""
    text = path.read_text(encoding="utf-8")
    kept = text
    if path.suffix == ".json":
        before = json.loads(text)
        after = public_manifest(before) if path.name == RECORD else _without_places(before)
        if after != before:
            kept = json.dumps(after, indent=2, ensure_ascii=False) + "\n"
    # Figures look like phone and card numbers; a model's JSON holds nobody's.
    wanted = {"secret", "endpoint", "path", "email"}
    spans = [span for span in find(kept, region) if span.kind in wanted]
    if spans:
        found = scan([(path.name, {"text": kept})], region=region)
        for kind in {span.kind for span in spans}:
            report.counts[kind] += found.counts[kind]
            report.rows_with[kind] += 1
            report.examples.setdefault(kind, []).extend(found.examples[kind][:1])
        kept = redact(kept, [span for span in spans if span.kind in replaced])
    return path if kept == text else kept


def _without_places(config: Any) -> Any:
    """Return a configuration that names models and not the folders they lay in on this machine."""
    if not isinstance(config, dict):
        return config
    return {key: public_manifest(v) if key in _PLACES else v for key, v in config.items()}


def _card(folder: Path, repo: str | None, options: PublishOptions) -> str:
    """Return the model's card: made from the run's record, or as it lies in the folder."""
    if (folder / RECORD).is_file():
        details = ModelDetails(
            license=options.license,
            language=options.language,
            tags=options.tags,
            judge_terms=options.judge_terms,
            citation=options.citation,
        )
        return public_card(model_card(folder, repo=repo, details=details), options.allow)
    if (folder / CARD).is_file():
        return (folder / CARD).read_text(encoding="utf-8")
    raise InputError(
        f"holds neither {RECORD} (of a run by this toolkit) nor {CARD}: write a card", path=folder
    )


def _manifest(model: _Model) -> dict[str, Any]:
    files = [
        {
            "path": name,
            "sha256": file_sha256(content) if isinstance(content, Path) else _hash(content),
        }
        for name, content in model.files.items()
    ]
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "tag": f"model-{content_id(files, length=16)}",
        "sources": [],
        "rows": {},
        "files": files,
        "found": dict(model.found.counts),
    }


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _to_folder(model: _Model, folder: Path, options: PublishOptions, to: Path) -> str:
    manifest, card = _manifest(model), _card(folder, None, options)
    with PublishedTree(to) as tree:
        fresh = tree.tag != manifest["tag"]
        if fresh:
            for name, content in model.files.items():
                _write(to / name, content)
            write_json(to / MANIFEST, manifest)
        changed = tree.write_card(card) or fresh
    say(f"model in {to}" if changed else f"nothing has changed: {to} holds this model already")
    return str(to)


def _write(path: Path, content: Path | str) -> None:
    if isinstance(content, str):
        write_text(path, content)
        return
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.copyfile(content, temporary)
    temporary.replace(path)


def _to_hub(model: _Model, folder: Path, options: PublishOptions) -> str:
    assert options.repo is not None
    hub = HubRepository(options.repo, "model", public=options.public)
    manifest = _manifest(model)
    texts = {CARD: _card(folder, hub.name, options), MANIFEST: json.dumps(manifest, indent=2)}
    files: dict[str, Path | bytes] = {
        name: content.encode() if isinstance(content, str) else content
        for name, content in {**model.files, **texts}.items()
    }
    message = f"Publish a model ({manifest['tag']})"
    changed = hub.commit(files, message, tag=manifest["tag"], stale=hub.stale(files))
    if changed:
        say(f"model at {hub.address}, version {manifest['tag']}")
    else:
        say(f"nothing has changed: {hub.address} holds this model already")
    return hub.address
