"""The spectral density of a symmetric operator, by stochastic Lanczos quadrature."""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from spectral_callbacks.linalg.krylov import Krylov
from spectral_callbacks.linalg.operator import LinearOperator
from spectral_callbacks.linalg.quadrature import check_quadrature, lanczos, mass_bounds, rounding_of, tridiagonal
from spectral_callbacks.linalg.result import MAX_ASYMMETRY, Eigenpairs, Estimate, Status
from spectral_callbacks.linalg.subspace import Complement, dimension, whole_space

_NOTHING = 1e-12  # of a mass
_CONVERGED = 0.05  # residual, relative to the node, of a node that is an eigenvalue
_ROUNDING_OF_SUM = 0.08  # of `rounding`: 4 rounding errors of ‖A‖, as in trace
_NUM_BISECTIONS = 60
_TINY = torch.finfo(torch.float64).tiny


@dataclasses.dataclass(frozen=True)
class Density:
    """The distribution of the n eigenvalues of A: p Gauss quadratures of m nodes, each seen by one random vector.

    A quadrature is exact for polynomials below degree 2 m. Nodes at the ends of the spectrum are eigenvalues; one
    inside stands for as many as its weight says. Two errors follow:

    - A random vector gives each eigenvalue a random weight. The mean of f(λ) then has the variance
      2 (mean f² - (mean f)²) / (p (n + 2)), exactly, which is taken from the quadratures: the spread of p = 3 numbers
      would be a t statistic of 2 degrees of freedom, wrong by a factor of two in every third case.
    - What 2 m moments leave open. They confine the mass below x to an interval as long as the largest mass that may sit
      at x (Chebyshev, Markov, Stieltjes): nothing between outliers, and more than half of everything next to the
      thousands of eigenvalues that a network has near zero. The error of a mass counts the truth as uniform in it,
      length / √12 from the middle. It bounds a bias: more probes do not shorten it; more steps do, slowly.

    Below both are rounding errors. Eigenvalues within `rounding` of a point are on either side of it: their mass counts
    as open. A moment's error contains what relative errors of a few units in the last place do to it.

    Attributes:
        diagonals: (p, m), float64, on the CPU: of the tridiagonal matrices of the p Lanczos runs.
        couplings: (p, m), likewise: beside the diagonal; the last one leads out of the basis, 0 if the basis is closed.
        known: (k,), likewise: eigenvalues given beforehand, of mass 1 / n each.
        size: n.
        rounding: Distance within which two numbers are one.
        status: `CONVERGED`; `BREAKDOWN` where the products are not those of a symmetric matrix; `NONFINITE` where one
            is not finite, and every number is NaN.
        num_matvecs: Products that were spent.

    References:
        Golub, Meurant, Matrices, Moments and Quadrature (2010), chapters 3 and 7; Ubaru, Chen, Saad (2017).
    """

    diagonals: Tensor
    couplings: Tensor
    known: Tensor
    size: int
    rounding: float
    status: Status
    num_matvecs: int

    @functools.cached_property
    def nodes(self) -> Tensor:  # (p, m + k)
        """Where each probe sees mass: its Ritz values in ascending order, then the known eigenvalues."""
        return torch.cat([self._ritz[0], self.known.expand(self._num_probes, -1)], dim=1)

    @functools.cached_property
    def weights(self) -> Tensor:  # (p, m + k)
        """How much mass is at each node; a row sums to 1."""
        known = torch.full((self._num_probes, len(self.known)), 1 / self.size, dtype=torch.float64)
        return torch.cat([self._share * self._ritz[1], known], dim=1)

    def moment(self, k: int) -> Estimate:
        """Return the mean of λᵏ over the eigenvalues, without bias below degree 2 m; k = 1 is tr A / n.

        For the trace itself `trace` is more exact: here an outlier has the weight that the random vectors give it,
        unless it is known.
        """
        return self._moment(k, 0.0)

    def variance(self) -> Estimate:
        """Return the mean of (λ - mean)² over the eigenvalues."""
        mean = self.moment(1)
        around = self._moment(2, mean.value)
        return dataclasses.replace(around, value=around.value + mean.error**2)  # what the fit of the mean takes away

    def mass_below(self, x: float) -> Estimate:
        """Return the share of eigenvalues below x.

        One that is below x by more than `rounding` counts. Mass that cannot be told from x, because moments leave it
        open or because it is within `rounding` of x, is split: in the proportion in which mass went below and above
        that all steps can tell from x and half of them could not, and in halves where no mass did. Where nothing else
        is below x, it is not either: `mass_below(0.0)`, the share of negative eigenvalues, is 0 for a positive
        semi-definite matrix of any rank. No share that is possible is more than 2 errors away.
        """
        points, m = torch.tensor([x], dtype=torch.float64), self.diagonals.shape[1]
        low, open_, there = (share.item() for share in self._bounds(points, m))
        low_before, open_before, there_before = (share.item() for share in self._bounds(points, (m + 1) // 2))
        either, part = open_ + there, 0.5
        resolved = open_before + there_before - either
        if (self.weights * (self.nodes < x - self.rounding)).sum(1).mean().item() <= _NOTHING and math.isfinite(low):
            low, either, part = 0.0, low + either, 0.0
        elif resolved * self.size >= 1:  # an eigenvalue or more
            part = min(max((low - low_before) / resolved, 0.0), 1.0)
        mass = low + part * either
        return self._estimate(mass, self._error_of_mass(mass, either, part))

    def quantile(self, q: float) -> Estimate:
        """Return the number with a share q of the eigenvalues below it.

        The error is half the distance between the quantiles at q plus and minus the error of the mass there, and
        `rounding`.

        Raises:
            ValueError: If q is not between 0 and 1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q={q} must lie between 0 and 1; 0.5 is the median.")
        value = self._quantiles(torch.tensor([q], dtype=torch.float64))
        error = self._error_of_mass(q, self._bounds(value, self.diagonals.shape[1])[1].item())
        ends = self._quantiles(torch.tensor([q - error, q + error], dtype=torch.float64).clamp(0, 1))
        return self._estimate(value.item(), math.hypot((ends[1] - ends[0]).item() / 2, self.rounding))

    def histogram(
        self,
        edges: Tensor,  # (b + 1,), ascending
    ) -> Tensor:  # (b,) float64, on the CPU
        """Return the share of eigenvalues between edges; what cannot be told from an edge is halved."""
        low, open_, there = self._bounds(edges.to("cpu", torch.float64), self.diagonals.shape[1])
        return (low + (open_ + there) / 2).diff().clamp_min(0.0)

    @property
    def _num_probes(self) -> int:
        return len(self.diagonals)

    @property
    def _num_unknown(self) -> int:
        return self.size - len(self.known)

    @property
    def _share(self) -> float:
        """Mass of all eigenvalues that are not known."""
        return self._num_unknown / self.size

    @functools.cached_property
    def _ritz(self) -> tuple[Tensor, Tensor, Tensor]:  # each (p, m)
        """Ritz values, their share in the random vector, their residuals."""
        if self.status is Status.NONFINITE:
            return self.diagonals, self.diagonals, self.diagonals
        values, S = torch.linalg.eigh(tridiagonal(self.diagonals, self.couplings[:, :-1]))
        return values, S[:, 0].square(), (self.couplings[:, -1:] * S[:, -1]).abs()

    def _moment(self, k: int, center: float) -> Estimate:
        """Return the mean of (λ - center)ᵏ."""
        values, shares, residuals = self._ritz
        seen = (values - center) ** k
        mean = (shares * seen).sum(1).mean().item()
        # An eigenvalue weighs 1 / n at least. One that happened to get less would hide its own variance.
        at_least = torch.where(residuals <= _CONVERGED * values.abs(), (shares > 0) / max(self._num_unknown, 1), 0.0)
        variance = (torch.maximum(shares, at_least) * (seen - mean).square()).sum(1).mean().item()
        known = ((self.known - center) ** k).sum().item() / self.size
        error = math.hypot(self._sampling_error(variance), self._rounding_error(k, center))
        return self._estimate(self._share * mean + known, error)

    def _rounding_error(self, k: int, center: float) -> float:
        """Return the error of vᵀ(A - center)ᵏ v in whose products A v rounding errs, relatively."""

        def rms(x: Tensor) -> float:
            return (self.weights * x.square()).sum(1).mean().sqrt().item()

        step = _ROUNDING_OF_SUM * self.rounding * rms(self.nodes / self.nodes.abs().max().clamp_min(_TINY))
        return k * step * rms(((self.nodes - center).abs() + step) ** max(k - 1, 0))

    def _sampling_error(self, variance: float) -> float:
        """Return the standard error of the mean of a function with this variance over the unknown eigenvalues."""
        return self._share * math.sqrt(2 * max(variance, 0.0) / (self._num_probes * (self._num_unknown + 2)))

    def _error_of_mass(self, mass: float, open_: float, part: float = 0.5) -> float:
        """Return the error of a mass that contains a part of what is open: the truth is uniform in all of it."""
        smaller = min(mass, 1 - mass)  # at least one eigenvalue, unless there is none
        variance = max(smaller, 1 / self.size) * (1 - smaller) if smaller > _NOTHING else 0.0
        return math.hypot(self._sampling_error(variance), open_ * math.sqrt(1 / 12 + (part - 0.5) ** 2))

    def _estimate(self, value: float, error: float) -> Estimate:
        return Estimate(value, error if math.isfinite(value) else math.inf, self._num_probes)

    def _bounds(self, points: Tensor, num_steps: int) -> tuple[Tensor, Tensor, Tensor]:  # each like points, (g,)
        """Return the bounds of `mass_bounds` by so many steps, over all eigenvalues."""
        if self.status is Status.NONFINITE:
            nothing = torch.full_like(points, torch.nan)
            return nothing, nothing, nothing
        steps = slice(num_steps)
        unknown = mass_bounds(self.diagonals[:, steps], self.couplings[:, steps], points, rounding=self.rounding)
        low, open_, there = (self._share * bound.mean(0) for bound in unknown)
        distances = self.known - points[:, None]
        masks = (distances < -self.rounding, distances.abs() <= self.rounding)
        known_low, known_there = (mask.double().sum(1) / self.size for mask in masks)
        return low + known_low, open_, there + known_there

    def _quantiles(self, levels: Tensor) -> Tensor:  # like levels
        if self.status is Status.NONFINITE:
            return torch.full_like(levels, torch.nan)
        m = self.diagonals.shape[1]
        nodes = self.nodes[:, 0 if self._num_unknown else m :]
        reach = self.couplings[:, -1].max() + 2 * self.rounding
        low, high = (nodes.min() - reach).expand(len(levels)), (nodes.max() + reach).expand(len(levels))
        for _ in range(_NUM_BISECTIONS):
            middle = (low + high) / 2
            least, open_, _ = self._bounds(middle, m)
            beyond = least + open_ / 2 >= levels
            low, high = torch.where(beyond, low, middle), torch.where(beyond, middle, high)
        return (low + high) / 2


def spectral_density(
    A: LinearOperator,  # (n, n), symmetric
    *,
    num_steps: int = 30,
    num_probes: int = 3,
    generator: torch.Generator,
    eigenpairs: Eigenpairs | None = None,
) -> Density:
    """Estimate how the eigenvalues of A are distributed, by Lanczos runs from random vectors.

    The runs are fully orthogonalized, so that no eigenvalue is seen twice, and end early where they have seen all that
    their start vector has a part in. Costs num_steps num_probes products and room for num_steps + 1 vectors; where n
    products are no more than that, they give all eigenvalues, and only rounding errors remain.

    More probes shrink the errors of moments, more steps those of masses. For the share of negative eigenvalues of a
    trained network, most of which are tiny, 1 x 90 is better than 3 x 30.

    Args:
        A: Symmetric operator.
        num_steps: Steps of each run.
        num_probes: Random vectors.
        generator: Source of the random vectors, on A's device.
        eigenpairs: Converged eigenpairs of A, as `eigsh` returns them. They enter with the weight 1 / n that they have,
            and only the rest is estimated. With ten outliers known, errors of moments fall five times and more.

    Returns:
        The density, with its status.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> import torch
        >>> from spectral_callbacks.linalg import Matrix
        >>> A = Matrix(torch.diag(torch.linspace(-1.0, 3.0, 400, dtype=torch.float64)))
        >>> density = spectral_density(A, generator=torch.Generator().manual_seed(0))
        >>> negative = density.mass_below(0.0)
        >>> abs(negative.value - 0.25) < 2 * negative.error < 0.08
        True
    """
    if A.shape[0] != A.shape[1]:
        raise ValueError(f"the operator has shape {A.shape}; only a square one has eigenvalues.")
    check_quadrature(num_steps, num_probes)
    n = dimension(A)
    if n <= num_steps * num_probes:
        return _exact(A, n, generator, num_probes)
    none = torch.zeros(A.shape[0], 0, dtype=A.dtype, device=A.device)
    known = torch.zeros(0, dtype=torch.float64) if eigenpairs is None else eigenpairs.values
    rest = Complement(A, none if eigenpairs is None else eigenpairs.vectors)
    m = min(num_steps, n - len(known))
    diagonals, couplings = torch.zeros(2, num_probes, max(m, 1), dtype=torch.float64)
    status, num_matvecs = Status.CONVERGED, 0
    size = max(known.abs().tolist(), default=0.0)  # of ‖A‖: what is left of rounding beside known pairs is nothing
    if not known.isfinite().all():
        status = Status.NONFINITE
    for probe in range(num_probes):
        krylov, diagonals[probe], couplings[probe] = lanczos(rest, m, generator, size=size)
        size = max(size, krylov.norm)
        status, num_matvecs = max(status, _status(krylov, size)), num_matvecs + krylov.num_matvecs
    if status is Status.NONFINITE:
        diagonals, couplings = diagonals.fill_(torch.nan), couplings.fill_(torch.nan)
    return Density(diagonals, couplings, known, n, rounding_of(A) * size, status, num_matvecs)


def _exact(A: LinearOperator, n: int, generator: torch.Generator, num_probes: int) -> Density:
    """All eigenvalues, by products with a basis of the whole space."""
    Q = whole_space(A, generator)
    B = A.gram(Q, A.matmat(Q)).to("cpu", torch.float64)
    nothing, size = torch.zeros(num_probes, 1, dtype=torch.float64), B.abs().max().item()
    status, known, norm = Status.NONFINITE, torch.full((n,), torch.nan, dtype=torch.float64), math.nan
    if math.isfinite(size):
        known = torch.linalg.eigvalsh((B + B.mT) / 2)
        norm = known.abs().max().item()
        skew = (B - B.mT).abs().max().item()
        status = Status.BREAKDOWN if skew > MAX_ASYMMETRY * size else Status.CONVERGED
    return Density(nothing, nothing, known, n, rounding_of(A) * norm, status, Q.shape[1])


def _status(krylov: Krylov, size: float) -> Status:
    if not krylov.finite:
        return Status.NONFINITE
    return Status.BREAKDOWN if krylov.asymmetry * krylov.norm > MAX_ASYMMETRY * size else Status.CONVERGED
