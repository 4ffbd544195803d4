"""Oracles: slow and obvious, in float64."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable, Sequence

import numpy
import torch
from torch import Tensor

Loss = Callable[[], Tensor]


def dense_gradient(loss: Loss, parameters: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:  # (n,)
    gradient = torch.autograd.grad(
        loss(), parameters, create_graph=create_graph, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.reshape(-1) for g in gradient])


def dense_hessian(loss: Loss, parameters: Sequence[Tensor]) -> Tensor:  # (n, n)
    """One backward pass for every entry of the gradient."""
    gradient = dense_gradient(loss, parameters, create_graph=True)
    rows = []
    for entry in gradient:
        row = torch.autograd.grad(entry, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        rows.append(torch.cat([r.reshape(-1) for r in row]))
    return torch.stack(rows)


def difference_hessian(loss: Loss, parameters: Sequence[Tensor], *, step: float = 1e-5) -> Tensor:  # (n, n)
    """Central differences of the gradient that `backward` leaves, as in training.

    No second derivative of torch has a part in it, and no `torch.autograd.grad`. For a float64 loss with derivatives of
    order 1 the error is about 1e-10.
    """
    columns = []
    with torch.no_grad():
        for p in parameters:
            flat = p.detach().view(-1)
            for i in range(len(flat)):
                value = flat[i].item()
                sides = []
                for shifted in (value + step, value - step):
                    flat[i] = shifted
                    with torch.enable_grad():
                        sides.append(_trained_gradient(loss, parameters))
                flat[i] = value
                columns.append((sides[0] - sides[1]) / (2 * step))
    H = torch.stack(columns, dim=1)
    return (H + H.mT) / 2


def _trained_gradient(loss: Loss, parameters: Sequence[Tensor]) -> Tensor:  # (n,)
    for p in parameters:
        p.grad = None
    loss().backward()
    gradient = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
    for p in parameters:
        p.grad = None
    return torch.cat([g.reshape(-1) for g in gradient])


def extreme_eigenvalues(matrix: Tensor, k: int, which: str) -> Tensor:  # (k,)
    """All eigenvalues by a dense solver, and the wanted ones of them in the documented order."""
    descending = torch.linalg.eigvalsh(matrix.double()).flip(0)
    if which == "LA":
        return descending[:k]
    if which == "SA":
        return descending.flip(0)[:k]
    high, low = k - k // 2, k // 2
    return torch.cat([descending[:high], descending[len(descending) - low :]])


def relative_error(found: Tensor, true: Tensor) -> float:
    """Largest difference over the largest true entry; infinite where the shapes differ or an entry is not finite."""
    if found.shape != true.shape or not found.isfinite().all():
        return float("inf")
    return ((found.double() - true.double()).abs().max() / true.double().abs().max()).item()


def last_stable(
    stays_bounded: Callable[[Tensor], Tensor],  # (p,) candidates -> (p,) bool
    low: float,
    high: float,
    *,
    num_points: int = 101,
    num_rounds: int = 5,
) -> float:
    """The largest stable number between a stable and an unstable one, by bisection into num_points at once."""
    for _ in range(num_rounds):
        grid = torch.linspace(low, high, num_points, dtype=torch.float64)
        stable = stays_bounded(grid)
        if not stable[0] or stable[-1]:
            raise ValueError(f"[{low}, {high}] does not bracket an edge.")
        first = int((~stable).nonzero()[0])
        low, high = grid[first - 1].item(), grid[first].item()
    return (low + high) / 2


def global_random_state() -> bytes:
    """The state of every global generator a callback could disturb: equal bytes, equal draws to come."""
    return pickle.dumps((torch.get_rng_state().tolist(), numpy.random.get_state(), random.getstate()))
