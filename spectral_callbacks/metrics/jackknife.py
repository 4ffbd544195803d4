"""Standard errors from leaving out one sample at a time."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def jackknife(
    statistic: Callable[[Tensor], float],
    num_samples: int,
    *,
    dataset_size: int,
    num_groups: int | None = None,
) -> float:
    """Return the standard error of a statistic of m samples drawn without replacement from n.

    From its values s_g with one of G groups of samples left out in turn, (G - 1)/G Σ (s_g - s̄)², less the share m/n of
    the dataset that is no guess: 0 where all of it was seen. The error is itself known to some 1/√(2G), relatively.

    Args:
        statistic: From the indices of some samples, (l,), to its value on them.
        num_samples: m.
        dataset_size: n.
        num_groups: G; m if left out or larger.

    Reference: Efron and Stein 1981, doi:10.1214/aos/1176345462.

    Example:
        >>> x = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
        >>> error = jackknife(lambda chosen: x[chosen].mean().item(), 4, dataset_size=10**9)
        >>> round(error, 6), round((x.std() / 4**0.5).item(), 6)  # of a mean it is the usual one
        (1.080123, 1.080123)
    """
    if num_samples >= dataset_size:
        return 0.0
    if num_samples < 2:
        return math.inf
    groups = torch.arange(num_samples).tensor_split(min(num_groups or num_samples, num_samples))
    rest = [torch.cat(groups[:g] + groups[g + 1 :]) for g in range(len(groups))]
    values = torch.tensor([statistic(chosen) for chosen in rest], dtype=torch.float64)
    spread = (len(groups) - 1) * values.var(correction=0).item()
    return math.sqrt(spread * (1 - num_samples / dataset_size))
