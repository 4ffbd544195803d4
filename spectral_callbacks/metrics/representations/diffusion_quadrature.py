"""Diffusion spectral entropy without eigenvalues: Lanczos quadrature, with exact moments as control variates."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.linalg.quadrature import tridiagonal

_NUM_PROBES = 32  # p
_NUM_STEPS = 20  # m
_CLOSED = 50.0  # rounding errors of ‖K‖ = 1: a coupling below is none
_TINY = torch.finfo(torch.float32).tiny


def quadrature_entropy(
    kernel: Tensor,  # (N, N), float32 or float64
    degrees: Tensor,  # (N,)
    *,
    t: float = 1,
    generator: torch.Generator,
) -> Estimate:
    """Estimate log2 S + 1/S Σ f(λ), f = -|λ|ᵗ log2 |λ|ᵗ, S = Σ |λ|ᵗ, over the eigenvalues of K: its entropy in bits.

    Random vectors see each eigenvalue with a random weight (stochastic Lanczos quadrature), and the noise of a sum is
    that of the function's variation over the spectrum. So f is split into the quadratic that fits it best on the Ritz
    values, whose sum c0 N + c1 tr K + c2 ‖K‖² is known exactly, and a small rest, which alone is estimated. S is split
    likewise, so that it is exact for t = 1 and t = 2, and estimated for other t; the ratio is linearized for the error.
    The eigenvalue 1 and its eigenvector √Deg are known and left out of the random vectors.

    The error is √(2 Σ r² / p) of the rest r, for p Gaussian vectors, from the quadrature's own Σ r², so that it is
    sharp for few of them; and beside it what so few moments leave open, a bias. That is taken to fall as m⁻⁴, and to be
    half the difference to the quadrature of three quarters of the steps: (4/3)⁴ - 1 = 2.2. Costs 640 products, all p
    vectors at a time, and room for p m of them.

    Args:
        kernel: K, symmetric, as `diffusion_kernel` returns it.
        degrees: Deg, row sums of the similarities.
        t: Steps of the walk.
        generator: Source of the random vectors, on the CPU.

    Returns:
        The bits, with p = 32 samples.
    """
    N = len(kernel)
    stationary = (degrees / degrees.sum()).sqrt().to(kernel)
    diagonals, couplings = _lanczos_runs(kernel, stationary, _NUM_PROBES, min(_NUM_STEPS, N - 1), generator)
    squares = torch.linalg.vector_norm(kernel, dim=1, dtype=torch.float64).square().sum().item()
    moments = torch.tensor([N - 1, kernel.diagonal().sum(dtype=torch.float64).item() - 1, squares - 1]).double()
    bits, variance = _entropy(diagonals, couplings, moments, t)
    fewer = max(3 * diagonals.shape[1] // 4, 1)
    coarse, _ = _entropy(diagonals[:, :fewer], couplings[:, : fewer - 1], moments, t)
    return Estimate(bits, math.hypot(math.sqrt(variance / _NUM_PROBES), (coarse - bits) / 2), _NUM_PROBES)


def _entropy(diagonals: Tensor, couplings: Tensor, moments: Tensor, t: float) -> tuple[float, float]:
    """Return the bits and the variance that one Gaussian vector has."""
    nodes, vectors = torch.linalg.eigh(tridiagonal(diagonals, couplings))
    nodes, weights = nodes.flatten(), (vectors[:, 0].square() / len(diagonals)).flatten()
    powers = nodes.abs() ** t
    functions = torch.stack([powers, -torch.xlogy(powers, powers) / math.log(2)], dim=1)
    variates = nodes[:, None] ** torch.arange(3)
    roots = weights.sqrt()[:, None]
    coefficients = torch.linalg.lstsq(roots * variates, roots * functions, driver="gelsd").solution
    rest = functions - variates @ coefficients
    count = moments[0]
    total, entropy = (moments @ coefficients + count * (weights @ rest)).tolist()
    total += 1  # of the eigenvalue 1, whose entropy is 0
    # d(log2 S + F/S) = (1/(S ln 2) - F/S²) dS + dF/S
    influence = rest @ torch.tensor([1 / (total * math.log(2)) - entropy / total**2, 1 / total]).double()
    mean, square = (weights @ influence).item(), (weights @ influence.square()).item()
    variance = 2 * count.item() ** 2 * max(square - mean**2, 0.0) / (count.item() + 2)
    return math.log2(total) + entropy / total, variance


def _lanczos_runs(
    kernel: Tensor, stationary: Tensor, num_probes: int, num_steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:  # (p, m), (p, m - 1), float64
    """Run Lanczos from p random vectors orthogonal to the stationary one, all p products at a time."""
    N, p, m = len(kernel), num_probes, num_steps
    basis = torch.zeros(p, m + 2, N, dtype=kernel.dtype)  # each run's vectors, after the stationary one
    basis[:, 0] = stationary
    diagonals, couplings = torch.zeros(2, p, m, dtype=torch.float64)
    closed = _CLOSED * torch.finfo(kernel.dtype).eps
    new = torch.randn(p, N, dtype=kernel.dtype, generator=generator)
    for step in range(m + 1):
        known = basis[:, : step + 1]
        for _ in range(2):
            coefficients = torch.bmm(known, new[:, :, None])
            new -= torch.bmm(known.mT, coefficients)[:, :, 0]
            if step:
                diagonals[:, step - 1] += coefficients[:, step, 0]
        sizes = torch.linalg.vector_norm(new, dim=1)
        goes_on = sizes > closed
        if step:
            couplings[:, step - 1] = torch.where(goes_on, sizes, 0)
        basis[:, step + 1] = torch.where(goes_on[:, None], new / sizes.clamp_min(_TINY)[:, None], 0)
        new = basis[:, step + 1] @ kernel if step < m else new
    return diagonals, couplings[:, :-1]
