"""Tests that may be looked at after every item: an e-process and a confidence sequence.

A p-value computed at every look rejects a true null hypothesis far too often. An e-process may be
looked at whenever one likes: it is a bet against the null hypothesis whose expected winnings are at
most 1 at every stopping time, so it exceeds ``1 / alpha`` with probability at most alpha, ever
(Ville 1939; Shafer 2021; Ramdas et al. 2023). The confidence sequence holds at all times at once.

This module knows nothing of judges or files; it takes arrays in the order in which they came.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Looks", "confidence_sequence", "sign_e_process"]

Floats = npt.NDArray[np.float64]


class Looks(NamedTuple):
    """A confidence sequence: bounds after each observation, each array of shape (n,)."""

    low: Floats
    high: Floats


def sign_e_process(differences: npt.ArrayLike, *, prior: float = 1.0) -> Floats:
    """Return log e-values against "a difference is as often positive as negative", after each item.

    Zeros carry no information and change nothing. Among the others, wins are Bernoulli(1/2) under
    the null hypothesis; the alternative is their Bernoulli rate with a Beta(prior, prior) prior,
    which gives, after w wins and l losses, ``B(w + prior, l + prior) / B(prior, prior) * 2^(w+l)``
    (Robbins 1970's mixture, for coin flips).

    Args:
        differences: one independent difference per item (per prompt, where items share prompts),
            shape (n,).
        prior: of the alternative; 1 is uniform.
    """
    from scipy import special

    signs = np.sign(np.asarray(differences, float))
    wins, losses = np.cumsum(signs > 0), np.cumsum(signs < 0)
    mixed = special.betaln(wins + prior, losses + prior) - special.betaln(prior, prior)
    return np.asarray(mixed + (wins + losses) * math.log(2.0), float)


def confidence_sequence(
    values: npt.ArrayLike, *, low: float = -1.0, high: float = 1.0, alpha: float = 0.05
) -> Looks:
    """Return bounds on the mean that hold at all times at once with probability ``1 - alpha``.

    Predictable plug-in empirical Bernstein confidence sequence (Waudby-Smith and Ramdas 2024,
    "Estimating means of bounded random variables by betting", theorem 2), intersected over time.

    Args:
        values: independent observations in [low, high], in the order in which they came, (n,).
        low: least possible value.
        high: largest possible value.
        alpha: chance that the mean ever leaves the bounds.
    """
    unit = (np.asarray(values, float) - low) / (high - low)
    if unit.size and (unit.min() < -1e-12 or unit.max() > 1 + 1e-12):
        raise ValueError(f"a value lies outside [{low}, {high}]")
    times = np.arange(1, len(unit) + 1)
    running = (0.5 + np.cumsum(unit)) / (times + 1)
    spread = (0.25 + np.cumsum((unit - running) ** 2)) / (times + 1)
    before = np.concatenate([[0.25], spread[:-1]])
    # The bet at each time may use only what came before it.
    bets = np.sqrt(2 * math.log(2 / alpha) / (before * times * np.log(1 + times)))
    bets = np.minimum(bets, 0.5)
    mean_before = np.concatenate([[0.5], running[:-1]])
    squares = 4 * (unit - mean_before) ** 2
    cost = (-np.log1p(-bets) - bets) / 4
    centre = np.cumsum(bets * unit) / np.cumsum(bets)
    reach = (math.log(2 / alpha) + np.cumsum(squares * cost)) / np.cumsum(bets)
    lower = np.maximum.accumulate(np.clip(centre - reach, 0, 1))
    upper = np.minimum.accumulate(np.clip(centre + reach, 0, 1))
    return Looks(low + lower * (high - low), low + upper * (high - low))
