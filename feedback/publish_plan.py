"""What is to be published, checked before any work: folders, gate, terms, and a name for it all.

The name, a tag on the Hub, is made of the folders' manifest hashes and of the settings that change
rows: the same shards have the same tag wherever they are published from.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from feedback.dataset_card import CardDetails, dataset_card
from feedback.errors import InputError, ShardError
from feedback.gate import check_gate, require_gate
from feedback.merge import split_of
from feedback.overlap import shipped_sets
from feedback.publish import PublishOptions
from feedback.publish_manifest import public_card
from feedback.publish_schema import CONFIGS
from feedback.records import content_id
from feedback.scan import KINDS
from feedback.shards import (
    KINDS as ROW_KINDS,
)
from feedback.shards import (
    MANIFEST,
    file_sha256,
    folder_kind,
    manifest_sha256,
    read_manifest,
    read_rows,
    shard_paths,
)

__all__ = ["Plan", "Source", "make_plan", "require_terms"]

_UNASKED = ("preferences", "rankings")
"""Kinds taken from a run's folder; the others leave only when they are named."""


class Source(NamedTuple):
    """One shard folder that is published."""

    folder: Path
    config: str
    split: str | None
    """The split that all of its rows belong to, where rlaif merge has split them."""
    rows: int
    manifest_sha256: str

    def read(self) -> Iterator[Any]:
        """Stream the rows."""
        yield from read_rows(self.folder, ROW_KINDS[self.config])

    @property
    def name(self) -> str:
        """Return the name of this source among those published."""
        return self.config if self.split is None else f"{self.config}-{self.split}"


@dataclass(frozen=True)
class Plan:
    """A publication that may go ahead, as far as can be told without reading rows."""

    options: PublishOptions
    sources: tuple[Source, ...]
    gates: tuple[Mapping[str, Any], ...]
    """Gate records of the folders that have one."""
    repo: str | None = None

    @property
    def configs(self) -> list[str]:
        """Return the configs, in the order in which they are listed."""
        found = {source.config for source in self.sources}
        return [config for config in CONFIGS if config in found]

    @property
    def rows(self) -> int:
        """Return how many rows the manifests speak of."""
        return sum(source.rows for source in self.sources)

    @property
    def replaced(self) -> list[str]:
        """Return the kinds of findings that are replaced by their names."""
        options = self.options
        return [kind for kind in KINDS if options.redact and kind not in options.allow]

    @property
    def drops_evaluation(self) -> bool:
        """Return whether rows of prompts in evaluation sets are left out."""
        return self.options.redact and "evaluation" not in self.options.allow

    @property
    def evaluation_sets(self) -> list[Path]:
        """Return the evaluation sets to hold prompts against."""
        return [*shipped_sets(), *self.options.eval_set]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Return the settings that change which rows are published, and how."""
        sets = {path.name: file_sha256(path) for path in self.evaluation_sets}
        return {
            "splits": self.options.shares,
            "seed": self.options.seed,
            "replaced": self.replaced,
            "region": self.options.region if self.replaced else None,
            "without": sets if self.drops_evaluation else None,
        }

    @cached_property
    def tag(self) -> str:
        """Return the name of this version."""
        sources = [(s.config, s.split, s.manifest_sha256) for s in self.sources]
        return f"manifest-{content_id(sources, self.settings, length=16)}"

    def split(self, source: Source, prompt_id: str) -> str:
        """Return the split of a prompt's rows."""
        return source.split or split_of(prompt_id, self.options.shares, seed=self.options.seed)

    def card(self, manifest: Mapping[str, Any]) -> str:
        """Return the card of the publication that ``manifest`` describes."""
        options = self.options
        assert options.license is not None
        accepted = [name for gate in self.gates for name in gate.get("accepted", [])]
        details = CardDetails(
            license=options.license,
            language=options.language,
            judge_terms=options.judge_terms,
            prompt_license=options.prompt_license,
            tags=options.tags,
            scan_summary={k: n for k, n in manifest["found"].items() if k != "evaluation"},
            redacted=tuple(self.replaced),
            overlap_summary=manifest["overlap"],
            accepted_bias=tuple(dict.fromkeys(accepted)),
            citation=options.citation,
        )
        folders = [source.folder for source in self.sources]
        text = dataset_card(folders, repo=self.repo, splits=manifest["rows"], details=details)
        return public_card(text, options.allow)


