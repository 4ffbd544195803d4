"""The diffusion kernel against slow definitions of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.metrics.representations.diffusion_kernel import Sigma, diffusion_kernel, kernel_width


def gaussian(N: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(N, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def differences(features: Tensor) -> Tensor:
    x = features.double()
    return (x[:, None] - x).square().sum(2).sqrt()


def random_walk(features: Tensor, sigma: float, alpha: float) -> Tensor:
    """The walk itself, not symmetric, from dense diagonal matrices."""
    G = torch.exp(-(differences(features) ** 2) / (2 * sigma**2))
    density = torch.diag(G.sum(1) ** -alpha)
    G = density @ G @ density
    return torch.diag(1 / G.sum(1)) @ G


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_has_the_eigenvalues_of_the_random_walk(alpha: float) -> None:
    x = gaussian(60, 3)
    K = diffusion_kernel(x, sigma=1.5, alpha=alpha)
    walk = torch.linalg.eigvals(random_walk(x, 1.5, alpha))
    torch.testing.assert_close(K, K.mT, rtol=1e-14, atol=0)
    torch.testing.assert_close(torch.linalg.eigvalsh(K), walk.real.sort().values, rtol=0, atol=1e-12)


def test_alpha_of_one_half_normalizes_the_kernel_of_zero_once_more() -> None:
    x = gaussian(60, 3)
    K = diffusion_kernel(x, sigma=1.5)
    again = torch.linalg.eigvals(K / K.sum(1, keepdim=True)).real.sort().values
    half = torch.linalg.eigvalsh(diffusion_kernel(x, sigma=1.5, alpha=0.5))
    torch.testing.assert_close(half, again, rtol=0, atol=1e-12)


@pytest.mark.parametrize("N", [2, 3, 6, 9])  # 1, 3, 15, 36 pairs: odd and even
def test_median_is_that_of_the_pairs(N: int) -> None:
    x = gaussian(N, 4)
    pairs = sorted(math.dist(x[i].tolist(), x[j].tolist()) for i in range(N) for j in range(i))
    expected = (pairs[(len(pairs) - 1) // 2] + pairs[len(pairs) // 2]) / 2
    assert kernel_width(x) == pytest.approx(expected, rel=1e-14)


def test_more_rows_than_a_block_are_no_different() -> None:
    x = gaussian(1100, 2)  # of 512 rows
    K = diffusion_kernel(x, sigma=1.0)
    G = torch.exp(-torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").square() / 2)
    root = G.sum(1).sqrt()
    torch.testing.assert_close(K, G / root / root[:, None], rtol=1e-12, atol=0)


def test_widths_have_names() -> None:
    x = gaussian(5, 9)
    assert kernel_width(x, "sqrt_dim") == 3.0
    assert kernel_width(x, "official") == 10.0
    assert kernel_width(x, 0.3) == 0.3
    assert kernel_width(3 * x) == pytest.approx(3 * kernel_width(x), rel=1e-14)


def test_offset_of_float32_features_costs_no_digits() -> None:
    x = (gaussian(50, 8) + 1e4).float()
    K = diffusion_kernel(x, sigma=1.0)
    G = torch.exp(-(differences(x) ** 2) / 2)
    root = G.sum(1).sqrt()
    torch.testing.assert_close(K, G / root / root[:, None], rtol=1e-11, atol=0)


def test_neighbors_far_nearer_than_the_rest_keep_their_distance() -> None:
    """Two heaps, a billion of their widths apart; most pairs are in the larger one."""
    x = torch.cat([gaussian(10, 2), gaussian(30, 2, seed=1) + 1e9])
    pairs = differences(x)[*torch.triu_indices(40, 40, 1)]
    assert kernel_width(x) == pytest.approx(pairs.quantile(0.5).item(), rel=1e-6)  # x holds 1e-7
    K = diffusion_kernel(x)
    G = torch.exp(-(differences(x) ** 2) / (2 * kernel_width(x) ** 2))
    root = G.sum(1).sqrt()
    torch.testing.assert_close(K, G / root / root[:, None], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_takes_any_real_features_and_leaves_them_alone(dtype: torch.dtype) -> None:
    x = (3 * gaussian(20, 4)).to(dtype)
    before = x.clone()
    torch.testing.assert_close(diffusion_kernel(x), diffusion_kernel(x.double()), rtol=0, atol=0)
    assert torch.equal(x, before)


BAD: dict[str, tuple[Tensor, Sigma, float, str]] = {
    "one sample": (torch.ones(1, 3), "median", 0.0, "n=1 samples; at least 2"),
    "no features": (torch.ones(3, 0), "median", 0.0, r"shape \(3, 0\)"),
    "three dimensions": (torch.ones(3, 2, 2), "median", 0.0, "shape"),
    "complex": (torch.ones(3, 2, dtype=torch.complex64), "median", 0.0, "complex64"),
    "integers": (torch.ones(3, 2).long(), "median", 0.0, "int64"),
    "NaN": (torch.tensor([[0.0], [math.nan]]), 1.0, 0.0, "not finite"),
    "too large": (torch.tensor([[1e200], [-1e200]], dtype=torch.float64), 1.0, 0.0, "cannot hold"),
    "constant": (torch.full((7, 3), 0.1), "median", 0.0, "coincide"),
    "most coincide": (torch.tensor([[0.1]] * 8 + [[0.7]]), "median", 0.0, "coincide"),
    "no width": (torch.eye(3), 0.0, 0.0, "sigma=0.0"),
    "NaN width": (torch.eye(3), math.nan, 0.0, "sigma=nan"),
    "unknown width": (torch.eye(3), "mean", 0.0, "'mean'"),  # pyright: ignore[reportAssignmentType]
    "negative alpha": (torch.eye(3), 1.0, -0.5, "alpha=-0.5"),
    "large alpha": (torch.eye(3), 1.0, 1.5, "alpha=1.5"),
}


@pytest.mark.parametrize(("features", "sigma", "alpha", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused(features: Tensor, sigma: Sigma, alpha: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diffusion_kernel(features, sigma=sigma, alpha=alpha)


def test_constant_features_have_no_median() -> None:
    with pytest.raises(ValueError, match="coincide"):
        kernel_width(torch.full((7, 3), 0.1) + 1e3)
