"""Rebalancing leaves the product as it is, and makes the first factor orthogonal."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.init import rebalance_, rebalance_layers_, rebalanced, split_bias


def factors(m: int = 9, n: int = 7, k: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(rows, k, dtype=dtype, generator=generator) for rows in (m, n))  # type: ignore[return-value]


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize(("m", "n", "k"), [(9, 7, 3), (3, 8, 3), (5, 1, 4), (1, 1, 1)])
def test_the_product_stays_and_the_first_factor_is_orthogonal(m: int, n: int, k: int, beta: float) -> None:
    F, G = factors(m, n, k)
    new_F, new_G = rebalanced(F, G, beta)
    torch.testing.assert_close(new_F @ new_G.T, F @ G.T)
    torch.testing.assert_close(new_F.T @ new_F, beta**2 * torch.eye(k, dtype=torch.float64))


def test_it_is_the_formula_of_the_paper() -> None:
    """F B diag(beta/s) and G B diag(s/beta), with F = A S Bᵀ; columns are told apart by their sign alone."""
    F, G = factors()
    _, s, Bh = torch.linalg.svd(F, full_matrices=False)
    new_F, new_G = rebalanced(F, G, 2.0)
    torch.testing.assert_close(new_F, F @ Bh.T @ torch.diag(2.0 / s))
    torch.testing.assert_close(new_G, G @ Bh.T @ torch.diag(s / 2.0))


def test_factors_of_single_precision_keep_it_and_their_product() -> None:
    F, G = factors(dtype=torch.float32)
    new_F, new_G = rebalanced(F, G)
    assert new_F.dtype == new_G.dtype == torch.float32
    torch.testing.assert_close(new_F.double() @ new_G.double().T, F.double() @ G.double().T, rtol=1e-5, atol=1e-6)


def test_in_place_it_keeps_the_tensors_and_their_gradients() -> None:
    F, G = (nn.Parameter(factor) for factor in factors())
    expected = rebalanced(F, G, 0.5)
    (F @ G.T).sum().backward()
    gradient = F.grad
    rebalance_(F, G, 0.5)
    torch.testing.assert_close((F.detach(), G.detach()), expected, rtol=0, atol=0)
    assert F.requires_grad
    assert F.grad is gradient


@pytest.mark.parametrize("bias", [True, False])
def test_two_layers_compute_what_they_computed(bias: bool) -> None:
    torch.manual_seed(0)
    first, second = nn.Linear(6, 3, bias=bias).double(), nn.Linear(3, 5).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    before = second(first(x)).detach()
    rebalance_layers_(first, second, beta=0.7)
    torch.testing.assert_close(second(first(x)).detach(), before)
    torch.testing.assert_close(second.weight.T @ second.weight, 0.49 * torch.eye(3, dtype=torch.float64))


def test_a_factor_of_too_low_a_rank_is_refused_and_left_alone() -> None:
    F, G = factors()
    F[:, 2] = F[:, 0] + F[:, 1]
    before = F.clone(), G.clone()
    with pytest.raises(ValueError, match=r"F \(9, 3\) has rank 2, and 3 is needed"):
        rebalance_(F, G)
    torch.testing.assert_close((F, G), before, rtol=0, atol=0)


def test_a_factor_wider_than_tall_is_refused() -> None:
    with pytest.raises(ValueError, match=r"F \(2, 3\) has rank 2, and 3 is needed"):
        rebalanced(torch.eye(2, 3), torch.ones(4, 3))


def test_rounding_of_single_precision_is_no_rank() -> None:
    F = torch.ones(9, 2)
    F[0, 1] += 1e-7
    with pytest.raises(ValueError, match="rank 1, and 2 is needed"):
        rebalanced(F, torch.ones(4, 2))


@pytest.mark.parametrize("beta", [0.0, -1.0, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=r"beta is .*, and must be positive"):
        rebalanced(*factors(), beta=beta)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"F \(3, 2\) and G \(3, 1\) are no factors of F Gᵀ"):
        rebalanced(torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(ValueError, match="the second layer takes 4 numbers, and the first gives 3"):
        rebalance_layers_(nn.Linear(2, 3), nn.Linear(4, 2))


def test_layers_whose_values_cannot_be_replaced_are_refused_and_left_alone() -> None:
    first, second, x = nn.Linear(5, 3), nn.Linear(3, 4), torch.ones(5)
    net = split_bias(nn.Sequential(first, second))
    before = net(x).detach()
    with pytest.raises(ValueError, match=r"first\.bias is computed from other parameters"):
        rebalance_layers_(first, second)
    nn.utils.parametrizations.weight_norm(second)
    with pytest.raises(ValueError, match="is computed from other parameters"):
        rebalance_layers_(nn.Linear(5, 3), second)
    torch.testing.assert_close(net(x).detach(), before)
