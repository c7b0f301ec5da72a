"""Reward shaping, GAE, whitening, the KL controller and PPO's losses: by hand, and against TRL."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from train.advantages import (
    KlController,
    RewardNormaliser,
    gae,
    kl_terms,
    last_index,
    masked_mean,
    masked_whiten,
    shape_rewards,
)
from train.ppo_losses import policy_loss, truncated_weights, value_loss

# Two completions of 2 and 3 tokens.
MASK = torch.tensor([[True, True, False], [True, True, True]])


def close(found: Tensor, wanted: object, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(
        found, torch.as_tensor(wanted, dtype=found.dtype), atol=tolerance, rtol=0
    )


def test_k1_is_the_difference_and_k3_its_convex_partner() -> None:
    """l = 0.5 and -0.5: k3 = e^-0.5 - 1 + 0.5 = 0.106531 and e^0.5 - 1 - 0.5 = 0.148721."""
    logprobs = torch.tensor([[-1.0, -2.0, 9.0], [0.0, -1.0, -1.0]])
    reference = torch.tensor([[-1.5, -1.5, -9.0], [0.0, -1.0, -1.0]])
    close(kl_terms(logprobs, reference, MASK), [[0.5, -0.5, 0.0], [0.0, 0.0, 0.0]])
    k3 = kl_terms(logprobs, reference, MASK, estimator="k3")
    close(k3, [[0.106531, 0.148721, 0.0], [0.0, 0.0, 0.0]])


def test_both_estimators_average_to_the_kl_divergence() -> None:
    """E over samples of the policy = sum pi log(pi / ref), computed from the tables themselves."""
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    mask = torch.ones(1, 3, dtype=torch.bool)
    for estimator in ("k1", "k3"):
        terms = kl_terms(policy.log()[None], reference.log()[None], mask, estimator=estimator)
        assert float((policy * terms[0]).sum()) == pytest.approx(float(exact), abs=1e-12)


def test_the_score_lands_on_the_last_token() -> None:
    """kl_coef 0.1: -0.1 * 2 = -0.2; the first row's score 3 lands on its second token."""
    kl = torch.tensor([[1.0, 2.0, 7.0], [0.0, 0.0, -1.0]])
    rewards = shape_rewards(torch.tensor([3.0, -1.0]), kl, MASK, kl_coef=0.1)
    close(rewards, [[-0.1, 2.8, 0.0], [0.0, 0.0, -0.9]])
    assert last_index(MASK).tolist() == [1, 2]


def test_gae_by_hand() -> None:
    """gamma 0.9, lambda 0.5, so gamma * lambda = 0.45.

    Row 1 (two tokens): delta_1 = 2 - 1 = 1; delta_0 = 1 + 0.9 * 1 - 2 = -0.1;
    A_1 = 1, A_0 = -0.1 + 0.45 = 0.35; R = A + V = [2.35, 2].
    Row 2: delta_2 = 1 - 0 = 1; delta_1 = 0 + 0 - 1 = -1; delta_0 = 0 + 0.9 - 0 = 0.9;
    A_2 = 1, A_1 = -1 + 0.45 = -0.55, A_0 = 0.9 - 0.2475 = 0.6525; R = [0.6525, 0.45, 1].
    """
    rewards = torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, 1.0]])
    values = torch.tensor([[2.0, 1.0, 8.0], [0.0, 1.0, 0.0]])
    advantages, returns = gae(rewards, values, MASK, gamma=0.9, lam=0.5)
    close(advantages, [[0.35, 1.0, 0.0], [0.6525, -0.55, 1.0]])
    close(returns, [[2.35, 2.0, 0.0], [0.6525, 0.45, 1.0]])


