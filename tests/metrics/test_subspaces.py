"""Overlap of subspaces, against explicit bases, and against chance."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.covariance_spectrum import CovarianceSpectrum
from spectral_callbacks.metrics.subspaces import (
    covariance_overlap,
    noise_curvature_alignment,
    noise_weights,
    subspace_overlap,
    top_subspace_share,
)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def basis(n: int, k: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(randn(n, k, seed=seed)).Q


def eigenvectors(g: Tensor, k: int) -> tuple[Tensor, Tensor]:
    spectrum = CovarianceSpectrum.from_gram(g @ g.mT)
    return spectrum.values[:k], spectrum.vectors[:, :k]


# ---- Subspaces


def test_angles_are_those_that_were_planted() -> None:
    planted = torch.tensor([0.0, 0.3, 1.0, math.pi / 2], dtype=torch.float64)
    Q = basis(20, 8)
    U, V = Q[:, :4], Q[:, :4] * planted.cos() + Q[:, 4:] * planted.sin()
    found = subspace_overlap(U @ basis(4, 4, seed=1), V @ basis(4, 4, seed=2))  # whatever the bases
    torch.testing.assert_close(found.angles, planted, rtol=0, atol=1e-7)
    assert found.value == pytest.approx(planted.cos().square().mean().item())


@pytest.mark.parametrize(("k", "l"), [(2, 2), (2, 5), (5, 2)])
def test_overlap_is_1_inside_0_across_and_symmetric(k: int, l: int) -> None:  # noqa: E741
    Q = basis(12, 7)
    larger, smaller = max(k, l), min(k, l)
    assert subspace_overlap(Q[:, :k], Q[:, :l]).value == pytest.approx(1)
    assert subspace_overlap(Q[:, :larger], Q[:, 7 - smaller :]).value == pytest.approx(max(0, larger - 5) / smaller)
    U, V = basis(12, k, seed=1), basis(12, l, seed=2)
    assert subspace_overlap(U, V).value == pytest.approx(subspace_overlap(V, U).value)
    assert subspace_overlap(U, V).value == pytest.approx((U.mT @ V).square().sum().item() / smaller)


@pytest.mark.parametrize(("k", "l", "n"), [(1, 1, 30), (3, 5, 30), (5, 3, 30), (10, 10, 12)])
def test_random_subspaces_overlap_by_the_null_value_and_its_spread(k: int, l: int, n: int) -> None:  # noqa: E741
    generator = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(4000, n, m, dtype=torch.float64, generator=generator)).Q for m in (k, l))
    null = subspace_overlap(U[0], V[0]).null
    values = (U.mT @ V).square().sum((1, 2)) / min(k, l)
    assert abs(values.mean().item() - null.value) < 3 * null.error / math.sqrt(4000)
    assert values.std().item() == pytest.approx(null.error, rel=0.06)


def test_a_subspace_of_everything_is_no_surprise() -> None:
    for n in (1, 4):
        found = subspace_overlap(basis(n, n), basis(n, 1, seed=1))
        assert found.value == pytest.approx(found.null.value)
        assert found.null.error == 0


def test_the_covariance_overlaps_as_its_eigenvectors_in_parameter_space_do() -> None:
    g, V = randn(9, 25) + 1, basis(25, 3, seed=1)
    values, U = eigenvectors(g, 4)
    found = covariance_overlap(values, U, g @ V, dimension=25)
    explicit = torch.linalg.eigh(torch.cov(g.mT)).eigenvectors.flip(1)[:, :4]
    torch.testing.assert_close(found.cosines, subspace_overlap(explicit, V).cosines)
    assert found.null == subspace_overlap(explicit, V).null
    whole = covariance_overlap(values, U, g, dimension=25)
    torch.testing.assert_close(whole.cosines, torch.ones(4, dtype=torch.float64))


def test_eigenvectors_without_an_eigenvalue_are_left_out() -> None:
    g, V = randn(9, 2) @ randn(2, 25, seed=2), basis(25, 3, seed=1)
    values, U = eigenvectors(g, 6)
    found = covariance_overlap(values, U, g @ V, dimension=25)
    assert found.dimensions == (2, 3, 25)
    torch.testing.assert_close(found.cosines, covariance_overlap(values[:2], U[:, :2], g @ V, dimension=25).cosines)
    none = covariance_overlap(values[2:], U[:, 2:], g @ V, dimension=25)
    assert math.isnan(none.value)
    assert math.isnan(none.null.value)


def test_a_planted_common_subspace_is_found_among_noise() -> None:
    V = basis(400, 4)
    g = randn(64, 400, seed=1) + 20 * randn(64, 4, seed=2) @ V.mT
    values, U = eigenvectors(g, 4)
    found = covariance_overlap(values, U, g @ V, dimension=400)
    assert found.value > 0.9
    other = covariance_overlap(values, U, g @ basis(400, 4, seed=3), dimension=400)
    assert abs(other.value - other.null.value) < 4 * other.null.error


def test_what_is_no_basis_is_refused() -> None:
    with pytest.raises(ValueError, match="orthonormal"):
        subspace_overlap(2 * basis(5, 2), basis(5, 2))
    with pytest.raises(ValueError, match="orthonormal"):
        subspace_overlap(basis(5, 2), torch.full((5, 2), math.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="shapes"):
        subspace_overlap(basis(5, 2), basis(6, 2))
    g = randn(9, 25)
    values, U = eigenvectors(g, 2)
    with pytest.raises(ValueError, match="cosine"):
        covariance_overlap(values, U, 3 * g, dimension=25)
    with pytest.raises(ValueError, match="in 25 dimensions"):
        covariance_overlap(values, U, g[:8], dimension=25)
    with pytest.raises(ValueError, match="in 24 dimensions"):
        covariance_overlap(values, U, g, dimension=24)


# ---- The mean gradient


def test_the_share_is_that_of_the_projected_mean_gradient() -> None:
    g, V = randn(9, 25) + 1, basis(25, 3, seed=1)
    found = top_subspace_share(g @ g.mT, g @ V)
    mean = g.mean(0)
    assert found.value == pytest.approx(((V.mT @ mean).square().sum() / mean.square().sum()).item())
    assert top_subspace_share(g @ g.mT, g @ V, dataset_size=9).error == 0


@pytest.mark.parametrize("num_samples", [16, 64, 256])
def test_the_share_varies_by_its_error(num_samples: int) -> None:
    generator = torch.Generator().manual_seed(0)
    V = basis(300, 5)
    estimates = []
    for _ in range(400):
        g = torch.randn(num_samples, 300, dtype=torch.float64, generator=generator) / 3 + V[:, 0]
        estimates.append(top_subspace_share(g @ g.mT, g @ V))
    values, errors = torch.tensor([(e.value, e.error) for e in estimates], dtype=torch.float64).unbind(1)
    assert errors.mean().item() == pytest.approx(values.std().item(), rel=0.15)


def test_a_random_subspace_has_its_share_of_the_dimensions() -> None:
    g = randn(16, 40) + 1
    shares = torch.tensor([top_subspace_share(g @ g.mT, g @ basis(40, 6, seed=s)).value for s in range(500)])
    assert abs(shares.mean().item() - 6 / 40) < 3 * shares.std().item() / math.sqrt(500)


def test_a_mean_gradient_of_zero_has_no_share() -> None:
    found = top_subspace_share(torch.zeros(4, 4), torch.zeros(4, 2))
    assert math.isnan(found.value)
    assert found.error == math.inf
    one = top_subspace_share(torch.tensor([[25.0]]), torch.tensor([[3.0]]))
    assert (one.value, one.error) == (9 / 25, math.inf)
    with pytest.raises(ValueError, match="products"):
        top_subspace_share(torch.eye(4), torch.zeros(3, 2))


# ---- Noise and curvature


def test_over_all_signs_the_vectors_have_the_covariance_of_the_gradients() -> None:
    g = randn(6, 4) + 1
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)), dtype=torch.float64).mT
    weights = (signs - signs.mean(0)) / math.sqrt(6)
    W = g.mT @ weights
    torch.testing.assert_close(W @ W.mT / 64, torch.cov(g.mT, correction=0))
    drawn = noise_weights(6, 50, generator=torch.Generator().manual_seed(0))
    assert all((weights - column[:, None]).abs().max(0).values.min() < 1e-12 for column in drawn.mT)
    assert len(drawn.mT.unique(dim=0)) > 20


def test_alignment_is_that_of_the_dense_matrices_and_known_to_its_error() -> None:
    n, N = 30, 40
    H = basis(n, n, seed=1) * torch.linspace(0.1, 3, n, dtype=torch.float64) @ basis(n, n, seed=1).mT
    g = randn(N, n) @ H
    noise = torch.cov(g.mT, correction=0)
    expected = ((noise * H).sum() / noise.trace() / (H.trace() / n)).item()
    generator = torch.Generator().manual_seed(0)
    mean = Estimate((H.trace() / n).item(), 0.0, num_samples=1)
    estimates = []
    for _ in range(400):
        W = g.mT @ noise_weights(N, 64, generator=generator)
        estimates.append(noise_curvature_alignment((W * (H @ W)).sum(0), W.square().sum(0), mean))
    values, errors = torch.tensor([(e.value, e.error) for e in estimates], dtype=torch.float64).unbind(1)
    spread = values.std().item()
    assert abs(values.mean().item() - expected) < 3 * spread / 20 + 0.1 * spread  # a ratio has a bias of 1/k
    assert errors.square().mean().sqrt().item() == pytest.approx(spread, rel=0.1)


def test_noise_along_the_curved_direction_has_the_alignment_n_and_isotropic_noise_1() -> None:
    n = 10
    H = torch.zeros(n, n, dtype=torch.float64)
    H[0, 0] = 5
    mean = Estimate(0.5, 0.0, num_samples=1)
    for W, expected in ((torch.eye(n, dtype=torch.float64)[:, :1], n), (torch.eye(n, dtype=torch.float64), 1)):
        found = noise_curvature_alignment((W * (H @ W)).sum(0), W.square().sum(0), mean)
        assert found.value == pytest.approx(expected)


def test_the_error_of_the_mean_eigenvalue_is_added() -> None:
    curvatures, squares = torch.tensor([2.0, 2.0, 2.0]), torch.ones(3)
    found = noise_curvature_alignment(curvatures, squares, Estimate(0.5, 0.05, num_samples=9))
    assert (found.value, found.error) == pytest.approx((4, 0.4))


def test_without_noise_or_curvature_there_is_no_alignment() -> None:
    one = torch.ones(3)
    for squares, mean in ((0 * one, 1.0), (one, 0.0), (one, -1.0), (one, math.nan)):
        found = noise_curvature_alignment(one, squares, Estimate(mean, 0.0, num_samples=1))
        assert math.isnan(found.value)
        assert found.error == math.inf
    assert noise_curvature_alignment(one[:1], one[:1], Estimate(1.0, 0.0, num_samples=1)).error == math.inf
    with pytest.raises(ValueError, match="curvatures"):
        noise_curvature_alignment(one, one[:2], Estimate(1.0, 0.0, num_samples=1))
