"""Which pairs people are shown: a seeded sample of the judged pairs, balanced over strata.

The order is that of a hash of the pair, so a larger sample contains the smaller one (but for a pair
where shares are rounded) and two people meet the same pairs first. Pairs whose texts are equal
after normalisation are left out: there is nothing to choose.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from feedback.annotate import AnnotateOptions
from feedback.errors import InputError, RecipeError, nearest
from feedback.inputs import checked_candidates
from feedback.observations import Material, Pairs, PromptOf, collect
from feedback.records import PromptText, Verdict, content_id, normalise_text
from feedback.shards import read_rows

__all__ = ["Item", "PairKey", "quotas", "sample_items", "text_folder"]

PairKey = tuple[str, str, str]
"""Prompt id and the two completion ids in sorted order."""
_CONFIDENCE_EDGES = (0.6, 0.75, 0.9)
_BY_VERDICTS = ("confidence", "disagreement")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One pair to label."""

    key: PairKey
    prompt: PromptText
    a: str
    """Text of the completion whose id sorts first."""
    b: str
    stratum: str
    weight: float = 1.0
    """Pairs of the stratum per pair sampled from it, relative to the whole; 1 when proportional."""


def text_folder(options: AnnotateOptions) -> Path:
    """Return where the texts are.

    Raises:
        RecipeError: neither verdicts nor candidates were named.
        InputError: there is no candidates folder beside the verdicts.
    """
    if options.candidates is not None:
        return options.candidates
    if options.verdicts is None:
        raise RecipeError("rlaif annotate needs --verdicts or --candidates")
    beside = options.verdicts.parent / "candidates"
    if not beside.is_dir():
        raise InputError(
            f"no texts: there is no folder {beside}; name one with --candidates",
            path=options.verdicts,
        )
    return beside


def sample_items(options: AnnotateOptions) -> list[Item]:
    """Return the pairs to label, in the order in which they are shown.

    Raises:
        InputError: texts are missing, a stratum is unknown, or no pair can be labelled.
    """
    texts = text_folder(options)
    material = Material(
        {
            row.prompt_id: PromptOf(
                row.prompt, {one.completion_id: one for one in row.completions}, row.meta
            )
            for row in checked_candidates(texts)
        }
    )
    folders = [] if options.verdicts is None else [options.verdicts, *options.also]
    arms = collect(
        itertools.chain.from_iterable(read_rows(folder, Verdict) for folder in folders),
        material=material,
    )
    judged = _judged(arms) if arms else {key: [] for key in _all_pairs(material)}
    strata = options.strata if options.strata is not None else _BY_VERDICTS[: int(bool(arms))]
    name = _namer(strata, arms, material)
    pool: dict[str, list[Item]] = {}
    for key, rows in judged.items():
        if (item := _item(key, material, texts)) is not None:
            stratum = name(key, rows)
            pool.setdefault(stratum, []).append(_replace(item, stratum))
    if not pool:
        raise InputError("holds no two different completions of a prompt", path=texts)
    return _draw(pool, options)


def _judged(arms: Sequence[Pairs]) -> dict[PairKey, list[tuple[Pairs, int]]]:
    """Return where each pair stands in each arm."""
    found: dict[PairKey, list[tuple[Pairs, int]]] = {}
    for pairs in arms:
        for row in range(len(pairs)):
            key = (pairs.prompt_ids[pairs.prompt[row]], pairs.a[row], pairs.b[row])
            found.setdefault(key, []).append((pairs, row))
    return found


def _all_pairs(material: Material) -> Iterator[PairKey]:
    for prompt_id, row in material.prompts.items():
        for one, two in itertools.combinations(sorted(row.completions), 2):
            yield prompt_id, one, two


def _item(key: PairKey, material: Material, texts: Path) -> Item | None:
    row = material.prompts.get(key[0])
    if row is None or not {key[1], key[2]} <= row.completions.keys():
        raise InputError(
            f"prompt {key[0]!r}: completions {key[1]!r} and {key[2]!r} were judged, and are not "
            "all here",
            path=texts,
        )
    a, b = (row.completions[name].completion for name in key[1:])
    if normalise_text(a) == normalise_text(b):
        return None
    return Item(key=key, prompt=row.prompt, a=a, b=b, stratum="")


def _replace(item: Item, stratum: str, weight: float = 1.0) -> Item:
    return Item(
        key=item.key, prompt=item.prompt, a=item.a, b=item.b, stratum=stratum, weight=weight
    )


