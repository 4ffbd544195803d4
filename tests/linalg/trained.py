"""The Hessian of a small trained network, and all its eigenvalues."""

from __future__ import annotations

import functools

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F


@functools.cache
def trained_hessian() -> tuple[Tensor, Tensor]:  # (n, n), (n,) ascending, both float64
    """Of a 64-24-24-10 tanh net with cross-entropy on 600 digits after SGD with momentum: n = 2410.

    A few eigenvalues are of order 1 and nearly all of the rest within 0.01 of zero, 35 % of all below it; 7 % are zero,
    because some pixels are never lit and the logits have a common shift.
    """
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:600] / 16), torch.tensor(labels[:600])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        chosen = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in gradient])
    rows = []
    for unit in torch.eye(len(flat), dtype=torch.float64).split(128):
        row = torch.autograd.grad(flat, parameters, unit, retain_graph=True, is_grads_batched=True)
        rows.append(torch.cat([r.reshape(len(unit), -1) for r in row], dim=1))
    H = torch.cat(rows)
    H = (H + H.mT) / 2
    return H, torch.linalg.eigvalsh(H)