def make_plan(options: PublishOptions) -> Plan:
    """Check everything that needs no row to be read.

    Raises:
        GateRefused: a judge fails its report card, and nobody accepted that by name.
        InputError: a folder is none that can be published, or the terms are not stated.
    """
    for path in options.eval_set:
        if not path.is_file():
            raise InputError("no such evaluation set", path=path)
    sources = _sources(options.folders)
    gates = [_gate(source, options.accept_bias) for source in sources]
    require_terms((read_manifest(source.folder) for source in sources), options.judge_terms)
    return Plan(options, tuple(sources), tuple(gate for gate in gates if gate))


def _sources(folders: Sequence[Path]) -> list[Source]:
    found = [_source(inner) for folder in folders for inner in _expand(folder)]
    for source in found:
        for other in found:
            same = other is not source and other.config == source.config
            if same and (other.split == source.split or source.split is None):
                raise ShardError(
                    f"holds {source.config}, as {other.folder} does; join them with rlaif merge",
                    path=source.folder,
                )
    return sorted(found, key=lambda source: (CONFIGS.index(source.config), source.split or ""))


def _expand(folder: Path) -> list[Path]:
    """Return a shard folder itself, or the labels that a run's folder holds."""
    if not folder.is_dir():
        raise ShardError("no such folder", path=folder)
    if (folder / MANIFEST).is_file() or any(shard_paths(folder, kind) for kind in ROW_KINDS):
        return [folder]
    inside = [
        path.parent
        for path in sorted(folder.glob(f"*/{MANIFEST}"))
        if read_manifest(path.parent).get("kind") in _UNASKED
    ]
    if not inside:
        raise ShardError(f"holds no {' or '.join(_UNASKED)} to publish", path=folder)
    return inside


def _source(folder: Path) -> Source:
    manifest = read_manifest(folder)
    kind = folder_kind(folder)
    if kind not in CONFIGS:
        raise ShardError(f"holds {kind}; what can be published: {', '.join(CONFIGS)}", path=folder)
    return Source(folder, kind, manifest.get("split"), manifest["rows"], manifest_sha256(folder))


def _gate(source: Source, accept: Sequence[str]) -> Mapping[str, Any] | None:
    """Return the folder's gate record, or refuse the folder."""
    if source.config == "verdicts":
        return check_gate(source.folder, accept=accept).manifest()
    return require_gate(source.folder, accept=accept)


def require_terms(manifests: Iterable[Mapping[str, Any]], terms: str | None) -> None:
    """Stop where somebody else's endpoint judged, and nobody says under which terms.

    Args:
        manifests: of the folders that are published, or that a model was trained on.
        terms: as stated.

    Raises:
        InputError: names the judge and the endpoint.
    """
    for judge in () if terms else (one for manifest in manifests for one in _judges(manifest)):
        endpoint = _endpoint(judge)
        if _is_hosted(endpoint):
            raise InputError(
                f"the judge {judge['model']} was asked at {endpoint}, whose terms cover "
                "what it wrote: state them with --judge-terms 'TEXT' (recipe: [publish] "
                "judge_terms)"
            )


def _judges(manifest: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield every judge that a manifest names, at whatever depth its making is recorded."""
    for key, value in manifest.items():
        if key in ("judge", "judges"):
            found = value if isinstance(value, list) else [value]
            yield from (one for one in found if isinstance(one, Mapping) and "model" in one)
        elif isinstance(value, Mapping):
            yield from _judges(value)
        elif isinstance(value, list):
            yield from (one for part in value if isinstance(part, Mapping) for one in _judges(part))


def _endpoint(judge: Mapping[str, Any]) -> str | None:
    """Return where a judge was asked: its identity says so, or the options of its engine."""
    if judge.get("backend") in ("openai", "batch"):
        return str(judge.get("base_url") or "api.openai.com")
    return judge.get("endpoint")


def _is_hosted(endpoint: str | None) -> bool:
    """Return whether an endpoint is somebody else's: neither this machine nor a private network."""
    if not endpoint:
        return False
    host = endpoint.rpartition("//")[2].partition("/")[0]
    host = host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        local = host == "localhost" or host.endswith((".local", ".internal", ".localhost"))
        return "." in host and not local
