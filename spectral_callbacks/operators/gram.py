"""Gram matrices of Jacobian rows: all that the Gauss-Newton matrices of samples have to do with each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_callbacks.operators.samples import Chunk, Samples


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


def gram(samples: Samples) -> Tensor:  # (N C, N C)
    """Return the inner products of all Jacobian rows, float64 on the CPU.

    At most 256 MiB of rows are held: beyond that, rows are computed again for each pair of blocks. Products of float32
    rows are taken in float32, and summed over the parameters in float64.
    """
    num_rows = samples.num_samples * samples.num_outputs
    result = torch.empty(num_rows, num_rows, dtype=torch.float64)
    blocks = _blocks(samples)
    for i, block in enumerate(blocks):
        held = [(place, samples.rows(chunk)) for place, chunk in block]
        for place, rows in held:
            for other, others in held:
                if other.start <= place.start:
                    _fill(result, place, rows, other, others)
        for later in blocks[i + 1 :]:
            for place, chunk in later:
                rows = samples.rows(chunk)
                for other, others in held:
                    _fill(result, place, rows, other, others)
    return result


def sample_curvature(samples: Samples) -> SampleCurvature:
    """Return what `SampleCurvature` holds."""
    N, C = samples.num_samples, samples.num_outputs
    rows = gram(samples)
    places = dict.fromkeys((chunk.batch, chunk.samples) for chunk in samples.chunks())
    losses, slopes, curvatures = zip(*(samples.scores(*place) for place in places), strict=True)
    return SampleCurvature(
        gram=rows.view(N, C, N, C),
        slopes=torch.cat(slopes).double().cpu(),
        curvatures=torch.cat(curvatures).double().cpu(),
        losses=torch.cat(losses).double().cpu(),
    )


def _blocks(samples: Samples) -> list[list[tuple[slice, Chunk]]]:
    """Group the chunks so that two groups can be held, or one if it is all."""
    num_rows = samples.num_samples * samples.num_outputs
    held = samples.held_bytes
    limit = held if num_rows * samples.row_bytes <= held else held // 2
    blocks: list[list[tuple[slice, Chunk]]] = []
    start = size = 0
    for chunk in samples.chunks():
        count = len(chunk.samples) * len(chunk.outputs)
        if not blocks or size + count * samples.row_bytes > limit:
            blocks.append([])
            size = 0
        blocks[-1].append((slice(start, start + count), chunk))
        start, size = start + count, size + count * samples.row_bytes
    return blocks


def _fill(result: Tensor, place: slice, rows: Sequence[Tensor], other: slice, others: Sequence[Tensor]) -> None:
    products = torch.zeros(len(rows[0]), len(others[0]), dtype=torch.float64, device=rows[0].device)
    for a, b in zip(rows, others, strict=True):
        dtype = torch.promote_types(a.dtype, torch.float32)
        products += a.to(dtype) @ b.to(dtype).mT
    result[place, other] = products.cpu()
    result[other, place] = products.mT.cpu()
