"""Conditioning: how long gradient descent takes along the slowest directions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def condition_number(
    matrix: Tensor,  # (n, p), or its singular values (r,)
    *,
    cutoff: float,
) -> float:
    """Return the largest singular value over the smallest one that is not zero.

    Zero is what lies at or below `cutoff` times the largest. The number says how slow gradient descent is: the
    least-squares problem of a feature matrix Z has the Hessian ZᵀZ of condition number κ(Z)², and takes about κ² steps.
    It peaks where the number of features passes the number of samples, the place of double descent (Liu and Flanigan
    2023, arXiv:2312.03951). A random Gaussian (n, p) matrix has κ = (√n + √p) / |√n - √p|.

    Args:
        matrix: Real; one dimension is taken for singular values, or for eigenvalues, where negative ones count as zero.
        cutoff: Relative to the largest. For the rank of a matrix of rounded numbers, max(n, p) times their epsilon.

    Returns:
        At least 1; NaN where nothing is above zero.

    Raises:
        ValueError: If `cutoff` is out of range, or the matrix has other than one or two dimensions.

    Example:
        >>> condition_number(torch.diag(torch.tensor([4.0, 2.0, 1e-9])), cutoff=1e-6)
        2.0
    """
    if not 0 <= cutoff < 1:
        raise ValueError(f"cutoff={cutoff!r} must lie between 0 and 1, for example 1e-3.")
    if matrix.ndim not in (1, 2):
        raise ValueError(f"matrix has shape {tuple(matrix.shape)}; pass (n, p), or singular values (r,).")
    values = torch.linalg.svdvals(matrix) if matrix.ndim == 2 else matrix
    if not len(values) or not values.max() > 0:
        return math.nan
    kept = values[(values > cutoff * values.max()) & (values > 0)]
    return (kept.max() / kept.min()).item()


def unfitted_modes(
    eigenvalues: Tensor,  # (r,)
    learning_rate: float,
    num_steps: int,
) -> float:
    """Return the share of modes that gradient descent from scratch has not fitted.

    On a quadratic with Hessian eigenvalue λ the error along its mode shrinks as (1 - η λ)^T. A mode with |1 - η λ|^T >
    1/e is not fitted: too slow, or unstable. The slow modes are those that noise blows up, so while many are unfitted
    the test error shows no double descent.

    Args:
        eigenvalues: Of the Hessian, without those that are zero: they are no modes of the data.
        learning_rate: η of plain gradient descent.
        num_steps: T.

    Returns:
        Between 0 and 1; NaN without a mode.

    Raises:
        ValueError: If `num_steps` or `learning_rate` is negative.

    Example:
        >>> unfitted_modes(torch.tensor([1.0, 0.1, 0.01, 0.001]), learning_rate=0.5, num_steps=100)
        0.5
    """
    if num_steps < 0 or learning_rate < 0:
        raise ValueError(f"num_steps={num_steps} and learning_rate={learning_rate} must not be negative.")
    if not len(eigenvalues):
        return math.nan
    remaining = (1 - learning_rate * eigenvalues.double()).abs() ** num_steps
    return (remaining > 1 / math.e).double().mean().item()
