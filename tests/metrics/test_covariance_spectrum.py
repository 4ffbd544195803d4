"""The spectrum of the gradients' covariance, against dense covariance matrices and random-matrix theory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.metrics import outliers
from spectral_callbacks.metrics.covariance_spectrum import (
    covariance_eigenvectors,
    covariance_lambda_max,
    covariance_spectrum,
    effective_rank,
    held_out_lambda_max,
    participation_ratio,
)
from spectral_callbacks.metrics.gradient_noise import GradientMoments, gradient_norm, mean_pairwise_cosine


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_spectrum(g: Tensor, center: bool = True) -> Tensor:
    """Of the matrix in parameter space, padded with zeros or cut to N values."""
    g = g - g.mean(0) if center else g
    values = torch.linalg.eigvalsh(sum((torch.outer(x, x) for x in g), torch.zeros(g.shape[1], g.shape[1])) / len(g))
    return torch.cat([values.flip(0), torch.zeros(len(g))])[: len(g)].double()


SIX = torch.tensor(
    [[-1.0, 0, 0, 0], [0, -2, 0, 0], [0, 0, -3, 0], [0, 0, 0, -4], [0, 0, 0, 0], [0, 0, -1, -1]], dtype=torch.float64
)  # ½ (w·x - y)² at w = 0; x = e1..e4, e1 + e2, e3 + e4; y = 1, 2, 3, 4, 0, 1


def test_six_samples_have_the_spectrum_in_closed_form() -> None:
    gram = SIX @ SIX.mT
    assert gram.diagonal().tolist() == [1, 4, 9, 16, 0, 2]
    expected = [2.856676, 1.643324, 0.666667, 0.166667, 0, 0]
    assert covariance_spectrum(gram, center=False).tolist() == pytest.approx(expected, abs=1e-6)
    expected = [2.305683, 1.224986, 0.445594, 0.079293, 0, 0]
    assert covariance_spectrum(gram).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (1, 4)])
def test_the_spectrum_is_that_of_the_matrix_in_parameter_space(shape: tuple[int, int], center: bool) -> None:
    g = randn(*shape) + 2 * randn(shape[1], seed=1)
    found = covariance_spectrum(g @ g.mT, center=center)
    torch.testing.assert_close(found, dense_spectrum(g, center), rtol=1e-10, atol=1e-12)
    assert (found.diff() <= 0).all()
    assert (found >= 0).all()


def test_values_that_are_only_rounding_are_zero() -> None:
    g = randn(20, 3)
    assert (covariance_spectrum(g @ g.mT)[3:] == 0).all()
    assert (covariance_spectrum(g[:1].expand(20, 3) @ g[:1].expand(20, 3).mT) == 0).all()


def test_the_vectors_are_eigenvectors_in_parameter_space() -> None:
    g = randn(9, 20) + 1
    values, U = covariance_eigenvectors(g @ g.mT, 4)
    V = (g - g.mean(0)).mT @ U / (9 * values).sqrt()
    torch.testing.assert_close(V.mT @ V, torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(torch.cov(g.mT, correction=0) @ V, V * values)
    torch.testing.assert_close(values, covariance_spectrum(g @ g.mT)[:4])
    torch.testing.assert_close(U.sum(0), torch.zeros(4, dtype=torch.float64))


# ---- Random-matrix theory

# θ -> outliers, and where one is: it separates from the bulk only beyond θ = √γ = 0.5
SPIKES: dict[float, tuple[int, float | None]] = {0.3: (0, None), 1.0: (1, 2.5), 3.0: (1, 13 / 3)}


@pytest.mark.parametrize("spike", SPIKES)
@pytest.mark.parametrize("seed", range(2))
def test_planted_gradients_have_the_bulk_of_marchenko_and_pastur_and_the_spikes_of_baik_ben_arous_and_peche(
    spike: float, seed: int
) -> None:
    count, place = SPIKES[spike]
    g = randn(2000, 500, seed=seed)
    g[:, 0] *= math.sqrt(1 + spike)
    values = covariance_spectrum((g + 3) @ (g + 3).mT)  # the mean is no outlier
    assert (values[500:] == 0).all()
    found = outliers(values[:25], size=500)
    assert found.count == count
    assert found.bulk_edge == pytest.approx(2.25, abs=0.06)  # (1 + √γ)²
    assert values[499].item() == pytest.approx(0.25, abs=0.03)  # (1 - √γ)²
    if place is not None:
        assert values[0].item() == pytest.approx(place, rel=0.1)  # (1 + θ)(1 + γ/θ)


def test_the_mean_gradient_is_an_outlier_of_the_empirical_fisher_matrix() -> None:
    g = randn(400, 100) + 1
    values = covariance_spectrum(g @ g.mT, center=False)
    assert outliers(values[:25], size=100).count == 1
    assert values[0].item() == pytest.approx(100, rel=0.1)


# ---- The largest eigenvalue


@pytest.fixture(scope="module")
def spiked() -> tuple[Tensor, Tensor]:
    """Values and errors, (R, 2), of largest and held-out eigenvalue; draws of 64 with an eigenvalue 30 over 0.3."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.cat([torch.tensor([30.0]), torch.full((299,), 0.3)]).double().sqrt()
    found = []
    for _ in range(200):
        g = torch.randn(64, 300, dtype=torch.float64, generator=generator) * scale
        found.append([(e.value, e.error) for e in (covariance_lambda_max(g @ g.mT), held_out_lambda_max(g @ g.mT))])
    values, errors = torch.tensor(found, dtype=torch.float64).unbind(2)
    return values, errors