def test_gae_steps_over_masked_columns_inside_a_row() -> None:
    mask = torch.tensor([[True, False, True]])
    inside = gae(torch.tensor([[1.0, 9.0, 2.0]]), torch.tensor([[2.0, 9.0, 1.0]]), mask, lam=0.5)
    without = gae(
        torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0]]), torch.ones(1, 2).bool(), lam=0.5
    )
    close(inside.advantages[:, [0, 2]], without.advantages)
    close(inside.returns[:, [0, 2]], without.returns)
    assert inside.advantages[0, 1] == 0


def test_lambda_one_gives_plain_returns() -> None:
    """With lambda 1 and gamma 1 the value target is the sum of later rewards, whatever V is."""
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 2, 3).unbind(0)
    rewards = rewards.masked_fill(~MASK, 0.0)
    wanted = rewards.flip(1).cumsum(1).flip(1).masked_fill(~MASK, 0.0)
    close(gae(rewards, values, MASK, lam=1.0).returns, wanted)
    apart = gae(rewards, values, MASK, lam=0.5, value_lam=1.0)
    close(apart.returns, wanted)
    close(apart.advantages, gae(rewards, values, MASK, lam=0.5).advantages)


def test_whitening() -> None:
    """1, 3, 5: mean 3, unbiased variance 4, so -1, 0, 1; unshifted 2, 3, 4."""
    values = torch.tensor([[1.0, 3.0], [5.0, 99.0]])
    mask = torch.tensor([[True, True], [True, False]])
    close(masked_whiten(values, mask), [[-1.0, 0.0], [1.0, 0.0]])
    close(masked_whiten(values, mask, shift_mean=False), [[2.0, 3.0], [4.0, 0.0]])
    assert float(masked_mean(values, mask)) == 3.0
    lonely = masked_whiten(values, torch.tensor([[False, False], [True, False]]))
    assert lonely.tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_two_processes_whiten_like_one() -> None:
    """Sums over both halves, given to each half, give what the whole batch gives."""
    torch.manual_seed(0)
    values, mask = torch.randn(4, 5, dtype=torch.float64), torch.rand(4, 5) < 0.7
    whole = masked_whiten(values, mask)
    # What an all-reduce would return, in the order asked: count, sum, squared deviations.
    mean = values[mask].mean()
    sums = [mask.sum().double(), values[mask].sum(), (values[mask] - mean).square().sum()]
    for rows in (slice(0, 2), slice(2, 4)):
        replies = iter(sums)
        part = masked_whiten(values[rows], mask[rows], reduce=lambda _, r=replies: next(r))
        close(part, whole[rows], 1e-12)


def test_kl_controller_steers_towards_its_target() -> None:
    """KL twice the target: error clipped to 0.2, so 0.1 * (1 + 0.2 * 100 / 1000) = 0.102."""
    controller = KlController(0.1, target=5.0, horizon=1000)
    controller.update(10.0, 100)
    assert controller.kl_coef == pytest.approx(0.102)
    controller.update(4.75, 100)  # error -0.05
    assert controller.kl_coef == pytest.approx(0.102 * (1 - 0.005))
    controller.update(math.nan, 100)
    assert controller.kl_coef == pytest.approx(0.102 * (1 - 0.005))
    restored = KlController(0.5, target=5.0)
    restored.load_state_dict(controller.state_dict())
    assert restored.kl_coef == controller.kl_coef
    fixed = KlController(0.1)
    fixed.update(100.0, 100)
    assert fixed.kl_coef == 0.1


def test_running_normaliser_pools_like_one_big_batch() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(7) * 3 + 2, torch.randn(5) - 4
    normaliser = RewardNormaliser("running")
    normaliser.update(first)
    normaliser.update(torch.cat([second, torch.tensor([math.nan])]))
    both = torch.cat([first, second])
    close(normaliser.normalise(both), (both - both.mean()) / both.std(), 1e-5)
    restored = RewardNormaliser("running")
    restored.load_state_dict(normaliser.state_dict())
    assert torch.equal(restored.normalise(both), normaliser.normalise(both))


