"""The spectrum of the gradients' covariance, against dense covariance matrices and random-matrix theory."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.metrics import outliers
from spectral_callbacks.metrics.covariance_spectrum import CovarianceSpectrum, covariance_spectrum
from spectral_callbacks.metrics.eigenvalues import effective_rank_of_eigenvalues
from spectral_callbacks.metrics.gradient_noise import GradientMoments, gradient_norm, mean_pairwise_cosine


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense_spectrum(g: Tensor, center: bool = True) -> Tensor:
    """Of the matrix in parameter space, padded with zeros or cut to N values."""
    g = g - g.mean(0) if center else g
    values = torch.linalg.eigvalsh(sum((torch.outer(x, x) for x in g), torch.zeros(g.shape[1], g.shape[1])) / len(g))
    return torch.cat([values.flip(0), torch.zeros(len(g))])[: len(g)].double()


def dense_largest(g: Tensor) -> float:
    return torch.linalg.matrix_norm(g - g.mean(0), 2).item() ** 2 / len(g)


def of(g: Tensor) -> CovarianceSpectrum:
    return CovarianceSpectrum.from_gram(g @ g.mT)


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


@pytest.mark.parametrize("shape", [(9, 20), (20, 5)])
def test_the_vectors_are_eigenvectors_in_parameter_space(shape: tuple[int, int]) -> None:
    g = randn(*shape) + 1
    N, k = shape[0], 4
    spectrum = of(g)
    values, U = spectrum.values, spectrum.vectors
    V = (g - g.mean(0)).mT @ U[:, :k] / (N * values[:k]).sqrt()
    torch.testing.assert_close(V.mT @ V, torch.eye(k, dtype=torch.float64))
    torch.testing.assert_close(torch.cov(g.mT, correction=0) @ V, V * values[:k])
    torch.testing.assert_close(values, covariance_spectrum(g @ g.mT)[:-1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(U.mT @ U, torch.eye(N - 1, dtype=torch.float64))
    torch.testing.assert_close(U.sum(0), torch.zeros(N - 1, dtype=torch.float64), rtol=0, atol=1e-10)
    assert spectrum.effective_rank() == effective_rank_of_eigenvalues(values).item()


GRADIENTS = {
    "a flat spectrum": randn(24, 300),
    "a spike": randn(24, 300) * torch.cat([torch.tensor([9.0]), torch.ones(299)]),
    "few dimensions": randn(24, 3),
    "one dimension": randn(24, 1),
    "a large mean": randn(24, 300) + 100,
    "a mean alone": torch.ones(6, 2).double(),
    "orthogonal": torch.eye(8).double(),
    "in pairs": randn(24, 300)[torch.arange(24) // 2],
    "one apart": torch.eye(8)[:, :1].double(),
    "of very different norms": randn(24, 300) * 10 ** randn(24, 1, seed=1),
    "three": randn(3, 7),
    "zero": torch.zeros(5, 5).double(),
}


@pytest.mark.parametrize("name", GRADIENTS)
def test_the_largest_eigenvalue_without_a_sample_is_that_of_the_other_gradients(name: str) -> None:
    g = GRADIENTS[name]
    expected = [dense_largest(torch.cat([g[:i], g[i + 1 :]])) for i in range(len(g))]
    found = of(g).lambda_max_without_each()
    assert found.tolist() == pytest.approx(expected, rel=1e-7, abs=1e-7 * dense_largest(g) + 1e-12)
    spread = torch.tensor(expected).std(correction=0).item() * math.sqrt(len(g) - 1)
    assert of(g).lambda_max().error == pytest.approx(spread, rel=1e-4, abs=1e-5 * dense_largest(g) + 1e-12)


@pytest.mark.parametrize("name", [*GRADIENTS, "one"])
def test_the_largest_eigenvalue_of_the_second_moment_is_that_with_the_mean_left_in(name: str) -> None:
    g = randn(1, 5) if name == "one" else GRADIENTS[name]
    expected = torch.linalg.matrix_norm(g, 2).item() ** 2 / len(g)
    assert of(g).second_moment_lambda_max() == pytest.approx(expected, rel=1e-9)


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


def looks(largest: float, num_samples: int, repetitions: int) -> tuple[Tensor, Tensor]:
    """Values and errors of draws in 300 dimensions, the other 299 with an eigenvalue of 0.3."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.cat([torch.tensor([largest]), torch.full((299,), 0.3)]).double().sqrt()
    found = []
    for _ in range(repetitions):
        g = torch.randn(num_samples, 300, dtype=torch.float64, generator=generator) * scale
        found.append(of(g).lambda_max())
    values, errors = torch.tensor([(e.value, e.error) for e in found], dtype=torch.float64).unbind(1)
    return values, errors


@pytest.mark.parametrize("num_samples", [16, 64])
@pytest.mark.parametrize("largest", [30.0, 5.0])
def test_an_eigenvalue_that_stands_clear_is_known_to_its_error(largest: float, num_samples: int) -> None:
    values, errors = looks(largest, num_samples, 300)
    ratio = errors.square().mean().sqrt().item() / values.std().item()
    assert ratio == pytest.approx(1.05, abs=0.15)


@pytest.mark.parametrize("num_samples", [16, 64])
def test_the_error_of_a_flat_spectrum_is_too_large_and_not_by_much(num_samples: int) -> None:
    values, errors = looks(0.3, num_samples, 300)
    ratio = errors.square().mean().sqrt().item() / values.std().item()
    assert 1.3 < ratio < 2.2


def test_the_largest_eigenvalue_is_biased_upward() -> None:
    values, _ = looks(30.0, 64, 300)
    expected = 30 * 63 / 64 + 299 * 0.3 / 64  # seen at ℓ + b, less the 1/N of the centering
    assert abs(values.mean().item() - expected) < 3 * values.std().item() / math.sqrt(300)
    values, _ = looks(0.3, 64, 300)
    assert values.mean().item() == pytest.approx(0.3 * (1 + math.sqrt(300 / 64)) ** 2, rel=0.05)


def test_the_largest_eigenvalue_of_the_whole_dataset_has_no_error() -> None:
    spectrum = of(randn(20, 6))
    assert spectrum.lambda_max(dataset_size=20).error == 0
    some, all_but_endless = (spectrum.lambda_max(dataset_size=n).error for n in (40, None))
    assert some == pytest.approx(all_but_endless * math.sqrt(0.5))


# ---- What is no Gram matrix

DOORS = [covariance_spectrum, CovarianceSpectrum.from_gram, GradientMoments.from_gram, gradient_norm]


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


def test_a_single_gradient_has_no_spread() -> None:
    one = torch.tensor([[4.0]])
    assert covariance_spectrum(one).tolist() == [0]
    assert covariance_spectrum(one, center=False).tolist() == [4]
    for g in (torch.tensor([[2.0]]), randn(2, 5)):  # without one of two, there is none either
        assert of(g).lambda_max().error == math.inf
        assert of(g).lambda_max(dataset_size=len(g)).error == 0


def test_gradients_that_are_zero_have_a_spectrum_of_zeros() -> None:
    zero = torch.zeros(5, 5)
    assert covariance_spectrum(zero).tolist() == [0] * 5
    largest = CovarianceSpectrum.from_gram(zero).lambda_max()
    assert (largest.value, largest.error) == (0, 0)
    assert math.isnan(CovarianceSpectrum.from_gram(zero).effective_rank())
