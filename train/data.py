"""Shards to tokenised groups: a prompt, its completions, and what the judge thought of them.

Preferences and rankings of one prompt become one ``Group``, so that the prompt is tokenised (and
later computed) once. Whatever is cut, dropped or merged is counted in ``DataReport`` and logged.

Knows nothing about torch, rows or losses. Text rows for SFT are in ``train/documents.py``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from feedback.errors import InputError, ShardError
from feedback.gate import require_gate
from feedback.records import (
    Preference,
    PromptText,
    Ranking,
    content_id,
    normalise_text,
)
from feedback.shards import MANIFEST, folder_kind, read_numbered, shard_paths
from train.chat import ChatFormat, DataReport

__all__ = [
    "Group",
    "Pair",
    "TokenIds",
    "read_groups",
    "split_by_prompt",
]

Overlong = Literal["truncate", "drop", "error"]
TokenIds = Sequence[int] | np.ndarray


class Pair(NamedTuple):
    """One judged pair of a group's completions."""

    chosen: int
    """Index of the completion that is preferred with probability ``p``."""
    rejected: int
    p: float = 1.0
    """As ``read_groups`` makes pairs: at least 1/2, and 1/2 exactly where ``tie``."""
    weight: float = 1.0
    tie: bool = False
    margin: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Group:
    """A prompt with its completions, as token ids, and their labels."""

    prompt_id: str
    prompt_ids: TokenIds
    """At least one token."""
    completions: Sequence[TokenIds]
    """Token ids of each completion, end-of-turn token included."""
    loss_masks: Sequence[Sequence[bool] | np.ndarray | None] = ()
    """Which tokens of each completion count; empty or None: all of them."""
    pairs: tuple[Pair, ...] = ()
    scores: tuple[float | None, ...] = ()
    """One score per completion, higher is better; empty: none known."""
    ranking: tuple[tuple[int, ...], ...] = ()
    """Tied groups of completion indices, best first; empty: none known."""
    source: str = ""
    """What the group came from, where its prompt does not say it (a text's is its start token):
    ``split_by_prompt`` keeps groups of one source on one side; empty: those of one prompt."""
    ref_logps: tuple[float, ...] = ()
    """Reference log-probability of each completion, once known."""
    ref_logprobs: Sequence[np.ndarray] = ()
    """The same per counted token."""


@dataclass(slots=True)
class _Draft:
    """A group while its rows come in."""

    prompt_id: str
    prompt: PromptText
    completions: dict[str, int] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    rankings: list[Ranking] = field(default_factory=list)

    def add(self, completion: str) -> int:
        return self.completions.setdefault(completion, len(self.completions))


def read_groups(
    sources: Sequence[str | Path],
    tokenizer: Any,
    *,
    max_length: int,
    overlong: Overlong = "truncate",
    row_tokens: int = 0,
    accept_bias: Sequence[str] = (),
) -> tuple[list[Group], DataReport]:
    """Read preferences and rankings folders (or JSONL files) as tokenised groups.

    All rows of one prompt make one group. A ranking group keeps scores, tied groups and compared
    pairs; a preference adds a pair. Two rankings of one prompt stay two groups.

    What a label says is settled here, once for all losses: a pair's chosen side is the one that is
    preferred (p >= 1/2, whichever way round the row has it); a tie has p = 1/2, and p = 1/2 is a
    tie; rows of weight 0, and rankings of fewer than two, are left out.

    Args:
        sources: shard folders, or JSONL files; a file's first line says which rows it holds.
        tokenizer: of the model to train.
        max_length: tokens of a prompt plus one completion, at most.
        overlong: what to do with longer ones.
        row_tokens: groups larger than this are split by completions; 0: never.
        accept_bias: figures of the judge's report card whose failure is accepted by name.

    Raises:
        InputError: a row is wrong, nothing is left to train on, or ``overlong`` is error.
        GateRefused: the labels' judge failed its report card, and nobody accepted that.
    """
    for source in map(Path, sources):
        if (source / MANIFEST).is_file():
            require_gate(source, accept=accept_bias)
    report = DataReport()
    chat = ChatFormat(tokenizer, report=report)
    drafts = _drafts(sources, report)
    prompts = chat.prompt_ids([chat.prompt_text(draft.prompt) for draft in drafts])
    texts = [text for draft in drafts for text in draft.completions]
    encoded = iter(chat.completion_ids(texts))
    groups: list[Group] = []
    for draft, prompt in zip(drafts, prompts, strict=True):
        group = _group(draft, prompt, [next(encoded) for _ in draft.completions])
        fitted = _fit(group, max_length, overlong, report)
        if fitted is not None:
            groups += _split(fitted, row_tokens, report)
    _summarise(groups, report, sources, max_length)
    return groups, report


