"""Remedies before and after, and models of annotators, on data whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from judged import with_texts

from feedback.annotators import bradley_terry_judges, dawid_skene, pair_votes
from feedback.intervals import Resampler
from feedback.mitigation import LengthCorrection, mitigation_section, remedies
from feedback.observations import collect
from feedback.regression import fit_logistic
from feedback.simulation import Planted, simulate


def sigmoid(x: float) -> float:
    return 1 / (1 + np.exp(-x))


# --- annotator models ------------------------------------------------------------------------


def test_dawid_skene_by_hand() -> None:
    """Without smoothing, two perfect annotators and a coin: the labels are the perfect ones'."""
    truth = np.array([0, 1, 0, 1, 0, 1, 0, 1])
    coin = np.array([0, 0, 1, 1, 0, 0, 1, 1])
    item = np.tile(np.arange(8), 3)
    annotator = np.repeat([0, 1, 2], 8)
    fit = dawid_skene(
        item, annotator, np.concatenate([truth, truth, coin]), classes=2, smoothing=1e-9
    )
    assert fit.labels.argmax(axis=1).tolist() == truth.tolist()
    assert fit.confusion[0] == pytest.approx(np.eye(2), abs=1e-6)
    assert fit.confusion[2] == pytest.approx(np.full((2, 2), 0.5), abs=1e-6)
    assert fit.prior == pytest.approx([0.5, 0.5])


def test_dawid_skene_finds_who_is_reliable_and_beats_the_majority() -> None:
    random = np.random.default_rng(0)
    accuracy = np.array([0.9, 0.85, 0.55, 0.55, 0.55])
    truth = random.integers(0, 2, 1500)
    right = random.random((5, 1500)) < accuracy[:, None]
    votes = np.where(right, truth, 1 - truth)
    fit = dawid_skene(
        np.tile(np.arange(1500), 5), np.repeat(np.arange(5), 1500), votes.ravel(), classes=2
    )
    found = fit.confusion[:, [0, 1], [0, 1]].mean(axis=1)
    assert found == pytest.approx(accuracy, abs=0.05)
    majority = (votes.sum(axis=0) > 2).astype(int)
    ours = fit.labels.argmax(axis=1)
    assert (ours == truth).mean() > (majority == truth).mean() + 0.05


def test_dawid_skene_takes_out_position_bias_of_one_judge() -> None:
    """Orders as annotators: the confusion matrices carry the lean, the labels do not."""
    pairs = simulate(Planted(position=1.5, sensitivity=2.5, lean=0.1), prompts=400, seed=1).pairs()
    keys, item, annotator, label = pair_votes([pairs])
    assert len(keys) == len(pairs)
    assert set(annotator) == {0, 1}
    fit = dawid_skene(item, annotator, label, classes=3)
    # With a first, a is named more often than with b first, whatever the truth.
    assert fit.confusion[0, 0, 2] > fit.confusion[1, 0, 2] + 0.1


def test_bradley_terry_with_judge_effects_recovers_them() -> None:
    random = np.random.default_rng(3)
    strength = random.normal(size=60)
    skill, place = np.array([1.6, 0.4]), np.array([0.0, 1.0])
    first = random.integers(0, 60, 20_000)
    second = (first + random.integers(1, 60, 20_000)) % 60
    judge = random.integers(0, 2, 20_000)
    logit = skill[judge] * (strength[first] - strength[second]) + place[judge]
    p = (random.random(20_000) < sigmoid(logit)).astype(float)
    fit = bradley_terry_judges(first, second, judge, p, ridge=0.01)
    assert fit.converged
    assert fit.skill == pytest.approx(skill, abs=0.1)
    assert fit.place == pytest.approx(place, abs=0.1)
    centred = fit.strength - fit.strength.mean()
    assert np.corrcoef(centred, strength)[0, 1] > 0.98
    assert np.std(centred) == pytest.approx(np.std(strength), rel=0.1)


def test_bradley_terry_gradient_is_right() -> None:
    """One comparison with p = 0.9 and no ridge on skill to speak of: logit 0.9 at the optimum."""
    fit = bradley_terry_judges(
        np.array([0]), np.array([1]), np.array([0]), np.array([0.9]), ridge=1e-6
    )
    gap = fit.skill[0] * (fit.strength[0] - fit.strength[1]) + fit.place[0]
    assert sigmoid(float(gap)) == pytest.approx(0.9, abs=0.01)


