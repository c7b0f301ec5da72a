"""Several rows about the same content as one row: what agrees is dropped, what differs is a vote.

A duplicate is a row that says the same and comes from the same verdicts. Labels of other judges, or
of the same judge asked again, are votes: all of them stay in ``source["votes"]``, each with its own
source, and the row's label is made of them all. Rows that were merged before bring their votes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from feedback.content import pair_sides
from feedback.errors import ShardError
from feedback.ranking import RankedPair, rank_pairs, tied_groups
from feedback.records import (
    Candidates,
    Completion,
    GoldPair,
    Preference,
    Ranking,
    Verdict,
    content_id,
    normalise_text,
)

__all__ = [
    "merge_candidates",
    "merge_gold",
    "merge_preferences",
    "merge_rankings",
    "merge_verdicts",
]

_DIGITS = 12
GoldLabel = Literal["a", "b", "tie"]
_OTHER_WAY: dict[GoldLabel, GoldLabel] = {"a": "b", "b": "a", "tie": "tie"}
Votes = list[dict[str, Any]]


def merge_preferences(rows: Sequence[Preference], counts: Counter[str]) -> Preference:
    """Return one row for preferences of the same pair; contradictions become votes.

    The probability of the first row's chosen side is averaged over the votes, by weight; where the
    mean falls below one half the sides change places. A vote's ``p_chosen`` is about the side that
    is chosen in the end.
    """
    first = rows[0]
    votes = _distinct([vote for row in rows for vote in _pair_votes(row, pair_sides(first))])
    counts["duplicates"] += len(rows) - 1
    if len(votes) == 1:
        return first
    wins = {vote["p_chosen"] > 0.5 for vote in votes if vote["p_chosen"] != 0.5}
    counts["conflicts, kept as votes" if len(wins) > 1 else "agreeing labels, kept as votes"] += 1
    mass = sum(vote["weight"] for vote in votes)
    p = sum(vote["p_chosen"] * vote["weight"] for vote in votes) / mass if mass else 0.5
    if swapped := p < 0.5:
        votes = [{**vote, "p_chosen": round(1 - vote["p_chosen"], _DIGITS)} for vote in votes]
    sides = (first.rejected, first.chosen) if swapped else (first.chosen, first.rejected)
    p = max(p, 1 - p)
    return replace(
        first,
        chosen=sides[0],
        rejected=sides[1],
        p_chosen=p,
        margin=2 * p - 1,
        p_raw=None,
        tie=all(vote["tie"] for vote in votes),
        weight=max(row.weight for row in rows),
        source={**_without_votes(first.source), "votes": votes},
    )


def _pair_votes(row: Preference, sides: tuple[str, str]) -> Votes:
    """Return a row's votes, with probabilities of ``sides[0]``; a row without votes is one."""
    own = {"p_chosen": row.p_chosen, "tie": row.tie, "weight": row.weight}
    votes: Votes = row.source.get("votes") or [{**own, **row.source}]
    if pair_sides(row) == sides:
        return votes
    return [{**vote, "p_chosen": round(1 - vote["p_chosen"], _DIGITS)} for vote in votes]


def _distinct(votes: Votes) -> Votes:
    return list({content_id(vote): vote for vote in votes}.values())


def _without_votes(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in source.items() if key != "votes"}


def merge_rankings(rows: Sequence[Ranking], counts: Counter[str]) -> Ranking:
    """Return one ranking for rankings of the same completions.

    Scores of ratings are averaged; otherwise each pair's probability is averaged over the votes
    that compared it, and Bradley-Terry strengths are fitted to the means.
    """
    first = rows[0]
    votes = _distinct([vote for row in rows for vote in _ranking_votes(row, first)])
    counts["duplicates"] += len(rows) - 1
    if len(votes) == 1:
        return first
    conflict = len({_signs(vote["ranking"]) for vote in votes}) > 1
    counts["conflicts, kept as votes" if conflict else "agreeing labels, kept as votes"] += 1
    source = {**_without_votes(first.source), "votes": votes}
    if all(vote.get("method") == "rating" for vote in votes):
        scores = [_mean([vote["scores"][place] for vote in votes])
                  for place in range(len(first.completions))]  # fmt: skip
        return replace(first, scores=scores, ranking=tied_groups(scores),
                       comparisons=_mean_comparisons(votes), source=source)  # fmt: skip
    fitted = _fitted(first, _mean_comparisons(votes))
    if fitted is None:
        return replace(first, source=source)
    return replace(fitted, source={**source, **fitted.source})


def _ranking_votes(row: Ranking, first: Ranking) -> Votes:
    """Return a row's votes with places in the first row's list of completions."""
    own = {"ranking": row.ranking, "scores": row.scores, "comparisons": row.comparisons}
    votes: Votes = row.source.get("votes") or [{**own, **row.source}]
    place = {normalise_text(text): number for number, text in enumerate(first.completions)}
    moved = [place[normalise_text(text)] for text in row.completions]
    if moved == list(range(len(moved))):
        return votes
    return [_moved(vote, moved) for vote in votes]


