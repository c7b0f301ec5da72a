"""A published data set back as shards: what ``rlaif publish`` wrote, from a folder or the Hub.

Each config becomes a folder of its kind, with a folder for each split inside where there are
several; every row is the one that was published.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from feedback.config import recipe_of
from feedback.errors import InputError
from feedback.import_sources import load
from feedback.importing import ImportOptions
from feedback.publish_schema import CONFIGS, row_of
from feedback.shards import ShardWriter, shard_paths

__all__ = ["write_published"]


def write_published(options: ImportOptions) -> Counter[str]:
    """Write the shards; return rows by folder.

    Raises:
        InputError: there is no such data set, or a row is not what was published.
    """
    counts: Counter[str] = Counter()
    for config, splits in _configs(options).items():
        for split in splits:
            inside = config if len(splits) == 1 else f"{config}/{split}"
            counts[inside] = _write(options, config, split, options.out / inside)
    return counts


def _configs(options: ImportOptions) -> dict[str, list[str]]:
    """Return the splits of each config that was published, as the card names them."""
    from datasets import get_dataset_config_names, get_dataset_split_names

    source, revision = str(options.source), options.revision
    try:
        found = get_dataset_config_names(source, revision=revision)
        wanted = [options.config] if options.config else [c for c in CONFIGS if c in found]
        return {
            config: [options.split]
            if options.split
            else get_dataset_split_names(source, config, revision=revision)
            for config in wanted
        }
    except (OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise InputError(
            f"cannot be read as a published data set: {lines[0]}", path=options.source
        ) from error


def _write(options: ImportOptions, config: str, split: str, folder: Path) -> int:
    if config not in CONFIGS:
        raise InputError(f"config {config!r} is none of {', '.join(CONFIGS)}", path=options.source)
    if folder.is_dir() and shard_paths(folder, config):
        raise InputError("already holds rows; import into a new folder", path=folder)
    number = 0
    with ShardWriter[Any](folder, config) as writer:
        for number, record in enumerate(load(options, config=config, split=split), start=1):
            try:
                writer.append(row_of(record, config))
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"not a published row of {config}/{split}: {error}",
                    path=options.source,
                    line=number,
                ) from error
        writer.finish(
            {
                "stage": "import",
                "format": options.format,
                "recipe": recipe_of(options),
                "source": options.source_name,
                "revision": options.revision,
                "split": split,
            }
        )
    return number
