"""Prompts that also occur in known evaluation sets: exact, and by shared runs of words.

Training on a benchmark's prompts makes its scores worthless, and a data set that holds them passes
the damage on. Evaluation sets are given as text (any JSONL with a ``prompt`` field, or one prompt a
line) or as lists of hashes, which reveal nothing of the sets themselves; the hashes of common ones
ship in ``prompts/evaluation``.

An *exact* hit is a prompt equal after normalisation. An *n-gram* hit shares a run of 13 words (the
length used by Brown et al. 2020, GPT-3, appendix C) or, for shorter prompts, all of its words.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from feedback.errors import InputError
from feedback.records import PromptText, normalise_text, prompt_messages
from feedback.shards import write_text
from feedback.templates import prompts_folder

__all__ = [
    "NGRAM",
    "EvaluationSets",
    "Hit",
    "load_evaluation_sets",
    "shipped_sets",
    "write_hashes",
]

NGRAM = 13
# Shorter prompts than this are too common ("hello") for a shared wording to mean anything.
_MIN_WORDS = 5
_HASH_CHARACTERS = 16
_NOT_LETTERS = re.compile(r"[\W_]")


class Hit(NamedTuple):
    """A prompt found in an evaluation set."""

    name: str
    """The evaluation set."""
    how: Literal["exact", "ngram"]


@dataclass(slots=True)
class EvaluationSets:
    """Hashes of prompts and of their word runs, by the set they come from."""

    exact: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, prompt: str) -> None:
        """Add one prompt of the set called ``name``."""
        for kind, value in _hashes(prompt):
            (self.exact if kind == "exact" else self.runs).setdefault(value, name)

    def find(self, prompt: PromptText) -> Hit | None:
        """Return where a prompt's user turns occur, or None."""
        turns = [turn["content"] for turn in prompt_messages(prompt) if turn["role"] == "user"]
        hit: Hit | None = None
        for turn in turns:
            for kind, value in _hashes(turn):
                if kind == "exact" and value in self.exact:
                    return Hit(self.exact[value], "exact")
                if kind == "ngram" and value in self.runs and hit is None:
                    hit = Hit(self.runs[value], "ngram")
        return hit


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_CHARACTERS]


def _hashes(prompt: str) -> Iterator[tuple[Literal["exact", "ngram"], str]]:
    """Yield the hash of the whole prompt and of each run of ``NGRAM`` words in it."""
    words = normalise_text(_NOT_LETTERS.sub(" ", prompt)).split()
    if len(words) < _MIN_WORDS:
        return
    yield "exact", _hash(" ".join(words))
    for start in range(len(words) - NGRAM + 1):
        yield "ngram", _hash(" ".join(words[start : start + NGRAM]))


def shipped_sets() -> list[Path]:
    """Return the lists of hashes that come with the toolkit."""
    return sorted((prompts_folder() / "evaluation").glob("*.txt"))


def load_evaluation_sets(paths: Iterable[Path]) -> EvaluationSets:
    """Read evaluation sets: ``.txt`` lists of hashes as ``write_hashes`` makes them, or JSONL.

    Raises:
        InputError: a file is missing or of neither form; names file and line.
    """
    sets = EvaluationSets()
    for path in paths:
        if not path.is_file():
            raise InputError("no such evaluation set", path=path)
        if path.suffix == ".jsonl":
            _read_prompts(path, sets)
        else:
            _read_hashes(path, sets)
    return sets


def _read_prompts(path: Path, sets: EvaluationSets) -> None:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                prompt = json.loads(line)["prompt"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    'each line must be an object with a "prompt"', path=path, line=number
                ) from error
            for turn in prompt_messages(prompt):
                sets.add(path.stem, turn["content"])


def _read_hashes(path: Path, sets: EvaluationSets) -> None:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.startswith("#") or not line.strip():
                continue
            kind, _, value = line.strip().partition(" ")
            if kind not in ("exact", "ngram") or len(value) != _HASH_CHARACTERS:
                raise InputError(
                    "each line must be 'exact HASH' or 'ngram HASH'", path=path, line=number
                )
            (sets.exact if kind == "exact" else sets.runs).setdefault(value, path.stem)


def write_hashes(path: Path, prompts: Iterable[str], *, about: str) -> int:
    """Write a list of hashes of an evaluation set; return how many prompts it holds."""
    lines: dict[str, None] = {}
    count = 0
    for prompt in prompts:
        count += 1
        for kind, value in _hashes(prompt):
            lines[f"{kind} {value}"] = None
    head = f"# {about}; {count} prompts; sha256 of normalised words, first 16 hexadecimal digits\n"
    write_text(path, head + "\n".join(sorted(lines)) + "\n")
    return count
