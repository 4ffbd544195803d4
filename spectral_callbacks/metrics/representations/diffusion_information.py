"""Diffusion spectral mutual information: how many bits knowing a sample's group takes off the entropy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.representations.diffusion_entropy import check_walk, drawn, kernel_entropy
from spectral_callbacks.metrics.representations.diffusion_kernel import Sigma, distances
from spectral_callbacks.metrics.representations.feature_matrix import checked_features, checked_groups


def diffusion_mutual_information(
    features: Tensor,  # (N, d)
    groups: Tensor,  # (N,), integers
    *,
    sigma: Sigma = "median",
    t: float = 1,
    alpha: float = 0.0,
    num_repetitions: int = 5,
    max_samples: int = 10_000,
    eigenvalue_dtype: torch.dtype = torch.float64,
    generator: torch.Generator,
) -> Estimate:
    """Return Σ_c p(c) (mean_r H(Z*_r) - H(Z | c)), H the diffusion spectral entropy, in bits.

    Z | c are the n_c samples of a group, p(c) = n_c/N, and Z*_r random subsets of all samples of the same size n_c,
    drawn without replacement: the entropy grows with the number of samples, so a group is compared with as many of all.

    How to read it: 0, up to its error, where groups lie in the features like random subsets, and at most about log2 of
    the number of groups: for tight clusters far from each other it is that number's logarithm, less what subsets miss
    or hold unevenly (8 equal clusters of 32 samples: 2.9, not 3). It can be slightly negative. It grows with the size
    of the groups: compare at equal N and groups only.

    The error is the standard error over the random subsets; what other samples of the same distribution would give is
    not in it. A group of one sample has no entropy, and neither has a subset of one: it adds 0. Distances are computed
    once. Costs N² d operations and num_repetitions + 1 decompositions of an n_c × n_c matrix for each group.

    Differences to the official code, whose values agree up to the draw of subsets: σ by name is that of all samples,
    once; the generator goes on from group to group, where the official one is seeded anew for each; max_samples
    holds, which the official one does not pass on.

    Args:
        features: One row a sample.
        groups: What each sample's label is; of labels that are continuous or vectors, `label_groups`, computed once.
        sigma: Width of the kernel, see `kernel_width`.
        t: Steps of the walk, see `diffusion_entropy`.
        alpha: Exponent of the density, see `diffusion_kernel`.
        num_repetitions: Random subsets for each group; at least 2 for a finite error.
        max_samples: Of more, so many are drawn; the same ones from a generator with the same seed.
        eigenvalue_dtype: Of the eigenvalues, see `diffusion_entropy`.
        generator: Source of the draws, on the CPU.

    Raises:
        ValueError: If an argument is out of its range, all samples are of one group, or the features have no distances,
            see `kernel_width`.

    References:
        Liao, Liu, Christensen, Tong, Huguet, Wolf, Nickel, Adelstein, Krishnaswamy, Assessing neural network
        representations during training using noise-resilient diffusion spectral entropy (2024, arXiv:2312.04823).

    Example:
        >>> groups = torch.arange(4).repeat(50)
        >>> far = 1e3 * torch.eye(4)[groups]
        >>> generator = torch.Generator().manual_seed(0)
        >>> round(diffusion_mutual_information(far, groups, sigma="official", generator=generator).value, 2)  # log2 4
        2.0
    """
    check_walk(t, eigenvalue_dtype)
    if num_repetitions < 1:
        raise ValueError(f"num_repetitions={num_repetitions} must be at least 1; 5 is the official number.")
    groups = checked_groups(groups, len(features))
    if len(features) > max_samples:
        kept = drawn(len(features), max_samples, generator)
        features, groups = features[kept], groups[kept]
    squared, width = distances(checked_features(features, fewest=2), sigma)

    def entropy(samples: Tensor) -> float:
        if len(samples) == 1:
            return 0.0
        among = squared[samples[:, None], samples]
        return kernel_entropy(among, width, t=t, alpha=alpha, dtype=eigenvalue_dtype).value

    N = len(squared)
    members = [(groups == group).nonzero()[:, 0] for group in groups.unique()]
    if len(members) < 2:
        raise ValueError(f"groups holds {len(members)} group among {N} samples; information needs two or more.")
    value = variance = 0.0
    for own in members:
        subsets = torch.zeros(num_repetitions, dtype=torch.float64)
        for i in range(num_repetitions):
            subsets[i] = entropy(torch.randperm(N, generator=generator)[: len(own)])
        share = len(own) / N
        value += share * (subsets.mean().item() - entropy(own))
        if len(own) > 1:
            spread = subsets.var().item() if num_repetitions > 1 else math.inf
            variance += share**2 * spread / num_repetitions
    return Estimate(value, math.sqrt(variance), num_repetitions)
