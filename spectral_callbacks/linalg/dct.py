"""The orthonormal discrete cosine transform (DCT-II) of the rows of a matrix, and its basis."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 128  # rows transformed at once, so that what is in between stays in the cache
_MIN_FFT = 384  # shorter rows are transformed faster by a product with the basis (measured on one core: even at 400)
_KEPT = 64  # widths whose basis and plan are kept


def dct_basis(
    n: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:  # (n, n)
    """Return the matrix Q of the DCT-II, whose columns are cosines: X @ Q is `dct(X)`, and Qᵀ Q is the identity.

    Q[j, k] = √(2/n) cos(π (2j + 1) k / 2n), the column k = 0 divided by √2. It is computed in float64, rounded once,
    and kept: callers share one matrix, and do not write to it.

    Args:
        n: Width, at least 1.
        dtype: Of the matrix.
        device: Where it lies.

    Example:
        >>> dct_basis(2)
        tensor([[ 0.7071,  0.7071],
                [ 0.7071, -0.7071]])
    """
    return _cached_basis(n, dtype, torch.device(device))


def dct(
    X: Tensor,  # (..., n)
) -> Tensor:  # (..., n)
    """Return the orthonormal DCT-II of X along its last dimension: y_k = Σ_j x_j Q[j, k] with `dct_basis`.

    Wide rows go through a real FFT of their own length, at n log n operations a row; half types are computed in
    float32.

    Example:
        >>> import torch
        >>> dct(torch.ones(1, 4))  # a constant row has all its energy in the first cosine
        tensor([[2., 0., 0., 0.]])

    References:
        Makhoul, A fast cosine transform in one and two dimensions (1980).
    """
    return _by_rows(X, lambda rows: rows @ _basis(rows), _by_fft)


def inverse_dct(
    X: Tensor,  # (..., n)
) -> Tensor:  # (..., n)
    """Return the rows whose DCT-II are the rows of X: the inverse of `dct`, and its adjoint.

    Example:
        >>> import torch
        >>> x = torch.tensor([3.0, 1.0, -2.0])
        >>> bool(torch.allclose(inverse_dct(dct(x)), x))
        True
    """
    return _by_rows(X, lambda rows: rows @ _basis(rows).mT, _by_inverse_fft)


def _by_rows(X: Tensor, by_product: Callable[[Tensor], Tensor], by_fft: Callable[[Tensor, _Plan], Tensor]) -> Tensor:
    n = X.shape[-1]
    rows = X.reshape(-1, n)
    if rows.dtype not in (torch.float32, torch.float64):
        rows = rows.float()
    if n < _MIN_FFT or not len(rows):
        result = by_product(rows)
    else:
        plan = _cached_plan(n, rows.dtype, rows.device)
        result = rows.new_empty(rows.shape)
        for start in range(0, len(rows), _BLOCK):
            result[start : start + _BLOCK] = by_fft(rows[start : start + _BLOCK], plan)
    return result.reshape(X.shape).to(X.dtype)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What Makhoul's algorithm needs for rows of length n.

    Let v be (x_0, x_2, ..., x_3, x_1), the evens and then the odds backwards, turned around from its second entry on.
    With its spectrum V = rfft(v), the numbers Z_k = s_k exp(iπk / 2n) V_k, k = 0 ... n/2, hold the whole transform:
    y_k = Re Z_k, and y_{n-k} = Im Z_k.

    Attributes:
        order: The index in x of each entry of v, (n,).
        inverse_order: The index in v of each entry of x, (n,).
        twiddle: s_k exp(iπk / 2n), s_0 = √(1/n), s_k = √(2/n): (n // 2 + 1,), complex.
        places: Where in (Re Z_0, Im Z_0, Re Z_1, ...) each y_k stands, (n,).
    """

    order: Tensor
    inverse_order: Tensor
    twiddle: Tensor
    places: Tensor


def _by_fft(rows: Tensor, plan: _Plan) -> Tensor:
    by_columns = rows.stride(1) != 1  # of a wide matrix: reordered as they lie, then turned in the cache
    v = rows.mT.index_select(0, plan.order).mT.contiguous() if by_columns else rows.index_select(1, plan.order)
    Z = torch.fft.rfft(v) * plan.twiddle
    return torch.view_as_real(Z).flatten(1).index_select(1, plan.places)


def _by_inverse_fft(rows: Tensor, plan: _Plan) -> Tensor:
    n = rows.shape[1]
    reversed_ = torch.cat([torch.zeros_like(rows[:, :1]), rows[:, n - n // 2 :].flip(1)], dim=1)
    Z = torch.complex(rows[:, : n // 2 + 1].contiguous(), reversed_)  # y_k + i y_{n-k}
    return torch.fft.irfft(Z / plan.twiddle, n=n).index_select(1, plan.inverse_order)


def _basis(rows: Tensor) -> Tensor:
    return _cached_basis(rows.shape[1], rows.dtype, rows.device)


@functools.lru_cache(maxsize=_KEPT)
def _cached_basis(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        j = torch.arange(n, dtype=torch.int64)
        phase = (2 * j[:, None] + 1) * j % (4 * n)  # cos has the period 4n in it: exact for every n
        Q = torch.cos(phase.double() * (math.pi / (2 * n))) * math.sqrt(2 / n)
        Q[:, 0] = math.sqrt(1 / n)
        return Q.to(device=device, dtype=dtype)


@functools.lru_cache(maxsize=_KEPT)
def _cached_plan(n: int, dtype: torch.dtype, device: torch.device) -> _Plan:
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        order = torch.cat([torch.arange(0, n, 2), torch.arange(1, n, 2).flip(0)])[-torch.arange(n) % n]
        k = torch.arange(n // 2 + 1)
        scale = torch.full((n // 2 + 1,), math.sqrt(2 / n), dtype=torch.float64)
        scale[0] = math.sqrt(1 / n)
        twiddle = torch.polar(scale, k.double() * (math.pi / (2 * n)))
        places = torch.cat([2 * k, 2 * torch.arange(n - len(k), 0, -1) + 1])
        return _Plan(
            order.to(device), order.argsort().to(device), twiddle.to(device, dtype.to_complex()), places.to(device)
        )
