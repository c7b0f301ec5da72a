"""How rows came to be, carried from stage to stage inside the manifests.

A published folder must say by itself who judged it, with which template in full and of what: the
folders it was made from may be gone by then. ``rlaif pair`` therefore copies into its manifests
what ``judging_record`` and ``sampling_record`` keep of the manifests before it, ``rlaif merge``
keeps those of each source, and ``origins_of`` reads them back from any folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedback.shards import MANIFEST, manifest_sha256, read_manifest
from feedback.templates import Template, describe

__all__ = [
    "Origin",
    "judging_record",
    "origins_in",
    "origins_of",
    "sampling_record",
    "template_record",
]

_COMMON = (
    "stage", "rows", "counts", "failed", "started", "versions", "recipe", "source", "format",
    "revision",
)  # fmt: skip
_JUDGING = (
    "judge", "judges", "template", "templates", "rubric", "orders", "pairs", "pairs_per_prompt",
    "repeats", "sampling", "read", "min_mass", "max_prompt_tokens", "seed", "choices", "criteria",
    "constitution", "combine", "cascade", "members", "panel", "prompts", "questions", "left_out",
    "totals",
)  # fmt: skip
_SAMPLING = (
    "policies", "completions", "temperatures", "top_p", "max_tokens", "system", "refills",
    "repeats", "seed", "limit", "prompts", "drawn", "prompts_sha256", "constitution",
    "counts_of_calls", "model", "revised_from",
)  # fmt: skip
_PAIRING = (
    "comparisons", "calibration_sha256", "remedy", "recipe", "counts", "rows", "versions", "stage",
    "source", "format", "revision",
)  # fmt: skip


def template_record(template: Template) -> dict[str, Any]:
    """Return a template in full, as a manifest keeps it."""
    return {
        **describe(template),
        "labels": list(template.labels),
        "tie": template.tie,
        "system": template.system,
        "user": template.user,
    }


def judging_record(folder: Path) -> dict[str, Any]:
    """Return what a verdict folder's manifest says of its judging, and the manifest's hash.

    Raises:
        ShardError: the folder is not finished.
    """
    return _record(folder, (*_COMMON, *_JUDGING))


def sampling_record(folder: Path) -> dict[str, Any] | None:
    """Return what a candidates folder's manifest says of its sampling; None for a plain file."""
    if not (folder / MANIFEST).is_file():
        return None
    return _record(folder, (*_COMMON, *_SAMPLING))


def _record(folder: Path, keys: Sequence[str]) -> dict[str, Any]:
    manifest = read_manifest(folder)
    kept = {key: manifest[key] for key in keys if key in manifest}
    return {"manifest_sha256": manifest_sha256(folder), **kept}


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """One judging behind a folder's rows; a merged folder has as many as were merged."""

    name: str
    """The folder's name."""
    manifest_sha256: str
    judging: Mapping[str, Any] = field(default_factory=dict)
    """Empty where nobody's verdicts are known: an import, or people's labels."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    pairing: Mapping[str, Any] = field(default_factory=dict)
    gate: Mapping[str, Any] = field(default_factory=dict)
    report: Path | None = None
    """The judge's full report card, where it still lies beside the folder."""

    @property
    def templates(self) -> list[dict[str, Any]]:
        """Return the templates in full, as far as the manifests hold them."""
        return list(self.judging.get("templates") or [])

    @property
    def judges(self) -> list[dict[str, Any]]:
        """Return the judges' identities."""
        one = self.judging.get("judge")
        return list(self.judging.get("judges") or ([one] if one else []))


def origins_of(folders: Sequence[Path]) -> list[Origin]:
    """Return the judgings behind finished shard folders, each once.

    Raises:
        ShardError: a folder is not finished.
    """
    found: dict[Any, Origin] = {}
    for folder in folders:
        manifest = read_manifest(folder)
        for origin in origins_in(
            folder.name, manifest, manifest_sha256(folder), beside=folder.parent
        ):
            judged = origin.judging.get("manifest_sha256")
            sampled = origin.sampling.get("manifest_sha256")
            key = (judged, sampled) if judged or sampled else origin.manifest_sha256
            before = found.get(key)
            if before is None or (origin.pairing and not before.pairing):
                found[key] = origin
    return _without_parts(list(found.values()))


def _without_parts(origins: list[Origin]) -> list[Origin]:
    """Leave out what only repeats the sampling that another origin's judging was of."""
    judged = {o.sampling.get("manifest_sha256") for o in origins if o.judging}
    verdicts = {o.judging.get("manifest_sha256") for o in origins if o.pairing and o.judging}

    def repeated(origin: Origin) -> bool:
        if not origin.judging:
            return origin.sampling.get("manifest_sha256") in judged - {None}
        return not origin.pairing and origin.judging["manifest_sha256"] in verdicts

    return [origin for origin in origins if not repeated(origin)]


def origins_in(
    name: str, manifest: Mapping[str, Any], sha256: str, *, beside: Path | None = None
) -> Iterator[Origin]:
    """Yield the judgings behind one folder, from its manifest.

    Args:
        name: the folder's name.
        manifest: its manifest; the list of shards may be missing.
        sha256: hash of the manifest.
        beside: folder in which candidates and report card are looked for; None: nowhere.
    """
    if manifest.get("sources"):
        for source in manifest["sources"]:
            yield from origins_in(source["folder"], source, source["manifest_sha256"])
        return
    own = {"manifest_sha256": sha256, **manifest}
    parts = manifest.get("provenance") or {}
    kind = manifest.get("kind")
    judging = own if kind == "verdicts" else parts.get("judging") or {}
    sampling = own if kind == "candidates" else parts.get("sampling") or {}
    if kind == "verdicts" and beside is not None:
        sampling = _sampling_beside(manifest, beside)
    paired = kind not in ("verdicts", "candidates")
    yield Origin(
        name=name,
        manifest_sha256=sha256,
        judging=judging,
        sampling=sampling,
        pairing={key: manifest[key] for key in _PAIRING if key in manifest} if paired else {},
        gate=manifest.get("gate") or {},
        report=_report_beside(judging, beside),
    )


def _sampling_beside(manifest: Mapping[str, Any], beside: Path) -> dict[str, Any]:
    """Return the record of the candidates that verdicts speak of, if they still lie beside."""
    folder = beside / "candidates"
    if not (folder / MANIFEST).is_file():
        return {}
    if manifest_sha256(folder) != manifest.get("candidates_sha256"):
        return {}
    return sampling_record(folder) or {}


def _report_beside(judging: Mapping[str, Any], beside: Path | None) -> Path | None:
    """Return the report card beside a folder, if it is of exactly these verdicts."""
    from feedback.card import read_card

    if beside is None or not judging:
        return None
    path = beside / "report-card" / "report.json"
    if not path.is_file():
        return None
    recorded = read_card(path).source.get("manifest_sha256")
    return path if recorded == [judging["manifest_sha256"]] else None
