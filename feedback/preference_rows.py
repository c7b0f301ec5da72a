"""Comparisons of one prompt as training rows: preferences and a ranking.

Pure functions; every rule by which a comparison becomes a row, or does not, is here and is counted.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from feedback.panel import Combination
from feedback.panel_ratings import panel_scores
from feedback.ranking import RankedPair, rank_lists, rank_pairs, rank_ratings, rank_scores
from feedback.records import (
    Candidates,
    Comparison,
    Completion,
    Message,
    Preference,
    PromptText,
    Ranking,
    Verdict,
    content_id,
    normalise_text,
    prompt_messages,
)

__all__ = ["Labelled", "PairRules", "preference_rows", "ranking_row", "usable"]


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


def _ids(row: Labelled) -> tuple[str, str]:
    return row.first.completion_id, row.second.completion_id


def preference_rows(
    candidates: Candidates,
    labelled: Sequence[Labelled],
    rules: PairRules,
    *,
    ranking: Ranking | None,
    source: Mapping[str, Any],
    counts: Counter[str],
) -> list[Preference]:
    """Return the preferences of one prompt, and count what was left out and why.

    Args:
        candidates: the prompt's completions.
        labelled: its comparisons that hold a label.
        rules: which of them become rows.
        ranking: of the same prompt; says which completions are best and worst.
        source: what each row's ``source`` begins with.
        counts: gets what was kept and left out.
    """
    chosen = _select(candidates, labelled, rules, ranking)
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


def _select(
    candidates: Candidates,
    labelled: Sequence[Labelled],
    rules: PairRules,
    ranking: Ranking | None,
) -> list[Labelled]:
    if rules.pairs == "all" or ranking is None:
        return list(labelled)
    ids = [entry.completion_id for entry in candidates.completions]
    scores = {
        name: score for name, score in zip(ids, ranking.scores, strict=True) if score is not None
    }
    compared = [row for row in labelled if set(_ids(row)) <= set(scores)]
    if not compared:
        return []
    best = max(scores, key=lambda name: (scores[name], name))
    rest = [row for row in compared if best in _ids(row)]
    if rules.pairs == "best-rest" or not rest:
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
    verdicts: Sequence[Verdict] = (),
    weights: Mapping[str, float] | None = None,
    combination: Combination | None = None,
) -> Ranking | None:
    """Return the ranking of one prompt, or None without comparisons.

    A judge's lists are fitted as lists and ratings keep their scale; anything else, the merged
    lists of several judges included, is Bradley-Terry strengths of the comparisons. Completions
    that were never judged have a null score and stand in no group.

    Args:
        candidates: the prompt's completions.
        labelled: its comparisons that hold a label.
        rules: form of the rows.
        source: what the row's ``source`` begins with.
        verdicts: behind the comparisons.
        weights: of criteria that were rated one by one.
        combination: how several judges are merged; None for a single judge.
    """
    pairs = [RankedPair(*_ids(row), row.p, row.tie) for row in labelled]
    kinds = {verdict.kind for verdict in verdicts}
    if kinds == {"rating"} and combination is not None:
        scores = panel_scores(verdicts, combination, weights=weights)
        ranking = rank_scores(candidates, scores, pairs, weights=weights)
    elif kinds == {"listwise"} and combination is None:
        ranking = rank_lists(candidates, verdicts, pairs)
    elif kinds == {"rating"}:
        ranking = rank_ratings(candidates, verdicts, pairs, weights=weights)
    else:
        ranking = rank_pairs(candidates, pairs)
    if ranking is None:
        return None
    votes = {vote for row in labelled for vote in row.votes}
    return dataclasses.replace(
        ranking,
        prompt=prompt_messages(candidates.prompt) if rules.messages else candidates.prompt,
        source={**source, **ranking.source, "verdicts": sorted(votes)},
    )
