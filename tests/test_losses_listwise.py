"""Losses on ranked groups: hand arithmetic, enumeration, finite differences, RRHF's equations."""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
import torch
from torch import Tensor

from train.losses import bradley_terry_loss, davidson_log_probs
from train.losses_listwise import (
    LARGEST_TIE,
    pad_groups,
    plackett_luce_loss,
    rrhf_loss,
)


def close(actual: Tensor, expected: object) -> None:
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, atol=2e-6, rtol=2e-6)


def full(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


def test_pad_groups() -> None:
    padded = pad_groups(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1, 3]))
    close(padded.values, [[1.0, 0.0, 0.0], [2.0, 3.0, 4.0]])
    assert padded.mask.tolist() == [[True, False, False], [True, True, True]]


# Plackett-Luce


def test_plackett_luce_by_hand() -> None:
    """f = log 3, log 2, 0 ranked in that order: 3/6 * 2/3 = 1/3, so log 3 = 1.098612.

    The second group, two completions, worse first: 1/4 of e^0 against e^log 3: log 4 = 1.386294.
    """
    f = torch.tensor([[math.log(3), math.log(2), 0.0], [0.0, math.log(3), 50.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    places = torch.tensor([[0, 1, 2], [0, 1, 0]])
    close(plackett_luce_loss(f, places, mask), [1.098612, 1.386294])


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    f = torch.randn(20, 2, dtype=torch.float64)
    places = torch.tensor([0, 1]).expand(20, 2)
    torch.testing.assert_close(
        plackett_luce_loss(f, places, full(f)), bradley_terry_loss(f[:, 0] - f[:, 1])
    )
    tied = plackett_luce_loss(f, places * 0, full(f))
    half = torch.full((20,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(tied, bradley_terry_loss(f[:, 0] - f[:, 1], p_chosen=half))


def test_plackett_luce_sums_to_one_over_orders() -> None:
    f = torch.randn(1, 4, dtype=torch.float64)
    likelihoods = [
        torch.exp(-plackett_luce_loss(f, torch.tensor([order]), full(f))).item()
        for order in permutations(range(4))
    ]
    assert sum(likelihoods) == pytest.approx(1.0)


def strict_loss(f: list[float], order: tuple[int, ...]) -> float:
    """The textbook formula, in plain Python."""
    return -sum(
        f[i] - math.log(sum(math.exp(f[j]) for j in order[k:])) for k, i in enumerate(order)
    )


@pytest.mark.parametrize("places", [[0, 0, 0, 0], [0, 1, 1, 2], [5, 0, 0, 0], [2, 1, 2, 1]])
def test_tied_blocks_are_averaged_over_their_orders(places: list[int]) -> None:
    f = [0.4, -1.1, 2.0, 0.3]
    orders = [o for o in permutations(range(4)) if [places[i] for i in o] == sorted(places)]
    expected = sum(strict_loss(f, order) for order in orders) / len(orders)
    scores = torch.tensor([f], dtype=torch.float64)
    actual = plackett_luce_loss(scores, torch.tensor([places]), full(scores))
    assert actual.item() == pytest.approx(expected)


@pytest.mark.parametrize("ties", ["average", "davidson"])
def test_ties_do_not_depend_on_the_index(ties: str) -> None:
    f = torch.randn(1, 5, dtype=torch.float64)
    places = torch.tensor([[1, 0, 1, 2, 0]])
    expected = plackett_luce_loss(f, places, full(f), ties=ties)  # type: ignore[arg-type]
    for _ in range(5):
        order = torch.randperm(5)
        actual = plackett_luce_loss(f[:, order], places[:, order], full(f), ties=ties)  # type: ignore[arg-type]
        torch.testing.assert_close(actual, expected)


def test_davidson_form_of_two_is_davidsons_model() -> None:
    f = torch.randn(6, 2, dtype=torch.float64)
    d = f[:, 0] - f[:, 1]
    for places, outcome in (([0, 1], 0), ([0, 0], 1), ([1, 0], 2)):
        loss = plackett_luce_loss(
            f, torch.tensor([places]).expand(6, 2), full(f), ties="davidson", tie_strength=1.4
        )
        torch.testing.assert_close(loss, -davidson_log_probs(d, nu=0.7)[:, outcome])


def weak_orders(n: int) -> list[list[int]]:
    """All rankings with ties of n items, as dense places."""
    found = {
        tuple(sorted(set(places)).index(place) for place in places)
        for places in product(range(n), repeat=n)
    }
    return [list(places) for places in sorted(found)]


@pytest.mark.parametrize("n", [3, 4])
def test_davidson_form_sums_to_one_over_weak_orders(n: int) -> None:
    f = torch.randn(1, n, dtype=torch.float64)
    orders = torch.tensor(weak_orders(n))
    assert len(orders) == {3: 13, 4: 75}[n]  # ordered Bell numbers
    scores = f.expand(len(orders), n)
    losses = plackett_luce_loss(scores, orders, full(scores), ties="davidson", tie_strength=0.6)
    assert torch.exp(-losses).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("ties", ["average", "davidson"])
def test_padding_and_batching_change_nothing(ties: str) -> None:
    f = torch.randn(2, 4)
    f[1, 2:] = torch.tensor([float("nan"), 1e9])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    places = torch.tensor([[0, 2, 2, 1], [1, 0, 0, 1]])
    f.requires_grad_()
    losses = plackett_luce_loss(f, places, mask, ties=ties)  # type: ignore[arg-type]
    losses.sum().backward()
    assert f.grad is not None and bool((f.grad[1, 2:] == 0).all())
    for g, k in ((0, 4), (1, 2)):
        alone = f[g : g + 1, :k].detach()
        loss = plackett_luce_loss(alone, places[g : g + 1, :k], full(alone), ties=ties)  # type: ignore[arg-type]
        torch.testing.assert_close(loss[0], losses[g].detach())


def test_large_ties_are_refused_with_a_way_out() -> None:
    scores = torch.zeros(1, LARGEST_TIE + 1)
    places = torch.zeros(1, LARGEST_TIE + 1, dtype=torch.long)
    with pytest.raises(ValueError, match="all pairs"):
        plackett_luce_loss(scores, places, full(scores))
    plackett_luce_loss(scores, torch.arange(LARGEST_TIE + 1).unsqueeze(0), full(scores))


# RRHF


def rrhf_example() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two queries, ragged.

    Query 1: s = -3, -2, -4 over 3, 1, 2 tokens: p = -1, -2, -2; r = 1, 3, 2.
    Query 2: s = -1, -6 over 2, 3 tokens: p = -0.5, -2; r = 5, 5 (a tie).
    """
    logps = torch.tensor([[-3.0, -2.0, -4.0], [-1.0, -6.0, -9.0]])
    lengths = torch.tensor([[3, 1, 2], [2, 3, 4]])
    scores = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    return logps, lengths, scores, mask


def test_rrhf_by_hand() -> None:
    """Query 1, pairs with r_i < r_j: (0,1): -1 + 2 = 1; (0,2): 1; (2,1): -2 + 2 = 0. L_rank = 2.

    Best is 1: L_ft = 2, L = 4. Query 2: a tie, no rank term; both are best: (1 + 6) / 2 = 3.5.
    """
    result = rrhf_loss(*rrhf_example())
    close(result.rank, [2.0, 0.0])
    close(result.sft, [2.0, 3.5])
    close(result.losses, [4.0, 3.5])
    close(result.accuracy[:1], [0.0])
    assert result.accuracy[1].isnan()
    close(rrhf_loss(*rrhf_example(), rank_weight=10.0).losses, [22.0, 3.5])


def test_rrhf_options_by_hand() -> None:
    """margin 0.5: hinge 1.5 + 1.5 + 0.5; logistic: 2 * log(1 + e) + log 2 = 3.319671.

    length_penalty 0: p = s: (0,1): -3 + 2 < 0; (0,2): -3 + 4 = 1; (2,1): -4 + 2 < 0: L_rank = 1.
    token_mean: 2 / 1 and (1/2 + 6/3) / 2 = 1.25.
    """
    example = rrhf_example()
    close(rrhf_loss(*example, margin=0.5).rank, [3.5, 0.0])
    close(rrhf_loss(*example, rank_form="logistic").rank, [3.319671, 0.0])
    close(rrhf_loss(*example, length_penalty=0.0).rank, [1.0, 0.0])
    close(rrhf_loss(*example, sft_form="token_mean").sft, [2.0, 1.25])
    weights = torch.ones(2, 3, 3)
    weights[0, 0, 1] = weights[0, 1, 0] = 0.25
    close(rrhf_loss(*example, pair_weights=weights).rank, [1.25, 0.0])


def test_rrhf_authors_code_variant() -> None:
    """A 192-wide row with 20 completion tokens of -1.5: 30 / 192 = 0.15625; the paper has 30."""
    logps, lengths = torch.tensor([[-30.0, -40.0]]), torch.tensor([[20, 20]])
    scores = torch.tensor([[1.0, 0.0]])
    widths = torch.tensor([192])
    code = rrhf_loss(logps, lengths, scores, full(logps), sft_form="row_mean", row_widths=widths)
    close(code.sft, [0.15625])
    close(rrhf_loss(logps, lengths, scores, full(logps)).sft, [30.0])
    # Tied for best: the code takes the first.
    tied = rrhf_loss(
        logps, lengths, scores * 0, full(logps), sft_form="row_mean", row_widths=widths
    )
    close(tied.sft, [0.15625])
    with pytest.raises(ValueError, match="row_widths"):
        rrhf_loss(logps, lengths, scores, full(logps), sft_form="row_mean")


def test_rrhf_equals_the_equations_in_plain_python() -> None:
    torch.manual_seed(1)
    k = 6
    logps = -10 * torch.rand(1, k, dtype=torch.float64)
    lengths = torch.randint(1, 9, (1, k))
    scores = torch.tensor([[2.0, 1.0, 2.0, 0.0, 3.0, 1.0]])
    p = [s / n for s, n in zip(logps[0].tolist(), lengths[0].tolist(), strict=True)]
    r = scores[0].tolist()
    rank = sum(max(0.0, p[i] - p[j]) for i in range(k) for j in range(k) if r[i] < r[j])
    result = rrhf_loss(logps, lengths, scores, full(logps))
    assert result.losses.item() == pytest.approx(rank - logps[0, 4].item())


def test_rrhf_batches_of_any_size_agree() -> None:
    logps, lengths, scores, mask = rrhf_example()
    together = rrhf_loss(logps, lengths, scores, mask).losses
    first = rrhf_loss(logps[:1], lengths[:1], scores[:1], mask[:1]).losses
    second = rrhf_loss(logps[1:, :2], lengths[1:, :2], scores[1:, :2], mask[1:, :2]).losses
    close(together, torch.cat([first, second]))


def test_rrhf_gradient_ends_once_ordered_unless_there_is_a_margin() -> None:
    logps = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    args = (torch.tensor([[1, 1]]), torch.tensor([[1.0, 0.0]]), full(logps))

    def gradient(**options: float | str) -> Tensor:
        logps.grad = None
        result = rrhf_loss(logps, *args, **options)  # type: ignore[arg-type]
        (result.losses.sum() + logps[0, 0]).backward()  # take the SFT term's -1 out again
        assert logps.grad is not None
        return logps.grad.clone()

    close(gradient(), [[0.0, 0.0]])
    close(gradient(margin=3.0), [[-1.0, 1.0]])
    assert gradient(rank_form="logistic")[0, 1] > 0


@pytest.mark.parametrize("ties", ["average", "davidson"])
def test_listwise_gradients_match_finite_differences(ties: str) -> None:
    torch.manual_seed(2)
    f = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    places = torch.tensor([[0, 1, 1, 2], [0, 0, 0, 9]])
    before = f.detach().clone()
    assert torch.autograd.gradcheck(
        lambda x: plackett_luce_loss(x, places, mask, ties=ties),  # type: ignore[arg-type]
        (f,),
    )
    lengths = torch.randint(1, 5, (2, 4))
    for form in ("hinge", "logistic"):
        assert torch.autograd.gradcheck(
            lambda x, form=form: (
                rrhf_loss(x, lengths, -places, mask, margin=0.1, rank_form=form).losses
            ),
            (f,),
        )
    assert torch.equal(f.detach(), before)


def test_half_precision_is_lifted() -> None:
    scores = torch.tensor([[100.0, 0.0, -100.0]], dtype=torch.bfloat16)
    places = torch.tensor([[2, 1, 0]])
    assert plackett_luce_loss(scores, places, full(scores)).dtype == torch.float32
    close(plackett_luce_loss(scores, places, full(scores)), [300.0])