def test_fixed_normaliser_keeps_the_first_batch_and_clips() -> None:
    """1 and 3: mean 2, deviation sqrt 2; 12 becomes 10 / sqrt 2 = 7.07, clipped to 5."""
    normaliser = RewardNormaliser("fixed", clip=5.0)
    normaliser.update(torch.tensor([1.0, 3.0]))
    normaliser.update(torch.tensor([100.0, 300.0]))
    close(normaliser.normalise(torch.tensor([2.0, 12.0])), [0.0, 5.0])
    none = RewardNormaliser()
    none.update(torch.tensor([1.0, 3.0]))
    close(none.normalise(torch.tensor([7.0])), [7.0])


def test_a_first_batch_without_spread_is_not_divided_by() -> None:
    """0, 0 and then 0, 0, 1, 1: moments of all six, mean 1/3, deviation sqrt(4/15) = 0.5164."""
    normaliser = RewardNormaliser("fixed")
    normaliser.update(torch.tensor([0.0, 0.0]))
    close(normaliser.normalise(torch.tensor([0.0, 1.0])), [0.0, 1.0])
    normaliser.update(torch.tensor([0.0, 0.0, 1.0, 1.0]))
    wanted = [(0 - 1 / 3) / 0.5163978, (1 - 1 / 3) / 0.5163978]
    close(normaliser.normalise(torch.tensor([0.0, 1.0])), wanted, 1e-5)
    normaliser.update(torch.tensor([50.0, 60.0]))  # frozen now
    close(normaliser.normalise(torch.tensor([0.0, 1.0])), wanted, 1e-5)
    running = RewardNormaliser("running")
    running.update(torch.full((7,), 0.1))
    close(running.normalise(torch.tensor([0.1, 1.1])), [0.0, 1.0])


def test_one_known_score_does_not_freeze_the_moments() -> None:
    normaliser = RewardNormaliser("fixed")
    normaliser.update(torch.tensor([2.0, math.nan]))
    normaliser.update(torch.tensor([4.0]))  # 2 and 4: mean 3, deviation sqrt 2
    close(normaliser.normalise(torch.tensor([3.0, 5.0])), [0.0, math.sqrt(2)])


def test_policy_loss_by_hand() -> None:
    """clip 0.2, two rows, one token masked.

    rho = 1.5 with A = 1: max(-1.5, -1.2) = -1.2, the clip decides.
    rho = 0.5 with A = -1: max(0.5, 0.8) = 0.8, the clip decides.
    rho = 1.0 with A = 2: -2.  Mean over three tokens: (-1.2 + 0.8 - 2) / 3 = -0.8.
    """
    ratio = torch.tensor([[1.5, 1.0], [0.5, 1.0]])
    mask = torch.tensor([[True, False], [True, True]])
    found = policy_loss(
        ratio.log(), torch.zeros(2, 2), torch.tensor([[1.0, 5.0], [-1.0, 2.0]]), mask
    )
    close(found.loss, -0.8)
    close(found.clipfrac, 2 / 3)
    close(found.ratio, 1.0)
    close(found.approxkl, (math.log(1.5) ** 2 + math.log(0.5) ** 2) / 6)


def test_policy_loss_options_by_hand() -> None:
    """Upper clip 0.5 leaves rho = 1.5 alone; dual clip 3 bounds rho = 5, A = -1 at 3."""
    ratio, mask = torch.tensor([[1.5, 5.0]]), torch.ones(1, 2).bool()
    advantages = torch.tensor([[1.0, -1.0]])
    high = policy_loss(ratio.log(), torch.zeros(1, 2), advantages, mask, cliprange_high=0.5)
    close(high.loss, (-1.5 + 5.0) / 2)
    dual = policy_loss(ratio.log(), torch.zeros(1, 2), advantages, mask, dual_clip=3.0)
    close(dual.loss, (-1.2 + 3.0) / 2)
    weighted = policy_loss(
        ratio.log(), torch.zeros(1, 2), advantages, mask, weights=torch.tensor([[2.0, 0.0]])
    )
    close(weighted.loss, -2.4 / 2)


