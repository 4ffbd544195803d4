"""The covariance of the gradients against the curvature, on a trained classifier."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_callbacks.linalg import eigsh
from spectral_callbacks.metrics import subspace_overlap
from spectral_callbacks.operators import GradientCovarianceOperator, Hessian
from spectral_callbacks.probe import Probe

CLASSES = 4
Batch = tuple[Tensor, Tensor]


def loss_of(module: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(module(batch[0]), batch[1])


def trained() -> tuple[nn.Module, Batch]:
    """A classifier of overlapping clusters, past its first epochs."""
    torch.manual_seed(0)
    y = torch.arange(240) % CLASSES
    x = 2 * torch.randn(CLASSES, 10, dtype=torch.float64)[y] + torch.randn(240, 10, dtype=torch.float64)
    module = nn.Sequential(nn.Linear(10, 24), nn.Tanh(), nn.Linear(24, CLASSES)).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(module, (x, y)).backward()
        optimizer.step()
    return module, (x, y)


def test_the_top_of_the_covariance_lies_in_that_of_the_curvature() -> None:
    """Half of the directions between classes, fifty times what random subspaces share (Sagun et al. 2017)."""
    module, batch = trained()
    k = CLASSES - 1
    found: dict[str, Tensor] = {}
    with Probe(module, torch.optim.SGD(module.parameters()), [batch], loss=loss_of, outputs="") as probe:
        operators = {
            "covariance": GradientCovarianceOperator(probe.sample_gradients(None)),
            "Gauss-Newton": probe.gauss_newton(),
            "Hessian": probe.operator(Hessian),
        }
        for name, A in operators.items():
            pairs = eigsh(A, k, rtol=1e-6, max_matvecs=200, generator=torch.Generator().manual_seed(0))
            found[name] = pairs.vectors
            dense = torch.linalg.eigh(A.to_dense())
            assert (found[name].mT @ dense.eigenvectors[:, -k:]).square().sum().item() > k - 1e-3
    for name in ("Gauss-Newton", "Hessian"):
        overlap = subspace_overlap(found["covariance"], found[name])
        assert overlap.null.value == k / probe.space.size
        assert overlap.value > 0.4 > 40 * overlap.null.value
