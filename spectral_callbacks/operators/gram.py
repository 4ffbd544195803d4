"""Gram matrices of Jacobian rows: all that the Gauss-Newton matrices of samples have to do with each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_callbacks.operators.samples import Samples


@dataclasses.dataclass(frozen=True)
class SampleCurvature:
    """The Gauss-Newton matrix of every sample, in coordinates that do not grow with the number of parameters.

    With J_i the Jacobian of the C outputs of sample i (flattened) and A_i its curvature, G_i = J_iᵀ A_i J_i; all traces
    and inner products of these follow from here. float64, on the CPU.

    Attributes:
        gram: (N, C, N, C), inner products of the rows of all J_i.
        slopes: (N, C), d loss_i / d outputs_i.
        curvatures: (N, C, C), d² loss_i / d outputs_i².
        losses: (N,), the loss of each sample alone.
    """

    gram: Tensor
    slopes: Tensor
    curvatures: Tensor
    losses: Tensor

    def gradient_gram(self) -> Tensor:  # (N, N)
        """Return the inner products of the gradients of all samples."""
        return torch.einsum("ic,icjd,jd->ij", self.slopes, self.gram, self.slopes)


def gram(samples: Samples) -> Tensor:  # (N C, N C)
    """Return the inner products of all Jacobian rows, float64 on the CPU.

    Each row is computed once, and all are held. Products of float32 rows are taken in float32, and summed over the
    parameters in float64.
    """
    num_rows = samples.num_samples * samples.num_outputs
    result = torch.empty(num_rows, num_rows, dtype=torch.float64)
    held: list[tuple[slice, tuple[Tensor, ...]]] = []
    start = 0
    for chunk in samples.chunks():
        rows = samples.rows(chunk)
        place = slice(start, start + len(rows[0]))
        start = place.stop
        held.append((place, rows))
        for other, others in held:
            products = _products(rows, others)
            result[place, other] = products
            result[other, place] = products.mT
    return result


def sample_curvature(
    samples: Samples,
    rows: Tensor | None = None,  # (N C, N C)
) -> SampleCurvature:
    """Return what `SampleCurvature` holds, with the inner products of the Jacobian rows where they are known."""
    N, C = samples.num_samples, samples.num_outputs
    rows = gram(samples) if rows is None else rows
    places = dict.fromkeys((chunk.batch, chunk.samples) for chunk in samples.chunks())
    losses, slopes, curvatures = zip(*(samples.scores(*place) for place in places), strict=True)
    return SampleCurvature(
        gram=rows.view(N, C, N, C),
        slopes=torch.cat(slopes).cpu().double(),
        curvatures=torch.cat(curvatures).cpu().double(),
        losses=torch.cat(losses).cpu().double(),
    )


def _products(
    rows: Sequence[Tensor], others: Sequence[Tensor]
) -> Tensor:  # float64 on the CPU: not all devices know it
    products = torch.zeros(len(rows[0]), len(others[0]), dtype=torch.float64)
    for a, b in zip(rows, others, strict=True):
        dtype = torch.promote_types(a.dtype, torch.float32)
        products += (a.to(dtype) @ b.to(dtype).mT).cpu()
    return products
