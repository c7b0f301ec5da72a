"""One version of a data set, wherever it lies: shards, a published folder, or the Hub.

``open_version`` gives its rows and the manifests of the stages behind them; the rest of the
toolkit then need not know where they came from. A version on the Hub is ``user/name``, or
``user/name@TAG`` for one that was published before.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from feedback.errors import BackendError, InputError
from feedback.publish_manifest import MANIFEST as PUBLICATION
from feedback.publish_manifest import parse
from feedback.publish_schema import CONFIGS, row_of
from feedback.shards import KINDS, MANIFEST, folder_kind, manifest_sha256, read_manifest, read_rows

__all__ = ["Version", "open_version"]

_ON_HUB = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?")
_BATCH = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Version:
    """A version's rows and what is recorded of them."""

    kind: str
    """Of its rows, one of ``KINDS``."""
    identity: str
    """Hash of the shards' manifest, or the tag of the publication."""
    manifests: list[dict[str, Any]]
    """Of the stages that made the rows."""
    folder: Path | None = None
    """Shard folder; None: ``files`` hold the rows."""
    files: list[Path] = field(default_factory=list)
    """Parquet files of a publication."""

    def rows(self) -> Iterator[Any]:
        """Stream the rows.

        Raises:
            InputError: a row is damaged, or no row of this kind.
        """
        if self.folder is not None:
            yield from read_rows(self.folder, KINDS[self.kind])
            return
        for path in self.files:
            yield from _published_rows(path, self.kind)


def open_version(source: Path, *, config: str, scratch: Path) -> Version:
    """Return a version.

    Args:
        source: a shard folder, a folder that ``rlaif publish`` wrote, or ``user/name[@TAG]``.
        config: which rows of a publication.
        scratch: folder for what must be fetched from the Hub.

    Raises:
        InputError: there is no such version, or it lacks the config.
        BackendError: the Hub cannot be reached.
    """
    if (manifest := _publication(source)) is not None:
        return _published(source, manifest, config)
    if source.exists():
        kind = folder_kind(source)
        identity = manifest_sha256(source) if (source / MANIFEST).is_file() else ""
        manifest = read_manifest(source)
        return Version(kind=kind, identity=identity, manifests=[manifest], folder=source)
    found = _ON_HUB.fullmatch(str(source))
    if found is None:
        raise InputError("no such folder, nor user/name[@TAG] on the Hub", path=source)
    folder = _fetched(found["repo"], found["revision"], config, scratch)
    manifest = _publication(folder)
    if manifest is None:
        raise InputError("was not published by rlaif publish: it has no manifest", path=source)
    return _published(folder, manifest, config)


def _publication(folder: Path) -> dict[str, Any] | None:
    path = folder / PUBLICATION
    return parse(path.read_bytes()) if path.is_file() else None


def _published(folder: Path, manifest: dict[str, Any], config: str) -> Version:
    if config not in CONFIGS or config not in manifest["rows"]:
        there = ", ".join(manifest["rows"])
        raise InputError(f"holds no {config!r} (there are: {there}; --config)", path=folder)
    files = [folder / file["path"] for file in manifest["files"]]
    behind = [
        json.loads((folder / source["manifest"]).read_text(encoding="utf-8"))
        for source in manifest["sources"]
        if source["config"] == config
    ]
    return Version(
        kind=config,
        identity=manifest["tag"],
        manifests=behind,
        files=[file for file in files if file.parent.name == config],
    )


def _fetched(repo: str, revision: str | None, config: str, scratch: Path) -> Path:
    """Fetch the manifests of a publication and the Parquet files of one config."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    network = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    wanted = [PUBLICATION, "manifests/*", f"{config}/*"]
    name = repo if revision is None else f"{repo}@{revision}"
    try:
        return Path(
            snapshot_download(
                repo,
                repo_type="dataset",
                revision=revision,
                allow_patterns=wanted,
                local_dir=scratch / name.replace("/", "-"),
            )
        )
    except (network, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BackendError(
            f"{name} is no folder here, and cannot be fetched from the Hub: {lines[0]}"
        ) from error


def _published_rows(path: Path, config: str) -> Iterator[Any]:
    from pyarrow import parquet

    number = 0
    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH):
            for record in batch.to_pylist():
                number += 1
                try:
                    yield row_of(record, config)
                except (ValueError, KeyError, TypeError) as error:
                    raise InputError(
                        f"not a published row of {config}: {error}", path=path, line=number
                    ) from error
