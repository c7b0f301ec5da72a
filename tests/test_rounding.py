"""Rounded probabilities are recognised, and others are not taken for rounded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from judged import verdict

from feedback.card import make_card
from feedback.observations import collect
from feedback.rounding import STEPS, log_odds_step


def labels(size: float, count: int, *, dtype: torch.dtype, ties: bool = False) -> list[list[float]]:
    """Probabilities of two labels (or three), from logits of about ``size`` held in ``dtype``."""
    random = np.random.default_rng(int(size))
    logits = size + random.normal(0, 0.7, (count, 3 if ties else 2))
    held = torch.tensor(logits).to(dtype).float()
    return held.log_softmax(-1).exp().tolist()


@pytest.mark.parametrize(
    ("size", "step"), [(6, 0.03125), (12, 0.0625), (24, 0.125), (48, 0.25), (96, 0.5)]
)
@pytest.mark.parametrize("ties", [False, True])
def test_bfloat16_logits_have_the_step_of_their_size(size: float, step: float, ties: bool) -> None:
    assert log_odds_step(labels(size, 400, dtype=torch.bfloat16, ties=ties)) == step


def test_finer_logits_have_none() -> None:
    """Nor do float16's, whose steps are an eighth of bfloat16's."""
    for size in (12, 24):
        assert log_odds_step(labels(size, 400, dtype=torch.float32)) is None
        assert log_odds_step(labels(size, 400, dtype=torch.float16)) is None
    assert STEPS[-1] > 2 * 2**-7


def test_chance_makes_no_step() -> None:
    random = np.random.default_rng(0)
    for _ in range(2000):
        first = random.uniform(0.02, 0.98, 50)
        assert log_odds_step(np.column_stack([first, 1 - first]).tolist()) is None


def test_a_few_verdicts_prove_nothing() -> None:
    assert log_odds_step(labels(24, 49, dtype=torch.bfloat16)) is None
    assert log_odds_step([]) is None
    assert log_odds_step([[1.0]] * 60) is None
    # A judge that always says the same, or says only 0, 1/2 and 1, is another finding.
    assert log_odds_step([[0.5, 0.5]] * 60) is None
    assert log_odds_step([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]] * 40) is None


@pytest.mark.parametrize(("dtype", "told"), [(torch.bfloat16, True), (torch.float32, False)])
def test_the_card_says_so(dtype: torch.dtype, told: bool) -> None:
    rows = labels(24, 100, dtype=dtype)
    verdicts = [
        verdict(f"p{number}", ("x", "y"), "1" if first > second else "2", p_first=first, mass=0.9)
        for number, (first, second) in enumerate(rows)
    ]
    card = make_card(collect(verdicts), source={}, replicates=20)
    section = next(s for s in card.arms[0].sections if s.name == "outcomes")
    assert bool(section.notes) == told
    if told:
        assert "steps of 0.125" in section.notes[0] and "3.1 points" in section.notes[0]
