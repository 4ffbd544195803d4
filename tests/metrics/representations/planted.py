"""Features with a prescribed spectrum: of the sample exactly, or of the distribution they are drawn from."""

from __future__ import annotations

import torch
from torch import Tensor


def power_law(d: int, alpha: float) -> Tensor:  # (d,)
    return torch.arange(1, d + 1, dtype=torch.float64) ** -alpha


def exact(eigenvalues: Tensor, num_samples: int) -> Tensor:  # (n, d)
    """Centred features whose covariance has these eigenvalues; n > d."""
    start = torch.randn(num_samples, len(eigenvalues) + 1, generator=torch.Generator().manual_seed(0)).double()
    start[:, 0] = 1
    return torch.linalg.qr(start)[0][:, 1:] * (num_samples * eigenvalues).sqrt()


def gaussian(eigenvalues: Tensor, num_samples: int, generator: torch.Generator) -> Tensor:  # (n, d)
    return torch.randn(num_samples, len(eigenvalues), generator=generator, dtype=torch.float64) * eigenvalues.sqrt()
