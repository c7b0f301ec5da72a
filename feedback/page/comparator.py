"""Verdicts in the JSON format of LLM Comparator (arXiv 2402.10524), for people who use that viewer.

Its scores run from -1.5 (B much better) to 1.5 (A much better); a verdict's probability of a is
mapped onto that range. Where several models wrote the candidates, A and B are the two commonest and
pairs of others are left out; else A and B are the two completions of each pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from feedback.observations import Material, Pairs
from feedback.page.text import conversation

__all__ = ["comparator_json"]

_TOP = 1.5


def comparator_json(
    arms: Sequence[Pairs], material: Material, *, limit: int = 10_000
) -> dict[str, Any] | None:
    """Return the viewer's data, or None where the texts are not at hand.

    Args:
        arms: each judge's pairs; a pair that several judged has all of their ratings.
        material: texts.
        limit: examples at most.
    """
    models = _two_models(arms)
    if models is None:
        return None
    examples: dict[tuple[str, str, str], dict[str, Any]] = {}
    for pairs in arms:
        for row in range(len(pairs)):
            _add(examples, pairs, row, material, models, limit)
    if not examples:
        return None
    for number, example in enumerate(examples.values()):
        scores = [rating["score"] for rating in example["individual_rater_scores"]]
        example["index"] = number
        example["score"] = float(np.mean(scores)) if scores else None
    names = models if models[0] != models[1] else ("a", "b")
    return {
        "metadata": {
            "source_path": ", ".join(dict.fromkeys(pairs.arm.name for pairs in arms)),
            "custom_fields_schema": [
                {"name": "prompt_id", "type": "string"},
                {"name": "gold", "type": "category"},
                {"name": "consistent", "type": "category"},
            ],
        },
        "models": [{"name": name} for name in names],
        "examples": list(examples.values()),
    }


def _two_models(arms: Sequence[Pairs]) -> tuple[str, str] | None:
    """Return the pair of models met most often, in sorted order; equal names for one model."""
    counts: Counter[tuple[str, str]] = Counter()
    for pairs in arms:
        for a, b in pairs.completions:
            if a is not None and b is not None:
                first, second = sorted((a.model, b.model))
                counts[first, second] += 1
    return counts.most_common(1)[0][0] if counts else None


def _add(
    examples: dict[tuple[str, str, str], dict[str, Any]],
    pairs: Pairs,
    row: int,
    material: Material,
    models: tuple[str, str],
    limit: int,
) -> None:
    a, b = pairs.completions[row]
    if a is None or b is None or tuple(sorted((a.model, b.model))) != models:
        return
    prompt_id = pairs.prompt_ids[pairs.prompt[row]]
    key = (prompt_id, pairs.a[row], pairs.b[row])
    if key not in examples and len(examples) >= limit:
        return
    # A is the first of the two models; where one model wrote both, the completion a.
    swapped = a.model != b.model and a.model != models[0]
    if key not in examples:
        gold = pairs.gold[row]
        sign = -1.0 if swapped else 1.0
        label = "unknown" if np.isnan(gold) else {1.0: "A", -1.0: "B"}.get(sign * gold, "tie")
        one, two = (b, a) if swapped else (a, b)
        examples[key] = {
            "input_text": conversation(material.prompts[prompt_id].prompt),
            "tags": [str(value) for value in pairs.meta[row].values() if isinstance(value, str)],
            "output_text_a": one.completion,
            "output_text_b": two.completion,
            "individual_rater_scores": [],
            "rationale_list": [],
            "custom_fields": {
                "prompt_id": prompt_id,
                "gold": label,
                "consistent": _same(pairs, row),
            },
        }
    ratings = examples[key]["individual_rater_scores"]
    for order, verdict in enumerate(pairs.verdicts[row]):
        p = pairs.p[row, order]
        if verdict is None or np.isnan(p):
            continue
        score = (2 * float(p) - 1) * _TOP * (-1 if swapped else 1)
        ratings.append(
            {
                "index": len(ratings),
                "score": score,
                "rating_label": "A" if score > 0 else "B" if score < 0 else "tie",
                "is_flipped": (order == 1) != swapped,
                "rationale": verdict.rationale or verdict.reply,
                "custom_fields": {},
            }
        )


def _same(pairs: Pairs, row: int) -> str:
    winner = pairs.winner[row]
    if not np.isfinite(winner).all():
        return "one order"
    return "yes" if winner[0] == winner[1] else "no"
