"""The diffusion kernel of N samples: a random walk between their features that prefers near ones."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spectral_callbacks.metrics.representations.feature_matrix import checked_features

Sigma = float | Literal["median", "sqrt_dim", "official"]

OFFICIAL_SIGMA = 10.0  # the default of dse-dsmi 1.1, as are t = 1, alpha = 0 and at most 10,000 samples
_EXACT = 1e-9  # error of D²/σ² up to which ‖x‖² + ‖y‖² - 2⟨x, y⟩ is trusted
_ROUNDING = 8 * torch.finfo(torch.float64).eps
_ROWS = 512  # of a block


class Kernel(NamedTuple):
    """K, and what its largest eigenvalue belongs to.

    Attributes:
        matrix: K, (N, N), float64, on the CPU.
        degrees: Deg, (N,): its root is the eigenvector of K to the eigenvalue 1.
    """

    matrix: Tensor
    degrees: Tensor


class Distances(NamedTuple):
    """The squared distances of N samples, and the width of the kernel on them.

    Attributes:
        squared: D², (N, N), float64, on the CPU, with an exact 0 on the diagonal.
        sigma: σ.
    """

    squared: Tensor
    sigma: float


def kernel_width(
    features: Tensor,  # (N, d)
    sigma: Sigma = "median",
) -> float:
    """Return the width σ of the Gaussian kernel exp(-D²/(2 σ²)), in units of the features.

    Features grow in training. With a fixed σ the entropy then tells of their size as much as of their geometry: for
    the same samples, 512 of unit norm, times 0.1, 1, 10 it goes from 0 to all of its 9 bits. The median distance makes
    every number that follows independent of scale. Costs N² (d + 1) operations and N² 12 bytes for "median", nothing
    for the others.

    Args:
        features: One row a sample.
        sigma: A number; "median", that of the distances of all N (N - 1)/2 pairs of these very samples, the mean of the
            middle two if even; "sqrt_dim", √d; or "official", 10, the default of the official package, as are t = 1,
            alpha = 0 and max_samples = 10,000 elsewhere.

    Raises:
        ValueError: If it is not positive: half of the pairs or more coincide. If the features are no finite matrix of
            two samples or more.

    Example:
        >>> kernel_width(torch.tensor([[0.0], [1.0], [3.0]]))  # distances 1, 2, 3
        2.0
        >>> kernel_width(torch.zeros(3, 16), "sqrt_dim")
        4.0
    """
    features = checked_features(features, fewest=2)
    return distances(features, sigma).sigma if sigma == "median" else _stated_width(sigma, features.shape[1])


def diffusion_kernel(
    features: Tensor,  # (N, d)
    *,
    sigma: Sigma = "median",
    alpha: float = 0.0,
) -> Tensor:  # (N, N), float64, on the CPU
    """Return the symmetric matrix K = Deg^(-1/2) G Deg^(-1/2), whose eigenvalues are those of a random walk.

    G_ij = exp(-D_ij²/(2 σ²)) holds the similarities, Deg their row sums, and the walk steps from i to j with the
    probability G_ij/Deg_i. Its largest eigenvalue is 1, all others lie in [0, 1]: the Gaussian kernel is positive
    semi-definite. One of them near 1 is a cluster that the walk hardly leaves.

    With alpha > 0 the similarities are first freed of the samples' density, G ← Deg^(-α) G Deg^(-α), and the walk is
    that of the result (Coifman and Lafon 2006, their anisotropic diffusion): alpha = 1/2 makes it a Fokker-Planck
    diffusion, alpha = 1 leaves the geometry alone. The paper of diffusion spectral entropy describes alpha = 1/2; its
    code computes alpha = 0, the default here.

    Distances are float64 and from centered features, so that a common offset costs no digits; where samples are so near
    each other, against the spread of all, that inner products would still lose them, differences are formed. Costs N²
    (d + 10) operations, and 8 N² bytes.

    Args:
        features: One row a sample.
        sigma: Width, see `kernel_width`.
        alpha: Exponent of the density, between 0 and 1.

    Raises:
        ValueError: If an argument is out of its range, see `kernel_width`.

    References:
        Coifman, Lafon, Diffusion maps (2006).

    Example:
        >>> K = diffusion_kernel(torch.tensor([[0.0], [7.0]]), sigma="official")
        >>> a = math.exp(-(7**2) / (2 * 10**2))
        >>> torch.allclose(torch.linalg.eigvalsh(K).flip(0), torch.tensor([1, (1 - a) / (1 + a)]).double())
        True
    """
    squared, width = distances(checked_features(features, fewest=2), sigma)
    return kernel_of(squared, width, alpha).matrix


def distances(
    features: Tensor,  # (N, d), as `checked_features` returns them
    sigma: Sigma,
) -> Distances:
    """Return the squared distances of all pairs, and the width that they, or the name, say."""
    centered = features - features.mean(0)
    sizes = centered.square().sum(1)
    if not math.isfinite(4 * sizes.max().item()):
        raise ValueError("features has entries whose squares float64 cannot hold; divide all by the largest.")
    found = _with_width(_by_inner_products(centered, sizes), features, sigma)
    if _ROUNDING * sizes.max().item() <= _EXACT * found.sigma**2:
        return _positive(found, sigma)
    direct = torch.cdist(centered, centered, compute_mode="donot_use_mm_for_euclid_dist").square_()
    return _positive(_with_width(direct, features, sigma), sigma)


def kernel_of(
    squared: Tensor,  # (N, N), which K overwrites
    sigma: float,
    alpha: float,
) -> Kernel:
    """Return K in the room of the squared distances."""
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie between 0 and 1; 0 is the official code's random walk.")
    similar = squared.mul_(-0.5 / sigma**2).exp_()
    if alpha:
        _scale_(similar, similar.sum(1) ** -alpha)
    degrees = similar.sum(1)
    return Kernel(_scale_(similar, degrees.rsqrt()), degrees)


def _by_inner_products(centered: Tensor, sizes: Tensor) -> Tensor:
    N = len(centered)
    squared = torch.empty(N, N, dtype=torch.float64)
    for start in range(0, N, _ROWS):
        block = slice(start, start + _ROWS)
        torch.addmm(sizes, centered[block], centered.mT, alpha=-2, out=squared[block])
        squared[block].add_(sizes[block, None]).clamp_(min=0)
    squared.fill_diagonal_(0)
    return squared


def _with_width(squared: Tensor, features: Tensor, sigma: Sigma) -> Distances:
    width = _median_distance(squared) if sigma == "median" else _stated_width(sigma, features.shape[1])
    return Distances(squared, width)


def _median_distance(squared: Tensor) -> float:
    N = len(squared)
    pairs = torch.empty(N * (N - 1) // 2, dtype=torch.float64)
    torch.cat([squared[i, i + 1 :] for i in range(N - 1)], out=pairs)
    values, middle = pairs.numpy(), len(pairs) // 2
    values.partition(middle)
    upper = values[middle].item()
    lower = upper if len(pairs) % 2 else values[:middle].max().item()
    return (math.sqrt(lower) + math.sqrt(upper)) / 2


def _stated_width(sigma: Sigma, dim: int) -> float:
    if isinstance(sigma, str):
        named = {"sqrt_dim": math.sqrt(dim), "official": OFFICIAL_SIGMA}
        if sigma not in named:
            raise ValueError(f"sigma={sigma!r} is no width; pass a number, 'median', 'sqrt_dim' or 'official'.")
        return named[sigma]
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma={sigma} must be a positive number; 'median' adapts to the features.")
    return float(sigma)


def _positive(found: Distances, sigma: Sigma) -> Distances:
    if not found.sigma > 0:
        raise ValueError(
            f"sigma={sigma!r} is {found.sigma:g}: half of the pairs of samples or more coincide, as for constant "
            "features or dead units; pass a number, or 'sqrt_dim'."
        )
    return found


def _scale_(matrix: Tensor, factors: Tensor) -> Tensor:
    return matrix.mul_(factors).mul_(factors[:, None])
