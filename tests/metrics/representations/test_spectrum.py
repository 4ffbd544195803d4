"""Eigenvalues of the covariance and of the second moment, and the two parts of an error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.metrics.eigenvalues import effective_rank_of_eigenvalues
from spectral_callbacks.metrics.representations.moments import feature_spectrum
from spectral_callbacks.metrics.representations.spectrum import FeatureSpectrum
from tests.metrics.representations.planted import exact, gaussian, power_law


def trace(eigenvalues: Tensor) -> Tensor:
    return eigenvalues.sum()


def largest(eigenvalues: Tensor) -> Tensor:
    return eigenvalues[0]


def rank_of_roots(eigenvalues: Tensor) -> Tensor:
    return effective_rank_of_eigenvalues(eigenvalues.sqrt())


def draws(n: int, d: int, mean: float, count: int) -> list[FeatureSpectrum]:
    generator = torch.Generator().manual_seed(0)
    return [feature_spectrum(gaussian(power_law(d, 1.0), n, generator) + mean) for _ in range(count)]


@pytest.mark.parametrize("n", [30, 12], ids=["covariance side", "Gram side"])
def test_both_spectra_are_divided_by_n(n: int) -> None:
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(0)).double() + 3
    spectrum = feature_spectrum(x)
    centered = torch.linalg.eigvalsh(torch.cov(x.mT, correction=0)).flip(0)[: min(n - 1, 12)]
    torch.testing.assert_close(spectrum.eigenvalues, centered, rtol=1e-9, atol=0)
    torch.testing.assert_close(spectrum.second_moment_eigenvalues, torch.linalg.svdvals(x) ** 2 / n, rtol=1e-9, atol=0)


@pytest.mark.parametrize("n", [40, 400, 3000], ids=["Gram side", "all rows", "kept rows"])
@pytest.mark.parametrize("center", [True, False])
def test_the_trace_has_the_error_of_a_mean_and_no_bias(n: int, center: bool) -> None:
    x = torch.randn(n, 60, generator=torch.Generator().manual_seed(0)).double().exp() * power_law(60, 0.5) + 0.1
    squares = (x - x.mean(0) * center).square().sum(1)
    found = feature_spectrum(x).estimate(trace, center=center)
    assert found.value == pytest.approx(squares.mean().item())
    assert found.standard_error == pytest.approx(squares.std().item() / math.sqrt(n), rel=1e-9 if n < 1024 else 0.4)
    assert abs(found.bias) < 0.01 * found.standard_error
    assert found.error == pytest.approx(math.hypot(found.standard_error, found.bias))


@pytest.mark.parametrize("n", [50, 300, 2000])
def test_the_largest_eigenvalue_has_the_error_of_a_variance(n: int) -> None:
    found = [spectrum.estimate(largest).standard_error for spectrum in draws(n, 100, 0.0, 8)]
    assert sum(found) / len(found) == pytest.approx(math.sqrt(2 / n), rel=0.15)


@pytest.mark.parametrize("mean", [0.0, 0.3, 10.0])
@pytest.mark.parametrize("n", [100, 400], ids=["n = 5 d", "n = 20 d"])
@pytest.mark.parametrize("center", [True, False])
def test_the_estimated_bias_is_that_over_draws(n: int, mean: float, center: bool) -> None:
    """With the mean in it, a second moment fluctuates otherwise: it is no Wishart matrix of its own eigenvalues."""
    spectra = draws(n, 20, mean, 150)
    population = torch.diag(power_law(20, 1.0)) + (0 if center else mean**2)
    truth = rank_of_roots(torch.linalg.eigvalsh(population).clamp(min=0)).item()
    eigenvalues = [s.eigenvalues if center else s.second_moment_eigenvalues for s in spectra]
    values = torch.stack([rank_of_roots(e) for e in eigenvalues])
    found = [s.estimate(rank_of_roots, center=center) for s in spectra[:10]]
    bias = values.mean().item() - truth
    noise = values.std().item() / math.sqrt(len(values))
    assert abs(bias - sum(e.bias for e in found) / 10) < 3 * noise + 0.3 * abs(bias)
    assert sum(e.standard_error for e in found) / 10 == pytest.approx(values.std().item(), rel=0.3)


def test_the_bias_is_the_same_at_every_look_and_asks_no_global_generator() -> None:
    x = exact(power_law(30, 1.0), 90)
    before = torch.get_rng_state()
    first, second = (feature_spectrum(x).estimate(effective_rank_of_eigenvalues) for _ in range(2))
    assert first == second
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("n", [2, 3])
def test_below_four_samples_the_error_is_unknown(n: int) -> None:
    found = feature_spectrum(torch.eye(n, 9)).estimate(effective_rank_of_eigenvalues)
    assert (found.error, found.bias, found.num_samples_needed) == (math.inf, math.inf, None)
    assert found.is_too_biased


def test_how_many_samples_it_takes() -> None:
    found = feature_spectrum(exact(torch.ones(40).double(), 100)).estimate(effective_rank_of_eigenvalues)
    assert found.is_too_biased
    needed = found.num_samples_needed
    assert needed == pytest.approx(100 * abs(found.bias / found.value) / 0.05, abs=1)
    assert needed is not None
    more = feature_spectrum(exact(torch.ones(40).double(), needed)).estimate(effective_rank_of_eigenvalues)
    assert abs(more.relative_bias) < 0.06
    enough = feature_spectrum(exact(torch.ones(40).double(), 2 * needed)).estimate(effective_rank_of_eigenvalues)
    assert not enough.is_too_biased
    assert enough.num_samples_needed == 2 * needed
