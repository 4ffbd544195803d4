"""Linear stability of stochastic gradient descent at a minimum: the exact threshold, and conditions it implies.

Near a minimum θ* that fits every one of n samples, a step on the batch 𝓑 is θ - θ* ← (I - η/B Σ_{i∈𝓑} H_i)(θ - θ*) with
the Hessians H_i ⪰ 0 of the samples' losses and H their mean. The run is stable if E‖θ - θ*‖² stays bounded, which is up
to one learning rate η*; a condition that is necessary for stability gives a number that is at most 2/η in a stable run.

Reference: Mulayoff and Michaeli 2024, arXiv:2306.07850 (their numbers of equations); Wu, Wang and Su 2022,
arXiv:2207.02628; Wu and Su 2023, arXiv:2305.17490.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Self

import torch
from torch import Tensor

_MAX_RANK = 64  # of the matrix whose pairs of directions are enumerated: 2,080 pairs
_RANK_TOL = 1e-12  # relative eigenvalue below which a direction is flat for every sample


def noise_fraction(num_samples: int, batch_size: int, *, replacement: bool) -> float:
    """Return p: a step on B of n samples has the second moments of a single sample with probability p, all n else.

    Without replacement p = (n - B) / (B (n - 1)), from 1 at B = 1 to 0 at B = n; with replacement p = 1/B.

    Args:
        num_samples: n, samples of the whole dataset.
        batch_size: B, samples of a step.
        replacement: Whether a sample can come twice in one batch.

    Raises:
        ValueError: If no such batch can be drawn.

    Example:
        >>> noise_fraction(8, 2, replacement=False), noise_fraction(8, 2, replacement=True)
        (0.42857142857142855, 0.5)
    """
    if batch_size < 1 or num_samples < 1:
        raise ValueError(f"batch_size={batch_size!r} of {num_samples!r} samples: both must be at least 1.")
    if replacement:
        return 1 / batch_size
    if batch_size > num_samples:
        raise ValueError(
            f"batch_size={batch_size} is more than the {num_samples} samples there are, and without replacement none "
            "comes twice; pass at most that, or replacement=True."
        )
    return 0.0 if batch_size == num_samples else (num_samples - batch_size) / (batch_size * (num_samples - 1))


def sgd_threshold(
    hessians: Tensor,  # (n, d, d)
    *,
    batch_size: int,
    replacement: bool,
) -> float:
    """Return the learning rate η* up to which SGD is linearly stable at a minimum that fits every sample.

    η* = 2 / λ_max(C⁺ D) with C = (H⊗I + I⊗H)/2 and D = (1 - p) H⊗H + p/n Σ H_i⊗H_i: necessary and sufficient for
    bounded second moments, for any number of outputs. In units of parameters squared per loss; infinite if every
    Hessian is 0. Gradient descent is B = n, with η* = 2 / λ_max(H).

    Second moments are symmetric matrices, and vanish where H does, so the eigenvalue is taken over symmetric matrices
    on the range of H, of rank r: n r⁴/4 operations and r⁴/4 numbers.

    Args:
        hessians: Of the samples, symmetric and positive semidefinite.
        batch_size: B, samples of a step.
        replacement: Whether a sample can come twice in one batch.

    Raises:
        ValueError: If the Hessians are not positive semidefinite, or the rank of their mean exceeds 64.

    Example:
        >>> hessians = torch.diag_embed(8 * torch.eye(8))  # 8 orthogonal samples, H = I
        >>> [round(sgd_threshold(hessians, batch_size=b, replacement=False), 9) for b in (1, 2, 4, 8)]
        [0.25, 0.5, 1.0, 2.0]
    """
    hessians = _checked(hessians)
    p = noise_fraction(len(hessians), batch_size, replacement=replacement)
    values, vectors = torch.linalg.eigh(hessians.mean(0))
    # A flat direction x may be dropped: H_i ⪯ n H, so that |xᵀ H_i y|² ≤ n xᵀHx yᵀH_i y vanishes for every y.
    curved = values > _RANK_TOL * values[-1]
    values, vectors = values[curved], vectors[:, curved]
    rank = len(values)
    if not rank:
        return math.inf
    if rank > _MAX_RANK:
        raise ValueError(
            f"the mean of the Hessians has rank {rank}, and the exact threshold is for at most {_MAX_RANK}; use "
            "SampleHessians.trace_condition and directional_condition, which are necessary conditions at any size."
        )
    # D in the orthonormal basis (E_ab + E_ba) / √2, a < b, and E_aa of the symmetric matrices; C is diagonal there.
    a, b = torch.triu_indices(rank, rank)
    scale = torch.where(a == b, 0.5, 1.0).double().sqrt()
    D = torch.diag((1 - p) * values[a] * values[b])
    for H_i in vectors.mT @ hessians @ vectors:
        products = H_i[a][:, a] * H_i[b][:, b] + H_i[a][:, b] * H_i[b][:, a]
        D += p / len(hessians) * scale[:, None] * products * scale
    root = ((values[a] + values[b]) / 2).rsqrt()
    return 2 / torch.linalg.eigvalsh(root[:, None] * D * root)[-1].item()


@dataclasses.dataclass(frozen=True)
class SampleHessians:
    """The Hessians of m samples, known by the numbers that trace condition and norm depend on.

    The m samples are all n of a dataset, or drawn from it without replacement; then ‖H‖² is estimated without bias:
    with d the mean of ‖H_i‖² and o the mean of ⟨H_i, H_j⟩ over i ≠ j it is d/n + (1 - 1/n) o.

    Attributes:
        products: Frobenius inner products ⟨H_i, H_j⟩, (m, m), float64.
        traces: (m,), float64.

    Example:
        >>> samples = SampleHessians.from_dense(torch.diag_embed(4 * torch.eye(4)))  # orthogonal: H = I
        >>> samples.frobenius_norm(), samples.trace_condition(batch_size=1, replacement=False)
        (2.0, 4.0)
    """

    products: Tensor
    traces: Tensor

    @classmethod
    def from_dense(
        cls,
        hessians: Tensor,  # (m, d, d)
    ) -> Self:
        """Return those of symmetric matrices."""
        hessians = hessians.to("cpu", torch.float64)
        flat = hessians.flatten(1)
        return cls(flat @ flat.mT, hessians.diagonal(dim1=1, dim2=2).sum(1))

    @classmethod
    def from_gram(
        cls,
        gram: Tensor,  # (m, C, m, C)
        curvatures: Tensor,  # (m, C, C)
    ) -> Self:
        """Return those of Gauss-Newton matrices G_i = J_iᵀ A_i J_i, of which ⟨G_i, G_j⟩ = tr A_i K_ij A_j K_ji.

        Args:
            gram: Inner products of the rows of the output Jacobians: gram[i, :, j, :] is K_ij = J_i J_jᵀ.
            curvatures: A_i, the second derivatives of each sample's loss in its C outputs.
        """
        gram, curvatures = gram.to("cpu", torch.float64), curvatures.to("cpu", torch.float64)
        half = torch.einsum("iab,ibjc->iajc", curvatures, gram)  # A_i K_ij
        own = torch.diagonal(half, dim1=0, dim2=2)  # (C, C, m)
        return cls(torch.einsum("iajc,jcia->ij", half, half), own.diagonal().sum(1))

    def take(
        self,
        indices: Tensor,  # (l,)
    ) -> SampleHessians:
        """Return some of the samples."""
        return SampleHessians(self.products[indices][:, indices], self.traces[indices])

    def trace(self) -> float:
        """Return tr H."""
        return self.traces.mean().item()

    def frobenius_norm(self, *, dataset_size: int | None = None) -> float:
        """Return ‖H‖ of the dataset; NaN where too few samples say nothing of it.

        Args:
            dataset_size: n; m if left out.
        """
        square = weighted_pairs(_own_mean(self.products), _pair_mean(self.products), dataset_size or len(self.traces))
        return math.sqrt(square) if square >= 0 else math.nan

    def trace_condition(self, *, batch_size: int, replacement: bool, dataset_size: int | None = None) -> float:
        """Return [(1 - p) ‖H‖² + p mean ‖H_i‖²] / tr H, which is at most 2/η where SGD is stable: condition (16).

        For batch size 1 and a scalar output ‖H_i‖ = tr H_i, and so tr H ≤ 2/η follows, by Jensen's inequality. For
        larger batches tr H ≤ 2/(p η) is all that does, and for C outputs tr H ≤ 2C/(p η).

        Args:
            batch_size: B, samples of a step.
            replacement: Whether a sample can come twice in one batch.
            dataset_size: n; m if left out.
        """
        n = dataset_size or len(self.traces)
        p = noise_fraction(n, batch_size, replacement=replacement)
        own = _own_mean(self.products)
        trace = self.trace()
        return ((1 - p) * weighted_pairs(own, _pair_mean(self.products), n) + p * own) / trace if trace else math.nan


def directional_condition(
    curvatures: Tensor,  # (m,)
    *,
    batch_size: int,
    replacement: bool,
    dataset_size: int | None = None,
) -> float:
    """Return λ + p/λ mean (vᵀH_i v - λ)², which is at most 2/η where SGD is stable: condition (15).

    v is the top eigenvector of H and λ = vᵀHv; the second term is what the noise adds along v. It is necessary along
    every unit vector v, so one that is not quite the eigenvector makes it weaker and not wrong.

    Args:
        curvatures: vᵀH_i v of all samples, or of some; λ is their mean, and the variance is estimated without bias.
        batch_size: B, samples of a step.
        replacement: Whether a sample can come twice in one batch.
        dataset_size: n; m if left out.

    Example:
        >>> along_first = torch.tensor([4.0, 0.0, 0.0, 0.0])  # of 4 orthogonal samples, H = I
        >>> directional_condition(along_first, batch_size=1, replacement=False)
        4.0
    """
    curvatures = curvatures.to("cpu", torch.float64)
    m = len(curvatures)
    n = dataset_size or m
    p = noise_fraction(n, batch_size, replacement=replacement)
    mean = curvatures.mean().item()
    square = curvatures.square().mean().item()
    pairs = (m * mean**2 - square) / (m - 1) if m > 1 else math.nan
    return mean + p / mean * (square - weighted_pairs(square, pairs, n)) if mean else math.nan


def _own_mean(products: Tensor) -> float:
    return products.diagonal().mean().item()


def _pair_mean(products: Tensor) -> float:
    m = len(products)
    return (products.sum() - products.trace()).item() / (m * (m - 1)) if m > 1 else math.nan


def weighted_pairs(own: float, pairs: float, n: int) -> float:
    """Return the mean over all ordered pairs of n samples, of which a share 1/n are a sample with itself."""
    return own if n == 1 else own / n + (1 - 1 / n) * pairs


def _checked(hessians: Tensor) -> Tensor:
    if hessians.ndim != 3 or hessians.shape[1] != hessians.shape[2] or not len(hessians):
        raise ValueError(f"hessians has shape {tuple(hessians.shape)}; pass one square matrix a sample, (n, d, d).")
    hessians = hessians.to("cpu", torch.float64)
    size = hessians.abs().max().item()
    if not math.isfinite(size):
        raise ValueError("a Hessian is not finite; look for NaN or infinity in the weights or the samples.")
    lowest = torch.linalg.eigvalsh(hessians).min().item()
    if (hessians - hessians.mT).abs().max() > 1e-6 * size or lowest < -1e-6 * size:
        raise ValueError(
            f"the Hessians must be symmetric and positive semidefinite, as those of a convex loss at a minimum that "
            f"fits every sample, and the smallest eigenvalue is {lowest:.3g}; pass Gauss-Newton matrices elsewhere."
        )
    return hessians
