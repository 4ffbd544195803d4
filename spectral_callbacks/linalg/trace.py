"""The trace and the Frobenius norm of a symmetric operator, from a few products with random vectors."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize

from spectral_callbacks.linalg.operator import LinearOperator
from spectral_callbacks.linalg.result import Eigenpairs, Estimate
from spectral_callbacks.linalg.subspace import (
    Complement,
    Normalized,
    dimension,
    gaussian,
    orthonormalize,
    rademacher,
    whole_space,
)

Method = Literal["hutchinson", "hutch++", "xtrace", "deflated"]

_FAILED = Estimate(math.nan, math.inf, 0)
_FEWEST = 6  # products of a method that learns a subspace first: below, plain samples are better spent
_ROUNDING = 4.0  # units in the last place that products err by: each of n in ‖A‖ / √n by itself, and all alike


def trace(
    A: LinearOperator,  # (n, n), symmetric
    *,
    num_matvecs: int = 30,
    method: Method = "xtrace",
    generator: torch.Generator,
    eigenpairs: Eigenpairs | None = None,
) -> Estimate:
    """Estimate tr A without bias from products with random vectors.

    - "hutchinson": the mean of zᵀA z over vectors z of random signs, of variance 2 (‖A‖² - Σ aᵢᵢ²) / num_matvecs in the
      Frobenius norm. The error falls as 1 / √num_matvecs.
    - "hutch++": a third of the products finds a basis Q of where A is large, a third gives tr QᵀA Q exactly, a third is
      Hutchinson's on the complement. Where the eigenvalues decay, the error falls at least as 1 / num_matvecs.
    - "xtrace": each test vector in turn is left out of the basis and is Hutchinson's on the complement of the others'.
      No product does one thing only.
    - "deflated": Hutchinson's on the complement of Ritz vectors already paid for. Their part is the sum of their
      values, which are xᵀA x whether they have converged or not: all products go to the rest, without a bias.

    With fewer than 6 products "hutch++" and "xtrace" are Hutchinson's; with n products or more the trace is exact.

    Args:
        A: Symmetric operator.
        num_matvecs: Products to spend at most; "hutch++" takes a multiple of three, "xtrace" of two.
        method: One of the four.
        generator: Source of the test vectors, on A's device.
        eigenpairs: Ritz pairs of A, as `eigsh` returns them. "deflated" needs them; with them every other method, too,
            estimates on their complement.

    Returns:
        The trace and its standard error, whose square is right on average. It is infinite for one sample, and for few
        it is itself uncertain: at 30 products |error| <= 2 standard errors in 92 to 96 % of cases (88 to 93 % for the
        10 samples of "hutch++"), at 12 in 83 to 92 %. It includes rounding, 4 eps √(‖A‖² + (tr A)²), the only error of
        an exact trace.
        NaN with infinite error where a product or an eigenvalue is not finite.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from spectral_callbacks.linalg import Matrix
        >>> A = Matrix(torch.diag(1.0 / torch.arange(1, 200) ** 2))
        >>> estimate = trace(A, generator=torch.Generator().manual_seed(0))
        >>> abs(estimate.value - 1.6399) < 3 * estimate.error < 0.05
        True

    References:
        Hutchinson (1990); Meyer, Musco, Musco, Woodruff, Hutch++ (2021), arXiv 2010.09649; Epperly, Tropp, Webber,
        XTrace (2024), arXiv 2301.07825.
    """
    _check(A, num_matvecs)
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} must be one of {', '.join(map(repr, get_args(Method)))}.")
    if method == "deflated" and eigenpairs is None:
        raise ValueError('method="deflated" needs eigenpairs; pass those of eigsh, or use method="xtrace".')
    exact = dimension(A) <= num_matvecs
    known = torch.zeros(0, dtype=torch.float64) if eigenpairs is None or exact else eigenpairs.values
    A = Normalized(A if eigenpairs is None or exact else Complement(A, eigenpairs.vectors))
    inside = 0.0
    if exact:
        Q = whole_space(A, generator)
        AQ = A.matmat(Q)
        estimate, square = _exact(_columns(A, Q, AQ).sum().item(), Q.shape[1]), _squares(A, AQ).sum().item()
    elif method == "xtrace" and num_matvecs >= _FEWEST:
        sketch = _Sketch(A, num_matvecs // 2, generator)
        estimate, square = sketch.trace(), sketch.square
    elif method == "hutch++" and num_matvecs >= _FEWEST:
        third = num_matvecs // 3
        first = A.matmat(rademacher(A, third, generator))
        Q, _ = orthonormalize(A, first)
        inside = _columns(A, Q, A.matmat(Q)).sum().item()
        Z = rademacher(A, third, generator)
        rest = Complement(A, Q)
        estimate, square = _estimate(_columns(rest, Z, rest.matmat(Z))), _squares(A, first).mean().item()
    else:
        Z = rademacher(A, num_matvecs, generator)
        AZ = A.matmat(Z)
        estimate, square = _estimate(_columns(A, Z, AZ)), _squares(A, AZ).mean().item()
    value = A.unit * (estimate.value + inside) + known.sum().item()
    if not math.isfinite(value):
        return dataclasses.replace(_FAILED, num_samples=estimate.num_samples)
    size = math.hypot(A.unit * math.sqrt(square), known.norm().item(), value)
    return Estimate(value, math.hypot(A.unit * estimate.error, _rounding(A) * size), estimate.num_samples)


def frobenius_norm(
    A: LinearOperator,  # (n, n), symmetric
    *,
    num_matvecs: int = 30,
    generator: torch.Generator,
) -> Estimate:
    """Estimate the Frobenius norm ‖A‖ = √Σ aᵢⱼ² = √Σ λᵢ².

    The square is estimated without bias as tr A² is by XTrace: on a basis of where A is large exactly, outside of it by
    the products with the test vectors that were left out of the basis. With fewer than 6 products it is the mean of
    ‖A z‖² over vectors z of random signs; with n products or more it is exact.

    Args:
        A: Symmetric operator.
        num_matvecs: Products to spend at most.
        generator: Source of the test vectors, on A's device.

    Returns:
        The norm, with the standard error of its square divided by twice the norm, and rounding, 4 eps ‖A‖. The root
        makes the norm too small on average, by half of (error / value)², relatively.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from spectral_callbacks.linalg import Matrix
        >>> A = Matrix(torch.diag(1.0 / torch.arange(1, 200) ** 2))
        >>> estimate = frobenius_norm(A, generator=torch.Generator().manual_seed(0))
        >>> abs(estimate.value - 1.0404) < 1e-3
        True

    References:
        Epperly, Tropp, Webber, XTrace (2024), arXiv 2301.07825, for the leave-one-out samples.
    """
    _check(A, num_matvecs)
    A = Normalized(A)
    if dimension(A) <= num_matvecs:
        Q = whole_space(A, generator)
        square = _exact(_squares(A, A.matmat(Q)).sum().item(), Q.shape[1])
    elif num_matvecs >= _FEWEST:
        square = _Sketch(A, num_matvecs // 2, generator).trace_of_square()
    else:
        square = _estimate(_squares(A, A.matmat(rademacher(A, num_matvecs, generator))))
    if not math.isfinite(square.value):
        return square
    norm = math.sqrt(max(square.value, 0.0))
    error = square.error / (2 * norm) if norm > 0 else math.sqrt(square.error)
    return Estimate(A.unit * norm, A.unit * math.hypot(error, _rounding(A) * norm), square.num_samples)


class _Sketch:
    """Test vectors Ω, their products, an orthonormal basis Q of A Ω, its products, and the basis without some of them.

    Without the i-th vector the basis spans what Q spans but for the direction Q sᵢ, sᵢ the normalized i-th column of
    R⁻ᵀ in A Ω = Q R. The test vector outside this smaller basis is put at the length √(n - k + 1) that it has on
    average, which takes the randomness of the length out. All that follows is in k by k matrices.

    A sample Tᵢ of the trace is right on average whatever the other vectors are, but samples are not independent: the
    variance of their mean is that of independent ones plus the covariance of two of them. With Tᵢ₋ⱼ the sample that
    knows nothing of the j-th vector, E (Tᵢ - tr) (Tⱼ₋ᵢ - tr) = 0, so that (Tᵢ - Tᵢ₋ⱼ) (Tⱼ - Tⱼ₋ᵢ) is this covariance
    on average. The paper leaves it out, and its error is 10 to 30 % too small.
    """

    def __init__(self, A: LinearOperator, num_vectors: int, generator: torch.Generator) -> None:
        omega = gaussian(A, num_vectors, generator)
        self._A = A
        self._n = dimension(A)
        self._lengths = _columns(A, omega, omega)
        self._AO = A.matmat(omega)
        self.square = _squares(A, self._AO).mean().item()  # estimates ‖A‖²
        self._finite = math.isfinite(self.square)
        if self._finite:
            self._Q, self._R = orthonormalize(A, self._AO)
            self._AQ = A.matmat(self._Q)
            self._W = _gram(A, self._Q, omega)

    def trace(self) -> Estimate:
        """Return tr A."""
        if not self._finite:
            return _FAILED
        return self._estimate(_gram(self._A, self._Q, self._AQ), self._R, (self._W * self._R).sum(0))

    def trace_of_square(self) -> Estimate:
        """Return tr A²."""
        if not self._finite:
            return _FAILED
        A, AO, AQ = self._A, self._AO, self._AQ
        return self._estimate(_gram(A, AQ, AQ), _gram(A, AQ, AO), _squares(A, AO))

    def _estimate(
        self,
        B: Tensor,  # (r, r), Qᵀ M Q for the matrix M whose trace is wanted
        C: Tensor,  # (r, k), Qᵀ M Ω
        d: Tensor,  # (k,), ωᵢᵀ M ωᵢ
    ) -> Estimate:
        (rank, k), W = self._W.shape, self._W
        full = rank == k
        # Where the products are dependent, each lies in the span of the others, and no direction is lost with it.
        S = normalize(torch.linalg.inv(self._R).mT, dim=0, eps=0.0) if full else torch.zeros_like(W)

        def sample(inside: Tensor, lost: Tensor, num_lost: int) -> Tensor:
            """Samples by test vectors whose coordinates in the smaller basis are `inside`, (r, k, ...)."""
            shape = (k,) + (1,) * (inside.ndim - 2)
            across = (inside * C.reshape(rank, *shape)).sum(0)
            outside = d.reshape(shape) - 2 * across + (inside * torch.tensordot(B, inside, 1)).sum(0)
            scale = (self._n - rank + num_lost * full) / (self._lengths.reshape(shape) - inside.square().sum(0))
            return B.trace() - lost + scale * outside

        inside, lost = W - S * (S * W).sum(0), (S * (B @ S)).sum(0)
        T = sample(inside, lost, 1)
        also = normalize(S[:, None, :] - S[:, :, None] * (S.mT @ S), dim=0)  # [:, i, j]: lost with j where i is
        inside = inside[:, :, None] - also * (also * W[:, :, None]).sum(0)
        lost = lost[:, None] + (also * torch.tensordot(B, also, 1)).sum(0)
        change = (T[:, None] - sample(inside, lost, 2)).fill_diagonal_(0.0)
        covariance = ((change * change.mT).sum() / (k * (k - 1))).clamp_min(0.0)
        return _estimate(T, covariance.item())


def _columns(A: LinearOperator, X: Tensor, Y: Tensor) -> Tensor:  # (k,) float64 on the CPU
    """Return the inner product of each column of X with that of Y."""
    return A.gram(X, Y).diagonal().to("cpu", torch.float64)


def _squares(A: LinearOperator, X: Tensor) -> Tensor:  # (k,) float64 on the CPU
    return _columns(A, X, X)


def _gram(A: LinearOperator, X: Tensor, Y: Tensor) -> Tensor:  # float64 on the CPU
    return A.gram(X, Y).to("cpu", torch.float64)


def _exact(value: float, num_products: int) -> Estimate:
    return Estimate(value, 0.0, num_products) if math.isfinite(value) else Estimate(math.nan, math.inf, num_products)


def _estimate(samples: Tensor, covariance: float = 0.0) -> Estimate:
    m = len(samples)
    if not samples.isfinite().all():
        return Estimate(math.nan, math.inf, m)
    error = math.sqrt(samples.var().item() / m + covariance) if m > 1 else math.inf
    return Estimate(samples.mean().item(), error, m)


def _rounding(A: LinearOperator) -> float:
    return _ROUNDING * torch.finfo(A.dtype).eps


def _check(A: LinearOperator, num_matvecs: int) -> None:
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"the operator has shape {A.shape}; only a square one has a trace and a symmetric norm here.")
    if num_matvecs < 1:
        raise ValueError(f"num_matvecs={num_matvecs} must be at least 1; 30 is a good start.")
