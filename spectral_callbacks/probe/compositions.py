"""Compositions: fused operations of torch, written with operations that torch differentiates twice."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:  # as v
    """`torch._weight_norm`, whose own second derivative is wrong on the CPU (by 0.2 to 0.9, without an error)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


class _EuclideanDistance(torch.autograd.Function):
    """‖aᵢ - bⱼ‖ with the derivative (aᵢ - bⱼ)/‖aᵢ - bⱼ‖, or 0 at distance 0, as torch has it; differentiable in turn.

    The saved distance carries this function's own derivative, so any order is exact without the (P, R, M) differences.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        # Through matrix products a point's distance to itself is √ε rather than 0, and its curvature 1/√ε.
        distance = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
        ctx.save_for_backward(a, b, distance)
        return distance

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        a, b, distance = ctx.saved_tensors
        zero = distance == 0
        ratio = (gradients[0] / distance.masked_fill(zero, 1)).masked_fill(zero, 0)
        return (
            ratio.sum(-1, keepdim=True) * a - ratio @ b,
            ratio.sum(-2).unsqueeze(-1) * b - ratio.mT @ a,
        )


def cdist(
    x1: Tensor,  # (*, P, M)
    x2: Tensor,  # (*, R, M)
    p: float = 2.0,
    compute_mode: str = "",
) -> Tensor:  # (*, P, R)
    """`torch.cdist`, with the first derivative that torch has where points coincide."""
    if p == 0:  # counts the components that differ
        return torch.cdist(x1.detach(), x2.detach(), p)
    dtype = torch.promote_types(x1.dtype, torch.float32)  # what autocast does
    batch = torch.broadcast_shapes(x1.shape[:-2], x2.shape[:-2])
    a = x1.to(dtype).expand(*batch, *x1.shape[-2:])
    b = x2.to(dtype).expand(*batch, *x2.shape[-2:])
    if p == 2:
        return _EuclideanDistance.apply(a, b)
    difference = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == float("inf"):
        return difference.amax(-1)
    # Powers have infinite derivatives at 0; filled twice, a zero component or distance gets derivative 0, as in torch.
    zero = difference == 0
    power = difference.masked_fill(zero, 1).pow(p).masked_fill(zero, 0).sum(-1)
    zero = power == 0
    return power.masked_fill(zero, 1).pow(1 / p).masked_fill(zero, 0)


def pdist(input: Tensor, p: float = 2.0) -> Tensor:  # (N, M) -> (N (N - 1) / 2,)
    """`torch.pdist`."""
    row, column = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return cdist(input, input, p)[row, column]


def embedding_bag(
    input: Tensor,  # (B, N), or (n,) with offsets
    weight: Tensor,  # (V, D)
    offsets: Tensor | None = None,  # (B,), or (B + 1,) with include_last_offset
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: Literal["sum", "mean", "max"] = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,  # as input
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:  # (B, D)
    """`torch.nn.functional.embedding_bag` as a gather and a sum, mean or maximum."""
    if scale_grad_by_freq or input.is_nested:  # the former's gradient is that of no function: let torch refuse
        rest = (max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights, include_last_offset)
        return F.embedding_bag(input, weight, offsets, *rest, padding_idx)
    if offsets is None:
        offsets = torch.arange(0, input.numel(), input.shape[1], dtype=input.dtype, device=input.device)
        include_last_offset = False
    indices = input.reshape(-1)
    if max_norm is not None:
        torch.embedding_renorm_(weight.detach(), indices, max_norm, norm_type)
    if mode == "max":
        _, _, size, winner = torch.embedding_bag(
            weight.detach(), indices, offsets, False, 2, False, None, include_last_offset, padding_idx
        )
        return weight.gather(0, winner.clamp(min=0)).masked_fill((size == 0).unsqueeze(1), 0)
    num_bags = len(offsets) - include_last_offset
    position = torch.arange(len(indices), dtype=offsets.dtype, device=offsets.device)
    bag = torch.searchsorted(offsets.contiguous(), position, right=True) - 1
    if padding_idx is not None:  # into the extra bag at the end, which is dropped
        bag = bag.masked_fill(indices == padding_idx % len(weight), num_bags)
    vectors = F.embedding(indices, weight, sparse=sparse)
    if per_sample_weights is not None:
        vectors = vectors * per_sample_weights.reshape(-1, 1)
    total = vectors.new_zeros(num_bags + 1, weight.shape[1]).index_add(0, bag, vectors)[:num_bags]
    if mode == "sum":
        return total
    size = vectors.new_zeros(num_bags + 1).index_add(0, bag, vectors.new_ones(len(bag)))[:num_bags]
    return total / size.clamp(min=1).unsqueeze(1)
