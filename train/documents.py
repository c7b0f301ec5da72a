"""Rows for supervised fine-tuning to tokenised groups: text, messages, or prompt and completion.

A document becomes a group of one completion: what carries no loss in front is its prompt, the rest
its completion with a mask over the tokens that count. Rows are JSON lines; which kind they are
follows from their fields. A row of candidates is one document per completion (the last revisions of
``rlaif revise``, say); rankings and preferences have their own readers.
"""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from feedback.errors import InputError, nearest
from feedback.records import Message, content_id
from train.chat import ChatFormat, DataReport
from train.data import Group

__all__ = ["read_documents"]

Overlong = Literal["truncate", "drop", "error"]
_KINDS = (("messages",), ("prompt", "completion"), ("text",))
_KNOWN = {"messages", "prompt", "completion", "text", "prompt_id", "id"}
_IGNORED = {"meta", "source", "license"}
_BATCH = 2000  # rows tokenised at one time


class _Part(NamedTuple):
    """A stretch of a row's text, tokenised apart from its neighbours."""

    text: str
    kind: Literal["plain", "completion", "prompt", "text"]
    """completion: gets the end-of-turn token; prompt: as sampling encodes one; text: a document."""
    counted: bool


class _Row(NamedTuple):
    name: str
    parts: list[_Part]


class _Document(NamedTuple):
    """Token ids, and which of them carry loss."""

    name: str
    ids: np.ndarray
    counted: np.ndarray
    text: bool
    source: str = ""
    """What the row is split by; empty: the tokens in front of the first that carries loss."""


def read_documents(
    sources: Sequence[str | Path],
    tokenizer: Any,
    *,
    max_length: int,
    overlong: Overlong = "truncate",
    completion_only: bool = True,
) -> tuple[list[Group], DataReport]:
    """Read JSONL files (also gzipped), or folders of them, as groups of one completion each.

    ``text`` rows carry loss everywhere and, when too long, go on in further documents; ``messages``
    rows carry it on assistant turns, ``prompt``/``completion`` rows on the completion, or with
    ``completion_only`` False everywhere. For a split, texts are told apart by their ids (without
    one, by their content), other rows by their prompts.

    Raises:
        InputError: a row is not JSON, has none of the known fields, or nothing is left.
    """
    report = DataReport()
    chat = ChatFormat(tokenizer, report=report)
    unknown: Counter[str] = Counter()
    rows = _all_rows(sources, chat, report, unknown)
    groups: list[Group] = []
    while batch := list(itertools.islice(rows, _BATCH)):
        for document in _tokenise(batch, chat):
            if not completion_only:
                document = _counted_everywhere(document)
            groups += _fit(document, max_length, overlong, report)
    for key, count in sorted(unknown.items()):
        report.warn(f"field {key!r} of {count} rows is not used{nearest(key, _KNOWN)}")
    _summarise(groups, report, sources, max_length)
    return groups, report


def _counted_everywhere(document: _Document) -> _Document:
    """Return the document with loss on all tokens, still split by what was its prompt."""
    prompt = document.ids[: int(document.counted.argmax())]
    return document._replace(
        counted=np.ones(len(document.ids), dtype=bool),
        source=document.source or content_id(prompt.tolist()),
    )


def _all_rows(
    sources: Sequence[str | Path], chat: ChatFormat, report: DataReport, unknown: Counter[str]
) -> Iterator[_Row]:
    for path in _files(sources):
        for line, row in _rows(path):
            report.rows += 1
            try:
                documents = list(_documents(row))
            except InputError as error:
                raise InputError(str(error), path=path, line=line) from error
            for document in documents:
                unknown.update(document.keys() - _KNOWN - _IGNORED)
                yield _parse(document, chat, path=path, line=line)


