"""LiDAR: in how many directions the features tell objects apart."""

from __future__ import annotations

import dataclasses
import math
import warnings

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.eigenvalues import effective_rank_of_eigenvalues
from spectral_callbacks.metrics.representations.feature_matrix import centered_features, checked_groups

_FEWEST = 3  # rows: two groups, and one with two
_BIAS = 0.05
_ZERO = 1e-12  # of the largest eigenvalue: below it there is only rounding


def lidar(
    features: Tensor,  # (n, d)
    groups: Tensor,  # (n,)
    *,
    delta: float = 1e-4,
) -> Estimate:
    """Return the linear discriminant analysis rank of features of several augmentations of each of G objects.

    It is exp(-Σ p_k log p_k), p_k = λ_k/Σ λ, with λ the eigenvalues of Σ_w^(-1/2) Σ_b Σ_w^(-1/2): Σ_b the covariance of
    the objects' means, Σ_w that of the augmentations within an object, plus δ I. Directions count by how far they
    separate objects, in units of the scatter of augmentations: between 1 and the smaller of d and G - 1. Higher is
    better among runs of one method: it correlates with the accuracy of a linear probe.

    Each object's mean counts once in Σ_b, whatever its augmentations; in Σ_w each augmentation counts once, with n - G
    in the denominator, so that an object with a single one adds nothing. For equal sizes this is the paper's.

    Bias: the means of q augmentations scatter by Σ_w/q themselves, which adds 1/q to every eigenvalue and raises the
    rank: eigenvalues 1, 1/2, ..., 1/16 have a rank of 3.47, and show 3.95 at q = 10 in 5 features, 20 in 32. Few
    objects, and few augmentations in all, spread a flat spectrum and lower it. There is a warning where
    `lidar_bias_warning` has one. Compare at equal G, q, d and δ.

    Error: the infinitesimal jackknife over objects, the one that leaves out an object at a time to first order (Jaeckel
    1972). It is too large by half for a flat spectrum, whose rank is at its maximum, and by more for fewer objects than
    features. The bias is not in it.

    Costs n d² + d³ operations, with n in place of d where it is smaller, in float64.

    Args:
        features: One row an augmentation.
        groups: The object of each row, integers.
        delta: δ, in units of the squared features: in directions where augmentations scatter less it takes the place of
            Σ_w, and the value is not scale-free. The paper has the term and leaves its size open.

    Returns:
        The rank; `num_samples` are the objects.

    Raises:
        ValueError: If `features` is no finite matrix that varies, `groups` not one integer a row, there is one object
            only, none has two augmentations, all means are equal, or `delta` is not positive.

    Reference: Thilak et al. 2023, arXiv:2312.04000. They add 1e-7 to each p_k, left out here, where 0 log 0 = 0: it
    raises the value by 1e-6 a direction. A library takes the principal components of the matrix instead of its
    eigenvalues, which squares the λ.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> objects = torch.arange(200).repeat_interleave(10)
        >>> means = torch.randn(200, 3, generator=generator) @ torch.eye(3, 6)  # objects differ in 3 directions of 6
        >>> features = means[objects] + 0.1 * torch.randn(2000, 6, generator=generator)
        >>> round(lidar(features, objects).value, 1)
        3.0
    """
    found = _Discriminant.of(features, groups, delta)
    message = lidar_bias_warning(found.eigenvalues, found.sizes, num_features=features.shape[1])
    if message is not None:
        warnings.warn(message, stacklevel=2)
    return found.rank()


def lidar_eigenvalues(
    features: Tensor,  # (n, d)
    groups: Tensor,  # (n,)
    *,
    delta: float = 1e-4,
) -> Tensor:
    """Return the eigenvalues of Σ_w^(-1/2) Σ_b Σ_w^(-1/2), descending; see `lidar` for the matrices and arguments.

    An eigenvalue is the variance of the objects' means in units of the variance of an object's augmentations. Those
    beyond min(d, G) are 0 and left out.

    Returns:
        (min(d, G),), float64, on the CPU.

    Raises:
        ValueError: Where `lidar` does.

    Example:
        >>> features = torch.tensor([[3.0, 1.0], [3.0, -1.0], [-3.0, 1.0], [-3.0, -1.0]])
        >>> lidar_eigenvalues(features, torch.tensor([0, 0, 1, 1]), delta=2.0)  # 18/2: augmentations scatter across
        tensor([9., 0.], dtype=torch.float64)
    """
    return _Discriminant.of(features, groups, delta).eigenvalues


