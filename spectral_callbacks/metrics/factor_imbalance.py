"""A matrix W = F Gᵀ that is trained through its factors: how unequal they are, and what that does to the rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate


def imbalance(
    F: Tensor,  # (m, k)
    G: Tensor,  # (n, k)
) -> Tensor:  # (k, k)
    """Return Δ = FᵀF - GᵀG, the imbalance of two factors, in float64.

    Gradient flow on any loss of F Gᵀ conserves it, and gradient descent does up to the square of the learning rate. In
    over-parameterised matrix sensing it sets the rate: balanced factors, Δ = 0, converge like 1/t² only, and the rate
    grows linear with an imbalance of full rank (Xiong et al. 2024, arXiv:2310.01769). It is in units of the weights
    squared. Cost: (m + n) k² multiplications.

    Raises:
        ValueError: If these are no factors of one matrix.

    Example:
        >>> imbalance(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
        tensor([[3.]], dtype=torch.float64)
    """
    F, G = _factors(F, G)
    return F.T @ F - G.T @ G


def product_singular_values(
    F: Tensor,  # (m, k)
    G: Tensor,  # (n, k)
) -> Tensor:  # (k,)
    """Return the singular values of F Gᵀ in descending order, in float64.

    The product is never formed: with F = Q R and G = P S they are those of R Sᵀ, which is k × k. Cost: about 2 (m + n)
    k² multiplications and a decomposition of size k.

    Raises:
        ValueError: If these are no factors of one matrix.

    Example:
        >>> product_singular_values(torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0]]))
        tensor([10.], dtype=torch.float64)
    """
    F, G = _factors(F, G)
    left, right = (torch.linalg.qr(factor, mode="r").R for factor in (F, G))
    return torch.linalg.svdvals(left @ right.T)


def excess_energy(
    values: Tensor,  # (k,), descending
    rank: int,
) -> float:
    """Return Σ s_i² over i > rank: the part of a product that a target of this rank does not need.

    Where the loss is ‖F Gᵀ - M‖² and M has this rank, it is what is left of the loss once M is fitted.

    Args:
        values: Singular values of the product.
        rank: Of what is to be learned.

    Raises:
        ValueError: If the rank is negative.

    Example:
        >>> excess_energy(torch.tensor([2.0, 0.5, 0.5]), rank=1)
        0.5
    """
    if rank < 0:
        raise ValueError(f"rank={rank!r} must be 0 or more.")
    return values[rank:].double().square().sum().item()


def apparent_rank(
    values: Tensor,  # (k,), descending
) -> int:
    """Return where a list of singular values falls most: the r with the largest s_r / s_{r+1}, at least 1.

    Values that rounding leaves of zero count as equal. One value, or none of them larger than another, has rank k.

    Example:
        >>> apparent_rank(torch.tensor([1.0, 0.9, 1e-3, 5e-4]))
        2
    """
    if len(values) < 2 or not values[0] > 0:
        return len(values)
    floor = values[0] * len(values) * torch.finfo(values.dtype).eps
    drops = values.clamp_min(floor).log().diff()
    return int(drops.argmin().item()) + 1 if drops.min() < 0 else len(values)


def rate_exponent(steps: Sequence[float], values: Sequence[float]) -> Estimate:
    """Return the slope of log value against log step, by least squares, with its standard error.

    A loss that falls like 1/tᵖ has the exponent -p: -2 is the curse of over-parameterised factors that are balanced, -1
    that of plain convex problems. Exponential convergence has none, and its slope falls on and on.

    Args:
        steps: Numbers of steps, all positive.
        values: Losses at these steps, all positive.

    Returns:
        The slope; its error is that of independent deviations from a straight line, and infinite with two points.

    Raises:
        ValueError: If there are fewer than two different steps, or a number is not positive.

    Example:
        >>> round(rate_exponent([10, 100, 1000], [1e-3, 1e-5, 1e-7]).value, 6)
        -2.0
    """
    if len(set(steps)) < 2 or len(steps) != len(values):
        raise ValueError(
            f"{len(steps)} steps and {len(values)} values: give at least two different steps, each a value."
        )
    if not all(0 < number < math.inf for number in (*steps, *values)):
        raise ValueError("steps and values must be positive and finite: a slope of logarithms is asked for.")
    x, y = (torch.tensor(numbers, dtype=torch.float64).log() for numbers in (steps, values))
    x, y = x - x.mean(), y - y.mean()
    spread = (x @ x).item()
    slope = (x @ y).item() / spread
    if len(steps) == 2:
        return Estimate(slope, math.inf, 2)
    deviation = y - slope * x
    return Estimate(slope, math.sqrt((deviation @ deviation).item() / (len(steps) - 2) / spread), len(steps))


def check_factors(F: Tensor, G: Tensor) -> None:
    """Raise unless F Gᵀ is a product.

    Raises:
        ValueError: Naming both shapes.
    """
    if F.ndim != 2 or G.ndim != 2 or F.shape[1] != G.shape[1]:
        raise ValueError(f"F {tuple(F.shape)} and G {tuple(G.shape)} are no factors of F Gᵀ: pass (m, k) and (n, k).")


def _factors(F: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    check_factors(F, G)
    return F.detach().double(), G.detach().double()
