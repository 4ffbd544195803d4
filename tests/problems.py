"""Problems whose answer is known: matrices with a prescribed spectrum, losses with a Hessian in closed form."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectral_callbacks.linalg import LinearOperator


def _spectrum(*parts: list[float] | Tensor) -> Tensor:
    return torch.cat([torch.as_tensor(part, dtype=torch.float64) for part in parts]).sort(descending=True).values


_BULK = torch.linspace(-0.3, 0.3, 60, dtype=torch.float64)

# Descending, float64. The leading eigenvalues stand clear of the bulk at both ends.
SPECTRA: dict[str, Tensor] = {
    "positive": _spectrum([4.0, 2.0, 1.5, 1.2, 1.0], _BULK + 0.3),
    "indefinite": _spectrum([3.0, 2.0, 1.5, 1.0, 0.7, -0.6, -0.9, -5.0], _BULK),  # the largest magnitude is negative
    "clustered": _spectrum([1.0, 1 - 1e-6, 1 - 2e-6, 0.7, 0.7 - 1e-6, -0.8, -0.8 - 1e-6], _BULK),
    "repeated": _spectrum([5.0] * 3, [2.0] * 4, [-3.0] * 2, _BULK),
    "rank deficient": _spectrum([3.0, 2.0, 1.0, -0.5, -2.0], [0.0] * 60),
    "graded": _spectrum(10.0 ** torch.linspace(2, -6, 60)),
    "negative": _spectrum([-4.0, -2.0, -1.5], _BULK - 1.0),
}


def symmetric(
    spectrum: Tensor,  # (n,)
    *,
    seed: int = 0,
) -> Tensor:  # (n, n), float64
    """Q diag(spectrum) Qᵀ with a random orthogonal Q."""
    n = len(spectrum)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))
    A = (Q * spectrum.double()) @ Q.mT
    return (A + A.mT) / 2


class Diagonal(LinearOperator):
    """diag(d), at the cost of n numbers."""

    def __init__(self, d: Tensor) -> None:
        self._d = d[:, None]
        self.shape = (len(d), len(d))
        self.dtype = d.dtype
        self.device = d.device

    def matmat(self, X: Tensor) -> Tensor:
        return self._d * X


class Counting(LinearOperator):
    """Another operator, and how many vectors it was given."""

    def __init__(self, A: LinearOperator) -> None:
        self._A = A
        self.shape = A.shape
        self.dtype = A.dtype
        self.device = A.device
        self.num_matvecs = 0

    def matmat(self, X: Tensor) -> Tensor:
        self.num_matvecs += X.shape[1]
        return self._A.matmat(X)


class Scaled(LinearOperator):
    """D⁻¹ A D, which is symmetric in the inner product XᵀD²Y and in no other.

    Its eigenvalues are A's, its eigenvectors D⁻¹ times A's. An algorithm that takes a single inner product or norm of
    vectors outside `gram` meets an operator that is not symmetric.
    """

    def __init__(self, A: Tensor, scale: Tensor) -> None:
        self._matrix = A * scale / scale[:, None]
        self._weight = scale.square()[:, None]
        self.shape = (A.shape[0], A.shape[1])
        self.dtype = A.dtype
        self.device = A.device

    def matmat(self, X: Tensor) -> Tensor:
        return self._matrix @ X

    def gram(self, X: Tensor, Y: Tensor) -> Tensor:
        return X.mT @ (self._weight * Y)


class Quadratic(nn.Module):
    """½ wᵀA w, with Hessian A."""

    def __init__(self, A: Tensor) -> None:
        super().__init__()
        self.A = A
        self.w = nn.Parameter(torch.linspace(-1.0, 1.0, A.shape[0], dtype=A.dtype))

    def forward(self) -> Tensor:
        return self.w @ (self.A @ self.w) / 2


def linear_regression_hessian(
    X: Tensor,  # (N, d)
    num_outputs: int,
) -> Tensor:  # (num_outputs d, num_outputs d)
    """Of (1/N) Σ ‖W x - y‖², W (num_outputs, d) flattened by rows: I ⊗ 2 XᵀX / N."""
    return torch.kron(torch.eye(num_outputs, dtype=X.dtype), 2 * X.mT @ X / len(X))


def logistic_regression_hessian(
    X: Tensor,  # (N, d)
    w: Tensor,  # (d,)
) -> Tensor:  # (d, d)
    """Of the mean binary cross-entropy of logits X w: Xᵀ diag(p (1 - p)) X / N."""
    p = torch.sigmoid(X @ w)
    return X.mT @ ((p * (1 - p))[:, None] * X) / len(X)


def deep_linear_hessian(a: float, b: float, y: float) -> Tensor:  # (2, 2)
    """Of ½ (a b - y)², in a and b: indefinite wherever the residual is large."""
    mixed = 2 * a * b - y
    return torch.tensor([[b * b, mixed], [mixed, a * a]], dtype=torch.float64)
