"""Verdicts as columns: one row per pair, with what each order said, in candidate space.

Everything on a report card is computed from these columns. A pairwise verdict is one pair in one
order. A listwise verdict is every pair in it, the one that stood earlier in the list counting as
shown first. Ratings of two completions of one prompt are a pair without an order.

``a`` and ``b`` of a row are the two completion ids in sorted order, so that neither side means
anything. Column 0 of a two-column array is the order with a shown first, column 1 the other.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feedback.errors import InputError
from feedback.ordering import first_probability
from feedback.records import (
    ORDER_UNKNOWN,
    Candidates,
    Completion,
    GoldPair,
    JudgeIdentity,
    PromptText,
    Verdict,
)
from feedback.shards import read_rows

__all__ = [
    "Arm",
    "Material",
    "Pairs",
    "collect",
    "load_gold",
    "load_material",
]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Arm(NamedTuple):
    """One judge with one template: what a card is about."""

    judge: JudgeIdentity
    template: str
    template_sha256: str
    member: int | None = None
    """Number within a panel, where verdicts carry one."""

    @property
    def name(self) -> str:
        """Return judge and template in words."""
        number = "" if self.member is None else f" (panel member {self.member})"
        return f"{self.judge.model} · {self.template}{number}"


class PromptOf(NamedTuple):
    """A prompt with its completions by id."""

    prompt: PromptText
    completions: dict[str, Completion]
    meta: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Material:
    """Texts that verdicts speak of: prompts and completions by id."""

    prompts: dict[str, PromptOf] = field(default_factory=dict)

    def completion(self, prompt_id: str, completion_id: str) -> Completion | None:
        """Return a completion, or None where the texts are not at hand."""
        found = self.prompts.get(prompt_id)
        return None if found is None else found.completions.get(completion_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """All pairs of one arm. Arrays have one row per pair, (n,) or (n, 2)."""

    arm: Arm
    prompt_ids: list[str]
    """Names of the prompts that ``prompt`` numbers; the same list for every arm of a card."""
    prompt: Ints
    a: list[str]
    b: list[str]
    repeat: Ints
    p: Floats
    """(n, 2): P(a preferred), a tie's probability split evenly; NaN where there is no verdict."""
    winner: Floats
    """(n, 2): 1 a, -1 b, 0 tie, NaN where there is no verdict."""
    mass: Floats
    """(n, 2): verdict mass; NaN where the engine gave none."""
    verdicts: list[tuple[Verdict | None, Verdict | None]]
    ordered: bool = True
    """False for pairs made of ratings, which have no order."""
    soft: bool = False
    """Whether any verdict came as probabilities."""
    gold: Floats
    """(n,): 1 a better, -1 b better, 0 equal; NaN unknown."""
    gold_pairs: list[GoldPair | None]
    meta: list[Mapping[str, Any]]
    completions: list[tuple[Completion | None, Completion | None]]
    outcomes: Counter[str] = field(default_factory=Counter)
    """Calls by outcome, failed ones included."""
    calls: list[Verdict] = field(default_factory=list)
    """Every verdict of the arm, once."""

    def __len__(self) -> int:
        return len(self.a)

    @property
    def mean_p(self) -> Floats:
        """(n,): P(a preferred), the mean of the orders at hand; NaN where there is none."""
        known = np.isfinite(self.p)
        count = known.sum(axis=1)
        total = np.where(known, self.p, 0.0).sum(axis=1)
        return np.divide(total, count, out=np.full(len(self), np.nan), where=count > 0)

    @property
    def both(self) -> npt.NDArray[np.bool_]:
        """(n,): both orders have a verdict (a tie is one)."""
        return np.asarray(np.isfinite(self.winner[:, 0]) & np.isfinite(self.winner[:, 1]))

    @property
    def order_known(self) -> npt.NDArray[np.bool_]:
        """(n, 2): there is a verdict, and it is known which completion stood first."""
        return np.array(
            [[one is not None and ORDER_UNKNOWN not in one.flags for one in pair]
             for pair in self.verdicts], bool,
        ).reshape(-1, 2)  # fmt: skip

    @property
    def swapped(self) -> npt.NDArray[np.bool_]:
        """(n,): both orders have a verdict and are known as such; what position bias is read of."""
        return np.asarray(self.both & self.order_known.all(axis=1) & self.ordered)

    @property
    def verdict(self) -> Floats:
        """(n,): the merged verdict: 1, -1, 0 from ``mean_p``; NaN where there is none."""
        return np.sign(np.round(self.mean_p - 0.5, 12))

    @property
    def lengths(self) -> Floats:
        """(n, 2): characters of a and of b; NaN where the texts are not at hand."""
        return np.array(
            [[np.nan if side is None else len(side.completion) for side in pair]
             for pair in self.completions], float,
        ).reshape(-1, 2)  # fmt: skip

    def take(self, rows: npt.NDArray[Any]) -> Pairs:
        """Return the pairs at ``rows`` (a mask or indices); outcomes and calls stay whole."""
        index = np.flatnonzero(rows) if rows.dtype == bool else np.asarray(rows)
        chosen: dict[str, Any] = {name: getattr(self, name)[index] for name in _ARRAYS}
        chosen |= {name: [getattr(self, name)[place] for place in index] for name in _LISTS}
        return replace(self, **chosen)


