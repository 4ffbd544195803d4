"""Alignment of the gradient noise with the curvature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_callbacks.metrics.sgd_stability import SampleHessians, weighted_pairs


def alignment(
    gram: Tensor,  # (m, C, m, C)
    slopes: Tensor,  # (m, C)
    curvatures: Tensor,  # (m, C, C)
    losses: Tensor,  # (m,)
    *,
    dataset_size: int | None = None,
) -> float:
    """Return μ = tr(Σ G) / (2 L ‖G‖²): how well the gradient noise aligns with the curvature.

    Σ, the mean of g_i g_iᵀ less ḡ ḡᵀ, is the covariance of the gradients g_i = J_iᵀ slopes_i of single samples, G the
    Gauss-Newton matrix, L the mean loss. Noise of the size of the loss and the shape of G, Σ = 2 L G, has μ = 1, and a
    minimum where SGD stays has ‖G‖ ≤ √(B/μ) / η (Wu, Wang and Su 2022, arXiv:2207.02628). The 2 L belongs to a squared
    loss ½ (f - y)²; for others μ is an empirical number. Of m samples out of n, numerator and ‖G‖² are estimated
    without bias; NaN where the loss or G is 0, or m is below 3.

    Args:
        gram: Inner products of the rows of the output Jacobians, as `SampleHessians.from_gram` takes them.
        slopes: First derivatives of each sample's loss in its C outputs.
        curvatures: Their second derivatives.
        losses: Loss of each sample.
        dataset_size: n; m if left out.

    Example:
        >>> one = torch.ones(2, 1)
        >>> gram = torch.eye(2).reshape(2, 1, 2, 1)  # two orthogonal samples, G = I/2, each off by 1
        >>> round(alignment(gram, one, one[:, None], torch.tensor([0.5, 0.5])), 9)  # Σ = [[1, -1], [-1, 1]] / 4
        0.5
    """
    gram, slopes, curvatures = (t.to("cpu", torch.float64) for t in (gram, slopes, curvatures))
    m = len(slopes)
    n = dataset_size or m
    norm = SampleHessians.from_gram(gram, curvatures).frobenius_norm(dataset_size=n)
    loss = losses.to("cpu", torch.float64).mean().item()
    moved = torch.einsum("jbia,ia->jib", gram, slopes)  # J_j g_i
    total, own = moved.sum(1), moved.diagonal().mT
    curved = torch.einsum("jab,jib->jia", curvatures, moved)
    # Sums of g_iᵀ G_j g_k over the triples of samples in which i = k, i = j, i = j = k, or anything goes.
    same = (moved * curved).sum().item()
    first = (own * curved.sum(1)).sum().item()
    single = (own * curved.diagonal().mT).sum().item()
    every = (total * curved.sum(1)).sum().item()
    second = weighted_pairs(single / m, (same - single) / (m * (m - 1)) if m > 1 else math.nan, n)  # mean of g_iᵀ G g_i
    if m == n:
        squared = every / m**3  # ḡᵀ G ḡ
    elif m < 3:
        return math.nan
    else:
        distinct = (every - same - 2 * first + 2 * single) / (m * (m - 1) * (m - 2))
        pairs = (same + 2 * first - 3 * single) / (m * (m - 1))
        squared = (single / m + (n - 1) * pairs + (n - 1) * (n - 2) * distinct) / n**2
    return (second - squared) / (2 * loss * norm**2) if loss and norm else math.nan