def _drafts(sources: Sequence[str | Path], report: DataReport) -> list[_Draft]:
    drafts: dict[str, _Draft] = {}
    ranked: list[_Draft] = []
    for source in sources:
        for path, line, row in _located_rows(Path(source)):
            report.rows += 1
            try:
                if isinstance(row, Ranking):
                    ranked.append(_ranking_draft(row, report))
                    continue
                key = content_id(row.prompt)
                draft = drafts.setdefault(key, _Draft(row.prompt_id, row.prompt))
                _add_preference(draft, row, report)
            except InputError as error:
                raise InputError(str(error), path=path, line=line) from error
    return [draft for draft in [*drafts.values(), *ranked] if draft.pairs or draft.rankings]


def _located_rows(source: Path) -> Iterator[tuple[Path, int, Preference | Ranking]]:
    """Yield a source's rows with file and line."""
    kind = _kind(source)
    name = "rankings" if kind is Ranking else "preferences"
    for path in shard_paths(source, name) if source.is_dir() else [source]:
        for line, row in read_numbered(path, kind):
            yield path, line, row


def _kind(source: Path) -> type[Preference] | type[Ranking]:
    """Return whether a source holds preferences or rankings."""
    if source.is_dir():
        for kind, record in (("preferences", Preference), ("rankings", Ranking)):
            if shard_paths(source, kind):
                return record
        found = folder_kind(source)
        raise ShardError(f"holds {found}; training reads preferences or rankings", path=source)
    return Ranking if source.is_file() and "ranking" in _first_row(source) else Preference


def _first_row(path: Path) -> dict[str, Any]:
    """Return a file's first row, or nothing where the reader will find fault with it."""
    with path.open(encoding="utf-8") as file:
        try:
            row = json.loads(file.readline())
        except ValueError:
            return {}
    return row if isinstance(row, dict) else {}


def _completion_text(completion: PromptText, prompt_id: str) -> str:
    if isinstance(completion, str):
        return completion
    if len(completion) == 1 and completion[0]["role"] == "assistant":
        return completion[0]["content"]
    raise InputError(
        f"prompt {prompt_id!r}: a completion is {len(completion)} messages, not one assistant "
        "message; move earlier turns into the prompt"
    )


def _add_preference(draft: _Draft, row: Preference, report: DataReport) -> None:
    if not 0.0 <= row.p_chosen <= 1.0:
        raise InputError(f"prompt {row.prompt_id!r}: p_chosen is {row.p_chosen}, outside [0, 1]")
    if row.weight < 0:
        raise InputError(f"prompt {row.prompt_id!r}: weight is {row.weight}, below 0")
    chosen = _completion_text(row.chosen, row.prompt_id)
    rejected = _completion_text(row.rejected, row.prompt_id)
    if row.weight == 0:
        report.weightless += 1
        return
    if normalise_text(chosen) == normalise_text(rejected):
        report.identical += 1
        return
    p, margin = 0.5 if row.tie else row.p_chosen, row.margin
    if p < 0.5:
        chosen, rejected, p, margin = rejected, chosen, 1 - p, abs(margin)
    sides = draft.add(chosen), draft.add(rejected)
    draft.pairs.append(Pair(*sides, p, row.weight, p == 0.5, margin))


