"""Diffusion spectral entropy: closed forms, an oracle, laws; and the stochastic path against its own error."""

from __future__ import annotations

import math
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.representations.diffusion_entropy import diffusion_entropy, drawn
from spectral_callbacks.metrics.representations.diffusion_kernel import kernel_width


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(N: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(N, dim, dtype=torch.float64, generator=generator(seed))


def bits(features: Tensor, **settings: Any) -> float:
    return diffusion_entropy(features, generator=generator(), **settings).value


def published(features: Tensor, sigma: float, t: float) -> float:
    """The algorithm of the official code, step by step, with dense diagonal matrices."""
    x = features.numpy()
    D = numpy.sqrt(((x[:, None] - x) ** 2).sum(2))
    G = numpy.exp(-(D**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))
    root = numpy.diag(1 / numpy.sqrt(G.sum(1)))
    p = numpy.abs(numpy.linalg.eigvalsh(root @ G @ root)) ** t
    p = p / p.sum() + numpy.finfo(float).eps
    return float(-(p * numpy.log2(p)).sum())


def heaps(k: int, size: int) -> Tensor:
    """Tight clusters, far from each other."""
    return 1e4 * torch.eye(k, dtype=torch.float64).repeat_interleave(size, 0) + 1e-4 * gaussian(k * size, k)


@pytest.mark.parametrize("t", [1, 2, 0.5, 3])
@pytest.mark.parametrize("sigma", [0.5, 2.0, 10.0])
def test_is_the_published_one(sigma: float, t: float) -> None:
    x = gaussian(80, 6)
    assert bits(x, sigma=sigma, t=t) == pytest.approx(published(x, sigma, t), abs=1e-12)


def test_alpha_zero_and_one_half_are_the_two_readings_of_the_paper() -> None:
    """Its code has 7.1139 bits here; the walk on the code's kernel, which its text describes, 7.1175."""
    x = torch.from_numpy(numpy.random.default_rng(0).normal(size=(300, 20)))
    assert bits(x, sigma=3.0) == pytest.approx(7.1139, abs=5e-5)
    assert bits(x, sigma=3.0, alpha=0.5) == pytest.approx(7.1175, abs=5e-5)


def test_two_points_have_their_closed_form() -> None:
    assert bits(torch.tensor([[0.0], [7.0]]), sigma="official") == pytest.approx(0.4958235839, abs=1e-10)


def test_points_that_coincide_have_none() -> None:
    assert bits(torch.full((50, 3), 0.7), sigma="official") == pytest.approx(0, abs=1e-9)


def test_points_far_apart_have_all() -> None:
    assert bits(1e3 * gaussian(64, 20), sigma="official") == pytest.approx(6, abs=1e-9)


@pytest.mark.parametrize("t", [1, 2, 7])
@pytest.mark.parametrize("k", [2, 4, 8])
def test_far_heaps_have_the_logarithm_of_their_number(k: int, t: float) -> None:
    assert bits(heaps(k, 10), sigma="official", t=t) == pytest.approx(math.log2(k), abs=1e-7)


def test_sizes_of_heaps_do_not_matter() -> None:
    x = heaps(2, 60)[30:]
    assert bits(x, sigma="official") == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize(("sigma", "expected"), [(10.0, 2.30), (16.0, 1.05), (1.0, 9.966)])
def test_of_the_unit_cube(sigma: float, expected: float) -> None:
    x = torch.rand(1000, 256, dtype=torch.float64, generator=generator())
    assert bits(x, sigma=sigma, eigenvalue_dtype=torch.float32) == pytest.approx(expected, abs=0.02)


def test_fixed_width_confounds_scale_and_geometry() -> None:
    """512 samples on the unit sphere: 0 to 9 bits by scale alone; by the median, the same at every scale."""
    x = torch.nn.functional.normalize(gaussian(512, 64), dim=1)
    assert bits(x, sigma="official") == pytest.approx(0.14, abs=0.01)
    assert bits(x, sigma=0.5) == pytest.approx(8.91, abs=0.01)
    at_one = bits(x)
    assert at_one == pytest.approx(3.81, abs=0.05)
    for scale in (1e-5, 0.1, 10.0, 3e7):
        assert bits(scale * x) == pytest.approx(at_one, abs=1e-10)


def test_turning_and_shifting_change_nothing() -> None:
    x = gaussian(100, 5)
    Q = torch.linalg.qr(gaussian(5, 5, seed=1)).Q
    assert bits(x @ Q + 100) == pytest.approx(bits(x), abs=1e-10)


def test_exact_is_without_error_and_counts_the_samples() -> None:
    x = gaussian(30, 4)
    found = diffusion_entropy(x, generator=generator())
    assert (found.error, found.num_samples) == (0.0, 30)
    assert found.value == bits(x, sigma=kernel_width(x))


@pytest.mark.parametrize("dim", [2, 5, 128])
def test_single_precision_knows_its_rounding(dim: int) -> None:
    x = gaussian(500, dim)
    found = diffusion_entropy(x, eigenvalue_dtype=torch.float32, generator=generator())
    assert abs(found.value - bits(x)) <= 2 * found.error + 1e-6
    assert found.error <= 1e-4


def test_same_seed_draws_the_same_samples() -> None:
    x = gaussian(200, 4)
    assert bits(x, max_samples=50) == bits(x[drawn(200, 50, generator())])
    assert bits(x, max_samples=50) != diffusion_entropy(x, max_samples=50, generator=generator(1)).value
    assert bits(x, max_samples=200) == bits(x)
    kept = drawn(200, 50, generator())
    assert len(kept.unique()) == 50
    assert kept.max() > 150  # of all


def estimates(features: Tensor, num_seeds: int, **settings: Any) -> list[Estimate]:
    return [
        diffusion_entropy(features, stochastic=True, generator=generator(seed), **settings) for seed in range(num_seeds)
    ]


CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "high dimension": (64, {}),
    "low dimension": (2, {}),
    "two steps": (16, {"sigma": 2.0, "t": 2}),
    "three and a half steps": (16, {"sigma": 2.0, "t": 3.5}),
    "anisotropic, single": (8, {"alpha": 1.0, "eigenvalue_dtype": torch.float32}),
}


