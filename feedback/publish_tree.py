"""The files of a publication in a folder: Parquet by config and split, card, manifests.

The manifest is written last: a folder without one was cut off, and its rows are written again. One
process writes a folder at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import filelock

from feedback.errors import InputError, ShardError
from feedback.installed import package_versions
from feedback.progress import ProgressBar, say
from feedback.publish_manifest import CARD, KIND, MANIFEST, parse, public_text, published_files
from feedback.publish_parquet import SplitWriter
from feedback.publish_scan import Survey, cleaned
from feedback.publish_schema import features, record_of
from feedback.shards import SCHEMA_VERSION, file_sha256, write_json, write_text

if TYPE_CHECKING:
    from feedback.publish_plan import Plan, Source

__all__ = ["PublishedTree"]

_LOCK = ".lock"


class PublishedTree:
    """A folder that holds a publication, or will.

    Args:
        folder: created if missing; locked until the end of the ``with`` block.

    Raises:
        InputError: the folder holds other files.
        ShardError: another process writes it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if folder.is_dir() and not (folder / _LOCK).exists() and any(folder.iterdir()):
            raise InputError("holds other files; give an empty or new folder", path=folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(folder / _LOCK, timeout=0)
            self._lock.acquire()
        except filelock.Timeout:
            raise ShardError("another run is writing this folder", path=folder) from None
        except OSError as error:
            raise InputError(f"cannot be written: {error.strerror}", path=folder) from error
        self.manifest: dict[str, Any] = self._whole() or {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    @property
    def tag(self) -> str | None:
        """Return the version that the folder holds, or None."""
        return self.manifest.get("tag")

    def _whole(self) -> dict[str, Any] | None:
        """Return the manifest if every file that it names is there as it was written."""
        path = self.folder / MANIFEST
        manifest = parse(path.read_bytes()) if path.is_file() else None
        if manifest is None:
            return None
        for file in manifest["files"]:
            place = self.folder / file["path"]
            if not place.is_file() or file_sha256(place) != file["sha256"]:
                return None
        return manifest

    def files(self) -> dict[str, Path]:
        """Return every file by its path in the publication."""
        return {name: self.folder / name for name in published_files(self.manifest)}

    def write_rows(self, plan: Plan, found: Survey) -> None:
        """Write all rows and the manifests, in place of an older version.

        Args:
            plan: what is published.
            found: by the pass over the same rows.

        Raises:
            InputError: no row is left to publish.
        """
        (self.folder / MANIFEST).unlink(missing_ok=True)
        kinds = {
            config: features(config, messages=found.messages[config]) for config in plan.configs
        }
        started = time.perf_counter()
        counts: Counter[str] = Counter()
        with ExitStack() as stack:
            bar = stack.enter_context(ProgressBar("writing Parquet", plan.rows))
            writers: dict[tuple[str, str], SplitWriter] = {}
            for source in plan.sources:
                open_writer = partial(self._writer, writers, stack, kinds)
                self._write_source(source, plan, found, open_writer, counts, bar)
        seconds = time.perf_counter() - started
        total = sum(writer.rows for writer in writers.values())
        if not total:
            raise InputError("no row is left to publish", path=plan.sources[0].folder)
        say(f"{total:,} rows written as Parquet, {total / max(seconds, 1e-9):,.0f} rows/s")
        for name, number in counts.items():
            say(f"  {name}: {number:,}")
        self._write_manifests(plan, found, writers, counts)
        self._remove_stale()

    def _remove_stale(self) -> None:
        """Remove what another version left, whole or cut off: the card's patterns would match."""
        known = {self.folder / name for name in published_files(self.manifest)}
        for pattern in ("*/*.parquet", "*/.*.tmp", "manifests/*.json"):
            for path in set(self.folder.glob(pattern)) - known:
                path.unlink()

    def _writer(
        self,
        writers: dict[tuple[str, str], SplitWriter],
        stack: ExitStack,
        kinds: Mapping[str, Any],
        config: str,
        split: str,
    ) -> SplitWriter:
        """Return the writer of a split, which is begun by its first row."""
        if (config, split) not in writers:
            begun = SplitWriter(self.folder, config, split, kinds[config])
            writers[config, split] = stack.enter_context(begun)
        return writers[config, split]

    def _write_source(
        self,
        source: Source,
        plan: Plan,
        found: Survey,
        open_writer: Callable[[str, str], SplitWriter],
        counts: Counter[str],
        bar: ProgressBar,
    ) -> None:
        config, messages = source.config, found.messages[source.config]
        drop = found.evaluation_prompts if plan.drops_evaluation else set()
        replaced, region = plan.replaced, plan.options.region
        for row in source.read():
            bar.advance()
            kept = cleaned(row, replaced, drop, counts, region=region)
            if kept is not None:
                writer = open_writer(config, plan.split(source, row.prompt_id))
                writer.add(record_of(kept, config, messages=messages))

    def _write_manifests(
        self,
        plan: Plan,
        found: Survey,
        writers: dict[tuple[str, str], SplitWriter],
        counts: Counter[str],
    ) -> None:
        sources = []
        for source in plan.sources:
            name = f"manifests/{source.name}.json"
            write_text(self.folder / name, public_text(source.folder / MANIFEST))
            sources.append(
                {
                    "config": source.config,
                    "split": source.split,
                    "rows": source.rows,
                    "manifest": name,
                    "manifest_sha256": source.manifest_sha256,
                }
            )
        files = [file for _, writer in sorted(writers.items()) for file in writer.files]
        self.manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "tag": plan.tag,
            "sources": sources,
            "settings": plan.settings,
            "rows": _rows(plan, writers),
            "found": dict(found.report.counts),
            "overlap": {name: len(prompts) for name, prompts in found.overlap.items()},
            "left_out": dict(counts),
            "files": [file._asdict() for file in files],
            "versions": package_versions(("rlaif", "datasets", "pyarrow")),
        }
        write_json(self.folder / MANIFEST, self.manifest)

    def write_card(self, text: str) -> bool:
        """Write the card; return whether it is another than before."""
        path = self.folder / CARD
        if path.is_file() and path.read_text(encoding="utf-8") == text:
            return False
        write_text(path, text)
        return True


def _rows(plan: Plan, writers: Mapping[tuple[str, str], SplitWriter]) -> dict[str, dict[str, int]]:
    """Return rows by config and split, the splits in the order in which they were asked for."""
    asked = list(plan.options.shares)
    order = sorted(writers, key=lambda place: asked.index(place[1]) if place[1] in asked else 99)
    return {
        config: {split: writers[config, split].rows for of, split in order if of == config}
        for config in plan.configs
    }
