"""Diffusion spectral entropy: how many regions a random walk between the features tells apart, in bits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.representations.diffusion_kernel import (
    Sigma,
    distances,
    kernel_of,
)
from spectral_callbacks.metrics.representations.diffusion_quadrature import quadrature_entropy
from spectral_callbacks.metrics.representations.feature_matrix import checked_features

_STOCHASTIC_FROM = 10_000  # samples


def diffusion_entropy(
    features: Tensor,  # (N, d)
    *,
    sigma: Sigma = "median",
    t: float = 1,
    alpha: float = 0.0,
    max_samples: int = 10_000,
    stochastic: bool | None = None,
    eigenvalue_dtype: torch.dtype = torch.float64,
    generator: torch.Generator,
) -> Estimate:
    """Return the diffusion spectral entropy -Σ p_i log2 p_i, p_i = |λ_i|ᵗ/Σ |λ|ᵗ, λ of `diffusion_kernel`, in bits.

    How to read it: 2 to this power is about the number of clusters, or of cells of a continuum, that a walk of t steps
    tells apart at the resolution σ. It is 0 where all samples coincide, log2 k for k tight clusters far from each other
    whatever their sizes, at most log2 N, and the same for features turned, shifted, and, with sigma="median", rescaled.
    It grows with N: compare at equal N only. At a fixed σ it is reported to rise in training; part of that is growth of
    the features, see `kernel_width`.

    The exact entropy is that of these very samples, so its error is 0, but for rounding: what other samples of the same
    distribution would give is not in it. In float32 only the eigenvalues are, distances and kernel are float64. The
    error is then twice what the eigenvalues below 0 add, which K does not have: the same rounding is in the others. It
    is up to 1e-4 where most eigenvalues are below float32's resolution, and the rest of the rounding is below 1e-6.

    Costs N³ operations; at N = 2,000 half a second in float64, 2/3 of that in float32 (one thread).

    The stochastic one costs 640 products of K, a tenth of the exact one at N = 10,000, and its error is the standard
    error over the random vectors, see `quadrature_entropy`.

    Args:
        features: One row a sample.
        sigma: Width of the kernel, see `kernel_width`; of the samples that are left by max_samples.
        t: Steps of the walk, positive; more steps forget small structures. A rule of thumb of the authors: 1 % of λᵗ
            should exceed 0.01.
        alpha: Exponent of the density, see `diffusion_kernel`.
        max_samples: Of more, so many are drawn; the same ones from a generator with the same seed.
        stochastic: Whether to draw vectors instead of computing all eigenvalues, for t of at least 1; None does from
            10,000 samples on.
        eigenvalue_dtype: Of the eigenvalues, or of the products with K: float64 or float32.
        generator: Source of the draw of samples, and of random vectors, on the CPU.

    Raises:
        ValueError: If an argument is out of its range, or the features have no distances, see `kernel_width`.

    References:
        Liao, Liu, Christensen, Tong, Huguet, Wolf, Nickel, Adelstein, Krishnaswamy, Assessing neural network
        representations during training using noise-resilient diffusion spectral entropy (2024, arXiv:2312.04823).

    Example:
        >>> far = 1e3 * torch.eye(8).repeat_interleave(4, 0)  # 8 clusters
        >>> round(diffusion_entropy(far, sigma="official", generator=torch.Generator()).value, 6)
        3.0
    """
    check_walk(t, eigenvalue_dtype)
    is_long = min(len(features), max_samples) >= _STOCHASTIC_FROM
    if (is_long if stochastic is None else stochastic) and t < 1:
        raise ValueError(
            f"t={t} below 1 lifts the smallest eigenvalues, which random vectors do not resolve; pass "
            "stochastic=False, with max_samples=5000 for its cost, or t of at least 1."
        )
    features = features[drawn(len(features), max_samples, generator)] if len(features) > max_samples else features
    squared, width = distances(checked_features(features, fewest=2), sigma)
    if is_long if stochastic is None else stochastic:
        kernel, degrees = kernel_of(squared, width, alpha)
        return quadrature_entropy(kernel.to(eigenvalue_dtype), degrees, t=t, generator=generator)
    return kernel_entropy(squared, width, t=t, alpha=alpha, dtype=eigenvalue_dtype)


def kernel_entropy(
    squared: Tensor,  # (N, N), overwritten
    sigma: float,
    *,
    t: float,
    alpha: float,
    dtype: torch.dtype,
) -> Estimate:
    """Return the exact entropy of samples with these squared distances."""
    kernel, degrees = kernel_of(squared, sigma, alpha)
    eigenvalues = torch.linalg.eigvalsh(kernel) if dtype == torch.float64 else _single_eigenvalues(kernel, degrees)
    powers = eigenvalues.abs() ** t
    # The official code adds the machine epsilon to every share after dividing, and so do we.
    shares = powers / powers.sum() + torch.finfo(torch.float64).eps
    terms = -shares * shares.log2()
    # K has no eigenvalue below 0: those are rounding, and as much of it is in the others.
    error = 2 * terms[eigenvalues < 0].sum().item() if dtype == torch.float32 else 0.0
    return Estimate(terms.sum().item(), error, len(squared))


def _single_eigenvalues(
    kernel: Tensor,  # (N, N), overwritten
    degrees: Tensor,  # (N,)
) -> Tensor:  # (N,), float64
    """Return the eigenvalues as float32 finds them where the 1, which rounding is relative to, is taken out before."""
    stationary = (degrees / degrees.sum()).sqrt()
    eigenvalues = torch.linalg.eigvalsh(kernel.addr_(stationary, stationary, alpha=-1).float()).double()
    eigenvalues[eigenvalues.abs().argmin()] = 1
    return eigenvalues


def drawn(num_samples: int, max_samples: int, generator: torch.Generator) -> Tensor:  # (max_samples,), ascending
    """Return the indices of samples drawn without replacement."""
    if max_samples < 2:
        raise ValueError(f"max_samples={max_samples} must be at least 2; 10000 is the official number.")
    return torch.randperm(num_samples, generator=generator)[:max_samples].sort().values


def check_walk(t: float, dtype: torch.dtype) -> None:
    """Raise unless a walk has some time, and a dtype to be computed in."""
    if not 0 < t < math.inf:
        raise ValueError(f"t={t} must be positive; 1 is the official number of steps.")
    if dtype not in (torch.float64, torch.float32):
        raise ValueError(f"eigenvalue_dtype={dtype} must be torch.float64 or torch.float32.")
