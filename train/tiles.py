"""A packed row cut into tiles, each within one run: what the Triton attention kernel works through.

A tile of queries reads two stretches of keys, the shared prompt and its own run so far; a tile of
keys is read by one stretch of queries, from itself to the end of its run, or of its group if it is
a prompt (the completions follow their prompt). So no block mask is needed, and no block is computed
that is masked out as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from train.packing import Run

__all__ = ["TileLayout", "tile_layout"]


class TileLayout(NamedTuple):
    """Tables of tiles; both are padded with empty tiles to few different lengths."""

    queries: Tensor
    """(N, 5) int32: start, end of run, start of run, prompt start, prompt end."""
    keys: Tensor
    """(N, 3) int32: start, end of run, end of the queries that read it."""
    tile: int
    """Rows per tile."""


def tile_layout(runs: Sequence[Run], size: int, *, tile: int = 64) -> TileLayout:
    """Return the tiles of a row of ``size`` tokens; padding becomes tiles that read themselves.

    Args:
        runs: of the row, in order.
        size: tokens in the row, padding included.
        tile: rows per tile, 64 or 128. Measured, 64 was quicker for short runs and for long ones.
    """
    table = np.asarray(runs, dtype=np.int64).reshape(-1, 4)
    lengths = table[:, 1] - table[:, 0]
    readers = table[:, 1].copy()
    for start, end in zip(table[:, 2], table[:, 1], strict=True):
        owner = np.searchsorted(table[:, 0], start)
        if table[owner, 0] == start:
            readers[owner] = max(readers[owner], end)
    counts = -(-lengths // tile)
    run = np.repeat(np.arange(len(table)), counts)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    starts = table[run, 0] + (np.arange(len(run)) - first) * tile
    queries = np.column_stack([starts, table[run, 1], table[run, 0], table[run, 2], table[run, 3]])
    keys = np.column_stack([starts, table[run, 1], readers[run]])
    covered = int(table[-1, 1]) if len(table) else 0
    pads = np.arange(covered, size, tile)
    ends = np.minimum(pads + tile, size)
    queries = np.concatenate([queries, np.column_stack([pads, ends, pads, pads, pads])])
    keys = np.concatenate([keys, np.column_stack([pads, ends, ends])])
    return TileLayout(_padded(queries), _padded(keys), tile)


def _padded(table: np.ndarray) -> Tensor:
    """Return the table with rows of zeros up to a power of two: few shapes, few compilations."""
    rows = max(16, 1 << (len(table) - 1).bit_length())
    padded = np.zeros((rows, table.shape[1]), dtype=np.int32)
    padded[: len(table)] = table
    return torch.from_numpy(padded)
