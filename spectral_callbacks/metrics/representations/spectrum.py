"""The spectrum of the features' covariance, and of their second moment about 0."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from spectral_callbacks.metrics.representations.eigenbasis import BiasedEstimate, Eigenbasis


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSpectrum:
    """Eigenvalues of the covariance Σ = 1/n Σ_i (x_i - x̄)(x_i - x̄)ᵀ of n features, and of 1/n Σ_i x_i x_iᵀ.

    Both are divided by n, and decomposed on the smaller side, when first asked for and once. From `FeatureMoments`.

    Attributes:
        num_samples: n.
        num_features: d.
        fourth_moment: Mean of |x_i - x̄|⁴.

    Example:
        >>> from spectral_callbacks.metrics.representations.moments import feature_spectrum
        >>> x = torch.randn(512, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2.0, 1.0, 1.0])
        >>> spectrum = feature_spectrum(x)
        >>> [round(v, 1) for v in spectrum.eigenvalues.tolist()]
        [8.6, 4.4, 1.1, 1.0]
        >>> trace = spectrum.estimate(lambda eigenvalues: eigenvalues.sum())
        >>> round(trace.value, 1), round(trace.error, 1)  # 15 ± √(2 · 99/512)
        (15.1, 0.7)
    """

    side: Side
    num_samples: int
    num_features: int
    fourth_moment: float

    @functools.cached_property
    def covariance(self) -> Eigenbasis:
        """Σ in its eigenbasis."""
        return self.side.centered()

    @functools.cached_property
    def second_moment(self) -> Eigenbasis:
        """1/n Σ_i x_i x_iᵀ in its eigenbasis, the mean left in."""
        return self.side.uncentered()

    @property
    def eigenvalues(self) -> Tensor:  # (r,)
        """Of Σ, float64, descending; those that are 0 to rounding are left out, so r ≤ min(n - 1, d)."""
        return self.covariance.eigenvalues

    @property
    def second_moment_eigenvalues(self) -> Tensor:  # (r,)
        """Of 1/n Σ_i x_i x_iᵀ, float64, descending; the squares of the features' singular values, divided by n."""
        return self.second_moment.eigenvalues

    def estimate(self, statistic: Callable[[Tensor], Tensor], *, center: bool = True) -> BiasedEstimate:
        """Return a function of the eigenvalues with its error; no warning of a bias. See `Eigenbasis.estimate`.

        Args:
            statistic: From the eigenvalues that are not 0, descending, to a number; differentiable.
            center: False for those of the second moment about 0.
        """
        return (self.covariance if center else self.second_moment).estimate(statistic)


class Side(abc.ABC):
    """The smaller of Gram matrix and covariance, from which both spectra follow."""

    @abc.abstractmethod
    def centered(self) -> Eigenbasis:
        """Return the covariance in its eigenbasis."""

    @abc.abstractmethod
    def uncentered(self) -> Eigenbasis:
        """Return the second moment about 0 in its eigenbasis."""


@dataclasses.dataclass(frozen=True, eq=False)
class GramSide(Side):
    """For n ≤ d.

    Attributes:
        gram: ⟨x_i - x̄, x_j - x̄⟩, (n, n).
        along_mean: ⟨x_i - x̄, x̄⟩, (n,).
        squared_mean: |x̄|².
    """

    gram: Tensor
    along_mean: Tensor
    squared_mean: float

    def centered(self) -> Eigenbasis:
        """Return the covariance in its eigenbasis."""
        n = len(self.gram)
        values, squares, _ = self._decomposed(self.gram, torch.zeros_like(self.along_mean))
        return Eigenbasis(values, squares, torch.zeros_like(values), n - 1, n)

    def uncentered(self) -> Eigenbasis:
        """Return the second moment about 0 in its eigenbasis."""
        n, a = len(self.gram), self.along_mean
        values, squares, mean = self._decomposed(self.gram + a + a[:, None] + self.squared_mean, a + self.squared_mean)
        return Eigenbasis(values, squares, mean, n, n)

    @staticmethod
    def _decomposed(gram: Tensor, along_mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The eigenvector to v_j is u_j = Xᵀ v_j / √(n λ_j), so that u_j · x_i = √(n λ_j) v_ij."""
        values, V = _positive(gram / len(gram))
        scales = len(gram) * values
        return values, V.square() * scales, along_mean @ V / scales.sqrt()


@dataclasses.dataclass(frozen=True, eq=False)
class CovarianceSide(Side):
    """For n > d.

    Attributes:
        covariance: Divided by n, (d, d).
        mean: x̄, (d,).
        rows: Some of the x_i, (m, d), for errors.
        num_samples: n.
    """

    covariance: Tensor
    mean: Tensor
    rows: Tensor
    num_samples: int

    def centered(self) -> Eigenbasis:
        """Return the covariance in its eigenbasis."""
        values, U = _positive(self.covariance)
        squares = ((self.rows.double() - self.mean) @ U).square()
        return Eigenbasis(values, squares, torch.zeros_like(values), self.num_samples - 1, self.num_samples)

    def uncentered(self) -> Eigenbasis:
        """Return the second moment about 0 in its eigenbasis."""
        values, U = _positive(torch.addr(self.covariance, self.mean, self.mean))
        squares = (self.rows.double() @ U).square()
        return Eigenbasis(values, squares, self.mean @ U, self.num_samples, self.num_samples)


def _positive(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues above rounding, descending, and their eigenvectors."""
    values, vectors = torch.linalg.eigh(matrix)
    rank = int((values > len(values) * torch.finfo(values.dtype).eps * values[-1]).sum())
    return values.flip(0)[:rank], vectors.flip(1)[:, :rank]
