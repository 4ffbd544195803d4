"""The residual term: how far the Hessian is from its Gauss-Newton part."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate, LinearOperator

NUM_VECTORS = 10  # makes the error 1 to 9 % on trained networks


def residual_ratio(H: LinearOperator, G: LinearOperator, generator: torch.Generator) -> Estimate:
    """Return ‖H - G‖ / ‖H‖ in the Frobenius norm, from 10 products with each: √(E‖(H - G)v‖² / E‖Hv‖²).

    Both are multiplied with the same vectors, so that most of the chance cancels; the error is that of the delta
    method. NaN where H is zero.
    """
    V = torch.randn(H.shape[0], NUM_VECTORS, generator=generator, dtype=H.dtype, device=H.device)
    GV = G.matmat(V)  # first, because it may refuse
    HV = H.matmat(V)
    residual, whole = _squares(H, HV - GV), _squares(H, HV)
    if not whole.mean() > 0:
        return Estimate(math.nan, math.inf, NUM_VECTORS)
    square = (residual.mean() / whole.mean()).item()
    deviation = (residual - square * whole).std().item() / whole.mean().item()
    ratio = math.sqrt(square)
    return Estimate(ratio, deviation / math.sqrt(NUM_VECTORS) / (2 * ratio) if ratio else 0.0, NUM_VECTORS)


def _squares(
    A: LinearOperator,
    X: Tensor,  # (n, k)
) -> Tensor:  # (k,) float64, on the CPU
    return torch.cat([A.gram(x, x)[0] for x in X.split(1, dim=1)]).to("cpu", torch.float64)