def lidar_bias_warning(
    eigenvalues: Tensor,  # (r,)
    group_sizes: Tensor,  # (G,)
    *,
    num_features: int,
) -> str | None:
    """Return what to warn of where `lidar` is likely more than 5 % too high or too low, otherwise None.

    The larger of two biases decides. Too high: by what the value exceeds that of the eigenvalues less what the scatter
    of the means of q augmentations adds to each; what falls below 0 counts as 0. That is 1/q, the mean over objects for
    unequal sizes, times d/min(d, G - 1) f/(f - d) for a Σ_w of d features known from f = n - G. Too low: by value/2
    (1/G + 1/(f - d)), what is missing to first order for a flat spectrum. With f at most d, Σ_w is singular and δ
    decides. d is the number of eigenvalues above 0 where that is less than G - 1. Checked on Gaussians with flat and
    falling spectra in 5 to 512 features.

    Args:
        eigenvalues: `lidar_eigenvalues`.
        group_sizes: n_g, augmentations of each object, of n in all.
        num_features: d.

    Example:
        >>> flat = 100 * torch.ones(20)
        >>> [lidar_bias_warning(flat, torch.full((G,), 10), num_features=20) is None for G in (50, 500)]
        [False, True]
    """
    value, G = effective_rank_of_eigenvalues(eigenvalues).item(), len(group_sizes)
    f = int(group_sizes.sum()) - G
    rank = int((eigenvalues > _ZERO * eigenvalues.max()).sum())
    d = num_features if rank >= G - 1 else rank
    if f <= d:
        return (
            f"LiDAR of {value:.3g} hangs on delta: {G} objects with {f + G} augmentations leave directions of the {d} "
            "features without any scatter. Take more augmentations than objects and features together."
        )
    inverse_size = (1 / group_sizes.double()).mean().item()
    clear = (eigenvalues - inverse_size * d / min(d, G - 1) * f / (f - d)).clamp(min=0)
    without = effective_rank_of_eigenvalues(clear).item() if clear.any() else 1.0
    too_high, too_low = value / without - 1, value / 2 * (1 / G + 1 / (f - d))
    if max(too_high, too_low) <= _BIAS:
        return None
    if too_high > too_low:
        return (
            f"LiDAR of {value:.3g} is likely too high by more than 5 %: the means of {1 / inverse_size:.3g} "
            f"augmentations scatter themselves, and without that it would be near {without:.3g}. Take more "
            "augmentations an object."
        )
    return (
        f"LiDAR of {value:.3g} is likely too low by more than 5 %: {G} objects with {f + G} augmentations are few "
        f"for so many directions. Take {10 * value:.0f} objects or more."
    )


@dataclasses.dataclass(frozen=True)
class _Discriminant:
    """The eigenvectors of Σ_b v = λ Σ_w v with vᵀ Σ_w v = 1, and what each object has along them.

    Attributes:
        eigenvalues: λ, (r,), descending.
        between: (vᵀ(m_g - m))², m_g the mean of an object, m that of all, (G, r).
        within: Σ_i (vᵀ(x_i - m_g))² over the augmentations of an object, (G, r).
        expected_within: vᵀ Σ_w v without δ, (r,): `within` is n_g - 1 times it in the mean.
        sizes: n_g, (G,).
    """

    eigenvalues: Tensor
    between: Tensor
    within: Tensor
    expected_within: Tensor
    sizes: Tensor

    @classmethod
    def of(cls, features: Tensor, groups: Tensor, delta: float) -> _Discriminant:
        """Return it, or refuse what has no such matrices."""
        if not (delta > 0 and math.isfinite(delta)):
            raise ValueError(f"delta={delta!r} must be positive, for example 1e-4 of the variance of a feature.")
        rows = centered_features(features, fewest=_FEWEST)
        groups, sizes = _objects(groups, len(rows))
        if rows.shape[1] > len(rows):  # the same inner products in fewer coordinates; what is beyond them is 0
            rows = torch.linalg.qr(rows.mT, mode="r").R.mT
        (n, d), G = rows.shape, len(sizes)
        means = torch.zeros(G, d, dtype=torch.float64).index_add_(0, groups, rows) / sizes[:, None]
        rows = rows - means[groups]
        off = means - means.mean(0)
        if off.abs().max() <= _ZERO * max(means.abs().max(), rows.abs().max()):
            raise ValueError(
                f"features has the same mean for each of the {G} objects, so that no direction tells them apart; "
                "LiDAR is not defined."
            )
        scatter = rows.mT @ rows / (n - G)
        factor = torch.linalg.cholesky(scatter + delta * torch.eye(d, dtype=torch.float64))
        whitened = torch.linalg.solve_triangular(factor, off.mT, upper=False) / math.sqrt(G - 1)  # (d, G)
        vectors, singular, sides = torch.linalg.svd(whitened, full_matrices=False)
        # λ are the squares of the singular values of Σ_w^(-1/2) times the means; squaring once more is the bug.
        vectors = torch.linalg.solve_triangular(factor.mT, vectors, upper=True)
        within = torch.zeros(G, len(singular), dtype=torch.float64).index_add_(0, groups, (rows @ vectors).square())
        between = (G - 1) * (singular[:, None] * sides).square().mT
        return cls(singular.square(), between, within, 1 - delta * vectors.square().sum(0), sizes)

    def rank(self) -> Estimate:
        """Return exp of the entropy, with the error from its derivative by the weight of each object."""
        eigenvalues, G = self.eigenvalues, len(self.sizes)
        value, kept = effective_rank_of_eigenvalues(eigenvalues).item(), eigenvalues > _ZERO * eigenvalues[0]
        degrees = self.sizes - 1
        # dλ = vᵀ (dΣ_b - λ dΣ_w) v, for each object's weight
        moved = (self.between - eigenvalues) / (G - 1)
        moved -= eigenvalues * (self.within - degrees[:, None] * self.expected_within) / degrees.sum()
        shares = eigenvalues[kept] / eigenvalues.sum()
        slopes = -(shares.log() + math.log(value)) / eigenvalues.sum()
        influence = value * (moved[:, kept] @ slopes)
        return Estimate(value, math.sqrt(G / (G - 1) * (influence @ influence).item()), G)


def _objects(groups: Tensor, n: int) -> tuple[Tensor, Tensor]:
    names, groups, sizes = torch.unique(checked_groups(groups, n), return_inverse=True, return_counts=True)
    if len(names) < 2 or len(names) == n:
        raise ValueError(
            f"groups names {len(names)} objects for {n} rows; pass several objects, some with two augmentations or "
            "more."
        )
    return groups, sizes