def test_an_isolated_eigenvalue_is_known_to_its_error(spiked: tuple[Tensor, Tensor]) -> None:
    values, errors = spiked
    ratio = errors.square().mean(0).sqrt() / values.std(0)
    assert ratio.tolist() == pytest.approx([1, 1], abs=0.15)


def test_the_largest_eigenvalue_is_biased_upward_and_the_held_out_one_downward(spiked: tuple[Tensor, Tensor]) -> None:
    values, _ = spiked
    mean, spread = values.mean(0), values.std(0) / 200**0.5
    gamma = 299 * 0.3 / 64  # seen at ℓ + b, less the 1/N of the centering
    assert abs(mean[0].item() - (30 * 63 / 64 + gamma)) < 3 * spread[0].item()
    assert mean[1].item() < 30
    assert mean[1].item() == pytest.approx(30, rel=0.1)


@pytest.mark.parametrize("num_samples", [7, 40])
def test_the_held_out_eigenvalue_is_that_of_projections_in_parameter_space(num_samples: int) -> None:
    g = randn(num_samples, 12) + 5
    squares = []
    for held in torch.arange(num_samples).tensor_split(min(16, num_samples)):
        others = g[[i for i in range(num_samples) if i not in held]]
        top = torch.linalg.eigh(torch.cov(others.mT)).eigenvectors[:, -1]
        squares.append(((g[held] - others.mean(0)) @ top).square() / (1 + 1 / len(others)))
    squares = torch.cat(squares)
    found = held_out_lambda_max(g @ g.mT)
    assert found.value == pytest.approx(squares.mean().item(), rel=1e-9)
    assert found.error == pytest.approx(squares.std().item() / math.sqrt(num_samples), rel=1e-9)


def test_the_held_out_eigenvalue_of_a_flat_spectrum_is_not_that_of_the_sample() -> None:
    held, seen = [], []
    for seed in range(100):
        g = randn(64, 300, seed=seed)
        held.append(held_out_lambda_max(g @ g.mT).value)
        seen.append(covariance_lambda_max(g @ g.mT).value)
    held = torch.tensor(held)
    assert abs(held.mean().item() - 1) < 3 * held.std().item() / 10
    assert torch.tensor(seen).mean().item() == pytest.approx((1 + math.sqrt(300 / 64)) ** 2, rel=0.05)


def test_the_largest_eigenvalue_of_the_whole_dataset_has_no_error() -> None:
    g = randn(20, 6)
    assert covariance_lambda_max(g @ g.mT, dataset_size=20).error == 0
    some, all_but_endless = (covariance_lambda_max(g @ g.mT, dataset_size=n).error for n in (40, None))
    assert some == pytest.approx(all_but_endless * math.sqrt(0.5))


# ---- Ranks


@pytest.mark.parametrize("rank", [effective_rank, participation_ratio])
def test_equal_eigenvalues_count_one_each(rank: type) -> None:
    for r in (1, 4, 9):
        values = torch.cat([torch.full((r,), 0.3), torch.zeros(5)])
        assert rank(values) == pytest.approx(r)
        assert rank(1e6 * values) == pytest.approx(r)
    assert math.isnan(rank(torch.zeros(5)))


def test_ranks_of_ten_directions_in_noise() -> None:
    values = torch.cat([torch.full((10,), 1.0 + 1e-4), torch.full((118,), 1e-4)]).double()
    assert participation_ratio(values) == pytest.approx(10.024, abs=1e-3)
    assert effective_rank(values) == pytest.approx(10.121, abs=1e-2)


# ---- What is no Gram matrix

DOORS = [covariance_spectrum, covariance_lambda_max, held_out_lambda_max, GradientMoments.from_gram, gradient_norm]


@pytest.mark.parametrize("door", [*DOORS, mean_pairwise_cosine])
@pytest.mark.parametrize(
    ("gram", "says"),
    [
        (torch.ones(2, 3), "shape"),
        (torch.ones(0, 0), "shape"),
        (torch.ones(4), "shape"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), "not finite"),
        (torch.tensor([[math.inf]]), "not finite"),
        (torch.tensor([[1.0, 0.5], [0.0, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), "inner products"),
        (-torch.eye(3), "inner products"),
    ],
)
def test_what_is_no_matrix_of_inner_products_is_refused(door: type, gram: Tensor, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        door(gram)


def test_more_eigenvectors_than_gradients_are_refused() -> None:
    for k in (0, 4):
        with pytest.raises(ValueError, match="k="):
            covariance_eigenvectors(torch.eye(3), k)


def test_a_single_gradient_has_no_spread() -> None:
    one = torch.tensor([[4.0]])
    assert covariance_spectrum(one).tolist() == [0]
    assert covariance_spectrum(one, center=False).tolist() == [4]
    assert covariance_lambda_max(one).error == math.inf
    assert math.isnan(held_out_lambda_max(one).value)


def test_gradients_that_are_zero_have_a_spectrum_of_zeros() -> None:
    zero = torch.zeros(5, 5)
    assert covariance_spectrum(zero).tolist() == [0] * 5
    assert covariance_lambda_max(zero).value == held_out_lambda_max(zero).value == 0
    assert math.isnan(effective_rank(covariance_spectrum(zero)))