# --- remedies --------------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [-1.0, 0.0, 1.0, 2.0])
def test_length_correction_recovers_and_removes_the_pull(planted: float) -> None:
    pairs = simulate(Planted(length=planted, soft=True, lean=0.2), prompts=600, seed=5).pairs()
    correction = LengthCorrection.fit(pairs)
    assert correction.coefficient == pytest.approx(planted, abs=0.1)
    lengths = pairs.lengths
    corrected = correction.apply(pairs.mean_p, lengths[:, 0], lengths[:, 1])
    pull = np.tanh((lengths[:, 0] - lengths[:, 1]) / correction.scale)
    left = fit_logistic(np.stack([pull, pairs.gold], axis=1), corrected, pairs.prompt)
    assert left.coefficients[0] == pytest.approx(0, abs=0.05)
    gold = pairs.gold > 0
    before = ((pairs.mean_p > 0.5) == gold).mean()
    after = ((corrected > 0.5) == gold).mean()
    assert after > 0.9
    assert after - before > 0.03 * abs(planted) - 0.01


def test_length_correction_of_hard_verdicts_by_length_alone() -> None:
    """What length decides and nothing else, corrected, says nothing."""
    pairs = with_texts([("t" * (10 + n), "u" * 5, "12", None) for n in range(5)])
    correction = LengthCorrection.fit(pairs)
    lengths = pairs.lengths
    corrected = correction.apply(pairs.mean_p, lengths[:, 0], lengths[:, 1])
    assert corrected.mean() == pytest.approx(0.5, abs=0.2)


def test_length_correction_by_hand() -> None:
    """p = 0.8 at one scale of difference: the logit loses coefficient * tanh(1)."""
    correction = LengthCorrection(0.5, 100.0)
    expected = sigmoid(np.log(4.0) - 0.5 * np.tanh(1.0))
    assert correction.apply(0.8, 150, 50) == pytest.approx(expected)
    assert correction.apply(0.8, 50, 50) == pytest.approx(0.8)
    assert correction.apply([0.5, 1.0], [10, 10], [10, 10])[0] == pytest.approx(0.5)


def test_length_correction_needs_differences() -> None:
    with pytest.raises(ValueError, match="different length"):
        LengthCorrection.fit(with_texts([("same", "size", "12", None)]))


def test_remedies_by_hand() -> None:
    """Consistent 12, split 11, one order only: what keeps a label under which remedy."""
    pairs = with_texts(
        [("t", "u" * 9, "12", "a"), ("t", "u" * 9, "11", "a"), ("t", "u" * 9, "1-", "b")]
    )
    found = remedies([pairs])
    assert str(found["both orders averaged"].tolist()) == "[1.0, 0.5, nan]"
    assert str(found["consistent pairs only"].tolist()) == "[1.0, nan, nan]"
    assert str(found["abstain within 0.1 of one half"].tolist()) == "[1.0, nan, nan]"


def test_the_table_shows_what_each_remedy_buys() -> None:
    pairs = simulate(Planted(position=1.0, soft=True, noise=0.5), prompts=200, seed=8).pairs()
    section = mitigation_section([pairs], Resampler(np.arange(200), replicates=200))
    assert section is not None
    rows = {row[0]: row[1:] for row in section.tables[0].rows}
    single, both = rows["one order (before)"], rows["both orders averaged"]
    consistent = rows["consistent pairs only"]
    assert both[1].value > single[1].value
    assert consistent[1].value > both[1].value
    assert consistent[0].value < both[0].value == 1.0


def test_several_judges_make_a_panel() -> None:
    one = simulate(Planted(soft=True, noise=1.5), prompts=80, seed=1, judge="one")
    other = simulate(Planted(soft=True, noise=1.0), prompts=80, seed=1, judge="other")
    arms = collect([*one.verdicts, *other.verdicts], material=one.material, gold=one.gold)
    found = remedies(arms)
    assert not np.allclose(arms[0].mean_p, arms[1].mean_p)
    assert found["panel mean"] == pytest.approx((arms[0].mean_p + arms[1].mean_p) / 2)
