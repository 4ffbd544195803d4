"""How log-normal the magnitudes of weights are."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST = 2**20  # entries that are sorted: the distance is then known to 0.001


@torch.no_grad()
def log_magnitudes(weights: Tensor) -> dict[str, Tensor]:
    """Return the share of zeros, moments of ln |w| over the others, and its distance to a normal law.

    The distance is that of Kolmogorov and Smirnov, to the normal law of the same mean and deviation: 0 for log-normal
    weights, about 0.6 / √n for n draws of them, and at most 1. Of more than 2²⁰ entries it takes every k-th.

    Args:
        weights: Of any shape.

    Returns:
        Scalars by name: "zero_share", and where any weight is not zero "log_abs_mean", "log_abs_std",
        "log_abs_skewness" and "log_normality".

    Example:
        >>> w = torch.empty(10_000).log_normal_(1.0, 0.5, generator=torch.Generator().manual_seed(0))
        >>> found = log_magnitudes(w)
        >>> {name: round(abs(found[name].item()), 1) for name in ("log_abs_mean", "log_abs_std", "log_normality")}
        {'log_abs_mean': 1.0, 'log_abs_std': 0.5, 'log_normality': 0.0}
    """
    magnitudes = weights.flatten().abs().to(torch.promote_types(weights.dtype, torch.float32))
    logarithms = magnitudes[magnitudes > 0].log()
    share = 1 - logarithms.new_tensor(len(logarithms) / max(1, len(magnitudes)))
    if not len(logarithms):
        return {"zero_share": share}
    std, mean = torch.std_mean(logarithms, correction=0)
    standard = (logarithms - mean) / std.clamp(min=torch.finfo(std.dtype).tiny)
    ordered = standard[:: 1 + len(standard) // _MOST].sort().values
    below = torch.arange(len(ordered) + 1, device=std.device, dtype=std.dtype) / len(ordered)
    normal = torch.special.ndtr(ordered)
    distance = torch.maximum(below[1:] - normal, normal - below[:-1]).max()
    return {
        "zero_share": share,
        "log_abs_mean": mean,
        "log_abs_std": std,
        "log_abs_skewness": standard.pow(3).mean(),
        "log_normality": distance,
    }
