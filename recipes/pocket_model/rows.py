"""Tokenised training rows, and the processes that make them while the model trains.

A factory starts its workers at once and hands out each wave of rows when it is asked for. A wave is
cut into a fixed number of parts, each with its own seed, so that the same plan gives the same rows
on any number of cores.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from recipes.pocket_model.chat import EOS, chat_text
from recipes.pocket_model.lessons import Source, judge_rows

__all__ = ["RowFactory", "Rows", "Wave", "join_rows", "tokenise"]

_PARTS = 16
MAX_TOKENS = 2048


class Rows(NamedTuple):
    """Tokenised rows end to end: row i is ``ids[begins[i]:begins[i + 1]]``."""

    ids: np.ndarray
    begins: np.ndarray
    answers: np.ndarray
    """Index within the row of the answer's first token; for dialogue text 1, the first that counts."""


class Wave(NamedTuple):
    """A number of judge rows to make."""

    name: str
    rows: int
    seed: int


def tokenise(rows: Iterable[dict[str, Any]], tokenizer: Tokenizer) -> Rows:
    """Tokenise rows of the form ``{"text"}`` or ``{"prompt", "completion"}``."""
    ids, begins, answers = [], [0], []
    for row in rows:
        if "text" in row:
            head, tokens = 1, tokenizer.encode(row["text"]).ids
        else:
            tokens = tokenizer.encode(chat_text(row["prompt"], add_generation_prompt=True)).ids
            head = len(tokens)
            tokens = tokens + tokenizer.encode(row["completion"] + EOS).ids
        tokens = tokens[:MAX_TOKENS]
        ids.append(np.asarray(tokens, dtype=np.uint16))
        begins.append(begins[-1] + len(tokens))
        answers.append(head)
    return Rows(np.concatenate(ids), np.asarray(begins, np.int64), np.asarray(answers, np.int64))


def join_rows(parts: Sequence[Rows]) -> Rows:
    """Put rows end to end."""
    starts = np.cumsum([0, *(len(part.ids) for part in parts)])
    begins = [part.begins[:-1] + start for part, start in zip(parts, starts[:-1], strict=True)]
    return Rows(
        np.concatenate([part.ids for part in parts]),
        np.concatenate([*begins, starts[-1:]]),
        np.concatenate([part.answers for part in parts]),
    )


class RowFactory:
    """Makes waves of judge rows in the background, in the order given."""

    def __init__(
        self, folder: Path, source: Source, tokenizer: Path, waves: Sequence[Wave], *, workers: int
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._waves = {wave.name: wave for wave in waves}
        # Forked, so that workers share the dialogues; they never touch a GPU.
        context = multiprocessing.get_context("fork")
        self._workers = [
            context.Process(
                target=_work,
                args=(folder, source, tokenizer, list(waves), number, workers),
                daemon=True,
            )
            for number in range(workers)
        ]
        for worker in self._workers:
            worker.start()

    def collect(self, name: str, parts: slice = slice(None)) -> Rows:
        """Wait for a wave, or for some parts of it, and return its rows.

        Raises:
            RuntimeError: a worker died.
        """
        loaded_parts = []
        for part in range(_PARTS)[parts]:
            path = self._folder / f"{name}-{part:02d}.npz"
            while not path.exists():
                if any(worker.exitcode not in (None, 0) for worker in self._workers):
                    raise RuntimeError(
                        f"a process that makes rows died before wave {name!r} was complete"
                    )
                time.sleep(0.05)
            with np.load(path) as loaded:
                loaded_parts.append(Rows(loaded["ids"], loaded["begins"], loaded["answers"]))
        return join_rows(loaded_parts)


def _work(
    folder: Path, source: Source, tokenizer_path: Path, waves: list[Wave], number: int, workers: int
) -> None:
    # Behind the training process, which compiles its kernels meanwhile.
    os.nice(10)
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    for wave in waves:
        for part in range(number, _PARTS, workers):
            made = tokenise(
                judge_rows(source, -(-wave.rows // _PARTS), wave.seed * 1009 + part), tokenizer
            )
            path = folder / f"{wave.name}-{part:02d}.npz"
            temporary = path.with_name(f".{path.name}")
            with temporary.open("wb") as file:
                np.savez(file, **made._asdict())
            temporary.rename(path)
