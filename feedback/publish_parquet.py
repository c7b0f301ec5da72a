"""Records to Parquet files, a batch at a time: memory does not grow with their number.

A split's files are ``CONFIG/SPLIT-00000.parquet``, ``CONFIG/SPLIT-00001.parquet`` ... A file is
begun under another name and takes its own when it is whole. The same records give the same bytes
under the same release of pyarrow, so that an upload that was cut off finds what it had sent.

This module knows nothing of shards, hubs or cards.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from feedback.shards import writing

__all__ = ["SplitWriter", "WrittenFile"]

_ROWS_PER_GROUP = 1000
_BYTES_PER_FILE = 256 * 2**20


class WrittenFile(NamedTuple):
    """A finished file of the published tree."""

    path: str
    """Inside the tree, with forward slashes."""
    rows: int
    bytes: int
    sha256: str


class SplitWriter:
    """Writes the records of one split.

    Args:
        root: folder of the tree.
        config: folder inside it.
        split: begins the files' names.
        features: ``datasets.Features`` of the config.
        rows_per_file: a new file is begun after this many rows, or after 256 MiB.

    Raises:
        ShardError: the system refused to write.
    """

    def __init__(
        self, root: Path, config: str, split: str, features: Any, *, rows_per_file: int = 100_000
    ):
        self.folder = root / config
        self.config = config
        self.split = split
        self.rows_per_file = rows_per_file
        self.files: list[WrittenFile] = []
        self._schema = features.arrow_schema
        self._plain = _plain_schema(self._schema)
        self._batch: list[Mapping[str, Any]] = []
        self._writer: Any = None
        self._rows = 0

    @property
    def rows(self) -> int:
        """Return how many records were added."""
        return sum(file.rows for file in self.files) + self._rows + len(self._batch)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add one record; JSON columns as text."""
        self._batch.append(record)
        if len(self._batch) >= _ROWS_PER_GROUP:
            self._flush()
            if self._rows >= self.rows_per_file or self._temporary.stat().st_size > _BYTES_PER_FILE:
                self._end_file()

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.split}-{len(self.files):05d}.parquet"

    @property
    def _temporary(self) -> Path:
        return self._path.with_name(f".{self._path.name}.tmp")

    def _flush(self) -> None:
        import pyarrow as pa
        from datasets.table import table_cast
        from pyarrow import parquet

        if not self._batch:
            return
        with writing(self._path):
            if self._writer is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Chunked by content: a version that changes few rows shares most of its bytes.
                self._writer = parquet.ParquetWriter(
                    self._temporary,
                    self._schema,
                    compression="zstd",
                    use_content_defined_chunking=True,
                )
            table = pa.Table.from_pylist(self._batch, schema=self._plain)
            self._writer.write_table(table_cast(table, self._schema))
        self._rows += len(self._batch)
        self._batch = []

    def _end_file(self) -> None:
        if self._writer is None:
            return
        path, temporary = self._path, self._temporary
        with writing(path):
            self._writer.close()
            self._writer = None
            with temporary.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            temporary.replace(path)
        size = path.stat().st_size
        self.files.append(WrittenFile(f"{self.config}/{path.name}", self._rows, size, digest))
        self._rows = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self._flush()
            self._end_file()
        elif self._writer is not None:
            self._writer.close()
            self._temporary.unlink(missing_ok=True)


def _plain_schema(schema: Any) -> Any:
    """Return the schema with JSON columns as text: pyarrow builds no extension type from rows."""
    import pyarrow as pa

    def plain(kind: Any) -> Any:
        if isinstance(kind, pa.BaseExtensionType):
            return kind.storage_type
        if pa.types.is_struct(kind):
            return pa.struct([pa.field(entry.name, plain(entry.type)) for entry in kind])
        return pa.list_(plain(kind.value_type)) if pa.types.is_list(kind) else kind

    return pa.schema([pa.field(entry.name, plain(entry.type)) for entry in schema])
