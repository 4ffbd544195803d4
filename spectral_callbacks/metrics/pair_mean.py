"""The mean of a symmetric function over pairs of samples, with its error: a U-statistic."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from spectral_callbacks.linalg import Estimate

_FEWEST = 4  # samples: the square of the mean is estimated from pairs of pairs without a common sample


@dataclasses.dataclass(frozen=True)
class PairMean:
    """The mean of k(x_i, x_j) over i ≠ j among N samples, unbiased for E k(x, y) of independent x and y.

    Its variance is 4 ζ/N + 2 η/(N (N - 1)): ζ is the variance of E[k(x, y) | x], η that of what k has beyond the sum of
    two such functions. Both are estimated without bias, in closed form from the sums of the rows, and cut at 0, so that
    the error comes out too large where there is no linear part: by 15 % in many directions, 25 % in few. The jackknife
    counts the second part twice (Efron and Stein 1981), and that part is most of it for small and noisy samples.

    Attributes:
        value: NaN for a single sample.
        linear: 4 ζ/N; infinite below 4 samples.
        quadratic: 2 η/(N (N - 1)); infinite below 4 samples.
        num_samples: N.

    Reference: Hoeffding 1948, doi:10.1214/aoms/1177730196.

    Example:
        >>> x = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
        >>> square = PairMean.of(x[:, None] * x)  # of the mean, 9 ± 2 · 3 / √400
        >>> round(square.value, 2), round(square.linear**0.5, 2), round(square.quadratic**0.5, 4)
        (8.78, 0.29, 0.0035)
    """

    value: float
    linear: float
    quadratic: float
    num_samples: int

    @classmethod
    def of(
        cls,
        kernel: Tensor,  # (N, N)
    ) -> PairMean:
        """Return that of a symmetric matrix k(x_i, x_j); the diagonal plays no part."""
        pairs, N = _off_diagonal(kernel), len(kernel)
        if N < 2:
            return cls(math.nan, math.inf, math.inf, N)
        rows = pairs.sum(1)
        mean = rows.sum().item() / (N * (N - 1))
        if N < _FEWEST:
            return cls(mean, math.inf, math.inf, N)
        pairs = torch.where(torch.eye(N, dtype=torch.bool), 0.0, pairs - mean)  # less the mean, against cancellation
        rows = pairs.sum(1)
        same, chained, whole = pairs.square().sum().item(), rows.square().sum().item(), rows.sum().item() ** 2
        # Means of k(x, y)², k(x, y) k(x, z) and k(x, y) k(z, w) over samples that all differ.
        two = same / (N * (N - 1))
        three = (chained - same) / (N * (N - 1) * (N - 2))
        four = (whole - 4 * chained + 2 * same) / (N * (N - 1) * (N - 2) * (N - 3))
        linear = 4 * max(three - four, 0.0) / N
        return cls(mean, linear, 2 * max(two - 2 * three + four, 0.0) / (N * (N - 1)), N)

    def variance(self, *, dataset_size: int | None = None) -> float:
        """Return the variance over draws.

        Args:
            dataset_size: n, samples that the N are drawn from without replacement, whose own pairs are then meant: the
                variance is that of N samples less that of n. Infinite if left out.
        """
        N, n = self.num_samples, dataset_size
        if n is None:
            return self.linear + self.quadratic
        if n <= N:
            return 0.0
        return self.linear * (1 - N / n) + self.quadratic * (1 - N * (N - 1) / (n * (n - 1)))

    def estimate(self, *, dataset_size: int | None = None) -> Estimate:
        """Return value and standard error."""
        return Estimate(self.value, math.sqrt(self.variance(dataset_size=dataset_size)), self.num_samples)


def covariance_with_mean(
    kernel: Tensor,  # (N, N)
    values: Tensor,  # (N,)
) -> float:
    """Return the covariance, over draws, of a pair mean with the mean of one number a sample; infinite below 3.

    Unbiased: 2/N cov(f(x), E[k(x, y) | x]), with the mean of f(x) k(y, z) over different samples for E f · E k.
    """
    N = len(values)
    if N < 3:
        return math.inf
    pairs = _off_diagonal(kernel)
    values = values - values.mean()
    rows = pairs.sum(1)
    return 2 * (values @ rows).item() / (N * (N - 1) * (N - 2))


def means_covariance(
    kernel: Tensor,  # (N, N)
    *,
    dataset_size: int | None = None,
) -> Tensor:  # (2, 2), float64
    """Return the covariance, over draws, of the mean of k(x_i, x_i) and the mean of k(x_i, x_j) over pairs.

    Args:
        kernel: Symmetric.
        dataset_size: n, samples that the N are drawn from without replacement; infinite if left out.
    """
    N, own, unseen = len(kernel), kernel.diagonal(), unseen_share(len(kernel), dataset_size)
    if not unseen:
        return torch.zeros(2, 2, dtype=torch.float64)
    own_variance = unseen * own.var().item() / N if N > 1 else math.inf
    cross = unseen * covariance_with_mean(kernel, own)
    pair_variance = PairMean.of(kernel).variance(dataset_size=dataset_size)
    return torch.tensor([[own_variance, cross], [cross, pair_variance]], dtype=torch.float64)


def combined_error(
    covariance: Tensor,  # (2, 2)
    *factors: float,
) -> float:
    """Return the standard error of a linear combination."""
    weights = torch.tensor(factors, dtype=torch.float64)
    variance = (weights @ covariance @ weights).item()
    return math.sqrt(max(variance, 0.0)) if math.isfinite(variance) else math.inf


def mean_of_all(
    kernel: Tensor,  # (N, N)
    *,
    dataset_size: int | None = None,
) -> Estimate:
    """Return the mean of k(x_i, x_j) over all i and j, i = j too, and its standard deviation over draws.

    Args:
        kernel: Symmetric.
        dataset_size: n, samples that the N are drawn from without replacement; infinite if left out.
    """
    N = len(kernel)
    error = combined_error(means_covariance(kernel, dataset_size=dataset_size), 1 / N, 1 - 1 / N)
    return Estimate(kernel.mean().item(), error, N)


def unseen_share(num_samples: int, dataset_size: int | None) -> float:
    """Return 1 - N/n: 1 for n infinite (None), 0 where the whole dataset was seen."""
    return 1.0 if dataset_size is None else max(1 - num_samples / dataset_size, 0.0)


def _off_diagonal(kernel: Tensor) -> Tensor:
    return kernel - torch.diag(kernel.diagonal())
