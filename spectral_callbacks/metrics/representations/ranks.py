"""How many directions the features occupy, by five conventions, each with its error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from spectral_callbacks.metrics.eigenvalues import (
    effective_rank_of_eigenvalues,
    entropy_of_eigenvalues,
    participation_ratio_of_eigenvalues,
    stable_rank_of_eigenvalues,
)
from spectral_callbacks.metrics.representations.eigenbasis import BiasedEstimate
from spectral_callbacks.metrics.representations.moments import feature_spectrum
from spectral_callbacks.metrics.representations.spectrum import FeatureSpectrum

_RANKME_EPSILON = 1e-7  # Garrido et al. 2023, equation 1


def _rankme(spectrum: FeatureSpectrum) -> BiasedEstimate:
    size = min(spectrum.num_samples, spectrum.num_features)
    zeros = size - len(spectrum.second_moment_eigenvalues)
    rest = -zeros * _RANKME_EPSILON * math.log(_RANKME_EPSILON)  # singular values that are 0 have p = ε

    def statistic(eigenvalues: Tensor) -> Tensor:
        values = eigenvalues.sqrt()
        return (torch.special.entr(values / values.sum() + _RANKME_EPSILON).sum() + rest).exp()

    return spectrum.estimate(statistic, center=False)


def _unbiased_participation_ratio(spectrum: FeatureSpectrum) -> BiasedEstimate:
    basis, n = spectrum.covariance, spectrum.num_samples
    if n < 4:
        raise ValueError(f"{n} samples: the unbiased participation ratio needs at least 4; add more.")
    values = basis.eigenvalues * (n / (n - 1))
    trace, square, fourth = values.sum().item(), values.square().sum().item(), spectrum.fourth_moment * n / (n - 1)
    # Himeno and Yamada 2014, doi:10.1016/j.jmva.2014.05.015: the U-statistics for tr(Σ)² and tr(Σ²), in closed form.
    factor = (n - 1) / (n * (n - 2) * (n - 3))
    numerator = factor * (2 * square + (n * n - 3 * n + 1) * trace**2 - n * fourth)
    denominator = factor * ((n - 1) * (n - 2) * square + trace**2 - n * fourth)
    if not denominator > 0:
        return BiasedEstimate.of(math.nan, math.inf, math.inf, n)
    ratio = numerator / denominator
    # What a row adds to both, relative to them; x Σ x without the row's own part in Σ.
    norms = basis.squares.sum(1)
    along = basis.squares @ basis.eigenvalues - norms.square() / n
    above, below = 2 * (norms - norms.mean()) / trace, 2 * (along - along.mean()) / denominator
    # Variance of the pairs' part of the denominator, of a Gaussian (Chen, Zhang and Zhong 2010): all there is in a flat
    # spectrum. The rows' part has it twice, as a jackknife has.
    pairs = 4 / n**2
    standard_error = ratio * math.sqrt(max((above - below).var().item() / n - 2 * pairs, 0.0) + pairs)
    # The estimators have no bias, but their ratio has, to second order.
    bias = ratio * ((below.square() - above * below).mean().item() / n + pairs)
    return BiasedEstimate.of(ratio, standard_error, bias, n)


# Each on a spectrum: no warning, but a bias that says whether there should be one.
RANKS: Mapping[str, Callable[[FeatureSpectrum], BiasedEstimate]] = {
    "rankme": _rankme,
    "effective_rank": lambda spectrum: spectrum.estimate(effective_rank_of_eigenvalues),
    "participation_ratio": lambda spectrum: spectrum.estimate(participation_ratio_of_eigenvalues),
    "unbiased_participation_ratio": _unbiased_participation_ratio,
    "stable_rank": lambda spectrum: spectrum.estimate(stable_rank_of_eigenvalues),
    "spectral_entropy": lambda spectrum: spectrum.estimate(entropy_of_eigenvalues),
}


def rankme(
    features: Tensor,  # (n, d)
) -> BiasedEstimate:
    """Return RankMe, exp(-Σ p_k ln p_k), p_k = σ_k/Σ σ + 1e-7, of the *singular values* σ of the *uncentred* features.

    From 1 to min(n, d), and near that for noise of any size: singular values are the roots of eigenvalues, which lifts
    a small tail. Ten directions in noise of a hundredth of their deviation count 18 of 128. A mean that all samples
    share is a direction too, and a large one hides the others. The literature on phases calls `effective_rank` RankMe.

    How to read it: high values before training on a task go with a high accuracy after; at equal n and d, and between
    runs of one method. At n = d it is short by about a sixth, at n = 4 d by some 4 %.

    Args:
        features: One row a sample.

    Returns:
        Value, and an error that contains the estimated bias, see `Eigenbasis.estimate`. Costs one decomposition of the
        smaller side and three of its eigenvalues alone.

    Raises:
        ValueError: If they are no matrix, not finite or constant, or a single sample.

    Warns:
        UserWarning: If the bias is beyond 5 % of the value, with the number of samples that it takes.

    Reference: Garrido et al. 2023, arXiv:2210.02885, equation 1, with its ε and the natural logarithm.

    Example:
        >>> x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0)).square()
        >>> found, centred = rankme(x), effective_rank(x)
        >>> round(found.value, 1), round(centred.value, 1)
        (7.6, 8.0)
    """
    return _public("rankme", features)


def effective_rank(
    features: Tensor,  # (n, d)
) -> BiasedEstimate:
    """Return exp(-Σ p_j ln p_j), p_j = λ_j/Σ λ, of the *eigenvalues* λ of the *centred* covariance.

    From 1 to min(n - 1, d): how many directions share the variance. Eigenvalues, not singular values, which
    `rankme` takes: 117 and 410 for eigenvalues 1/j in 512 dimensions. No ε.

    How to read it: it falls where features collapse onto few directions, and rises as they spread. It comes out short
    where n is not much larger than it: d exp(-d/2n) for a flat spectrum. Compare at equal n only.

    Args:
        features: One row a sample.

    Returns:
        Value, and an error that contains the estimated bias, see `Eigenbasis.estimate`. Costs one decomposition of the
        smaller side and three of its eigenvalues alone.

    Raises:
        ValueError: If they are no matrix, not finite or constant, or a single sample.

    Warns:
        UserWarning: If the bias is beyond 5 % of the value, with the number of samples that it takes.

    Reference: Roy and Vetterli 2007 for the form; of the covariance in arXiv:2509.23024, which calls it RankMe.

    Example:
        >>> x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
        >>> found = effective_rank(x)
        >>> round(found.value, 1), round(found.relative_bias, 3)
        (8.0, -0.002)
    """
    return _public("effective_rank", features)


def participation_ratio(
    features: Tensor,  # (n, d)
) -> BiasedEstimate:
    """Return (Σ λ_j)² / Σ λ_j² of the *eigenvalues* λ of the *centred* covariance.

    From 1 to min(n - 1, d): the rank that weighs large eigenvalues most; at most `effective_rank`. It is short where n
    is not much larger than it: n d/(n + d) for a flat spectrum. `unbiased_participation_ratio` is not.

    Args:
        features: One row a sample.

    Returns:
        Value, and an error that contains the estimated bias, see `Eigenbasis.estimate`. Costs one decomposition of the
        smaller side and three of its eigenvalues alone.

    Raises:
        ValueError: If they are no matrix, not finite or constant, or a single sample.

    Warns:
        UserWarning: If the bias is beyond 5 % of the value, with the number of samples that it takes.

    Example:
        >>> x = torch.randn(2048, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 1.0, 1.0])
        >>> round(participation_ratio(x).value, 1)  # 6²/18
        2.0
    """
    return _public("participation_ratio", features)


def unbiased_participation_ratio(
    features: Tensor,  # (n, d)
) -> BiasedEstimate:
    """Return tr(Σ)²/tr(Σ²) of the covariance Σ of the distribution, both estimated without bias.

    What `participation_ratio` tends to for many samples. It can be compared between different n: the U-statistics have
    no bias whatever the distribution, and what the ratio has is small. By chance it can exceed d.

    Args:
        features: One row a sample.

    Returns:
        Value, and an error that contains the estimated bias of the ratio; below about 100 samples, and where the
        spectrum falls, it is up to a third too small. Costs one decomposition of the smaller side. NaN where tr(Σ²) is
        not estimated positive.

    Raises:
        ValueError: If they are no matrix, not finite or constant, or less than 4 samples.

    Warns:
        UserWarning: If the bias is beyond 5 % of the value, with the number of samples that it takes.

    Reference: Himeno and Yamada 2014, doi:10.1016/j.jmva.2014.05.015, for the U-statistics.

    Example:
        >>> x = torch.randn(400, 200, generator=torch.Generator().manual_seed(0))
        >>> round(unbiased_participation_ratio(x).value, -1)  # 133 with the bias
        200.0
    """
    return _public("unbiased_participation_ratio", features)


def stable_rank(
    features: Tensor,  # (n, d)
) -> BiasedEstimate:
    """Return Σ λ_j / λ_max of the *eigenvalues* λ of the *centred* covariance.

    From 1 to min(n - 1, d): the variance in units of the largest; at most `participation_ratio`. The largest eigenvalue
    comes out too large where n is not much larger than d, so that this comes out short.

    Args:
        features: One row a sample.

    Returns:
        Value, and an error that contains the estimated bias, see `Eigenbasis.estimate`. Costs one decomposition of the
        smaller side and three of its eigenvalues alone.

    Raises:
        ValueError: If they are no matrix, not finite or constant, or a single sample.

    Warns:
        UserWarning: If the bias is beyond 5 % of the value, with the number of samples that it takes.

    Reference: Rudelson and Vershynin 2007, arXiv:math/0503442, of a matrix; here of the centred features.

    Example:
        >>> x = torch.randn(2048, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 1.0, 1.0])
        >>> round(stable_rank(x).value, 1)
        1.5
    """
    return _public("stable_rank", features)


def spectral_entropy(
    features: Tensor,  # (n, d)
) -> BiasedEstimate:
    """Return -Σ p_j ln p_j, p_j = λ_j/Σ λ, in nats, of the *eigenvalues* λ of the *centred* covariance.

    From 0 to ln min(n - 1, d): the logarithm of `effective_rank`, and the von Neumann entropy of Σ/tr Σ.

    Args:
        features: One row a sample.

    Returns:
        Value, and an error that contains the estimated bias, see `Eigenbasis.estimate`. Costs one decomposition of the
        smaller side and three of its eigenvalues alone.

    Raises:
        ValueError: If they are no matrix, not finite or constant, or a single sample.

    Warns:
        UserWarning: If the bias is beyond 5 % of the value, with the number of samples that it takes.

    Reference: arXiv:2509.23024, equation 2.

    Example:
        >>> x = torch.randn(2048, 8, generator=torch.Generator().manual_seed(0))
        >>> round(spectral_entropy(x).value, 2)  # ln 8 = 2.08
        2.08
    """
    return _public("spectral_entropy", features)


def _public(name: str, features: Tensor) -> BiasedEstimate:
    found = RANKS[name](feature_spectrum(features))
    found.warn(name, stacklevel=4)
    return found