def _moved(vote: Mapping[str, Any], moved: Sequence[int]) -> dict[str, Any]:
    scores: list[float | None] = [None] * len(moved)
    for old, score in enumerate(vote["scores"]):
        scores[moved[old]] = score
    return {
        **vote,
        "ranking": [sorted(moved[old] for old in group) for group in vote["ranking"]],
        "scores": scores,
        "comparisons": [(moved[i], moved[j], p) for i, j, p in vote["comparisons"]],
    }


def _signs(ranking: Sequence[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(sorted(group)) for group in ranking)


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _mean_comparisons(votes: Votes) -> list[tuple[int, int, float]]:
    """Return each compared pair once, with its probability averaged over the votes."""
    found: dict[tuple[int, int], list[float]] = {}
    for vote in votes:
        for i, j, p in vote["comparisons"]:
            found.setdefault((min(i, j), max(i, j)), []).append(p if i < j else 1 - p)
    return [(i, j, sum(values) / len(values)) for (i, j), values in sorted(found.items())]


def _fitted(first: Ranking, comparisons: list[tuple[int, int, float]]) -> Ranking | None:
    names = [str(place) for place in range(len(first.completions))]
    completions = [
        Completion(completion_id=name, completion=text, model="")
        for name, text in zip(names, first.completions, strict=True)
    ]
    candidates = Candidates(prompt_id=first.prompt_id, prompt=first.prompt, completions=completions)
    pairs = [RankedPair(names[i], names[j], p) for i, j, p in comparisons]
    return rank_pairs(candidates, pairs)


def merge_candidates(rows: Sequence[Candidates], counts: Counter[str]) -> Candidates:
    """Return one row with every completion of the prompt once.

    Raises:
        ShardError: two different completions have the same id, which verdicts then could not tell
            apart.
    """
    texts: set[str] = set()
    ids: set[str] = set()
    completions = []
    for completion in (one for row in rows for one in row.completions):
        text = normalise_text(completion.completion)
        if text in texts:
            counts["duplicate completions"] += 1
            continue
        if completion.completion_id in ids:
            raise ShardError(
                f"prompt {rows[0].prompt_id!r} has two different completions with the id "
                f"{completion.completion_id!r}; give one folder other ids"
            )
        texts.add(text)
        ids.add(completion.completion_id)
        completions.append(completion)
    gold = next((row.gold for row in rows if row.gold is not None), None)
    meta = {key: value for row in reversed(rows) for key, value in row.meta.items()}
    return replace(rows[0], completions=completions, gold=gold, meta=meta)


def merge_gold(rows: Sequence[GoldPair], counts: Counter[str]) -> GoldPair:
    """Return one gold pair with every person's vote; the label is what most of them say.

    A row without votes is one vote, of somebody unknown. Where most say neither side, it is a tie.
    """
    first = rows[0]
    turned = list(
        {content_id(row.label, row.votes, row.annotators): row for row in
         (_turned(row, first) for row in rows)}.values()
    )  # fmt: skip
    counts["duplicates"] += len(rows) - 1
    if len(turned) == 1:
        return first
    conflict = len({row.label for row in turned}) > 1
    counts["conflicts, kept as votes" if conflict else "agreeing labels, kept as votes"] += 1
    votes: list[tuple[str, GoldLabel]] = []
    for row in turned:
        said = row.votes or [row.label]
        people = row.annotators if len(row.annotators) == len(said) else [""] * len(said)
        votes += [
            vote for vote in zip(people, said, strict=True) if not vote[0] or vote not in votes
        ]
    told = Counter(label for _, label in votes)
    label: GoldLabel = "a" if told["a"] > told["b"] else "b" if told["b"] > told["a"] else "tie"
    if told["tie"] > max(told["a"], told["b"]):
        label = "tie"
    named = all(person for person, _ in votes)
    return replace(
        first,
        label=label,
        votes=[label for _, label in votes],
        annotators=[person for person, _ in votes] if named else [],
    )


def _turned(row: GoldPair, first: GoldPair) -> GoldPair:
    """Return a row with a and b as in the first one."""
    if row.a == first.a:
        return row
    votes = [_OTHER_WAY[vote] for vote in row.votes]
    return replace(row, a=row.b, b=row.a, label=_OTHER_WAY[row.label], votes=votes)


def merge_verdicts(rows: Sequence[Verdict], counts: Counter[str]) -> Verdict:
    """Return one of several records of the same call: a verdict before a failure, else the first.

    Calls that were answered differently are a conflict; the other answer stays in ``meta``.
    """
    counts["duplicates"] += len(rows) - 1
    answered = [row for row in rows if row.outcome != "failed"] or list(rows)
    kept = answered[0]
    others = [row for row in answered[1:] if (row.outcome, row.winner, row.ranking, row.scores)
              != (kept.outcome, kept.winner, kept.ranking, kept.scores)]  # fmt: skip
    if not others:
        return kept
    counts["conflicts, kept as votes"] += 1
    votes = [
        {"outcome": row.outcome, "winner": row.winner, "ranking": row.ranking, "scores": row.scores}
        for row in others
    ]
    return replace(kept, meta={**kept.meta, "votes": votes})