# --- strata ----------------------------------------------------------------------------------


def _namer(
    strata: Sequence[str], arms: Sequence[Pairs], material: Material
) -> Callable[[PairKey, list[tuple[Pairs, int]]], str]:
    """Return a function that names the stratum of a pair.

    Raises:
        InputError: a stratum needs verdicts and there are none, or names an unknown field.
    """
    fields = {name for row in material.prompts.values() for name in row.meta}
    fields |= {name for pairs in arms for meta in pairs.meta for name in meta}
    for name in strata:
        if name in _BY_VERDICTS and not arms:
            raise InputError(f"strata by {name} need --verdicts")
        if name not in _BY_VERDICTS and name not in fields:
            known = [*_BY_VERDICTS, *sorted(fields)]
            raise InputError(
                f"unknown stratum {name!r}{nearest(name, known)} (there are: {', '.join(known)})"
            )

    def named(key: PairKey, rows: list[tuple[Pairs, int]]) -> str:
        return ", ".join(_stratum(name, key, rows, material) for name in strata)

    return named


def _stratum(name: str, key: PairKey, rows: list[tuple[Pairs, int]], material: Material) -> str:
    if name == "confidence":
        return _confidence(rows)
    if name == "disagreement":
        said = {float(one) for pairs, row in rows for one in pairs.winner[row] if np.isfinite(one)}
        return "no verdict" if not said else "one voice" if len(said) == 1 else "divided"
    meta: Mapping[str, Any] = rows[0][0].meta[rows[0][1]] if rows else material.prompts[key[0]].meta
    return f"{name} {meta.get(name, '-')}"


def _confidence(rows: list[tuple[Pairs, int]]) -> str:
    """Return the first judge's confidence, orders and repeats averaged, as one of four bands."""
    first = rows[0][0]
    known = [
        float(pairs.mean_p[row])
        for pairs, row in rows
        if pairs is first and np.isfinite(pairs.p[row]).any()
    ]
    if not known:
        return "no verdict"
    p = float(np.mean(known))
    confidence = max(p, 1 - p)
    edges = [0.5, *_CONFIDENCE_EDGES, 1.0]
    place = sum(confidence >= edge for edge in _CONFIDENCE_EDGES)
    return f"confidence {edges[place]:g} to {edges[place + 1]:g}"


# --- drawing ---------------------------------------------------------------------------------


def _draw(pool: dict[str, list[Item]], options: AnnotateOptions) -> list[Item]:
    def place(item: Item) -> str:
        return content_id("annotate", options.seed, *item.key)

    sizes = {name: len(items) for name, items in sorted(pool.items())}
    wanted = quotas(sizes, options.sample, equal=options.allocation == "equal")
    total, drawn = sum(sizes.values()), sum(wanted.values())
    chosen = [
        _replace(item, name, round(sizes[name] / wanted[name] * drawn / total, 4))
        for name, items in pool.items()
        for item in sorted(items, key=place)[: wanted[name]]
    ]
    return sorted(chosen, key=place)


def quotas(sizes: Mapping[str, int], sample: int, *, equal: bool) -> dict[str, int]:
    """Return how many to draw from each stratum.

    Args:
        sizes: pairs per stratum.
        sample: pairs in all; at most as many as there are.
        equal: as many of each as there are, instead of in proportion (by largest remainder).
    """
    sample = min(sample, sum(sizes.values()))
    if equal:
        return _equal(sizes, sample)
    shares = {name: sample * size / sum(sizes.values()) for name, size in sizes.items()}
    wanted = {name: math.floor(share) for name, share in shares.items()}
    rest = sample - sum(wanted.values())
    for name in _largest(sizes, lambda name: shares[name] - wanted[name])[:rest]:
        wanted[name] += 1
    return wanted


def _equal(sizes: Mapping[str, int], sample: int) -> dict[str, int]:
    wanted: Counter[str] = Counter({name: 0 for name in sizes})
    while (rest := sample - wanted.total()) > 0:
        free = [name for name in sizes if wanted[name] < sizes[name]]
        for place, name in enumerate(free):
            step = rest // len(free) + (place < rest % len(free))
            wanted[name] += min(step, sizes[name] - wanted[name])
    return dict(wanted)


def _largest(names: Iterable[str], size: Callable[[str], float]) -> list[str]:
    return sorted(names, key=lambda name: (-size(name), name))
