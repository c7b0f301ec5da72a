"""What the judge's choice is worth: best of four samples against a random one.

The pocket policy samples four replies to each evaluation prompt; the judge compares all pairs in both
orders. The gold check and the second judge, neither of which took part, then compare the judge's
choice with a reply drawn at random.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np

from feedback.goldcheck import gold_score
from feedback.records import Prompt, prompt_messages
from feedback.shards import read_jsonl
from recipes.pocket_model.contests import Contest
from recipes.pocket_model.sampling import draw_replies
from recipes.pocket_model.scoring import compare

__all__ = ["selection_figures"]

_SETS = Path(__file__).parents[2] / "prompts" / "sets"
_REPLIES = 4


def _strengths(
    model: Any, tokenizer: Any, prompts: list[Prompt], replies: list[list[str]]
) -> tuple[np.ndarray, np.ndarray]:
    """Return (prompts, replies): mean chance to be preferred; and (prompts, replies, replies): P(i over j)."""
    pairs = list(itertools.combinations(range(_REPLIES), 2))
    contests = [
        Contest(tuple(prompt_messages(prompt.prompt)), (texts[i], texts[j]), ("", ""))
        for prompt, texts in zip(prompts, replies, strict=True)
        for i, j in pairs
    ]
    chances = compare(model, tokenizer, contests).preferred.reshape(len(prompts), len(pairs))
    wins = np.full((len(prompts), _REPLIES, _REPLIES), 0.5)
    for place, (i, j) in enumerate(pairs):
        wins[:, i, j] = chances[:, place]
        wins[:, j, i] = 1 - chances[:, place]
    return wins.sum(2) / _REPLIES, wins


def _win_rate(chosen: np.ndarray, other: np.ndarray) -> float:
    return float(np.mean((chosen > other) + 0.5 * (chosen == other)))


def selection_figures(
    assistant: tuple[Any, Any], second: tuple[Any, Any], *, prompts: int, batch: int
) -> dict[str, float]:
    """Return gold scores of samples, the judges' agreement with them, and best-of-four win rates."""
    rows = list(read_jsonl(_SETS / "booking-eval.jsonl", Prompt))[:prompts]
    asked = [prompt_messages(row.prompt) for row in rows for _ in range(_REPLIES)]
    drawn = draw_replies(*assistant, asked, batch=batch, seed=5)
    gold = np.array(
        [
            gold_score(rows[place // _REPLIES].meta, reply.text, ended=reply.ended)
            for place, reply in enumerate(drawn)
        ]
    ).reshape(-1, _REPLIES)
    replies = [
        [reply.text for reply in drawn[place : place + _REPLIES]]
        for place in range(0, len(drawn), _REPLIES)
    ]
    figures = {
        "gold_mean": float(gold.mean()),
        "gold_spread": float(gold.std(1).mean()),
        "gold_best_of_4": float(gold.max(1).mean()),
    }
    lines = np.arange(len(rows))
    chooser = random.Random(7)
    drawn_place = np.array([chooser.randrange(_REPLIES) for _ in rows])
    strengths = {}
    for name, judge in (("judge", assistant), ("second_judge", second)):
        strengths[name], wins = _strengths(*judge, rows, replies)
        upper = np.triu_indices(_REPLIES, 1)
        gaps = (gold[:, :, None] - gold[:, None, :])[:, upper[0], upper[1]]
        chances = wins[:, upper[0], upper[1]]
        apart = np.abs(gaps) > 1e-9
        figures[f"{name}_gold_agreement"] = float(
            np.mean((chances[apart] > 0.5) == (gaps[apart] > 0))
        )
        figures[f"{name}_gold_auc"] = _auc(chances[apart], gaps[apart] > 0)
    best, wins = strengths["judge"].argmax(1), _strengths(*second, rows, replies)[1]
    figures["best_of_4_gold"] = float(gold[lines, best].mean())
    figures["best_of_4_gold_win_rate"] = _win_rate(gold[lines, best], gold[lines, drawn_place])
    figures["best_of_4_second_judge_win_rate"] = float(wins[lines, best, drawn_place].mean())
    agree = (strengths["judge"].argmax(1) == strengths["second_judge"].argmax(1)).mean()
    figures["judges_same_best_of_4"] = float(agree)
    return figures


def _auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """Return P(a positive scores higher than a negative), ties counted half."""
    high, low = scores[positive], scores[~positive]
    return float(np.mean((high[:, None] > low[None, :]) + 0.5 * (high[:, None] == low[None, :])))
