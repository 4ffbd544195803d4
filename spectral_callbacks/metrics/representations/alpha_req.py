"""α-ReQ: how fast the eigenvalues of the features' covariance fall, as a power of their rank."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from spectral_callbacks.metrics.representations.eigenbasis import BiasedEstimate
from spectral_callbacks.metrics.representations.moments import feature_spectrum
from spectral_callbacks.metrics.representations.spectrum import FeatureSpectrum

_FEWEST_RANKS = 3  # through two, any line fits


@dataclasses.dataclass(frozen=True)
class PowerLawFit(BiasedEstimate):
    """A power law fitted to eigenvalues, λ_i ∝ i^-α.

    Attributes:
        value: α.
        error: √(standard_error² + bias²).
        num_samples: n.
        r2: Share of the weighted variance of ln λ_i that the line explains; far from 1, there is no power law.
        fit_range: First and last rank used, 1 for the largest eigenvalue.
    """

    r2: float
    fit_range: tuple[int, int]


def alpha_req(
    features: Tensor,  # (n, d)
    *,
    fit_range: tuple[int, int] = (11, 100),
) -> PowerLawFit:
    """Return α of λ_i ∝ i^-α, the *eigenvalues* of the *centred* covariance, fitted over the ranks `fit_range`.

    Least squares of ln λ_i on -ln i and a constant, with the weights 1/i that make each decade count the same
    (Stringer et al. 2018).

    How to read it: about 1 is the slowest decay of a smooth representation. Well below, the tail has too much variance,
    with features sensitive to detail; well above, few directions carry all. It falls as `effective_rank` rises. It
    comes out wrong where n is not much larger than d, by a bias that need not shrink steadily: .48, .44, .46, .48 at
    n = 256, 512, 2,048, 8,192 for a true .5 and d = 512.

    Args:
        features: One row a sample.
        fit_range: First and last rank, counted from 1, both included. The last is cut to half the rank of the
            covariance, as the end of a sample's spectrum falls for want of samples; the result says what was used. The
            default is that of reptrix; the code of arXiv:2509.23024 starts at 12.

    Returns:
        Value, R², the ranks used, and an error that contains the estimated bias and knows that neighbouring
        eigenvalues move together, which that of a regression does not; see `Eigenbasis.estimate`. Costs one
        decomposition of the smaller side and three of its eigenvalues alone.

    Raises:
        ValueError: If fewer than three ranks are left, `fit_range` is no range, or the features are no matrix, not
            finite or constant, or a single sample.

    Warns:
        UserWarning: If the bias is beyond 5 % of the value, with the number of samples that it takes.

    Reference: Agrawal et al. 2022, arXiv:2202.05808; Stringer et al. 2019, doi:10.1038/s41586-019-1346-5.

    Example:
        >>> scales = torch.arange(1, 65) ** -0.5  # λ_i = 1/i
        >>> found = alpha_req(torch.randn(4096, 64, generator=torch.Generator().manual_seed(0)) * scales)
        >>> round(found.value, 1), found.fit_range
        (1.0, (11, 32))
    """
    found = power_law_fit(feature_spectrum(features), fit_range=fit_range)
    found.warn("alpha_req", stacklevel=3)
    return found


def power_law_fit(
    spectrum: FeatureSpectrum,
    *,
    fit_range: tuple[int, int] = (11, 100),
) -> PowerLawFit:
    """Return `alpha_req` of a spectrum, without a warning.

    Args:
        spectrum: Of the features.
        fit_range: First and last rank, see `alpha_req`.

    Raises:
        ValueError: If fewer than three ranks are left, or `fit_range` is no range.
    """
    # A copy: the published code adds 1 to the caller's own array, and fits another range on the next call.
    first, last = (int(rank) for rank in fit_range)
    if not 1 <= first < last:
        raise ValueError(f"fit_range={(first, last)} must be two ranks in order, from 1 on, for example (11, 100).")
    rank = len(spectrum.eigenvalues)
    last = min(last, rank // 2)
    if last - first + 1 < _FEWEST_RANKS:
        raise ValueError(
            f"fit_range={(first, last)} after the cut to half the rank {rank} of the covariance; at least "
            f"{_FEWEST_RANKS} ranks are needed: pass more samples, or a range that starts earlier."
        )
    ranks = torch.arange(first, last + 1, dtype=torch.float64, device=spectrum.eigenvalues.device)
    weights = 1 / ranks
    x = -ranks.log()
    x -= weights @ x / weights.sum()
    slope = weights * x / (weights @ x.square())  # of a line through y, slope @ y

    def statistic(eigenvalues: Tensor) -> Tensor:
        return slope @ eigenvalues[first - 1 : last].log()

    found = spectrum.estimate(statistic)
    y = spectrum.eigenvalues[first - 1 : last].log()
    y = y - weights @ y / weights.sum()
    total, residual = weights @ y.square(), weights @ (y - found.value * x).square()
    r2 = 1 - (residual / total).item() if total > 0 else 1.0
    return PowerLawFit(**dataclasses.asdict(found), r2=r2, fit_range=(first, last))
