"""Reading what users bring: prompt sets and candidates, every problem named by file and line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from feedback.errors import InputError, nearest
from feedback.records import Candidates, Prompt, PromptText, content_id, decode
from feedback.row_hints import row_hint
from feedback.shards import KINDS, folder_kind, shard_paths
from feedback.verdict_index import SeenIds

__all__ = ["Numbered", "checked_candidates", "read_numbered", "read_prompts"]

Record = TypeVar("Record", Prompt, Candidates)
_PROMPT_KEYS = {"prompt_id", "prompt", "gold", "meta"}


class Numbered(NamedTuple):
    """A line and where it stands."""

    path: Path
    line: int
    text: bytes


def read_numbered(source: Path, kind: str) -> Iterator[Numbered]:
    """Yield the non-empty lines of a JSONL file, or of a folder's shards of ``kind``.

    Raises:
        InputError: there is nothing of that kind.
    """
    if source.is_dir():
        paths = shard_paths(source, kind)
        if not paths and (found := folder_kind(source)) != kind:
            raise InputError(f"holds {found}, not {kind}", path=source)
    elif source.is_file():
        paths = [source]
    else:
        raise InputError("no such file or folder", path=source)
    for path in paths:
        with path.open("rb") as file:
            for line, text in enumerate(file, start=1):
                if text.strip():
                    yield Numbered(path, line, text)


def read_prompts(source: Path) -> Iterator[Prompt]:
    """Yield the prompts of a JSONL file or a prompt folder.

    A row is ``{"prompt": ...}`` (text or chat messages), with ``prompt_id``, ``gold`` and ``meta``
    if there are any; without an id, the id is a hash of the prompt.

    Raises:
        InputError: a line is no such row, a prompt is empty, or an id occurs twice.
    """
    seen = SeenIds()
    for path, line, text in read_numbered(source, "prompts"):
        prompt = _prompt(path, line, text)
        _check_prompt(prompt.prompt, path, line)
        if (before := seen.add(prompt.prompt_id, line)) is not None:
            raise InputError(
                f"prompt_id {prompt.prompt_id!r} occurs twice (first in line {before}); "
                "ids must be unique, and a prompt without id must not stand there twice",
                path=path,
                line=line,
            )
        yield prompt
    seen.close()


def _prompt(path: Path, line: int, text: bytes) -> Prompt:
    try:
        row = msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise InputError(f"not JSON: {error}", path=path, line=line) from error
    if not isinstance(row, dict) or "prompt" not in row:
        raise InputError('not a prompt row: it has no "prompt"', path=path, line=line)
    for key in row:
        if key not in _PROMPT_KEYS:
            raise InputError(
                f"unknown field {key!r}{nearest(key, _PROMPT_KEYS)} (further facts belong into "
                '"meta")',
                path=path,
                line=line,
            )
    row.setdefault("prompt_id", content_id("prompt", row["prompt"], length=16))
    try:
        return msgspec.convert(row, Prompt)
    except msgspec.ValidationError as error:
        raise InputError(f"not a prompt row: {error}", path=path, line=line) from error


def _check_prompt(prompt: PromptText, path: Path, line: int) -> None:
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    if not any(text.strip() for text in texts):
        raise InputError("the prompt is empty; remove the row", path=path, line=line)


def checked_candidates(source: Path) -> Iterator[Candidates]:
    """Yield the candidates rows of a folder or file, checked.

    Raises:
        InputError: a line is no candidates row, a prompt is empty, or an id occurs twice.
    """
    kind = next(name for name, known in KINDS.items() if known is Candidates)
    seen = SeenIds()
    for path, line, text in read_numbered(source, kind):
        try:
            row = decode(text, Candidates)
        except ValueError as error:
            raise InputError(
                f"not a candidates row: {error}{row_hint(text, Candidates)}", path=path, line=line
            ) from error
        _check_prompt(row.prompt, path, line)
        ids = [completion.completion_id for completion in row.completions]
        if len(set(ids)) < len(ids):
            raise InputError(
                f"prompt {row.prompt_id!r} has a completion_id twice", path=path, line=line
            )
        if (before := seen.add(row.prompt_id, line)) is not None:
            raise InputError(
                f"prompt_id {row.prompt_id!r} occurs twice (first in line {before})",
                path=path,
                line=line,
            )
        yield row
    seen.close()
