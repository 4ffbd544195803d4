"""The spectral density of a symmetric operator, by stochastic Lanczos quadrature."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from spectral_callbacks.linalg.krylov import Krylov
from spectral_callbacks.linalg.operator import LinearOperator
from spectral_callbacks.linalg.quadrature import mass_bounds, tridiagonal
from spectral_callbacks.linalg.result import Eigenpairs, Estimate, Status
from spectral_callbacks.linalg.subspace import Complement, dimension, gaussian, whole_space

_MAX_ASYMMETRY = 0.05  # as in eigsh
_ROUNDING = 50.0  # rounding errors of ‖A‖ within which two numbers are one
_CONVERGED = 0.05  # residual, relative to the node, of a node that is an eigenvalue
_NUM_BISECTIONS = 60


@dataclasses.dataclass(frozen=True)
class Density:
    """The distribution of the n eigenvalues of A: p Gauss quadratures of m nodes, each seen by one random vector.

    A quadrature is exact for polynomials below degree 2 m. Nodes at the ends of the spectrum are eigenvalues; one
    inside stands for as many as its weight says. Two errors follow, and both are reported:

    - A random vector gives each eigenvalue a random weight. The mean of f(λ) then has the variance
      2 (mean f² - (mean f)²) / (p (n + 2)), exactly, which is taken from the quadratures: the spread of p = 3 numbers
      would be a t statistic of 2 degrees of freedom, wrong by a factor of two in every third case.
    - What 2 m moments leave open. They confine the mass below x to an interval as long as the largest mass that may sit
      at x (Chebyshev, Markov, Stieltjes): nothing between outliers, and more than half of everything next to the
      thousands of eigenvalues that a network has near zero. The error of a mass counts it as a uniform distribution,
      length / √12. It bounds a bias: more probes do not shorten it; more steps do, slowly.

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
        return self._mean(lambda nodes: nodes**k)

    def variance(self) -> Estimate:
        """Return the mean of (λ - mean)² over the eigenvalues."""
        mean = self.moment(1)
        around = self._mean(lambda nodes: (nodes - mean.value).square())
        return dataclasses.replace(around, value=around.value + mean.error**2)  # what the fit of the mean takes away

    def mass_below(self, x: float) -> Estimate:
        """Return the share of eigenvalues below x.

        Inside the interval that the moments leave open, the value is extrapolated: mass that half the steps could not
        tell from x, but all of them can, went below and above in some proportion, and the rest is split alike.
        """
        points, m = torch.tensor([x], dtype=torch.float64), self.diagonals.shape[1]
        low, open_ = (share.item() for share in self._bounds(points, m))
        low_before, open_before = (share.item() for share in self._bounds(points, (m + 1) // 2))
        resolved = open_before - open_
        part = min(max((low - low_before) / resolved, 0.0), 1.0) if resolved > self.rounding else 0.5
        mass = low + part * open_
        return self._estimate(mass, self._error_of_mass(mass, open_))

    def quantile(self, q: float) -> Estimate:
        """Return the number with a share q of the eigenvalues below it.

        The error is half the distance between the quantiles at q plus and minus the error of the mass there.

        Raises:
            ValueError: If q is not between 0 and 1.
        """
        if not 0 <= q <= 1:
            raise ValueError(f"q={q} must lie between 0 and 1; 0.5 is the median.")
        value = self._quantiles(torch.tensor([q], dtype=torch.float64))
        error = self._error_of_mass(q, self._bounds(value, self.diagonals.shape[1])[1].item())
        ends = self._quantiles(torch.tensor([q - error, q + error], dtype=torch.float64).clamp(0, 1))
        return self._estimate(value.item(), (ends[1] - ends[0]).item() / 2)

    def histogram(
        self,
        edges: Tensor,  # (b + 1,), ascending
    ) -> Tensor:  # (b,) float64, on the CPU
        """Return the share of eigenvalues from each edge to before the next; what the moments leave open is halved."""
        low, open_ = self._bounds(edges.to("cpu", torch.float64), self.diagonals.shape[1])
        return (low + open_ / 2).diff().clamp_min(0.0)

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

    def _mean(self, f: Callable[[Tensor], Tensor]) -> Estimate:
        values, shares, residuals = self._ritz
        seen = f(values)
        # An eigenvalue weighs 1 / n at least. One that happened to get less would hide its own variance.
        at_least = torch.where(residuals <= _CONVERGED * values.abs(), (shares > 0) / max(self._num_unknown, 1), 0.0)
        square = (torch.maximum(shares, at_least) * seen.square()).sum(1).mean().item()
        mean = (shares * seen).sum(1).mean().item()
        known = f(self.known).sum().item() / self.size
        return self._estimate(self._share * mean + known, self._sampling_error(square - mean**2))

    def _sampling_error(self, variance: float) -> float:
        """Return the standard error of the mean of a function with this variance over the unknown eigenvalues."""
        return self._share * math.sqrt(2 * max(variance, 0.0) / (self._num_probes * (self._num_unknown + 2)))

    def _error_of_mass(self, mass: float, open_: float) -> float:
        smaller = min(mass, 1 - mass)  # at least one eigenvalue, unless there is none
        variance = max(smaller, 1 / self.size) * (1 - smaller) if smaller > self.rounding else 0.0
        return math.hypot(self._sampling_error(variance), open_ / math.sqrt(12))

    def _estimate(self, value: float, error: float) -> Estimate:
        return Estimate(value, error if math.isfinite(value) else math.inf, self._num_probes)

    def _bounds(self, points: Tensor, num_steps: int) -> tuple[Tensor, Tensor]:  # each like points, (g,)
        """Return the least mass below each point that so many steps allow, and how much more it may be."""
        if self.status is Status.NONFINITE:
            return torch.full_like(points, torch.nan), torch.full_like(points, torch.nan)
        steps = slice(num_steps)
        low, open_ = mass_bounds(self.diagonals[:, steps], self.couplings[:, steps], points, rounding=self.rounding)
        known = (self.known < points[:, None] - self.rounding).sum(1) / self.size
        return self._share * low.mean(0) + known, self._share * open_.mean(0)

    def _quantiles(self, levels: Tensor) -> Tensor:  # like levels
        if self.status is Status.NONFINITE:
            return torch.full_like(levels, torch.nan)
        m = self.diagonals.shape[1]
        nodes = self.nodes[:, 0 if self._num_unknown else m :]
        reach = self.couplings[:, -1].max() + 2 * self.rounding
        low, high = (nodes.min() - reach).expand(len(levels)), (nodes.max() + reach).expand(len(levels))
        for _ in range(_NUM_BISECTIONS):
            middle = (low + high) / 2
            least, open_ = self._bounds(middle, m)
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
    products are no more than that, they give all eigenvalues and no error remains.

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
    for name, number in (("num_steps", num_steps), ("num_probes", num_probes)):
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1; 30 steps from 3 probes are a good start.")
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
    for diagonal, beside in zip(diagonals, couplings, strict=True):
        krylov = _lanczos(rest, m, generator, size)
        size = max(size, krylov.norm)
        T, steps = krylov.projection, krylov.dimension
        diagonal[:steps] = T.diagonal()
        if steps:
            beside[: steps - 1] = T.diagonal(1)
            beside[steps - 1] = _coupling(krylov, _rounding(A) * size)
        status, num_matvecs = max(status, _status(krylov, size)), num_matvecs + krylov.num_matvecs
    if status is Status.NONFINITE:
        diagonals, couplings = diagonals.fill_(torch.nan), couplings.fill_(torch.nan)
    return Density(diagonals, couplings, known, n, _rounding(A) * size, status, num_matvecs)


def _exact(A: LinearOperator, n: int, generator: torch.Generator, num_probes: int) -> Density:
    """All eigenvalues, by products with a basis of the whole space."""
    Q = whole_space(A, generator)
    B = A.gram(Q, A.matmat(Q)).to("cpu", torch.float64)
    nothing, size = torch.zeros(num_probes, 1, dtype=torch.float64), B.abs().max().item()
    status, known = Status.NONFINITE, torch.full((n,), torch.nan, dtype=torch.float64)
    if math.isfinite(size):
        known = torch.linalg.eigvalsh((B + B.mT) / 2)
        skew = (B - B.mT).abs().max().item()
        status = Status.BREAKDOWN if skew > _MAX_ASYMMETRY * size else Status.CONVERGED
    return Density(nothing, nothing, known, n, _rounding(A) * size, status, Q.shape[1])


def _status(krylov: Krylov, size: float) -> Status:
    if not krylov.finite:
        return Status.NONFINITE
    return Status.BREAKDOWN if krylov.asymmetry * krylov.norm > _MAX_ASYMMETRY * size else Status.CONVERGED


def _lanczos(A: Complement, num_steps: int, generator: torch.Generator, size: float) -> Krylov:
    krylov = Krylov(A)
    krylov.add(A.project(gaussian(A, 1, generator))[:, 0])
    while krylov.finite and krylov.num_directions and krylov.num_matvecs < num_steps:
        krylov.expand()
        if krylov.finite and not _coupling(krylov, _rounding(A) * max(size, krylov.norm)):
            break
    return krylov


def _coupling(krylov: Krylov, rounding: float) -> float:
    """Return how the last vector is coupled to the rest of the space: 0 within rounding of the products."""
    if not krylov.num_directions:
        return 0.0
    coupling = krylov.coupling(torch.eye(krylov.dimension, dtype=torch.float64)[-1]).abs().item()
    return coupling if coupling > rounding else 0.0


def _rounding(A: LinearOperator) -> float:
    return _ROUNDING * torch.finfo(A.dtype).eps
