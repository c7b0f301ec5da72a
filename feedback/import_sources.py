"""Where imported rows come from: JSON files, Parquet, and data sets of `datasets`, disk or Hub.

``rows_of`` streams (number, row) of whatever ``--source`` names: a JSON or JSON-lines file, a
Parquet or Arrow file, a folder that ``save_to_disk`` wrote, a folder with data files (and a card
that names its configs), or ``user/name`` on the Hub. All but the first go through `datasets`' own
loaders. Numbers count rows from 1, so that an error can name one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from feedback.errors import InputError
from feedback.importing import ImportOptions, read_objects

__all__ = ["load", "rows_of"]

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_SAVED = ("state.json", "dataset_dict.json")


def rows_of(options: ImportOptions) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line or row number, row) of the source.

    Raises:
        InputError: it is missing, or cannot be read; names the split or config to give.
    """
    source = options.source
    if source.is_file() and source.suffix not in _TABLES:
        yield from read_objects(source)
        return
    dataset = load(options, config=options.config, split=options.split or "train")
    yield from enumerate(_rows(dataset, source), start=1)


def _rows(dataset: Any, source: Path) -> Iterator[dict[str, Any]]:
    """Yield rows; what a remote or damaged file does to the stream becomes one clear line."""
    iterator = iter(dataset)
    while True:
        try:
            row = next(iterator, None)
        except (OSError, ValueError) as error:
            raise _unreadable(source, error) from error
        if row is None:
            return
        yield dict(row)


def load(options: ImportOptions, *, config: str | None, split: str) -> Any:
    """Return one split of a data set, as `datasets` loads it.

    Raises:
        InputError: there is no such data set, config or split; or `datasets` is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            "reading this needs `datasets`: pip install 'rlaif[hub]'", path=options.source
        ) from error
    source = options.source
    try:
        if source.is_file():
            kind, files = _TABLES[source.suffix], str(source)
            return datasets.load_dataset(kind, data_files=files, split="train", streaming=True)
        if any((source / name).is_file() for name in _SAVED):
            return _saved(datasets.load_from_disk(str(source)), options)
        if not source.is_dir() and not _REPOSITORY.fullmatch(str(source)):
            raise InputError("no such file or folder, nor user/name on the Hub", path=source)
        return datasets.load_dataset(
            str(source), config, split=split, revision=options.revision, streaming=True
        )
    except (OSError, ValueError) as error:
        raise _unreadable(source, error) from error


def _saved(saved: Any, options: ImportOptions) -> Any:
    """Return the split of what ``save_to_disk`` wrote: a data set, or several by split."""
    if not isinstance(saved, dict):
        return saved
    split = options.split or ("train" if "train" in saved else next(iter(saved)))
    if split not in saved:
        raise InputError(f"no split {split!r} (there are: {', '.join(saved)})", path=options.source)
    return saved[split]


def _unreadable(source: Path, error: Exception) -> InputError:
    what = "" if source.exists() else "neither a file or folder here, nor read from the Hub: "
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return InputError(f"{what}{lines[0]}", path=source)
