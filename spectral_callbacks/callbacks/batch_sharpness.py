"""Batch sharpness: the curvature along its own gradient that a batch has, on average over batches."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from spectral_callbacks.callbacks.sampling import Sampling
from spectral_callbacks.linalg import Estimate
from spectral_callbacks.operators import Hessian, Objective
from spectral_callbacks.probe import Probe


def batch_sharpness(probe: Probe, sampling: Sampling, *, num_draws: int = 8) -> Estimate | None:
    """Return the mean over batches of g_BᵀH_B g_B / |g_B|², gradient and Hessian those of one batch.

    SGD without momentum raises it to 2/η, where λ_max of the whole loss can stay far below (Andreyev and Beneventano
    2024, arXiv:2412.20553). Batches are drawn from the probe's samples as training draws them from the dataset; if one
    batch holds them all, it is the only one there is. Cost: a gradient and a product of a batch for each draw.

    Args:
        probe: With samples along dimension 0 of its batches.
        sampling: How training draws.
        num_draws: Batches to draw.

    Returns:
        The mean and its standard error, over the draws from these samples: 0 where the one batch is the whole dataset,
        infinite where a single batch speaks for others. None where the batches of training are not known, or no batch
        has a gradient.

    Raises:
        ValueError: If the probe has no samples, or fewer than a batch.
    """
    batch_size, num_samples = sampling.batch_size, probe.num_samples
    if batch_size is None or sampling.replacement is None:
        return None
    if batch_size > num_samples and not sampling.replacement:
        raise ValueError(
            f"a batch of training has {batch_size} samples, and the probe only {num_samples}; measure on more with "
            f"num_batches={math.ceil(batch_size / num_samples) * len(probe.batches)}."
        )
    is_whole = batch_size == num_samples and not sampling.replacement
    objectives = [probe.objective] if is_whole else _drawn(probe, batch_size, sampling.replacement, num_draws)
    values = torch.tensor([_along_gradient(objective) for objective in objectives], dtype=torch.float64)
    values = values[values.isfinite()]
    count = len(values)
    if not count:
        return None
    error = values.std().item() / math.sqrt(count) if count > 1 else math.inf
    if is_whole and num_samples == sampling.dataset_size:
        error = 0.0
    return Estimate(values.mean().item(), error, count)


def _drawn(probe: Probe, batch_size: int, replacement: bool, num_draws: int) -> Iterator[Objective]:
    generator, num_samples = probe.generator, probe.num_samples
    for _ in range(num_draws):
        if replacement:
            chosen = torch.randint(num_samples, (batch_size,), generator=generator, device=generator.device)
        else:
            chosen = torch.randperm(num_samples, generator=generator, device=generator.device)[:batch_size]
        yield probe.subset(chosen)


def _along_gradient(objective: Objective) -> float:
    """Return the curvature along the gradient; NaN where there is none."""
    list(objective.graphs())  # kept from here on, so that gradient and product come from one forward pass
    g: Tensor = objective.gradient()[:, None]
    hessian = Hessian(objective)
    square = hessian.gram(g, g).item()
    return hessian.gram(g, hessian.matmat(g)).item() / square if square > 0 else math.nan
