"""An operator that is watched for the symmetry that those who use it take for granted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_callbacks.linalg.operator import LinearOperator
from spectral_callbacks.linalg.result import MAX_ASYMMETRY, Status


class Watched(LinearOperator):
    """Another operator, and whether its products are those of a symmetric matrix.

    Of each block X it is given, XᵀA X is compared with its transpose: for random columns the defect is ‖A - Aᵀ‖ / ‖A‖
    in the Frobenius norm, on average. This takes inner products and no product with A.

    Args:
        A: Square.

    Attributes:
        status: `BREAKDOWN` where the matrix is not symmetric, beyond any rounding; `NONFINITE` where a product is not
            finite.

    Example:
        >>> import torch
        >>> from spectral_callbacks.linalg import Matrix
        >>> A = Watched(Matrix(torch.tensor([[1.0, 1.0], [0.0, 1.0]])))
        >>> _ = A.to_dense()
        >>> A.status.name
        'BREAKDOWN'
    """

    def __init__(self, A: LinearOperator) -> None:
        self._A = A
        self.shape = A.shape
        self.dtype = A.dtype
        self.device = A.device
        self.status = Status.CONVERGED

    def matmat(self, X: Tensor) -> Tensor:
        """Return the products of the operator that is watched."""
        Y = self._A.matmat(X)
        cross, square = (self.gram(Z, Y).to("cpu", torch.float64) for Z in (X, Y))
        size = square.diagonal().sum().sqrt() * math.sqrt(max(X.shape[1] - 1, 1))
        defect = (cross - cross.mT).norm()
        if not (size + defect).isfinite():
            self.status = max(self.status, Status.NONFINITE)
        elif defect > MAX_ASYMMETRY * size:
            self.status = max(self.status, Status.BREAKDOWN)
        return Y

    def gram(self, X: Tensor, Y: Tensor) -> Tensor:
        """Return the inner products as the operator takes them."""
        return self._A.gram(X, Y)
