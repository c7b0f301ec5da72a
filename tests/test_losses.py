"""Losses on pairs: hand arithmetic, finite differences, closed-form optima, tie models."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from train.losses import (
    PairLogps,
    bradley_terry_loss,
    centring_loss,
    davidson_log_probs,
    gdpo_loss,
    implicit_rewards,
    ipo_loss,
    length_correlation_loss,
    nll_loss,
    rao_kupper_log_probs,
    robust_loss,
    rpo_loss,
    simpo_loss,
    tie_loss,
    tie_targets,
    weighted_mean,
)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.fixture
def pair() -> PairLogps:
    """Two pairs, completions of unequal length, one masked token.

    Pair 1: chosen tokens -1.0, -0.5 and a masked -9.0, so s = -1.5 over 2 tokens; rejected -2.0,
    -1.0, -0.5, so s = -3.5 over 3. Reference: -2.0 and -3.0: log-ratios 0.5 and -0.5, difference 1.
    Pair 2: chosen -4.0 over 1 token, rejected -1.5 - 0.5 = -2.0 over 2; reference -3.0 and -3.0:
    log-ratios -1 and 1, difference -2.
    """
    chosen = torch.tensor([[-1.0, -0.5, -9.0], [-4.0, 0.0, 0.0]])
    chosen_mask = torch.tensor([[True, True, False], [True, False, False]])
    rejected = torch.tensor([[-2.0, -1.0, -0.5], [-1.5, -0.5, 0.0]])
    rejected_mask = torch.tensor([[True, True, True], [True, True, False]])
    return PairLogps(
        policy_chosen=(chosen * chosen_mask).sum(1),
        policy_rejected=(rejected * rejected_mask).sum(1),
        chosen_lengths=chosen_mask.sum(1),
        rejected_lengths=rejected_mask.sum(1),
        ref_chosen=torch.tensor([-2.0, -3.0]),
        ref_rejected=torch.tensor([-3.0, -3.0]),
    )


def close(actual: Tensor, expected: list[float] | float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=2e-6, rtol=2e-6)


def test_implicit_rewards(pair: PairLogps) -> None:
    """beta 0.5: chosen 0.25 and -0.5, rejected -0.25 and 0.5, h = 0.5 and -1."""
    rewards = implicit_rewards(pair, beta=0.5)
    close(rewards.chosen, [0.25, -0.5])
    close(rewards.rejected, [-0.25, 0.5])
    close(rewards.differences, [0.5, -1.0])
    without = implicit_rewards(pair._replace(ref_chosen=None, ref_rejected=None), beta=0.5)
    close(without.differences, [0.5 * (-1.5 + 3.5), 0.5 * (-4.0 + 2.0)])


def test_dpo_hard_and_soft(pair: PairLogps) -> None:
    """h = 0.5, -1.

    Hard: log(1 + e^-0.5) = 0.474077, log(1 + e) = 1.313262. Soft with p = 0.75, 0.6:
    0.75 * 0.474077 + 0.25 * 0.974077 = 0.599077 and 0.6 * 1.313262 + 0.4 * 0.313262 = 0.913262.
    """
    h = implicit_rewards(pair, beta=0.5).differences
    close(bradley_terry_loss(h), [0.474077, 1.313262])
    close(bradley_terry_loss(h, p_chosen=torch.tensor([0.75, 0.6])), [0.599077, 0.913262])
    close(bradley_terry_loss(h, p_chosen=torch.ones(2)), [0.474077, 1.313262])


def test_margin() -> None:
    """d = 2, m = 0.5: log(1 + e^-1.5) = 0.201413; flipped: log(1 + e^2.5) = 2.578890.

    p = 0.9: 0.9 * 0.201413 + 0.1 * 2.578890 = 0.439161.
    """
    d, m = torch.tensor([2.0]), torch.tensor([0.5])
    close(bradley_terry_loss(d, margin=m), [0.201413])
    close(bradley_terry_loss(d, margin=m, p_chosen=torch.tensor([0.9])), [0.439161])


def test_gdpo(pair: PairLogps) -> None:
    """(2p - 1) h = 0.25, -0.2: log(1 + e^-0.25) = 0.575939, log(1 + e^0.2) = 0.798139."""
    h = implicit_rewards(pair, beta=0.5).differences
    close(gdpo_loss(h, p_chosen=torch.tensor([0.75, 0.6])), [0.575939, 0.798139])


def test_robust(pair: PairLogps) -> None:
    """e = 0.2: (0.8 * 0.474077 - 0.2 * 0.974077) / 0.6 = 0.307410.

    Second: (0.8 * 1.313262 - 0.2 * 0.313262) / 0.6 = 1.646595.
    """
    h = implicit_rewards(pair, beta=0.5).differences
    close(robust_loss(h, flip=0.2), [0.307410, 1.646595])
    close(robust_loss(h, flip=torch.tensor([0.2, 0.0])), [0.307410, 1.313262])


def test_robust_is_capped_and_bounded() -> None:
    h = torch.tensor([3.0, 50.0, 500.0], requires_grad=True)
    close(robust_loss(h, flip=0.49, cap=0.3)[:1], [robust_loss(h, flip=0.3)[0].item()])
    losses = robust_loss(h, flip=0.3, limit=10.0)
    assert losses[1] == losses[2] > -8
    losses.sum().backward()
    assert h.grad is not None
    assert h.grad[0] != 0 and h.grad[1] == h.grad[2] == 0
    with pytest.raises(ValueError, match="cap"):
        robust_loss(h, flip=0.1, cap=0.5)


def test_robust_is_unbiased_under_flips() -> None:
    """Averaged over flipping a label with chance e, the loss of h is the clean loss of h."""
    e, h = 0.3, torch.tensor([1.7, -0.4])
    expected = (1 - e) * robust_loss(h, flip=e) + e * robust_loss(-h, flip=e)
    torch.testing.assert_close(expected, bradley_terry_loss(h))


def test_ipo(pair: PairLogps) -> None:
    """beta 0.5, so the target is 1: (1 - 1)^2 = 0 and (-2 - 1)^2 = 9.

    Averaged: 0.5/2 + 0.5/3 = 0.416667, squared distance 0.340278; -1/1 - 1/2 = -1.5, 6.25.
    Soft p = 0.75, 0.6: 0.25 * (1 + 1)^2 = 1; 0.6 * 9 + 0.4 * (-2 + 1)^2 = 5.8.
    """
    close(ipo_loss(pair, beta=0.5), [0.0, 9.0])
    close(ipo_loss(pair, beta=0.5, averaged=True), [0.340278, 6.25])
    close(ipo_loss(pair, beta=0.5, p_chosen=torch.tensor([0.75, 0.6])), [1.0, 5.8])
    with pytest.raises(ValueError, match="reference"):
        ipo_loss(pair._replace(ref_chosen=None), beta=0.5)


def test_simpo(pair: PairLogps) -> None:
    """beta 2, gamma 0.5: 2 (-0.75 + 1.166667) - 0.5 = 0.333333; 2 (-4 + 1) - 0.5 = -6.5.

    log(1 + e^-0.333333) = 0.540305; log(1 + e^6.5) = 6.501502.
    """
    close(simpo_loss(pair, beta=2.0, gamma=0.5), [0.540305, 6.501502])
    soft = simpo_loss(pair, beta=2.0, gamma=0.5, p_chosen=torch.tensor([0.75, 0.5]))
    first = 0.75 * 0.540305 + 0.25 * softplus(0.833333 + 0.5)
    second = 0.5 * 6.501502 + 0.5 * softplus(-6.0 + 0.5)
    close(soft, [first, second])


def test_nll(pair: PairLogps) -> None:
    close(nll_loss(pair.policy_chosen, pair.chosen_lengths), [0.75, 4.0])


def test_rpo() -> None:
    """h = 0, target = log 3: sigma(target) = 0.75.

    KL(0.75 || 0.5) = 0.75 log 1.5 + 0.25 log 0.5 = 0.130812;
    KL(0.5 || 0.75) = 0.5 log(2/3) + 0.5 log 2 = 0.143841; squared: (log 3)^2 = 1.206949.
    """
    h, target = torch.tensor([0.0]), torch.tensor([math.log(3)])
    close(rpo_loss(h, target=target), [0.130812])
    close(rpo_loss(h, target=target, form="policy_to_target"), [0.143841])
    close(rpo_loss(h, target=target, form="squared"), [1.206949])
    for form in ("target_to_policy", "policy_to_target", "squared"):
        close(rpo_loss(target, target=target, form=form), [0.0])


def test_centring() -> None:
    close(centring_loss(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 2.0])), [2.25, 0.0])


def test_length_correlation() -> None:
    """d = 1, -1, 2; l = 2, 1, 0: (2 - 1)^2 / (6 * 5) = 1/30. Proportional: 1. No lengths: 0."""
    d = torch.tensor([1.0, -1.0, 2.0])
    close(length_correlation_loss(d, torch.tensor([2, 1, 0])), 1 / 30)
    close(length_correlation_loss(d, 3 * d), 1.0)
    d.requires_grad_()
    nothing = length_correlation_loss(d, torch.zeros(3))
    nothing.backward()
    assert nothing == 0 and d.grad is not None and bool((d.grad == 0).all())
    weighted = length_correlation_loss(
        d, torch.tensor([2, 1, 0]), weights=torch.tensor([1.0, 0.0, 1.0])
    )
    close(weighted, 4 / (5 * 4))


def test_weighted_mean() -> None:
    losses = torch.tensor([1.0, 3.0, 5.0])
    assert weighted_mean(losses) == 3
    weights = torch.tensor([1.0, 0.0, 3.0])
    assert weighted_mean(losses, weights) == 4
    assert weighted_mean(losses, weights, total=8) == 2
    assert weighted_mean(losses, torch.zeros(3)) == 0
    halves = [weighted_mean(losses[i], weights[i], total=4) for i in (slice(0, 1), slice(1, 3))]
    assert sum(halves) == 4


# Ties


def test_rao_kupper_by_hand() -> None:
    """nu = 3, d = 0: wins sigma(-log 3) = 1/4 each, tie 1/2. nu = 2, d = log 2: 1/2, 3/10, 1/5."""
    close(rao_kupper_log_probs(torch.zeros(1)).exp()[0], [0.25, 0.5, 0.25])
    close(rao_kupper_log_probs(torch.tensor([math.log(2)]), nu=2.0).exp()[0], [0.5, 0.3, 0.2])


def test_davidson_by_hand() -> None:
    """nu = 1, d = 0: 1/4, 1/2, 1/4. nu = 1/2, d = 2 log 2: (2, 1, 1/2) / 3.5."""
    close(davidson_log_probs(torch.zeros(1)).exp()[0], [0.25, 0.5, 0.25])
    actual = davidson_log_probs(torch.tensor([2 * math.log(2)]), nu=0.5).exp()[0]
    close(actual, [4 / 7, 2 / 7, 1 / 7])


@pytest.mark.parametrize("model", [rao_kupper_log_probs, davidson_log_probs])
@pytest.mark.parametrize("nu", [1.01, 1.5, 4.0])
def test_tie_models_sum_to_one(model: Callable[..., Tensor], nu: float) -> None:
    d = torch.linspace(-8, 8, 33, dtype=torch.float64)
    probs = model(d, nu=nu).exp()
    torch.testing.assert_close(probs.sum(-1), torch.ones_like(d))
    # Changing sides mirrors the outcome.
    torch.testing.assert_close(probs.flip(0), probs.flip(1))


def test_tie_models_refuse_impossible_thresholds() -> None:
    with pytest.raises(ValueError, match="nu"):
        rao_kupper_log_probs(torch.zeros(1), nu=1.0)
    with pytest.raises(ValueError, match="nu"):
        davidson_log_probs(torch.zeros(1), nu=0.0)


def test_tie_loss() -> None:
    """d = 0, nu = 3: a tie costs log 2 = 0.693147; p = 0.8 costs log 4 = 1.386294 either way."""
    targets = tie_targets(torch.tensor([0.5, 0.8]), torch.tensor([True, False]))
    close(targets[0], [0.0, 1.0, 0.0])
    close(targets[1], [0.8, 0.0, 0.2])
    losses = tie_loss(rao_kupper_log_probs(torch.zeros(2)), targets=targets)
    close(losses, [0.693147, 1.386294])


@pytest.mark.parametrize("model", [rao_kupper_log_probs, davidson_log_probs])
def test_a_tie_pulls_the_difference_to_zero(model: Callable[..., Tensor]) -> None:
    d = torch.tensor([2.0, -2.0, 0.0], dtype=torch.float64, requires_grad=True)
    targets = tie_targets(torch.full((3,), 0.5).double(), torch.ones(3))
    tie_loss(model(d), targets=targets).sum().backward()
    assert d.grad is not None
    assert d.grad[0] > 0 > d.grad[1] and d.grad[2].abs() < 1e-12


# Gradients and optima

P = torch.tensor([0.9, 0.55, 0.5], dtype=torch.float64)
ON_DIFFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "hard": bradley_terry_loss,
    "soft": lambda d: bradley_terry_loss(d, p_chosen=P),
    "margin": lambda d: bradley_terry_loss(d, p_chosen=P, margin=1 - P),
    "gdpo": lambda d: gdpo_loss(d, p_chosen=P),
    "robust": lambda d: robust_loss(d, flip=1 - P, cap=0.4),
    "rpo": lambda d: rpo_loss(d, target=2 * P),
    "rpo backwards": lambda d: rpo_loss(d, target=2 * P, form="policy_to_target"),
    "rpo squared": lambda d: rpo_loss(d, target=2 * P, form="squared"),
    "rao-kupper": lambda d: tie_loss(rao_kupper_log_probs(d), targets=tie_targets(P, P == 0.5)),
    "davidson": lambda d: tie_loss(davidson_log_probs(d), targets=tie_targets(P, P == 0.5)),
    "length": lambda d: length_correlation_loss(d, torch.tensor([5, -3, 1])),
    "centring": lambda d: centring_loss(d, d.flip(0) * 0.3),
}


@pytest.mark.parametrize("name", ON_DIFFERENCES)
def test_gradients_match_finite_differences(name: str) -> None:
    d = torch.tensor([0.3, -1.2, 2.5], dtype=torch.float64, requires_grad=True)
    before = d.detach().clone()
    assert torch.autograd.gradcheck(ON_DIFFERENCES[name], (d,))
    assert torch.equal(d.detach(), before)


def test_gradients_of_losses_on_log_probabilities() -> None:
    lengths = (torch.tensor([3, 1]), torch.tensor([2, 5]))
    p = torch.tensor([0.8, 0.6], dtype=torch.float64)

    def all_of_them(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        pair = PairLogps(a, b, *lengths, c, d)
        return (
            implicit_rewards(pair, beta=0.3).differences,
            ipo_loss(pair, beta=0.3),
            ipo_loss(pair, beta=0.3, averaged=True, p_chosen=p),
            simpo_loss(pair, beta=2.0, gamma=0.4),
            simpo_loss(pair, beta=2.0, gamma=0.4, p_chosen=p),
            nll_loss(a, lengths[0]),
        )

    torch.manual_seed(0)
    inputs = [torch.randn(2, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    assert torch.autograd.gradcheck(all_of_them, inputs)


def minimise(loss: Callable[[Tensor], Tensor], start: float = 0.0) -> float:
    x = torch.full((1,), start, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [x],
        max_iter=200,
        tolerance_grad=1e-12,
        tolerance_change=1e-18,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        search.zero_grad()
        value = loss(x).sum()
        value.backward()
        return value

    search.step(closure)
    return x.item()


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.99])
def test_soft_bradley_terry_is_least_at_the_logit(p: float) -> None:
    found = minimise(lambda d: bradley_terry_loss(d, p_chosen=torch.tensor([p]).double()))
    assert found == pytest.approx(math.log(p / (1 - p)), abs=1e-6)


@pytest.mark.parametrize("p", [0.5, 0.7, 0.9])
def test_optimum_with_a_margin(p: float) -> None:
    """With c = e^-m: (1 - p) c u^2 + (1 - 2p) u - p c = 0 for u = e^d; 0 at p = 1/2."""
    m = 0.7
    c = math.exp(-m)
    root = math.sqrt((2 * p - 1) ** 2 + 4 * p * (1 - p) * c * c)
    expected = math.log((2 * p - 1 + root) / (2 * (1 - p) * c))
    found = minimise(
        lambda d: bradley_terry_loss(d, p_chosen=torch.tensor([p]).double(), margin=torch.tensor(m))
    )
    assert found == pytest.approx(expected, abs=1e-5)


def test_optima_of_ipo_and_rpo() -> None:
    def ipo(p: Tensor | None) -> Callable[[Tensor], Tensor]:
        zero, one = torch.zeros(1), torch.ones(1)
        return lambda x: ipo_loss(PairLogps(x, zero, one, one, zero, zero), beta=0.25, p_chosen=p)

    assert minimise(ipo(None)) == pytest.approx(2.0, abs=1e-6)  # 1 / (2 beta)
    assert minimise(ipo(torch.tensor([0.75]))) == pytest.approx(1.0, abs=1e-6)  # (2p - 1) of it
    for form in ("target_to_policy", "policy_to_target", "squared"):
        found = minimise(lambda h, form=form: rpo_loss(h, target=torch.tensor([1.3]), form=form))
        assert found == pytest.approx(1.3, abs=1e-4)


def test_optima_of_the_tie_models() -> None:
    """With win, tie and loss shares q the optimum reproduces q(win) : q(loss).

    Davidson: d = log(q_win / q_loss) when q is one of its own distributions; likewise Rao-Kupper.
    """
    for model, nu in ((davidson_log_probs, 0.8), (rao_kupper_log_probs, 2.0)):
        targets = model(torch.tensor([1.1], dtype=torch.float64), nu=nu).exp()
        found = minimise(lambda d: tie_loss(model(d, nu=nu), targets=targets))  # noqa: B023
        assert found == pytest.approx(1.1, abs=1e-6)


def test_gdpo_ignores_a_coin_flip_and_never_pulls_back() -> None:
    h = torch.tensor([0.7, 5.0], requires_grad=True)
    gdpo_loss(h, p_chosen=torch.tensor([0.5, 0.6])).sum().backward()
    assert h.grad is not None
    assert h.grad[0] == 0 and h.grad[1] < 0  # cDPO would pull 5.0 back to logit(0.6) = 0.41
