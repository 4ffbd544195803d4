"""Subspaces of an operator's domain, by inner products from `gram` alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_callbacks.linalg.operator import LinearOperator

_DEPENDENT = 10.0  # a remainder below this many rounding errors of the largest column is no direction


def dimension(A: LinearOperator) -> int:
    """Return the length of A's vectors, summed over the processes that hold a part of each."""
    first = torch.zeros(A.shape[1], 1, dtype=A.dtype, device=A.device)
    first[0] = 1.0
    return round(A.gram(A.shape[1] * first, first).item())


def rademacher(
    A: LinearOperator,  # (n, n)
    num_vectors: int,
    generator: torch.Generator,
) -> Tensor:  # (n, num_vectors)
    """Return independent signs, each 1 or -1 with equal odds."""
    signs = torch.randint(2, (A.shape[1], num_vectors), generator=generator, device=A.device, dtype=torch.int8)
    return 2 * signs.to(A.dtype) - 1


def gaussian(
    A: LinearOperator,  # (n, n)
    num_vectors: int,
    generator: torch.Generator,
) -> Tensor:  # (n, num_vectors)
    """Return independent standard normal numbers."""
    return torch.randn(A.shape[1], num_vectors, generator=generator, dtype=A.dtype, device=A.device)


def orthonormalize(
    A: LinearOperator,
    Y: Tensor,  # (n, k), finite
) -> tuple[Tensor, Tensor]:  # (n, r), (r, k) float64 on the CPU
    """Return Q and R with Y = Q R, Q orthonormal in A's inner product, r the numerical rank.

    Gram-Schmidt, each column twice against all before it: a Gram matrix of all columns at once would lose those below
    the root of the rounding error.
    """
    Q = torch.empty_like(Y.mT, memory_format=torch.contiguous_format)
    R = torch.zeros(Y.shape[1], Y.shape[1], dtype=torch.float64)
    rank, largest = 0, 0.0
    for index, y in enumerate(Y.unbind(dim=1)):
        basis, remainder = Q[:rank].mT, y[:, None]
        size = A.gram(remainder, remainder).sqrt().item()
        largest = max(largest, size)
        for _ in range(2):
            inside = A.gram(basis, remainder)
            remainder = remainder - basis @ inside
            R[:rank, index] += inside[:, 0].to(R)
        norm = A.gram(remainder, remainder).sqrt().item()
        if norm > _DEPENDENT * torch.finfo(Y.dtype).eps * largest:
            Q[rank] = remainder[:, 0] / norm
            R[rank, index] = norm
            rank += 1
    return Q[:rank].mT, R[:rank]


def whole_space(
    A: LinearOperator,  # (n, n)
    generator: torch.Generator,
) -> Tensor:  # (n, n)
    """Return an orthonormal basis of all vectors, for a small n."""
    return orthonormalize(A, gaussian(A, dimension(A), generator))[0]


class Complement(LinearOperator):
    """P A P with P = I - X Xᵀ: what a symmetric operator does orthogonally to some vectors.

    Args:
        A: Symmetric, (n, n).
        vectors: X, (n, k), orthonormal in A's inner product.

    Example:
        >>> import torch
        >>> from spectral_callbacks.linalg import Matrix
        >>> A = Matrix(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
        >>> Complement(A, torch.tensor([[1.0], [0.0], [0.0]])).to_dense().diagonal().tolist()
        [0.0, 2.0, 1.0]
    """

    def __init__(self, A: LinearOperator, vectors: Tensor) -> None:
        self._A = A
        self._vectors = vectors
        self.shape = A.shape
        self.dtype = A.dtype
        self.device = A.device

    def matmat(self, X: Tensor) -> Tensor:
        """Return the product, at the cost of one product with A."""
        return self.project(self._A.matmat(self.project(X)))

    def gram(self, X: Tensor, Y: Tensor) -> Tensor:
        """Return the inner products as A takes them."""
        return self._A.gram(X, Y)

    def project(
        self,
        X: Tensor,  # (n, k)
    ) -> Tensor:  # (n, k)
        """Return the part of each column that is orthogonal to the vectors."""
        return X - self._vectors @ self._A.gram(self._vectors, X)


class Normalized(LinearOperator):
    """A / unit, of which squares neither overflow nor vanish, whatever the unit of A.

    Args:
        A: (n, n).

    Attributes:
        unit: Size of the first product, rounded to a power of two: dividing by it loses nothing.

    Example:
        >>> import torch
        >>> from spectral_callbacks.linalg import Matrix
        >>> A = Normalized(Matrix(1e-30 * torch.eye(2)))
        >>> product = A.matmat(torch.ones(2, 1))
        >>> 0.1 < product.square().sum().item() < 10
        True
    """

    def __init__(self, A: LinearOperator) -> None:
        self._A = A
        self.unit = 0.0
        self.shape = A.shape
        self.dtype = A.dtype
        self.device = A.device

    def matmat(self, X: Tensor) -> Tensor:
        """Return the product, which is the first to say how large products are."""
        product = self._A.matmat(X)
        if not self.unit:
            roots = product.abs().mean(dim=1, keepdim=True).sqrt()  # whose squares are safe to sum
            size = self.gram(roots, roots).item()
            self.unit = 2.0 ** round(math.log2(size)) if 0 < size < math.inf else 1.0
        return product / self.unit

    def gram(self, X: Tensor, Y: Tensor) -> Tensor:
        """Return the inner products as A takes them."""
        return self._A.gram(X, Y)