def _documents(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the row itself, or for a row of candidates one row per completion.

    Raises:
        InputError: it is a ranking, whose last completion is as much text as its best.
    """
    completions = row.get("completions")
    if "ranking" in row and isinstance(completions, list):
        raise InputError(
            "these are rankings, which sft does not read: use rlaif rrhf, rlaif reward or rlaif dpo"
        )
    if "prompt" not in row or not isinstance(completions, list):
        yield row
        return
    rest = {key: value for key, value in row.items() if key not in ("completions", "gold")}
    for entry in completions:
        yield {**rest, "completion": entry.get("completion") if isinstance(entry, dict) else entry}


def _tokenise(rows: Sequence[_Row], chat: ChatFormat) -> Iterator[_Document]:
    """Yield the rows as documents; each kind of part is tokenised in one call."""
    parts = [part for row in rows for part in row.parts]
    encoded: dict[str, Iterator[np.ndarray]] = {}
    for kind, encode in (
        ("plain", chat.plain_ids),
        ("completion", chat.completion_ids),
        ("prompt", chat.prompt_ids),
        ("text", chat.text_ids),
    ):
        encoded[kind] = iter(encode([part.text for part in parts if part.kind == kind]))
    for row in rows:
        pieces = [next(encoded[part.kind]) for part in row.parts]
        counted = [
            np.full(len(piece), part.counted) for piece, part in zip(pieces, row.parts, strict=True)
        ]
        text = row.parts[0].kind == "text"
        ids, counts = np.concatenate(pieces), np.concatenate(counted)
        yield _Document(row.name, ids, counts, text, row.name if text else "")


def _files(sources: Sequence[str | Path]) -> Iterator[Path]:
    for source in map(Path, sources):
        if source.is_dir():
            found = sorted([*source.glob("*.jsonl"), *source.glob("*.jsonl.gz")])
            if not found:
                raise InputError("holds no .jsonl files", path=source)
            yield from found
        elif source.is_file():
            yield source
        else:
            raise InputError("no such file or folder", path=source)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise InputError(f"not JSON: {error}", path=path, line=number) from error
            if not isinstance(row, dict):
                raise InputError("not a JSON object", path=path, line=number)
            yield number, row


def _parse(row: dict[str, Any], chat: ChatFormat, *, path: Path, line: int) -> _Row:
    kind = next((kind for kind in _KINDS if all(key in row for key in kind)), None)
    if kind is None and {"chosen", "rejected"} <= row.keys():
        raise InputError(
            "these are preferences, which sft does not read: use rlaif dpo or rlaif reward",
            path=path,
            line=line,
        )
    if kind is None:
        raise InputError(
            f"has {', '.join(sorted(row)) or 'no fields'}; a row needs text, or messages, or "
            "prompt and completion",
            path=path,
            line=line,
        )
    name = str(row.get("prompt_id") or row.get("id") or content_id(*(row[key] for key in kind)))
    try:
        return _Row(name, _parts(row, kind, chat))
    except InputError as error:
        raise InputError(str(error), path=path, line=line) from error
    except (TypeError, KeyError, AttributeError) as error:
        raise InputError(f"a field has the wrong type: {error}", path=path, line=line) from error


def _parts(row: dict[str, Any], kind: tuple[str, ...], chat: ChatFormat) -> list[_Part]:
    if kind == ("text",):
        return [_Part(_string(row["text"]), "text", True)]
    if kind == ("messages",):
        return _conversation(row["messages"], chat)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(completion, list):
        turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        return _conversation([*turns, *completion], chat, first=len(turns))
    text = chat.prompt_text(prompt)
    return [_Part(text, "prompt", False), _Part(_string(completion), "completion", True)]


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} where text was expected")
    return value


def _conversation(messages: Sequence[Message], chat: ChatFormat, *, first: int = 0) -> list[_Part]:
    """Cut a conversation into parts: loss on assistant turns from message ``first`` on.

    Each assistant turn is cut where generation would start it, so that ids are those of sampling.
    """
    parts: list[_Part] = []
    done = ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = chat.prompt_text(list(messages[:place])) if place else ""
        if not before.startswith(done):
            raise InputError(
                "the chat template rewrites earlier turns (it drops reasoning, say), so a "
                "conversation cannot be trained on in one piece; give prompt and completion rows"
            )
        parts.append(_Part(before[len(done) :], "plain", False))
        parts.append(_Part(_string(message["content"]), "completion", place >= first))
        done = before + message["content"] + chat.end_text
    if not any(part.counted for part in parts):
        raise InputError("has no assistant message to learn from")
    return parts


def _fit(
    document: _Document, max_length: int, overlong: Overlong, report: DataReport
) -> list[Group]:
    """Return the document as groups within ``max_length``; text goes on, conversations are cut."""
    length = len(document.ids)
    if length <= max_length:
        pieces = [document]
    elif document.text:
        report.split_groups += 1
        starts = range(0, length - 1, max_length - 1)  # one token overlaps: it predicts the next
        pieces = [_cut(document, start, start + max_length) for start in starts]
    elif overlong == "error":
        raise InputError(
            f"row {document.name!r} has {length} tokens, more than max_length {max_length}; raise "
            "it, or set overlong to truncate or drop"
        )
    elif overlong == "drop":
        report.dropped_overlong += 1
        return []
    else:
        pieces = [_cut(document, 0, max_length)]
        if _group(pieces[0]) is None:  # its prompt alone is too long
            report.dropped_overlong += 1
            return []
        report.truncated_completions += 1
    made = [_group(piece) for piece in pieces]
    kept = [group for group in made if group is not None]
    report.unlabelled += len(made) - len(kept)
    return kept


def _cut(document: _Document, start: int, end: int) -> _Document:
    return document._replace(ids=document.ids[start:end], counted=document.counted[start:end])


def _group(document: _Document) -> Group | None:
    """Split a document at its first token that counts; nothing predicts the very first token."""
    counted = np.flatnonzero(document.counted[1:]) + 1
    if not len(counted):
        return None
    start = int(counted[0])
    mask = document.counted[start:]
    return Group(
        prompt_id=document.name,
        prompt_ids=document.ids[:start],
        completions=(document.ids[start:],),
        loss_masks=() if mask.all() else (mask,),
        source=document.source,
    )


def _summarise(
    groups: list[Group], report: DataReport, sources: Sequence[str | Path], max_length: int
) -> None:
    report.groups = report.completions = len(groups)
    report.tokens = sum(len(g.prompt_ids) + len(g.completions[0]) for g in groups)
    if not groups:
        raise InputError(
            f"nothing to train on ({report.rows} rows read, {report.dropped_overlong} too long, "
            f"{report.unlabelled} without a token that counts)",
            path=", ".join(map(str, sources)),
        )
    if report.truncated_completions:
        report.warn(
            f"{report.truncated_completions} rows cut to max_length {max_length}; raise it or set "
            "overlong to drop"
        )
    if report.dropped_overlong:
        report.warn(f"{report.dropped_overlong} rows dropped: longer than max_length {max_length}")