_ARRAYS = ("prompt", "repeat", "p", "winner", "mass", "gold")
_LISTS = ("a", "b", "verdicts", "gold_pairs", "meta", "completions")


def load_material(
    folders: Iterable[Path | str], *, keep: Callable[[str], bool] | None = None
) -> Material:
    """Read candidate shards; later folders add completions to prompts already known.

    Args:
        folders: folders or JSONL files.
        keep: tells by its id whether a prompt is wanted; None: all are.

    Raises:
        InputError: a folder is missing or damaged.
    """
    prompts: dict[str, PromptOf] = {}
    for folder in folders:
        for row in read_rows(folder, Candidates):
            if keep is not None and not keep(row.prompt_id):
                continue
            known = prompts.setdefault(row.prompt_id, PromptOf(row.prompt, {}, dict(row.meta)))
            for completion in row.completions:
                known.completions[completion.completion_id] = completion
    return Material(prompts)


def load_gold(source: Path | str) -> dict[tuple[str, str, str], GoldPair]:
    """Read gold pairs, keyed by prompt and the two completion ids in sorted order.

    Raises:
        InputError: the source is missing or damaged, or a pair occurs twice with other labels.
    """
    gold: dict[tuple[str, str, str], GoldPair] = {}
    for row in read_rows(source, GoldPair):
        first, second = sorted((row.a, row.b))
        key = (row.prompt_id, first, second)
        if key in gold and _oriented(gold[key]) != _oriented(row):
            raise InputError(
                f"prompt {row.prompt_id!r}: the pair {first!r}, {second!r} has two different "
                "labels; keep one, or give both as votes of one row",
                path=source,
            )
        gold[key] = row
    return gold


def _oriented(row: GoldPair) -> float:
    """Return the label as seen from the completion whose id sorts first: 1, 0 or -1."""
    value = {"a": 1.0, "b": -1.0, "tie": 0.0}[row.label]
    return value if row.a <= row.b else -value


class _Said(NamedTuple):
    """What one verdict says of one pair, in the order shown."""

    first: str
    second: str
    p: float | None
    winner: float
    verdict: Verdict


def _statements(verdict: Verdict) -> Iterator[_Said]:
    """Yield each pair that a pairwise or listwise verdict speaks of."""
    done = verdict.outcome in ("decided", "tie")
    if verdict.kind == "pairwise":
        first, second = verdict.shown
        winner = np.nan
        if done:
            winner = {first: 1.0, second: -1.0}.get(verdict.winner or "", 0.0)
        yield _Said(first, second, first_probability(verdict), winner, verdict)
        return
    places: dict[str, int] = {}
    if done and verdict.ranking is not None:
        places = {name: place for place, group in enumerate(verdict.ranking) for name in group}
    for first, second in itertools.combinations(verdict.shown, 2):
        if first in places and second in places:
            winner = float(np.sign(places[second] - places[first]))
            yield _Said(first, second, (winner + 1) / 2, winner, verdict)
        else:
            yield _Said(first, second, None, np.nan, verdict)