def _ranking_draft(row: Ranking, report: DataReport) -> _Draft:
    count = len(row.completions)
    members = sorted(member for tied in row.ranking for member in tied)
    if len(row.scores) != count or any(not 0 <= member < count for member in members):
        raise InputError(
            f"prompt {row.prompt_id!r}: {count} completions, but {len(row.scores)} scores and "
            f"ranking {row.ranking}"
        )
    if len(set(members)) != len(members):
        raise InputError(f"prompt {row.prompt_id!r}: a completion stands twice in {row.ranking}")
    for first, second, p in row.comparisons:
        if not (0 <= first < count and 0 <= second < count and first != second and 0 <= p <= 1):
            raise InputError(
                f"prompt {row.prompt_id!r}: comparison ({first}, {second}, {p}) is not of two of "
                f"the {count} completions, with a probability"
            )
    draft = _Draft(row.prompt_id, row.prompt)
    places = [draft.add(text) for text in row.completions]
    if len(draft.completions) != count:
        report.identical += count - len(draft.completions)
        return _Draft(row.prompt_id, row.prompt)
    for first, second, p in row.comparisons:
        chosen, rejected, p = (first, second, p) if p >= 0.5 else (second, first, 1 - p)
        draft.pairs.append(Pair(places[chosen], places[rejected], p, 1.0, p == 0.5, 2 * p - 1))
    if not draft.pairs and len(members) < 2:
        report.unjudged += 1
        return _Draft(row.prompt_id, row.prompt)
    draft.rankings.append(row)
    return draft


def _group(draft: _Draft, prompt: np.ndarray, completions: list[np.ndarray]) -> Group:
    ranking = draft.rankings[0] if draft.rankings else None
    return Group(
        prompt_id=draft.prompt_id,
        prompt_ids=prompt,
        completions=tuple(completions),
        pairs=tuple(draft.pairs),
        scores=tuple(ranking.scores) if ranking else (),
        ranking=tuple(tuple(tied) for tied in ranking.ranking) if ranking else (),
    )


