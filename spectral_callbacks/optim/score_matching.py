"""Denoising score matching for positive data under multiplicative noise."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_callbacks.optim.multiplicative_langevin import NoisyScore


def multiplicative_score_matching_loss(
    score: NoisyScore,
    x0: Tensor,  # (n, ...), positive
    noise_scale: Tensor,  # (n,)
    *,
    data_std: float | None = None,
    noise: Tensor | None = None,  # (n, ...)
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the mean of λ(s) (h(x_s, s) + 1 + z / s)² over samples and entries, with x_s = x₀ exp(s z).

    1 + z / s is minus the Hyvärinen score x ∘ ∇ln p(x_s | x₀) of the noise, so that the minimiser is that of the noisy
    data, h = x ∘ ∇ln p_s(x). In logarithms this is ordinary denoising, with the denoiser D = ln x_s + s² (h + 1):
    s⁴ (h + 1 + z / s)² = (D - ln x₀)².

    Args:
        score: h, a function from x_s and the scales to a tensor of x_s's shape.
        x0: Data.
        noise_scale: s, one a sample.
        data_std: Deviation σ of ln x₀, which gives the weight λ = s² (s² + σ²) / σ² of Karras et al., under which every
            scale of a preconditioned network starts at a loss of 1. None for λ = s².
        noise: z; drawn if None.
        generator: Source of the noise; None for the global one.

    Returns:
        The loss, ().

    References:
        Dale meets Langevin, arXiv:2510.02730; the weight: Karras et al. 2022, arXiv:2206.00364, table 1.

    Example:
        >>> x0, s = torch.ones(1000, 1), torch.full((1000,), 0.5)
        >>> def exact(x, s):  # all data are 1, so that the noise is known from x
        ...     return -1 - x.log() / s[:, None] ** 2
        >>> round(multiplicative_score_matching_loss(exact, x0, s).item(), 6)
        0.0
    """
    s = noise_scale.view(-1, *(1,) * (x0.ndim - 1))
    z = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=x0.device) if noise is None else noise
    weight = s.square() if data_std is None else s.square() * (s.square() / data_std**2 + 1)
    return (weight * (score(x0 * (s * z).exp(), noise_scale) + 1 + z / s).square()).mean()
