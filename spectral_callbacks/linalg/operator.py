"""Linear operators: maps known by their products with blocks of vectors."""

from __future__ import annotations

import abc

import torch
from torch import Tensor


class LinearOperator(abc.ABC):
    """A linear map of shape (m, n), known by its products with blocks of vectors.

    Vectors are flat and real. Every algorithm of this package takes its inner products from `gram` and from nowhere
    else, so an operator whose vectors are spread over several processes overrides that one method.

    Attributes:
        shape: (m, n).
        dtype: Element type of the vectors.
        device: Where the vectors live.
    """

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device

    @abc.abstractmethod
    def matmat(
        self,
        X: Tensor,  # (n, k)
    ) -> Tensor:  # (m, k)
        """Return the product of the operator with each of the k columns of X."""

    def gram(
        self,
        X: Tensor,  # (n, k)
        Y: Tensor,  # (n, l)
    ) -> Tensor:  # (k, l)
        """Return the inner products XᵀY, the only ones that algorithms use."""
        return X.mT @ Y

    def to_dense(self) -> Tensor:  # (m, n)
        """Return the matrix itself, by one product with the identity: n products and m n numbers."""
        return self.matmat(torch.eye(self.shape[1], dtype=self.dtype, device=self.device))


class Matrix(LinearOperator):
    """A dense matrix as an operator.

    Args:
        matrix: (m, n), real.

    Example:
        >>> import torch
        >>> A = Matrix(torch.diag(torch.tensor([3.0, -5.0])))
        >>> A.matmat(torch.ones(2, 1)).flatten().tolist()
        [3.0, -5.0]
    """

    def __init__(self, matrix: Tensor) -> None:
        if matrix.ndim != 2 or matrix.is_complex():
            raise ValueError(
                f"matrix has shape {tuple(matrix.shape)} and dtype {matrix.dtype}; pass a real 2-D tensor."
            )
        self._matrix = matrix
        self.shape = (matrix.shape[0], matrix.shape[1])
        self.dtype = matrix.dtype
        self.device = matrix.device

    def matmat(self, X: Tensor) -> Tensor:
        """Return the matrix product."""
        return self._matrix @ X
