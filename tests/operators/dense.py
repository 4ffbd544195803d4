"""Jacobians and Gauss-Newton matrices entry by entry, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectral_callbacks.probe import twice_differentiable


def jacobian(outputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:  # (outputs, n)
    """One backward pass for every output."""
    rows = []
    for z in outputs.reshape(-1):
        row = torch.autograd.grad(z, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([r.to_dense().reshape(-1) for r in row]))
    return torch.stack(rows)


def dense_gauss_newton(
    outputs: Tensor, loss: Callable[[Tensor], Tensor], parameters: Sequence[Tensor]
) -> Tensor:  # (n, n)
    """Jᵀ A J, with A by torch's own Hessian of a function."""
    with twice_differentiable():
        J = jacobian(outputs, parameters)
    A = torch.autograd.functional.hessian(lambda z: loss(z.view(outputs.shape)), outputs.detach().reshape(-1))
    return J.mT @ torch.as_tensor(A) @ J
