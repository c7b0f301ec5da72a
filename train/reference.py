"""Reference log-probabilities, computed once: content-addressed, on disk, shared by algorithms.

The key of a completion hashes what its log-probabilities depend on: the weights, their type, the
prompt's ids, the completion's ids and which of them count. So a cache survives other epochs, other
losses, other data orders and added rows, and a changed model can never read another's figures.
One SQLite file per model; writers take turns.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import logging
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.attention import with_layout
from train.batches import Packing
from train.data import Group
from train.model_checks import require_context
from train.models import backbone, base_model, packed_logprobs, without_adapters
from train.packing import group_tokens, pack_groups, pack_rows

__all__ = ["ReferenceCache", "attach_reference", "completion_key", "weights_hash"]

logger = logging.getLogger(__name__)


def weights_hash(model: Any) -> str:
    """Return the sha256 of all weights, names and types included.

    Adapters that ``without_adapters`` switches off are left out: they do not make the reference.
    """
    from peft import PeftModel

    removable = isinstance(model, PeftModel)
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if removable and "lora_" in name:
            continue
        # The same weight has another name inside PEFT's wrappers.
        plain = name.replace("base_model.model.", "").replace(".base_layer", "")
        digest.update(f"{plain} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().reshape(-1).contiguous().view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def completion_key(group: Group, index: int) -> bytes:
    """Return the key of one completion within a model's cache."""
    digest = hashlib.sha256()
    mask = group.loss_masks[index] if group.loss_masks else None
    for part in (group.prompt_ids, group.completions[index]):
        ids = np.asarray(part, dtype=np.int64)
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.data)
    if mask is not None:
        digest.update(np.asarray(mask, dtype=np.uint8).data)
    return digest.digest()


class ReferenceCache:
    """One model's log-probabilities on disk.

    Args:
        folder: created if missing.
        name: of the model's file: its weights' hash and type.
    """

    def __init__(self, folder: Path, name: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.sqlite"
        with self._open() as database:
            database.execute(
                "CREATE TABLE IF NOT EXISTS logprobs (key BLOB PRIMARY KEY, value BLOB NOT NULL)"
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(sqlite3.connect(self.path, timeout=120)) as database, database:
            yield database

    def read(self, keys: Iterable[bytes]) -> dict[bytes, np.ndarray]:
        """Return what is known: per-token log-probabilities, float32, by key."""
        wanted = list(dict.fromkeys(keys))
        found: dict[bytes, np.ndarray] = {}
        with self._open() as database:
            for start in range(0, len(wanted), 500):
                part = wanted[start : start + 500]
                marks = ",".join("?" * len(part))
                rows = database.execute(
                    f"SELECT key, value FROM logprobs WHERE key IN ({marks})", part
                )
                found |= {key: np.frombuffer(value, dtype=np.float32) for key, value in rows}
        return found

    def write(self, values: dict[bytes, np.ndarray]) -> None:
        """Add log-probabilities."""
        rows = [(key, value.astype(np.float32).tobytes()) for key, value in values.items()]
        with self._open() as database:
            database.executemany("INSERT OR REPLACE INTO logprobs VALUES (?, ?)", rows)


def attach_reference(
    groups: Sequence[Group],
    model: Any,
    *,
    packing: Packing,
    folder: Path,
    chunk: int = 0,
) -> list[Group]:
    """Return the groups with the reference's log-probabilities of every completion.

    Args:
        groups: to look up; what the cache lacks is computed, packed, without gradients.
        model: the reference; LoRA adapters on it are switched off.
        packing: how to pack rows.
        folder: of the cache.
        chunk: as for ``token_logprobs``.

    Raises:
        InputError: a group is longer than the model's context.
    """
    if not groups:
        return []
    require_context(base_model(model).config, groups)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    cache = ReferenceCache(folder, f"{weights_hash(model)[:32]}-{dtype}")
    keys = [[completion_key(g, index) for index in range(len(g.completions))] for g in groups]
    known = cache.read(key for row in keys for key in row)
    missing = [i for i, row in enumerate(keys) if any(key not in known for key in row)]
    mine = missing[packing.process :: packing.processes]
    if missing:
        logger.info("reference: %d of %d groups to compute", len(missing), len(groups))
        computed = _compute(
            [groups[i] for i in mine], [keys[i] for i in mine], model, packing, chunk
        )
        cache.write(computed)
        known |= computed
        if packing.processes > 1:
            torch.distributed.barrier()
            known = cache.read(key for row in keys for key in row)
    return [
        dataclasses.replace(
            group,
            ref_logprobs=tuple(known[key] for key in row),
            ref_logps=tuple(float(known[key].sum(dtype=np.float64)) for key in row),
        )
        for group, row in zip(groups, keys, strict=True)
    ]


@torch.no_grad()
def _compute(
    groups: Sequence[Group],
    keys: Sequence[Sequence[bytes]],
    model: Any,
    packing: Packing,
    chunk: int,
) -> dict[bytes, np.ndarray]:
    """Return per-token log-probabilities of all completions of ``groups``."""
    device = next(backbone(model).parameters()).device
    sizes = [group_tokens(group, share_prompt=packing.share_prompt) for group in groups]
    values: dict[bytes, np.ndarray] = {}
    training = model.training
    model.eval()
    with without_adapters(model):
        for row in pack_rows(sizes, packing.row_tokens if packing.pack else 1):
            batch = pack_groups(
                [groups[i] for i in row],
                share_prompt=packing.share_prompt,
                multiple=packing.multiple,
            )
            batch = with_layout(batch, packing.attention).to(device)
            logprobs = packed_logprobs(model, batch, chunk=chunk).logprobs.cpu().numpy()
            parts = np.split(logprobs, np.cumsum(batch.lengths.cpu().numpy())[:-1])
            names = [key for i in row for key in keys[i]]
            values |= {name: part.copy() for name, part in zip(names, parts, strict=True)}
    model.train(training)
    return values
