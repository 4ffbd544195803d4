"""What single samples say about the stability of SGD, each number with its standard error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spectral_callbacks.callbacks.sampling import Sampling
from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics import SampleHessians, alignment, directional_condition, jackknife
from spectral_callbacks.operators import SampleCurvature

_ENDLESS = 10**12  # samples: nothing that is seen of so many makes a difference
_NUM_GROUPS = 10  # of samples that the jackknife leaves out in turn


@dataclasses.dataclass(frozen=True)
class SampleConditions:
    """What the Gauss-Newton matrices G_i of single samples say about their mean G over the dataset.

    Attributes:
        trace: tr G over these samples, exactly.
        norm: ‖G‖.
        alignment: μ of `spectral_callbacks.metrics.alignment`.
        conditions: "batch_ratio" and "directional_ratio", curvatures that are at most 2/η in a stable run; empty where
            it is not known how training draws.
    """

    trace: float
    norm: Estimate
    alignment: Estimate
    conditions: dict[str, Estimate]


def sample_conditions(
    curved: SampleCurvature,
    along: Tensor,  # (N,)
    sampling: Sampling,
) -> SampleConditions:
    """Compare the Gauss-Newton matrices of single samples.

    Args:
        curved: Of m samples.
        along: Curvature of N samples along the top eigenvector of G.
        sampling: How training draws; from its dataset the samples were drawn without replacement, and they count as the
            whole of it where its size is not known.
    """
    samples, m = SampleHessians.from_gram(curved.gram, curved.curvatures), len(curved.losses)
    n = sampling.dataset_size or m

    def estimate(statistic: Callable[[Tensor], float], count: int = m) -> Estimate:
        error = jackknife(statistic, count, dataset_size=n, num_groups=_NUM_GROUPS)
        return Estimate(statistic(torch.arange(count)), error, count)

    conditions: dict[str, Estimate] = {}
    if not sampling.unknown:
        kind: dict[str, Any] = dataclasses.asdict(sampling)
        conditions = {
            "batch_ratio": estimate(lambda i: samples.take(i).trace_condition(**kind)),
            "directional_ratio": estimate(lambda i: directional_condition(along[i], **kind), len(along)),
        }
    norm = estimate(lambda i: samples.take(i).frobenius_norm(dataset_size=n))
    return SampleConditions(samples.trace(), norm, loss_noise_alignment(curved, n), conditions)


def loss_noise_alignment(curved: SampleCurvature, dataset_size: int | None) -> Estimate:
    """Return μ of `spectral_callbacks.metrics.alignment`, with a jackknife error.

    Args:
        curved: Of m samples.
        dataset_size: n, samples that they were drawn from without replacement; infinite if None.
    """
    m = len(curved.losses)
    n = _ENDLESS if dataset_size is None else dataset_size

    def aligned(chosen: Tensor) -> float:
        gram = curved.gram[chosen][:, :, chosen]
        slopes, curvatures, losses = curved.slopes[chosen], curved.curvatures[chosen], curved.losses[chosen]
        return alignment(gram, slopes, curvatures, losses, dataset_size=n)

    return Estimate(aligned(torch.arange(m)), jackknife(aligned, m, dataset_size=n, num_groups=_NUM_GROUPS), m)