@pytest.mark.parametrize(("dim", "settings"), CASES.values(), ids=CASES)
def test_stochastic_error_is_honest(dim: int, settings: dict[str, Any]) -> None:
    x = gaussian(300, dim)
    exact, found = bits(x, **settings), estimates(x, 12, **settings)
    z = torch.tensor([(one.value - exact) / one.error for one in found])
    assert z.square().mean().sqrt() < 1.6  # χ² of 12: 2.5 has a probability of 0.003
    assert z.std() > 0.4
    assert all(one.num_samples == 32 for one in found)


@pytest.mark.slow
@pytest.mark.parametrize("dim", [3, 128])
def test_stochastic_error_is_honest_for_many_samples(dim: int) -> None:
    x = gaussian(2000, dim)
    exact, found = bits(x), estimates(x, 30, eigenvalue_dtype=torch.float32)
    z = torch.tensor([(one.value - exact) / one.error for one in found])
    assert abs(z.mean()) < 1
    assert 0.6 < z.std() < 1.4
    assert max(one.error for one in found) < 0.02


def test_moments_as_control_variates_save_most_of_the_error() -> None:
    """Plain quadrature of f from 32 random vectors has the error √(2 Σ f²/32)/S."""
    x = gaussian(400, 64)
    found = estimates(x, 1)[0]
    K = torch.exp(-torch.cdist(x, x).square() / (2 * kernel_width(x) ** 2))
    root = K.sum(1).sqrt()
    eigenvalues = torch.linalg.eigvalsh(K / root / root[:, None]).clamp(min=1e-300)
    plain = math.sqrt(2 / 32 * (eigenvalues * eigenvalues.log2()).square().sum()) / eigenvalues.sum().item()
    assert found.error < plain / 8


@pytest.mark.parametrize("N", [2, 3, 10])
def test_stochastic_is_exact_where_steps_suffice(N: int) -> None:
    x = gaussian(N, 3)
    found = estimates(x, 3)[2]
    assert abs(found.value - bits(x)) < 5 * found.error + 1e-9
    assert math.isfinite(found.error)


def test_stochastic_survives_runs_that_close() -> None:
    """Heaps have as many eigenvalues as there are heaps: a run ends after a few steps."""
    found = estimates(heaps(4, 50), 1, sigma="official")[0]
    assert found.value == pytest.approx(2, abs=max(4 * found.error, 1e-3))
    assert estimates(torch.ones(100, 2), 1, sigma=1.0)[0].value == pytest.approx(0, abs=1e-6)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no time": ({"t": 0}, "t=0"),
    "NaN time": ({"t": math.nan}, "t=nan"),
    "precision": ({"eigenvalue_dtype": torch.float16}, "eigenvalue_dtype=torch.float16"),
    "one sample left": ({"max_samples": 1}, "max_samples=1"),
    "stochastic half step": ({"t": 0.5, "stochastic": True}, "t=0.5 below 1 lifts the smallest eigenvalues"),
}


@pytest.mark.parametrize(("settings", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bits(gaussian(5, 2), **settings)


@pytest.mark.parametrize("stochastic", [False, True])
def test_features_without_distances_are_refused(stochastic: bool) -> None:
    for features in (torch.full((7, 3), 0.1), torch.ones(1, 3), torch.full((4, 2), math.nan)):
        with pytest.raises(ValueError, match="features"):
            bits(features, stochastic=stochastic)
