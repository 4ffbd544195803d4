"""The curvature of every sample along one direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_callbacks.operators import GaussNewton
from spectral_callbacks.probe import num_samples


def curvature_along(
    gauss_newton: GaussNewton,
    v: Tensor,  # (n,)
    batches: Sequence[Any],
) -> Tensor:  # (N,), float64 on the CPU
    """Return vᵀG_i v of every sample of the probe, at the cost of one backward pass.

    Args:
        gauss_newton: Of the probe.
        v: Direction in parameter space.
        batches: Of the probe; their loss is the mean over their samples.

    Raises:
        ValueError: If the outputs' dimension 0 is not that of the samples.
    """
    tangents = gauss_newton.jvp(v)
    curvatures: list[Tensor] = []
    for batch, w, Aw in zip(batches, tangents, gauss_newton.output_curvature(tangents), strict=True):
        size = num_samples(batch)
        if any(t.ndim == 0 or len(t) != size for t in w):
            raise ValueError(
                f"outputs= returned shapes {', '.join(str(tuple(t.shape)) for t in w)} for {size} samples; name a "
                "submodule whose outputs have the samples along dimension 0."
            )
        # A is the second derivative of the mean over the samples: it holds 1/size of that of each.
        pairs = [(a.to("cpu", torch.float64), b.to("cpu", torch.float64)) for a, b in zip(w, Aw, strict=True)]
        curvatures.append(size * torch.stack([(a * b).reshape(size, -1).sum(1) for a, b in pairs]).sum(0))
    return torch.cat(curvatures)
