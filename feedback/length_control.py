"""Win rates with length held equal, by the form of AlpacaEval 2 (2404.04475).

    logit P(model beats baseline on prompt x) = theta + phi * tanh(dl / sd(dl)) + psi * gamma_x

``dl`` is the difference in characters, ``gamma_x`` the difficulty of the prompt, and the length-
controlled win rate is the mean prediction at ``dl = 0``. AlpacaEval ships its own ``gamma_x`` and
adds rows of two deliberately long and short baselines; neither exists for other prompt sets, so
``gamma_x`` is estimated from all models at hand and a small ridge takes the place of those rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feedback.figures import CardTable
from feedback.intervals import Estimate, Resampler, mean, nothing
from feedback.observations import Pairs
from feedback.regression import fit_logistic, sigmoid, standardise

__all__ = ["Duels", "controlled_win_rate", "duels", "prompt_difficulty", "win_rate_table"]

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_RIDGE = 1e-3
_MIN_MODELS = 4


@dataclass(frozen=True, slots=True)
class Duels:
    """All pairs of one model against the baseline."""

    model: str
    win: Floats
    """(n,): P(model preferred), or 1, 0.5 and 0 for won, level and lost."""
    gap: Floats
    """(n,): characters of the model's answer less the baseline's."""
    prompt: Ints
    """(n,)"""


def duels(pairs: Pairs, baseline: str) -> list[Duels]:
    """Return each other model's pairs against ``baseline``, models with most pairs first."""
    rows: dict[str, list[tuple[float, float, int]]] = {}
    p = pairs.mean_p
    for row, (a, b) in enumerate(pairs.completions):
        if a is None or b is None or not np.isfinite(p[row]) or a.model == b.model:
            continue
        gap = float(len(a.completion) - len(b.completion))
        prompt = int(pairs.prompt[row])
        if b.model == baseline:
            rows.setdefault(a.model, []).append((float(p[row]), gap, prompt))
        elif a.model == baseline:
            rows.setdefault(b.model, []).append((1 - float(p[row]), -gap, prompt))
    found = []
    for model, values in sorted(rows.items(), key=lambda item: -len(item[1])):
        table = np.array(values)
        found.append(Duels(model, table[:, 0], table[:, 1], table[:, 2].astype(int)))
    return found


def prompt_difficulty(models: Sequence[Duels], prompts: int, *, rounds: int = 12) -> Floats | None:
    """Return gamma_x for each prompt, standardised, or None with fewer than four models.

    Fitted by turns: each model's theta and phi given gamma, then each prompt's gamma by one Newton
    step given the rest, shrunk towards 0.
    """
    if len(models) < _MIN_MODELS:
        return None
    gamma = np.zeros(prompts)
    win = np.concatenate([duel.win for duel in models])
    place = np.concatenate([duel.prompt for duel in models])
    for _ in range(rounds):
        offsets = []
        for duel in models:
            covariate = np.tanh(standardise(duel.gap))
            design = np.stack([np.ones(len(covariate)), covariate, gamma[duel.prompt]], axis=1)
            fit = fit_logistic(design, duel.win, duel.prompt, ridge=_RIDGE)
            offsets.append(design[:, :2] @ fit.coefficients[:2])
        offset = np.concatenate(offsets)
        fitted = sigmoid(offset + gamma[place])
        slope = np.bincount(place, win - fitted, prompts) - gamma
        curve = np.bincount(place, fitted * (1 - fitted), prompts) + 1.0
        gamma = gamma + slope / curve
        gamma -= gamma[np.unique(place)].mean()
    spread = float(gamma[np.unique(place)].std())
    return gamma / spread if spread > 0 else None


def controlled_win_rate(duel: Duels, difficulty: Floats | None = None) -> Estimate:
    """Return the length-controlled win rate, with a delta-method interval on the logit scale."""
    n = len(duel.win)
    if n < 10 or not np.any(duel.gap):
        return nothing("fewer than 10 pairs, or no difference in length")
    columns = [np.ones(n), np.tanh(standardise(duel.gap))]
    if difficulty is not None:
        columns.append(difficulty[duel.prompt])
    design = np.stack(columns, axis=1)
    fit = fit_logistic(design, duel.win, duel.prompt, ridge=_RIDGE)
    level = design.copy()
    level[:, 1] = 0.0
    predicted = sigmoid(level @ fit.coefficients)
    rate = float(predicted.mean())
    gradient = (level * (predicted * (1 - predicted))[:, None]).mean(axis=0)
    error = float(np.sqrt(gradient @ fit.covariance @ gradient)) / (rate * (1 - rate))
    logit = float(np.log(rate / (1 - rate)))
    low, high = (float(sigmoid(np.array(logit + sign * 1.96 * error))) for sign in (-1, 1))
    method = "logistic regression at equal length, errors clustered by prompt"
    return Estimate(rate, low, high, n, fit.prompts, method)


def win_rate_table(
    pairs: Pairs, resampler: Resampler, *, baseline: str | None = None
) -> CardTable | None:
    """Return raw and length-controlled win rates of every model against a baseline, or None.

    Args:
        pairs: with texts.
        resampler: of the card.
        baseline: a model's name; None: the one in most pairs of two different models.
    """
    counts: dict[str, int] = {}
    for a, b in pairs.completions:
        if a is not None and b is not None and a.model != b.model:
            counts[a.model] = counts.get(a.model, 0) + 1
            counts[b.model] = counts.get(b.model, 0) + 1
    if not counts:
        return None
    baseline = baseline or max(counts, key=lambda name: counts[name])
    models = duels(pairs, baseline)
    difficulty = prompt_difficulty(models, len(pairs.prompt_ids))
    rows = []
    for duel in models:
        raw = mean(resampler, duel.prompt, duel.win)
        rows.append([duel.model, raw, controlled_win_rate(duel, difficulty)])
    if not rows:
        return None
    return CardTable(
        name="length_controlled",
        caption=f"Win rate against {baseline}, as judged and with length held equal",
        columns=["Model", "Win rate", "At equal length"],
        rows=rows,
    )
