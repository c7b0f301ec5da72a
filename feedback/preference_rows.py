"""Comparisons of one prompt as training rows: preferences and a ranking.

Pure functions; every rule by which a comparison becomes a row, or does not, is here and is counted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from feedback.bradley_terry import Duel, fit_bradley_terry
from feedback.records import (
    Candidates,
    Comparison,
    Completion,
    Message,
    Preference,
    PromptText,
    Ranking,
    content_id,
    normalise_text,
    prompt_messages,
)

__all__ = ["Labelled", "PairRules", "preference_rows", "ranking_row", "strengths", "usable"]

# Standard deviation of the normal prior on Bradley-Terry strengths, in log-odds: wide enough to
# leave clear preferences alone, and it keeps a completion that won every time finite.
_PRIOR_SD = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PairRules:
    """Which comparisons become preferences, and with which label."""

    pairs: Literal["all", "best-worst", "best-rest"] = "all"
    labels: Literal["soft", "hard"] = "soft"
    ties: Literal["keep", "drop"] = "keep"
    near_ties: Literal["keep", "drop", "tie"] = "keep"
    band: float = 0.0
    inconsistent: Literal["keep", "drop"] = "keep"
    most: int | None = None
    messages: bool = False
    """Write prompts and completions as chat messages."""
    seed: int = 0


class Labelled(NamedTuple):
    """A comparison that may become a row."""

    first: Completion
    second: Completion
    p: float
    """P(first preferred), calibrated where a calibration is applied."""
    p_raw: float
    tie: bool
    consistent: bool | None
    votes: list[str]


def usable(
    comparisons: Sequence[Comparison],
    completions: Mapping[str, Completion],
    calibrated: Mapping[tuple[str, str], float],
    counts: Counter[str],
) -> list[Labelled]:
    """Return the comparisons that hold a label, and count the others by outcome."""
    kept = []
    for row in comparisons:
        if row.p is None or row.outcome not in ("decided", "tie"):
            counts[f"no label: {row.outcome}"] += 1
            continue
        first, second = completions[row.a], completions[row.b]
        if normalise_text(first.completion) == normalise_text(second.completion):
            counts["equal after normalisation"] += 1
            continue
        p = calibrated.get((row.a, row.b), row.p)
        tie = row.outcome == "tie"
        kept.append(Labelled(first, second, p, row.p, tie, row.consistent, row.votes))
    return kept


def strengths(labelled: Sequence[Labelled]) -> dict[str, float]:
    """Return Bradley-Terry strengths (log-odds) by completion id; {} without comparisons."""
    ids = sorted({name for row in labelled for name in _ids(row)})
    if len(ids) < 2:
        return {}
    place = {name: number for number, name in enumerate(ids)}
    duels = [
        Duel(place[row.first.completion_id], place[row.second.completion_id], row.p, 1.0 - row.p)
        for row in labelled
    ]
    fit = fit_bradley_terry(len(ids), duels, prior_sd=_PRIOR_SD)
    return {name: float(fit.values[place[name]]) for name in ids}


def _ids(row: Labelled) -> tuple[str, str]:
    return row.first.completion_id, row.second.completion_id


def preference_rows(
    candidates: Candidates,
    labelled: Sequence[Labelled],
    rules: PairRules,
    *,
    source: Mapping[str, Any],
    counts: Counter[str],
) -> list[Preference]:
    """Return the preferences of one prompt, and count what was left out and why."""
    chosen = _select(labelled, rules)
    rows: list[Preference] = []
    for row in chosen:
        near = not row.tie and abs(row.p - 0.5) < rules.band
        tie = row.tie or row.p == 0.5 or (near and rules.near_ties == "tie")
        if tie and rules.ties == "drop":
            counts["tie"] += 1
        elif near and rules.near_ties == "drop":
            counts["near tie"] += 1
        elif row.consistent is False and rules.inconsistent == "drop":
            counts["orders disagree"] += 1
        else:
            rows.append(_preference(candidates, row, tie, rules, source))
    rows.sort(key=lambda kept: content_id(rules.seed, kept.prompt_id, kept.source["verdicts"]))
    if rules.most is not None and len(rows) > rules.most:
        counts["over the limit per prompt"] += len(rows) - rules.most
        rows = rows[: rules.most]
    counts["ties kept"] += sum(kept.tie for kept in rows)
    counts["preferences kept"] += sum(not kept.tie for kept in rows)
    return rows


def _select(labelled: Sequence[Labelled], rules: PairRules) -> list[Labelled]:
    if rules.pairs == "all" or not labelled:
        return list(labelled)
    scores = strengths(labelled)
    best = max(scores, key=lambda name: (scores[name], name))
    rest = [row for row in labelled if best in _ids(row)]
    if rules.pairs == "best-rest":
        return rest
    # The worst that was compared with the best: a label is a comparison, not an inference.
    return [min(rest, key=lambda row: sum(scores[name] for name in _ids(row)))]


def _preference(
    candidates: Candidates,
    row: Labelled,
    tie: bool,
    rules: PairRules,
    source: Mapping[str, Any],
) -> Preference:
    first_wins = row.p > 0.5
    if tie:
        # Which side of a tie is called chosen means nothing; a seeded coin keeps it meaningless.
        coin = content_id("tie", rules.seed, candidates.prompt_id, _ids(row), length=8)
        first_wins = int(coin, 16) % 2 == 0
    chosen, rejected = (row.first, row.second) if first_wins else (row.second, row.first)
    if normalise_text(chosen.completion) == normalise_text(rejected.completion):
        raise AssertionError(f"prompt {candidates.prompt_id!r}: chosen equals rejected")
    raw = row.p_raw if first_wins else 1.0 - row.p_raw
    p = 0.5 if tie else row.p if first_wins else 1.0 - row.p
    if rules.labels == "hard" and not tie:
        p = 1.0
    return Preference(
        prompt=prompt_messages(candidates.prompt) if rules.messages else candidates.prompt,
        chosen=_completion(chosen.completion, rules.messages),
        rejected=_completion(rejected.completion, rules.messages),
        margin=2.0 * p - 1.0,
        p_chosen=p,
        prompt_id=candidates.prompt_id,
        tie=tie,
        p_raw=raw,
        source={
            **source,
            "verdicts": row.votes,
            "completions": [chosen.completion_id, rejected.completion_id],
        },
    )


def _completion(text: str, messages: bool) -> PromptText:
    return [Message(role="assistant", content=text)] if messages else text


def ranking_row(
    candidates: Candidates,
    labelled: Sequence[Labelled],
    rules: PairRules,
    *,
    source: Mapping[str, Any],
) -> Ranking | None:
    """Return the ranking of one prompt by Bradley-Terry strengths, or None without comparisons.

    Completions that were never compared keep a null score and stand in no group.
    """
    scores = strengths(labelled)
    if not scores:
        return None
    completions = candidates.completions
    place = {entry.completion_id: number for number, entry in enumerate(completions)}
    order = sorted(scores, key=lambda name: (-scores[name], place[name]))
    groups: list[list[int]] = []
    last = math.inf
    for name in order:
        if math.isclose(scores[name], last, abs_tol=1e-9):
            groups[-1].append(place[name])
        else:
            groups.append([place[name]])
        last = scores[name]
    return Ranking(
        prompt=prompt_messages(candidates.prompt) if rules.messages else candidates.prompt,
        completions=[entry.completion for entry in completions],
        scores=[scores.get(entry.completion_id) for entry in completions],
        ranking=groups,
        prompt_id=candidates.prompt_id,
        comparisons=[
            (place[row.first.completion_id], place[row.second.completion_id], row.p)
            for row in labelled
        ],
        source={**source, "verdicts": sorted({vote for row in labelled for vote in row.votes})},
    )