def _fit(group: Group, max_length: int, overlong: Overlong, report: DataReport) -> Group | None:
    """Return the group within ``max_length``, or None when no label is left."""
    prompt = group.prompt_ids
    longest = max(len(ids) for ids in group.completions)
    if len(prompt) + longest <= max_length:
        return group
    if overlong == "error":
        raise InputError(
            f"prompt {group.prompt_id!r}: {len(prompt)} prompt and {longest} completion tokens "
            f"exceed max_length {max_length}; raise it, or set overlong to truncate or drop"
        )
    if overlong == "drop":
        keep = [
            i for i, ids in enumerate(group.completions) if len(prompt) + len(ids) <= max_length
        ]
        report.dropped_overlong += len(group.completions) - len(keep)
        kept = _subset(group, keep)
        if kept is None:
            report.unlabelled += 1
        return kept
    room = max(max_length - longest, max_length // 2)
    if len(prompt) > room:
        report.truncated_prompts += 1
        prompt = prompt[-room:]
    space = max_length - len(prompt)
    report.truncated_completions += sum(len(ids) > space for ids in group.completions)
    cut = dataclasses.replace(
        group, prompt_ids=prompt, completions=tuple(ids[:space] for ids in group.completions)
    )
    return _without_equal(cut, report)


def _without_equal(group: Group, report: DataReport) -> Group | None:
    """Return a cut group without the labels of completions that are equal now; None: none left."""
    texts = [np.asarray(ids).tobytes() for ids in group.completions]
    if len(set(texts)) == len(texts):
        return group
    kept = [pair for pair in group.pairs if texts[pair.chosen] != texts[pair.rejected]]
    report.cut_equal += 1 if group.ranking else len(group.pairs) - len(kept)
    if group.ranking or not kept:
        report.unlabelled += 1
        return None
    members = {member for pair in kept for member in pair[:2]}
    return _subset(dataclasses.replace(group, pairs=tuple(kept)), sorted(members))


def _subset(group: Group, keep: Sequence[int]) -> Group | None:
    """Return the group with only the completions ``keep``, or None when no label is left."""
    place = {old: new for new, old in enumerate(keep)}
    pairs = tuple(
        pair._replace(chosen=place[pair.chosen], rejected=place[pair.rejected])
        for pair in group.pairs
        if pair.chosen in place and pair.rejected in place
    )
    tiers = (tuple(place[m] for m in tied if m in place) for tied in group.ranking)
    ranking = tuple(tied for tied in tiers if tied)
    if not pairs and sum(map(len, ranking)) < 2:
        return None
    return dataclasses.replace(
        group,
        completions=tuple(group.completions[index] for index in keep),
        loss_masks=tuple(group.loss_masks[index] for index in keep) if group.loss_masks else (),
        pairs=pairs,
        scores=tuple(group.scores[index] for index in keep) if group.scores else (),
        ranking=ranking,
    )


def _split(group: Group, row_tokens: int, report: DataReport) -> Iterable[Group]:
    """Yield the group, in parts where all of its completions do not fit into one row.

    Pairs stay together: a part takes pairs, in order, for as long as their completions fit.
    """
    size = len(group.prompt_ids) + sum(len(ids) for ids in group.completions)
    if not row_tokens or size <= row_tokens:
        return [group]
    if group.ranking:
        raise InputError(
            f"prompt {group.prompt_id!r}: a ranking of {size} tokens does not fit into a row of "
            f"{row_tokens}; raise row_tokens or lower max_length"
        )
    report.split_groups += 1
    parts: list[tuple[list[int], list[Pair]]] = []
    space = 0
    for pair in group.pairs:
        members = parts[-1][0] if parts else []
        new = [m for m in (pair.chosen, pair.rejected) if m not in members]
        need = sum(len(group.completions[m]) for m in new)
        if not parts or need > space:
            new = [pair.chosen, pair.rejected]
            space = row_tokens - len(group.prompt_ids)
            need = sum(len(group.completions[m]) for m in new)
            parts.append(([], []))
        parts[-1][0].extend(new)
        parts[-1][1].append(pair)
        space -= need
    whole = [dataclasses.replace(group, pairs=tuple(pairs)) for _, pairs in parts]
    subsets = (_subset(part, members) for part, (members, _) in zip(whole, parts, strict=True))
    return [part for part in subsets if part is not None]


def _summarise(
    groups: list[Group], report: DataReport, sources: Sequence[str | Path], max_length: int
) -> None:
    report.groups = len(groups)
    report.completions = sum(len(group.completions) for group in groups)
    report.pairs = sum(len(group.pairs) for group in groups)
    report.ties = sum(pair.tie for group in groups for pair in group.pairs)
    report.rankings = sum(bool(group.ranking) for group in groups)
    report.tokens = sum(
        len(group.prompt_ids) + sum(map(len, group.completions)) for group in groups
    )
    if report.cut_equal:
        report.warn(
            f"{report.cut_equal} pairs or rankings dropped: cut to max_length {max_length}, their "
            "completions are the same; raise it"
        )
    named = ", ".join(map(str, sources))
    if not groups:
        raise InputError(
            f"no labelled completions to train on ({report.rows} rows read, {report.identical} "
            f"identical, {report.weightless} of weight 0, {report.unjudged} with fewer than two "
            f"judged completions, {report.dropped_overlong} too long)",
            path=named,
        )
    if report.identical:
        report.warn(f"{report.identical} rows dropped: their completions are the same text")
    if report.weightless:
        report.warn(f"{report.weightless} rows left out: their weight is 0")
    if report.unjudged:
        report.warn(
            f"{report.unjudged} rankings left out: fewer than two of their completions are judged"
        )
    if report.truncated_completions or report.truncated_prompts:
        report.warn(
            f"{report.truncated_completions} completions and {report.truncated_prompts} prompts "
            f"cut to max_length {max_length}; raise it or set overlong to drop"
        )
    if report.dropped_overlong:
        report.warn(
            f"{report.dropped_overlong} completions ({report.unlabelled} whole groups) dropped: "
            f"longer than max_length {max_length}"
        )


def split_by_prompt(
    groups: Sequence[Group], share: float, *, seed: int
) -> tuple[list[Group], list[Group]]:
    """Return (training, evaluation) groups; all groups of one prompt land on the same side.

    Which side is decided by a hash of the prompt's tokens (or of ``source``) and the seed, so that
    it does not change when other rows come or go.
    """
    if not share:
        return list(groups), []
    train: list[Group] = []
    held_out: list[Group] = []
    origins = [group.source or [int(token) for token in group.prompt_ids] for group in groups]
    for group, origin in zip(groups, origins, strict=True):
        key = content_id(seed, origin, length=12)
        (held_out if int(key, 16) < share * 16**12 else train).append(group)
    if not train or not held_out:
        if all(origin == origins[0] for origin in origins):
            raise InputError(
                f"eval_share {share} leaves a side empty: all {len(groups)} rows share one prompt, "
                "so a split by prompt is impossible; give eval_data"
            )
        raise InputError(
            f"eval_share {share} of {len(groups)} groups leaves a side empty; change it or give "
            "eval_data"
        )
    return train, held_out
