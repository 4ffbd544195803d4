"""The size of the gradient noise against the signal, from the inner products of N gradients, each with its error."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Self

import torch
from scipy import special
from torch import Tensor

from spectral_callbacks.linalg import Estimate
from spectral_callbacks.metrics.covariance_spectrum import checked_gram
from spectral_callbacks.metrics.pair_mean import PairMean, combined_error, mean_of_all, means_covariance, unseen_share
from spectral_callbacks.metrics.sgd_stability import weighted_pairs

_UPPER = 0.975  # quantile at each end of a 95 % interval


class NoiseScale(NamedTuple):
    """The simple noise scale: the batch size at which noise and signal of a gradient are of one size.

    Attributes:
        value: tr Σ / |G|²; infinite where |G|² is not positive.
        error: One standard error by the delta method. The distribution is skewed: value ± 2 errors is no interval.
        low: Lower end of the 95 % interval.
        high: Upper end; infinite where |G|² is not significantly positive.
    """

    value: float
    error: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class GradientMoments:
    """Mean square and squared mean of the samples' gradients, estimated without bias, and what follows from the two.

    With m = mean |g_i|² and ḡ the mean of N gradients, E|g|² is estimated by m, and |G|² = |E g|² by the mean of
    ⟨g_i, g_j⟩ over i ≠ j, which is (N |ḡ|² - m)/(N - 1); their difference N/(N - 1) (m - |ḡ|²) estimates tr Σ. The
    variances are those of U-statistics, see `PairMean`. Costs N² operations.

    A single look's noise scale has a denominator that may be hardly known, so that it has not even an expectation.
    `averaged` averages numerator and denominator over looks, and the ratio is taken of those.

    Attributes:
        square: E|g|², in units of loss² per parameter².
        signal: |G|², in the same; it can come out negative.
        covariance: Of the two estimates, (2, 2), float64; infinite below 4 samples, 0 for the whole dataset.
        num_samples: N, of the smallest look.
        weight: Sum of the weights of the looks in an average, in which the newest has 1.

    Example:
        >>> g = torch.tensor([[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [0, 0, 0, 4], [0, 0, 0, 0], [0, 0, 1, 1]])
        >>> moments = GradientMoments.from_gram(g @ g.mT)
        >>> [round(x, 6) for x in (moments.trace().value, moments.signal, moments.noise_scale().value)]
        [4.866667, 0.466667, 10.428571]
    """

    square: float
    signal: float
    covariance: Tensor
    num_samples: int
    weight: float = 1.0

    @classmethod
    def from_gram(
        cls,
        gram: Tensor,  # (N, N)
        *,
        dataset_size: int | None = None,
    ) -> Self:
        """Return those of one look.

        Args:
            gram: K, inner products of the gradients of the samples' own losses; of one layer's, for that layer's noise.
            dataset_size: n, samples that the N are drawn from without replacement, whose own mean gradient and
                covariance are then meant; infinite if left out. Errors are 0 where all were seen.

        Raises:
            ValueError: If `gram` is no matrix of inner products.
        """
        gram = checked_gram(gram)
        N, own, pairs = len(gram), gram.diagonal(), PairMean.of(gram)
        m, signal = own.mean().item(), pairs.value
        if not unseen_share(N, dataset_size):
            return cls(m, gram.mean().item(), torch.zeros(2, 2, dtype=torch.float64), N)
        covariance = means_covariance(own, pairs, dataset_size=dataset_size)
        if dataset_size is not None:
            signal = weighted_pairs(m, signal, dataset_size)
            of_dataset = torch.tensor([[1, 0], [1 / dataset_size, 1 - 1 / dataset_size]], dtype=torch.float64)
            covariance = of_dataset @ covariance @ of_dataset.mT
        return cls(m, signal, covariance, N)

    def averaged(self, newer: GradientMoments, decay: float, *, same_samples: bool) -> GradientMoments:
        """Return the exponential moving average with one more look, without the bias of a start at zero.

        The j-th last look has a weight in proportion to decayʲ. Ratios of the result are ratios of averages.

        Args:
            newer: The look that comes next.
            decay: From 0, which forgets all others, to 1, the plain mean of all looks.
            same_samples: Whether the looks are at the same samples, so that their errors may be any multiple of each
                other: the covariance is then an upper bound, otherwise that of independent looks.

        Raises:
            ValueError: If `decay` is not between 0 and 1.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay={decay!r} must lie between 0 and 1, for example 0.9.")
        weight = decay * self.weight + 1
        old, new = 1 - 1 / weight, 1 / weight
        # Cov(a x + b y) ⪯ a Cov x + b Cov y for a + b = 1, however x and y depend on each other.
        power = 1 if same_samples else 2
        return GradientMoments(
            old * self.square + new * newer.square,
            old * self.signal + new * newer.signal,
            old**power * self.covariance + new**power * newer.covariance if old else newer.covariance,
            min(self.num_samples, newer.num_samples) if old else newer.num_samples,
            weight,
        )

    def trace(self) -> Estimate:
        """Return tr Σ, the variance of a single sample's gradient."""
        return self._combined(1.0, -1.0)

    def squared_signal(self) -> Estimate:
        """Return |G|², the squared norm of the expected gradient."""
        return self._combined(0.0, 1.0)

    def noise_scale(self) -> NoiseScale:
        """Return tr Σ / |G|² with a 95 % interval.

        Batches well below it are mostly noise, and twice the batch allows nearly twice the step; batches well above it
        waste samples. It grows as training proceeds.

        The interval is Fieller's for |G|²/E|g|² = 1/(1 + B), with Student's quantile of N - 1: the values B for which
        E|g|² - (1 + B)|G|² is not significantly different from 0. It is not symmetric, and unbounded where |G|² is not
        significantly positive.

        Coverage measured on Gaussian gradients with B = 100, at N = 16, 32, 64, 128: 96, 95, 92, 94 % for a flat
        spectrum in 200 dimensions, 98, 96, 95, 95 % for one that falls as 1/√i in 1,000, above 99 % for 1/i, where the
        noise lies in few directions and the error of |G|² is overestimated. It is too short for norms that differ
        wildly, as every interval for a mean is: 91, 93, 94 % at N = 32, 64, 128 where |g|² has a standard deviation of
        1.3 times its mean, 70 to 80 % where of 7 times, the true value lying above it.

        Reference: McCandlish et al. 2018, arXiv:1812.06162; Fieller 1954, doi:10.1111/j.2517-6161.1954.tb00159.x.
        """
        low, high = self._interval()
        if not self.signal > 0:
            return NoiseScale(math.inf if self.signal <= 0 < self.square else math.nan, math.inf, low, high)
        ratio = self.square / self.signal
        error = self._combined(1.0, -ratio).error / self.signal
        return NoiseScale(max(ratio - 1, 0.0), error, low, high)

    def signal_to_noise(self) -> Estimate:
        """Return |G|² / tr Σ, the signal-to-noise ratio of a single sample's gradient; a batch of B has B times that.

        The reciprocal of the noise scale, with the well-known number below: the error (delta method) is an honest
        one here. NaN where there is no noise.
        """
        noise = self.square - self.signal
        if not noise > 0:
            return Estimate(math.nan, math.inf, self.num_samples)
        ratio = self.signal / noise
        return Estimate(ratio, self._combined(-ratio, 1 + ratio).error / noise, self.num_samples)

    def _combined(self, of_square: float, of_signal: float) -> Estimate:
        value = of_square * self.square + of_signal * self.signal
        return Estimate(value, combined_error(self.covariance, of_square, of_signal), self.num_samples)

    def _interval(self) -> tuple[float, float]:
        if not math.isfinite(self.covariance.sum().item()) or not self.square > 0:
            return 0.0, math.inf
        t = special.stdtrit(self.num_samples - 1, _UPPER).item() if self.covariance.any() else 0.0
        (mm, ms), (_, ss) = (t**2 * self.covariance).tolist()
        # (signal - y square)² ≤ t² Var(signal - y square): a y² - 2 b y + c ≤ 0
        a, b, c = self.square**2 - mm, self.square * self.signal - ms, self.signal**2 - ss
        if a <= 0:
            return 0.0, math.inf
        root = math.sqrt(max(b * b - a * c, 0.0))
        return _noise_scale((b + root) / a), _noise_scale((b - root) / a)


def mean_pairwise_cosine(
    gram: Tensor,  # (N, N)
    *,
    dataset_size: int | None = None,
) -> Estimate:
    """Return the mean cosine between the gradients of two different samples, with the error of a U-statistic.

    1 where all samples pull in one direction, 0 where they are unrelated, as most are late in training, negative where
    learning one harms the others. Gradients that are exactly 0 have no direction and are left out.

    Args:
        gram: K, inner products of the gradients of the samples' own losses.
        dataset_size: n, samples that the N are drawn from without replacement; infinite if left out.

    Returns:
        The value is NaN and the error infinite where fewer than two gradients are not 0.

    Raises:
        ValueError: If `gram` is no matrix of inner products.

    Example:
        >>> g = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
        >>> round(mean_pairwise_cosine(g @ g.mT).value, 9)
        0.333333333
    """
    gram = checked_gram(gram)
    norms = gram.diagonal().clamp(min=0).sqrt()
    some = norms > 0
    if not some.all():
        gram, norms = gram[some][:, some], norms[some]
    found = PairMean.of((gram / norms / norms[:, None]).clamp_(-1, 1))
    if found.num_samples < 2:
        return Estimate(math.nan, math.inf, found.num_samples)
    if dataset_size is not None:  # as many of the others have a direction
        dataset_size = round(dataset_size * found.num_samples / len(some))
    return found.estimate(dataset_size=dataset_size)


def gradient_norm(
    gram: Tensor,  # (N, N)
    *,
    dataset_size: int | None = None,
) -> Estimate:
    """Return |ḡ|, the norm of the mean gradient of these N samples, and its standard deviation over draws of N.

    As an estimate of |G| it is biased upward, its square by tr Σ/N; `GradientMoments.squared_signal` is not.

    Args:
        gram: K, inner products of the gradients of the samples' own losses.
        dataset_size: n, samples that the N are drawn from without replacement; infinite if left out.

    Raises:
        ValueError: If `gram` is no matrix of inner products.

    Example:
        >>> gradient_norm(torch.tensor([[1.0, 0.0], [0.0, 3.0]])).value
        1.0
    """
    square = mean_of_all(checked_gram(gram), dataset_size=dataset_size)
    norm = math.sqrt(max(square.value, 0.0))
    return Estimate(norm, square.error / (2 * norm) if norm else math.sqrt(square.error), square.num_samples)


def _noise_scale(signal_share: float) -> float:
    """B, of |G|²/E|g|² = 1/(1 + B)."""
    return max(1 / signal_share - 1, 0.0) if signal_share > 0 else math.inf
