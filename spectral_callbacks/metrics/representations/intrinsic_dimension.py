"""The intrinsic dimension of features: how many numbers it takes to say where a sample lies among its neighbors."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.representations.feature_matrix import centered_features

_FEWEST = 3  # samples: each has two neighbors
_CLOSE = 1e-4  # of a row's distance from the mean: d² from inner products has lost 8 of its 16 digits
_TINY = 1e-130  # of the largest: the square of a rounding error in it is still a number
_BLOCK = 2**22  # numbers held at a time, 32 MiB
_UNBIASED_UP_TO = 1.4  # times log n, see `two_nn_bias_warning`


def two_nn_dimension(
    features: Tensor,  # (n, d)
) -> Estimate:
    """Return the intrinsic dimension of the manifold that the features lie on, from two nearest neighbors of each.

    With r1 and r2 the distances of a sample to its nearest and second nearest other one, r2/r1 follows a Pareto law
    whose exponent is the dimension D, as long as the density hardly changes over r2. Its estimate is (n - 1)/Σ log
    (r2/r1). The maximum of the likelihood has n in place of n - 1, and is too high by n/(n - 1) for independent ratios.

    The number is local: a curved sheet has dimension 2 whatever its covariance spans. It is scale-free, at most about
    the number of features, and compares only at equal n: noise looks like dimensions on the scale of r2, and r2 shrinks
    with n.

    Bias: downward, as r2 is not small in many dimensions. Measured with n = 2,000: 9.7 of a Gaussian in 10 dimensions,
    22.8 in 30. A hard boundary does more: 4.73 of a uniform cube in 5 dimensions, 7.2 in 8, 15 in 20. There is a
    warning where `two_nn_bias_warning` has one.

    Error: the theory of n independent ratios, D/√n, is too small by 25 % in one to three dimensions, 15 % in ten, since
    neighbors share their distances (measured over draws of Gaussians). The error here has the covariance of neighbors
    in it, Σ over pairs with one among the two nearest of the other, and is at least D/√n. The bias is not in it.

    Copies of a sample have distance 0 and count once. Features rounded to few bits have many equal distances, which
    make the dimension look higher.

    Costs n² d operations in float64, in blocks of 32 MiB. The neighbors are found by inner products of the centered
    features, their distances from differences. Where neighbors are closer than 1e-4 of their distance from the mean, as
    in tight clusters, they are found by differences too, which takes ten times as long.

    Args:
        features: One row a sample.

    Returns:
        The dimension; `num_samples` are those that differ.

    Raises:
        ValueError: If `features` is no finite matrix, has less than 3 samples that differ, or no two distances that do.

    Reference: Facco, d'Errico, Rodriguez and Laio 2017, doi:10.1038/s41598-017-11873-y; they fit a line to
    the distribution without its upper tenth instead of maximizing the likelihood.

    Example:
        >>> angle = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 6
        >>> spiral = torch.stack([angle * angle.cos(), angle * angle.sin(), angle], dim=1)
        >>> round(two_nn_dimension(spiral).value)  # a curve
        1
    """
    found = two_nn_estimate(features)
    message = two_nn_bias_warning(found.num_samples, found.value)
    if message is not None:
        warnings.warn(message, stacklevel=2)
    return found


def two_nn_estimate(
    features: Tensor,  # (n, d)
) -> Estimate:
    """Return `two_nn_dimension`, without a warning.

    Args:
        features: One row a sample.

    Raises:
        ValueError: As `two_nn_dimension`.
    """
    rows = centered_features(features, fewest=_FEWEST)
    rows = torch.unique(torch.nn.functional.hardshrink(rows / rows.abs().max(), _TINY), dim=0)
    if len(rows) < _FEWEST:
        raise ValueError(
            f"features has {len(rows)} samples that differ; at least {_FEWEST} are needed. Collect more, or look for a "
            "collapsed layer."
        )
    distances, neighbors = _two_nearest(rows)
    ratios = (distances[:, 1] / distances[:, 0]).log()
    mean = ratios.mean().item()
    if not mean > 0:
        raise ValueError(
            "the nearest and the second nearest neighbor of every sample are equally far, as on a grid or between "
            "one-hot codes: there is no dimension to see. Take features that are continuous."
        )
    n = len(rows)
    dimension = (n - 1) / (n * mean)
    deviation = math.sqrt(max(_variance_of_sum(ratios - mean, neighbors), n * mean**2))  # not below theory
    return Estimate(dimension, dimension * deviation / (n * mean), n)


def two_nn_bias_warning(
    num_samples: int,
    dimension: float,
) -> str | None:
    """Return what to warn of where `two_nn_dimension` is likely more than 5 % too low, otherwise None.

    The rule is dimension > 1.4 log n. Measured on Gaussians with n = 100, 200, 500, 1,000, 2,000, 5,000: the bias
    passes 5 % at an estimate of about 6.7, 7.2, 8.3, 10, 11, 12; it is near 13 % at 1.5 times the rule's limit, 20 % at
    1.9 times and 26 % at 2.3 times. A hard boundary is not covered: on uniform cubes the bias passes 5 % already at
    2.7, 3, 3.5, 4, 4.6, 5, about 0.6 log n. Nor are clusters of few samples each.

    Args:
        num_samples: n, samples that differ.
        dimension: The estimate.

    Example:
        >>> two_nn_bias_warning(2000, 9.7) is None, two_nn_bias_warning(2000, 22.8) is None
        (True, False)
    """
    limit = _UNBIASED_UP_TO * math.log(num_samples)
    if dimension <= limit:
        return None
    return (
        f"a two-NN dimension of {dimension:.3g} from n={num_samples} samples is likely more than 5 % too low: it is "
        f"above 1.4 log n = {limit:.2g}. Read it as a lower bound, and compare it at equal n only; more samples help "
        "little."
    )


def _two_nearest(
    rows: Tensor,  # (n, d)
) -> tuple[Tensor, Tensor]:  # distances and indices, (n, 2)
    n, d = rows.shape
    squares = (rows * rows).sum(1)
    distances, neighbors = [], []
    for chosen in torch.arange(n).split(max(_BLOCK // max(n, 2 * d), 1)):
        block = rows[chosen]
        fast = torch.addmm(squares, block, rows.mT, alpha=-2)  # less the |x|² of the row, which orders nothing
        fast[torch.arange(len(chosen)), chosen] = math.inf
        near = fast.topk(2, largest=False).indices
        exact, order = torch.linalg.vector_norm(rows[near] - block[:, None], dim=2).sort(dim=1)
        near = near.gather(1, order)
        close = exact[:, 1] < _CLOSE * squares[chosen].sqrt()
        if close.any():
            direct = torch.cdist(block[close], rows, compute_mode="donot_use_mm_for_euclid_dist")
            direct[torch.arange(len(direct)), chosen[close]] = math.inf
            exact[close], near[close] = direct.topk(2, largest=False)
        distances.append(exact)
        neighbors.append(near)
    return torch.cat(distances), torch.cat(neighbors)


def _variance_of_sum(
    deviations: Tensor,  # (n,)
    neighbors: Tensor,  # (n, 2)
) -> float:
    """Return Σ_ij c_ij x_i x_j, with c_ij = 1 for i = j and for neighbors, otherwise 0: others are independent."""
    pairs = torch.stack([torch.arange(len(neighbors)).repeat_interleave(2), neighbors.flatten()], dim=1)
    first, second = torch.unique(pairs.sort(dim=1).values, dim=0).unbind(1)
    return (deviations @ deviations + 2 * deviations[first] @ deviations[second]).item()