def _rated(verdicts: Sequence[Verdict]) -> Iterator[_Said]:
    """Yield each pair of rated completions of a prompt, the higher score winning."""
    by_prompt: dict[tuple[str, int], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.scores:
            by_prompt.setdefault((verdict.prompt_id, verdict.repeat), []).append(verdict)
    for group in by_prompt.values():
        for left, right in itertools.combinations(group, 2):
            assert left.scores is not None and right.scores is not None
            winner = float(np.sign(left.scores[0] - right.scores[0]))
            yield _Said(left.shown[0], right.shown[0], (winner + 1) / 2, winner, left)


def collect(
    verdicts: Iterable[Verdict],
    *,
    material: Material | None = None,
    gold: Mapping[tuple[str, str, str], GoldPair] | None = None,
) -> list[Pairs]:
    """Sort verdicts into arms and put each arm's pairs into columns.

    Args:
        verdicts: from one or several folders; doubles of one id count once, the last one.
        material: texts; without it, length, format and self-preference cannot be measured.
        gold: from ``load_gold``.
    """
    by_arm: dict[Arm, dict[str, Verdict]] = {}
    for verdict in verdicts:
        member = verdict.meta.get("member")
        arm = Arm(verdict.judge, verdict.template, verdict.template_sha256, member)
        known = by_arm.setdefault(arm, {})
        last = known.get(verdict.verdict_id)
        if last is None or last.outcome == "failed":
            known[verdict.verdict_id] = verdict
    names: dict[str, int] = {}
    for rows in by_arm.values():
        for verdict in rows.values():
            names.setdefault(verdict.prompt_id, len(names))
    return [
        _columns(arm, list(rows.values()), names, material or Material(), gold or {})
        for arm, rows in by_arm.items()
    ]


def _columns(
    arm: Arm,
    verdicts: list[Verdict],
    names: dict[str, int],
    material: Material,
    gold: Mapping[tuple[str, str, str], GoldPair],
) -> Pairs:
    rated = bool(verdicts) and verdicts[0].kind == "rating"
    said = _rated(verdicts) if rated else itertools.chain(*map(_statements, verdicts))
    slots: dict[tuple[str, str, str, int], list[_Said | None]] = {}
    for one in said:
        first, second = sorted((one.first, one.second))
        key = (one.verdict.prompt_id, first, second, one.verdict.repeat)
        slots.setdefault(key, [None, None])[int(one.first != first)] = one
    keys = list(slots)
    p, winner, mass = (np.full((len(keys), 2), np.nan) for _ in range(3))
    for row, pair in enumerate(slots.values()):
        for order, told in enumerate(pair):
            if told is None:
                continue
            sign = 1.0 if order == 0 else -1.0
            winner[row, order] = sign * told.winner + 0.0
            if told.p is not None:
                p[row, order] = told.p if order == 0 else 1 - told.p
            if told.verdict.mass is not None:
                mass[row, order] = told.verdict.mass
    golds = [gold.get(key[:3]) for key in keys]
    return Pairs(
        arm=arm,
        prompt_ids=list(names),
        prompt=np.array([names[key[0]] for key in keys], int),
        a=[key[1] for key in keys],
        b=[key[2] for key in keys],
        repeat=np.array([key[3] for key in keys], int),
        p=p,
        winner=winner,
        mass=mass,
        verdicts=[_pair_of(pair) for pair in slots.values()],
        ordered=not rated,
        soft=any(verdict.probs is not None for verdict in verdicts),
        gold=np.array([np.nan if row is None else _oriented(row) for row in golds], float),
        gold_pairs=golds,
        meta=[_meta(material, key[0], pair) for key, pair in slots.items()],
        completions=[
            (material.completion(key[0], key[1]), material.completion(key[0], key[2]))
            for key in keys
        ],
        outcomes=Counter(verdict.outcome for verdict in verdicts),
        calls=verdicts,
    )


def _pair_of(pair: Sequence[_Said | None]) -> tuple[Verdict | None, Verdict | None]:
    first, second = (None if one is None else one.verdict for one in pair)
    return first, second


def _meta(material: Material, prompt_id: str, pair: Sequence[_Said | None]) -> Mapping[str, Any]:
    """Return a pair's slice fields: the prompt's, and over them the verdict's own."""
    found = material.prompts.get(prompt_id)
    own = next((one.verdict.meta for one in pair if one is not None), {})
    return {**({} if found is None else found.meta), **own}
