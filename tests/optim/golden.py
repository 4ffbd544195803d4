"""The function of the golden trajectories: f(w) = ½ Σ aᵢ (wᵢ - cᵢ)² + ¼ w₀² w₁²."""

from __future__ import annotations

import torch
from torch import Tensor

START = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64)


def quartic_gradient(w: Tensor) -> Tensor:  # (4,) -> (4,)
    a = torch.tensor([1.0, 10.0, 0.1, 1e-6], dtype=torch.float64)
    c = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)
    coupling = torch.stack([w[0] * w[1] ** 2, w[0] ** 2 * w[1], 0 * w[0], 0 * w[0]]) / 2
    return a * (w - c) + coupling