def test_the_gradient_at_the_start_is_the_policy_gradient() -> None:
    """At pi = pi_old, d loss / d log pi = -A / n, and a clipped token has none."""
    logprobs = torch.tensor([[-1.0, -2.0, -3.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -2.0, 4.0]])
    mask = torch.tensor([[True, True, False]])
    policy_loss(logprobs, logprobs.detach(), advantages, mask).loss.backward()
    close(logprobs.grad, [[-0.5, 1.0, 0.0]])
    far = torch.tensor([[0.5]], requires_grad=True)
    one = torch.ones(1, 1)
    policy_loss(far, torch.zeros(1, 1), one, one.bool()).loss.backward()
    assert float(far.grad) == 0.0


@pytest.mark.parametrize("name", ["policy", "value"])
def test_loss_gradients_by_finite_differences(name: str) -> None:
    torch.manual_seed(1)
    old, other = torch.randn(2, 2, 3, dtype=torch.float64).unbind(0)
    start = (old + 0.3 * torch.randn(2, 3, dtype=torch.float64)).requires_grad_()

    def loss(x: Tensor) -> Tensor:
        if name == "policy":
            return policy_loss(x, old, other, MASK).loss
        return value_loss(x, old, other, MASK).loss

    assert torch.autograd.gradcheck(loss, (start,))


def test_value_loss_by_hand() -> None:
    """clip 0.2: V 1.0 from 0.5 is pulled to 0.7; R = 0: max(1, 0.49) = 1.

    V 0.0 from 0.5 is pulled to 0.3; R = 0: max(0, 0.09) = 0.09, the clip decides.
    Half the mean: (1 + 0.09) / 4 = 0.2725. Unclipped: (1 + 0) / 4.
    """
    values, old = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.5]])
    zero, mask = torch.zeros(1, 2), torch.ones(1, 2).bool()
    found = value_loss(values, old, zero, mask)
    close(found.loss, 0.2725)
    close(found.clipfrac, 0.5)
    close(value_loss(values, old, zero, mask, cliprange=0.0).loss, 0.25)


def test_micro_batches_add_up_to_the_minibatch() -> None:
    torch.manual_seed(0)
    new, old, advantages = torch.randn(3, 2, 3).unbind(0)
    total = MASK.sum()
    whole = policy_loss(new, old, advantages, MASK)
    parts = [
        policy_loss(new[i : i + 1], old[i : i + 1], advantages[i : i + 1], MASK[i : i + 1],
                    total=total)
        for i in range(2)
    ]  # fmt: skip
    for field in whole._fields:
        close(sum(getattr(part, field) for part in parts), getattr(whole, field))
    whole_value = value_loss(new, old, advantages, MASK)
    value_parts = [
        value_loss(new[i : i + 1], old[i : i + 1], advantages[i : i + 1], MASK[i : i + 1],
                   total=total)
        for i in range(2)
    ]  # fmt: skip
    close(sum(part.loss for part in value_parts), whole_value.loss)


def test_truncated_weights() -> None:
    weights = truncated_weights(
        torch.tensor([0.0, -1.0, -1.0]), torch.tensor([0.0, -3.0, -0.5]), cap=2.0
    )
    close(weights, [1.0, 2.0, math.exp(-0.5)])


def test_inputs_stay_as_they_were() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3) for _ in range(4)]
    copies = [tensor.clone() for tensor in inputs]
    scores = torch.ones(2)
    shape_rewards(scores, inputs[0], MASK, kl_coef=0.1)
    gae(inputs[0], inputs[1], MASK)
    masked_whiten(inputs[0], MASK, shift_mean=False)
    policy_loss(inputs[0], inputs[1], inputs[2], MASK, dual_clip=3.0)
    value_loss(inputs[0], inputs[1], inputs[2], MASK)
    kl_terms(inputs[0], inputs[1], MASK, estimator="k3")
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert scores.tolist() == [1.0, 1.0]
