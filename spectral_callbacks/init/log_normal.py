"""Log-normal weights: what multiplicative updates lead to, and none of them is zero."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


@torch.no_grad()
def log_normal_(
    tensor: Tensor,  # (out, in, ...)
    mean_std_ratio: float = 1.0,
    gain: float = 3**-0.5,
    generator: torch.Generator | None = None,
    *,
    same_sign_inputs: bool = False,
) -> Tensor:
    """Fill a weight in place with log-normal magnitudes and random signs, of variance gain² / fan_in.

    With r = mean_std_ratio the magnitudes have the deviation d = gain / √(fan_in (1 + r²)) and the mean r d, so that
    the second moment is gain² / fan_in: ln |w| has the mean ln(r d) - σ²/2 and the variance σ² = ln(1 + 1 / r²). The
    gain 1/√3 gives the variance of PyTorch's own initialisation of linear layers and convolutions.

    Args:
        tensor: A weight; fan_in is the number of entries of one output unit.
        mean_std_ratio: r, of the magnitudes; the smaller, the heavier the tail.
        gain: Deviation of the weights times √fan_in.
        generator: Source of magnitudes and signs; None for the global one.
        same_sign_inputs: Whether all weights of an input unit share their sign: Dale's law, by which a unit either
            excites or inhibits. Otherwise each weight has a sign of its own.

    Returns:
        The tensor.

    Raises:
        ValueError: If the ratio or the gain is not positive, or the tensor has fewer than two dimensions.

    References:
        Cornford et al. 2024, Brain-like learning with exponentiated gradients; Dale meets Langevin, arXiv:2510.02730.

    Example:
        >>> w = log_normal_(torch.empty(1000, 256), generator=torch.Generator().manual_seed(0))
        >>> round((w.var() * 3 * 256).item(), 1), bool((w == 0).any())
        (1.0, False)
    """
    for name, value in (("mean_std_ratio", mean_std_ratio), ("gain", gain)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {value!r}, and must be a finite positive number.")
    if tensor.ndim < 2:
        raise ValueError(f"the tensor has shape {tuple(tensor.shape)}, and a fan-in needs at least two dimensions.")
    if not tensor.numel():
        return tensor
    deviation = gain / math.sqrt(tensor[0].numel() * (1 + mean_std_ratio**2))
    variance = math.log1p(mean_std_ratio**-2)
    mean = math.log(mean_std_ratio * deviation) - variance / 2
    precision = torch.promote_types(tensor.dtype, torch.float32)
    weights = torch.empty(tensor.shape, dtype=precision, device=tensor.device)
    weights.log_normal_(mean, math.sqrt(variance), generator=generator)
    weights.clamp_(min=torch.finfo(tensor.dtype).tiny)  # half types round a small one to zero
    shape = (1, tensor.shape[1], *(1,) * (tensor.ndim - 2)) if same_sign_inputs else tensor.shape
    signs = torch.empty(shape, dtype=precision, device=tensor.device).bernoulli_(0.5, generator=generator)
    return tensor.copy_(weights * (2 * signs - 1))


def log_normal_weights_(
    module: Module,
    mean_std_ratio: float = 1.0,
    gain: float = 3**-0.5,
    generator: torch.Generator | None = None,
    *,
    same_sign_inputs: bool = False,
) -> Module:
    """Apply `log_normal_` to every parameter of two or more dimensions of a module, biases and norms left alone.

    Args:
        module: Any module.
        mean_std_ratio: See `log_normal_`.
        gain: See `log_normal_`.
        generator: See `log_normal_`.
        same_sign_inputs: See `log_normal_`.

    Returns:
        The module.

    Example:
        >>> from torch import nn
        >>> net = log_normal_weights_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2)))
        >>> bool((net[2].weight == 0).any())
        False
    """
    for parameter in module.parameters():
        if parameter.ndim >= 2:
            log_normal_(parameter, mean_std_ratio, gain, generator, same_sign_inputs=same_sign_inputs)
    return module
