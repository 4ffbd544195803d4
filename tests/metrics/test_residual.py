"""How far the Hessian is from Gauss-Newton, against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Matrix
from spectral_callbacks.metrics.residual import residual_ratio

N = 60


def _symmetric(seed: int) -> Tensor:
    A = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (A + A.mT) / 2


def _ratio(H: Tensor, G: Tensor, seed: int = 0, **options: int) -> tuple[float, float]:
    estimate = residual_ratio(Matrix(H), Matrix(G), generator=torch.Generator().manual_seed(seed), **options)
    return estimate.value, estimate.error


def test_the_ratio_is_that_of_the_frobenius_norms_within_its_error() -> None:
    H = _symmetric(0)
    G = H - 0.3 * _symmetric(1)
    truth = ((H - G).norm() / H.norm()).item()
    found = torch.tensor([_ratio(H, G, seed, num_vectors=40) for seed in range(200)], dtype=torch.float64)
    z = (found[:, 0] - truth) / found[:, 1]
    assert abs(z.mean().item()) < 0.25
    assert z.std().item() == pytest.approx(1.0, abs=0.15)
    assert (found[:, 1] < 0.1 * truth).all()


def test_a_multiple_of_the_hessian_is_as_far_as_its_factor_says_without_chance() -> None:
    H = _symmetric(0)
    for factor in (1.0, 0.5, -1.0):
        value, error = _ratio(H, factor * H)
        assert value == pytest.approx(1 - factor, abs=1e-12)
        assert error == pytest.approx(0.0, abs=1e-12)


def test_a_hessian_of_zero_has_no_ratio() -> None:
    value, error = _ratio(torch.zeros(N, N), torch.zeros(N, N))
    assert math.isnan(value)
    assert error == math.inf


def test_it_costs_as_many_products_with_each_as_there_are_vectors() -> None:
    seen: list[tuple[int, ...]] = []

    class Seen(Matrix):
        def matmat(self, X: Tensor) -> Tensor:
            seen.append(tuple(X.shape))
            return super().matmat(X)

    A = Seen(_symmetric(0))
    assert residual_ratio(A, A, num_vectors=7, generator=torch.Generator().manual_seed(0)).num_samples == 7
    assert seen == [(N, 7), (N, 7)]


@pytest.mark.parametrize("num_vectors", [0, 1])
def test_too_few_vectors_for_an_error_are_refused(num_vectors: int) -> None:
    with pytest.raises(ValueError, match=f"num_vectors={num_vectors} must be at least 2"):
        _ratio(torch.eye(N), torch.eye(N), num_vectors=num_vectors)
