"""Gauss quadratures as tridiagonal matrices, and what their moments say about a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_callbacks.linalg.krylov import Krylov
from spectral_callbacks.linalg.operator import LinearOperator
from spectral_callbacks.linalg.subspace import Complement, gaussian

_ROUNDING = 50.0  # rounding errors of ‖A‖ within which two numbers are one
_STEEPEST = 1e6  # last entry of an extended matrix, in units of its norm; moves its node by 1e-6 of a residual


def check_quadrature(num_steps: int, num_probes: int) -> None:
    """Raise unless there is a step and a probe.

    Raises:
        ValueError: Naming the number.
    """
    for name, number in (("num_steps", num_steps), ("num_probes", num_probes)):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1; 30 steps from 3 probes are a good start.")


def rounding_of(A: LinearOperator) -> float:
    """Return the distance within which two numbers are one, in units of ‖A‖."""
    return _ROUNDING * torch.finfo(A.dtype).eps


def lanczos(
    A: Complement,  # (n, n)
    num_steps: int,
    generator: torch.Generator,
    *,
    size: float,
) -> tuple[Krylov, Tensor, Tensor]:  # (num_steps,), (num_steps,), float64
    """Run Lanczos from a random vector; return the basis, and the tridiagonal matrix as `mass_bounds` takes it.

    A run that closes early ends there: what follows is zero.

    Args:
        A: Symmetric.
        num_steps: Products at most.
        generator: Source of the vector.
        size: Of ‖A‖, as far as it is known: a coupling within rounding of it is none.
    """
    krylov = Krylov(A)
    krylov.add(A.project(gaussian(A, 1, generator))[:, 0])
    while krylov.finite and krylov.num_directions and krylov.num_matvecs < num_steps:
        krylov.expand()
        if krylov.finite and not _coupling(krylov, rounding_of(A) * max(size, krylov.norm)):
            break
    diagonal, beside = torch.zeros(2, max(num_steps, 1), dtype=torch.float64)
    T, steps = krylov.projection, krylov.dimension
    diagonal[:steps] = T.diagonal()
    if steps:
        beside[: steps - 1] = T.diagonal(1)
        beside[steps - 1] = _coupling(krylov, rounding_of(A) * max(size, krylov.norm))
    return krylov, diagonal, beside


def tridiagonal(
    diagonal: Tensor,  # (..., m)
    beside: Tensor,  # (..., m - 1)
) -> Tensor:  # (..., m, m)
    """Return the symmetric tridiagonal matrices with these entries."""
    return torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)


def mass_bounds(
    diagonals: Tensor,  # (p, m), float64
    couplings: Tensor,  # (p, m), float64
    points: Tensor,  # (g,), float64
    *,
    rounding: float,
) -> tuple[Tensor, Tensor, Tensor]:  # each (p, g)
    """Return the least mass below each point that the moments of a Lanczos run allow, how much more, and what is there.

    The quadrature with these moments and a node at x is a tridiagonal matrix with one more row, whose last entry
    x + β² (T - x)⁻¹ₘₘ makes x an eigenvalue. The mass below x lies between the weight of the nodes below x and that
    with the node at x, and no other bounds are sharper (Chebyshev, Markov, Stieltjes). The nodes of a closed run are
    exact but for rounding: the mass within rounding of x, which may be on either side, is the third number.

    Args:
        diagonals: Of p tridiagonal matrices.
        couplings: Beside the diagonal; the last one leads out of the Krylov basis, and is 0 where that is closed.
        points: x.
        rounding: Distance within which a node is at a point.

    Example:
        >>> import torch
        >>> mean, deviation = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
        >>> low, more, _ = mass_bounds(mean, deviation, torch.tensor([-2.0]).double(), rounding=1e-12)
        >>> round(low.item(), 4), round(more.item(), 4)  # Cantelli's inequality: 1 / (1 + 2²)
        (0.0, 0.2)
    """
    values, S = torch.linalg.eigh(tridiagonal(diagonals, couplings[:, :-1]))
    gaps = values[:, None] - points[:, None]  # (p, g, m)
    gaps = torch.where(gaps == 0, torch.finfo(torch.float64).tiny, gaps)
    steepest = _STEEPEST * max(values.abs().max().item(), couplings.max().item())
    last = ((couplings[:, -1:] * S[:, -1]).square()[:, None] / gaps).sum(2).clamp(-steepest, steepest) + points
    shape = (-1, len(points), -1)
    extended = tridiagonal(
        torch.cat([diagonals[:, None].expand(*shape), last[:, :, None]], dim=2), couplings[:, None].expand(*shape)
    )
    nodes, Y = torch.linalg.eigh(extended)
    weights, distances = Y[:, :, 0].square(), nodes - points[:, None]
    is_open = couplings[:, -1:] > 0
    reach = (distances.abs().amin(dim=2) * is_open).clamp_min(rounding)[:, :, None]
    below, there = (weights * mask for mask in (distances < -reach, distances.abs() <= reach))
    return below.sum(2), there.sum(2) * is_open, there.sum(2) * ~is_open


def _coupling(krylov: Krylov, rounding: float) -> float:
    """Return how the last vector is coupled to the rest of the space: 0 within rounding of the products."""
    if not krylov.num_directions:
        return 0.0
    coupling = krylov.coupling(torch.eye(krylov.dimension, dtype=torch.float64)[-1]).abs().item()
    return coupling if coupling > rounding else 0.0
