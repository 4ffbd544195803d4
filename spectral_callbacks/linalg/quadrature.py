"""Gauss quadratures as tridiagonal matrices, and what their moments say about a distribution."""

from __future__ import annotations

import torch
from torch import Tensor

_STEEPEST = 1e6  # last entry of an extended matrix, in units of its norm; moves its node by 1e-6 of a residual


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
) -> tuple[Tensor, Tensor]:  # (p, g), (p, g)
    """Return the least mass below each point that the moments of a Lanczos run allow, and how much more it may be.

    The quadrature with these moments and a node at x is a tridiagonal matrix with one more row, whose last entry
    x + β² (T - x)⁻¹ₘₘ makes x an eigenvalue. The mass below x lies between the weight of the nodes below x and that
    with the node at x, and no other bounds are sharper (Chebyshev, Markov, Stieltjes). A closed run is exact.

    Args:
        diagonals: Of p tridiagonal matrices.
        couplings: Beside the diagonal; the last one leads out of the Krylov basis, and is 0 where that is closed.
        points: x.
        rounding: Distance within which a node is at a point.

    Example:
        >>> import torch
        >>> mean, deviation = torch.zeros(1, 1).double(), torch.ones(1, 1).double()
        >>> low, more = mass_bounds(mean, deviation, torch.tensor([-2.0]).double(), rounding=1e-12)
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
    below = distances < -reach
    there = (distances.abs() <= reach) & is_open[:, :, None]
    return (weights * below).sum(2), (weights * there).sum(2)
