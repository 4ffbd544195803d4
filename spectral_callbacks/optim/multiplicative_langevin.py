"""Samplers whose every step multiplies: x <- x exp(...) keeps the sign of each entry, and positive data positive."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectral_callbacks.optim.base import require

Score = Callable[[Tensor], Tensor]
NoisyScore = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def multiplicative_langevin_sample(
    score: Score,
    x0: Tensor,  # (...), without zeros
    *,
    step_size: float,
    num_steps: int,
    generator: torch.Generator,
) -> Tensor:
    """Return x after so many steps x <- x exp(d (h + 1) + √(2d) z) of Langevin dynamics in ln |x|.

    h = x ∘ ∇ln p(x) is the Hyvärinen score, and h + 1 the score of ln |x|, whose density is |x| p(x). For d → 0 the
    steps sample p on the orthant of x0. At a finite d the law is a little too wide: for a log-normal of deviation s the
    deviation in logarithms is s / √(1 - d / (2s²)). Each step is one evaluation of the score.

    This is one step of exponentiated gradient descent on -ln p plus noise. The reverse of geometric Brownian motion,
    x exp(d σ² (h + 1) + σ √d z), has half the noise: it is right while p is itself diffusing (`reverse_diffusion`),
    and with p held it would sample p² |x|.

    Args:
        score: The Hyvärinen score h, a function from x to a tensor of its shape.
        x0: Where to start.
        step_size: d.
        num_steps: Number of steps.
        generator: Source of the noise z, on x0's device.

    Returns:
        The last x, of x0's shape and signs.

    Raises:
        ValueError: If the step size is not positive, the number of steps negative, or some entry of x0 zero, which no
            step would ever move.

    References:
        Dale meets Langevin, arXiv:2510.02730.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> x0 = torch.ones(20_000, dtype=torch.float64)
        >>> def score(x):  # of the log-normal of mean 0.3 and deviation 0.7 in logarithms
        ...     return -1 - (x.log() - 0.3) / 0.7**2
        >>> x = multiplicative_langevin_sample(score, x0, step_size=0.02, num_steps=150, generator=generator)
        >>> bool((x > 0).all()), round(x.log().mean().item(), 1), round(x.log().std().item(), 1)
        (True, 0.3, 0.7)
    """
    require(step_size > 0, "step_size", step_size, "positive")
    require(num_steps >= 0, "num_steps", num_steps, "0 or more")
    _require_nonzero("x0", x0)
    x = x0
    for _ in range(num_steps):
        noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
        x = x * (step_size * (score(x) + 1) + math.sqrt(2 * step_size) * noise).exp()
    return x


@torch.no_grad()
def reverse_diffusion(
    score: NoisyScore,
    x: Tensor,  # (n, ...), without zeros
    noise_scales: Sequence[float],
    *,
    generator: torch.Generator,
) -> Tensor:
    """Return samples of the data from samples x = x₀ exp(s z) of the largest noise scale, by the reverse diffusion.

    From scale s to the next one s' the step is x <- x exp(v (h(x, s) + 1) + √v z) with v = s² - s'². This reverses
    geometric Brownian motion without drift in the logarithm (μ = σ²/2); another drift would scale x by a known factor.
    After the last scale x is replaced by exp of the posterior mean of ln x₀, x exp(s² (h(x, s) + 1)). Each scale costs
    one evaluation of the score.

    Args:
        score: The Hyvärinen score x ∘ ∇ln p_s(x) of the noisy data, a function from x and the scales (n,) to a tensor
            of x's shape.
        x: Samples of the first noise scale.
        noise_scales: s, decreasing, positive.
        generator: Source of the noise, on x's device.

    Returns:
        Samples of x's shape and signs.

    Raises:
        ValueError: If the scales do not decrease to a positive one, or some entry of x is zero.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> def score(x, s):  # of data that are all 2, noisy
        ...     return -1 - (x.log() - math.log(2.0)) / s[:, None] ** 2
        >>> x = 2 * torch.randn(3, 1, generator=generator).exp()
        >>> reverse_diffusion(score, x, [1.0, 0.5, 0.1], generator=generator).flatten()
        tensor([2.0000, 2.0000, 2.0000])
    """
    decreasing = all(b < a for a, b in itertools.pairwise(noise_scales))
    require(decreasing and all(s > 0 for s in noise_scales), "noise_scales", noise_scales, "positive and decreasing")
    _require_nonzero("x", x)
    for scale, following in zip(noise_scales, [*noise_scales[1:], 0.0], strict=True):
        drift = score(x, x.new_full((len(x),), scale)) + 1
        variance = scale**2 - following**2
        step = variance * drift
        if following:
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            step = step + math.sqrt(variance) * noise
        x = x * step.exp()
    return x


def _require_nonzero(name: str, x: Tensor) -> None:
    if num_zeros := int((x == 0).sum()):
        raise ValueError(
            f"{name} {tuple(x.shape)} is zero in {num_zeros} of its entries, and no multiplicative step moves a zero: "
            "shift the data away from it."
        )
