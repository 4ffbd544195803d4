"""A sample's second moment in its own eigenbasis, and how far a function of its eigenvalues is from the truth."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable

import torch
from scipy import special
from torch import Tensor

from spectral_callbacks.linalg import Estimate

_SEED = 0x5EED  # of the simulated samples: the same at every measurement, so that their noise is no news
_SIMULATED = 512  # eigenvalues to simulate at least, in as many samples as that takes
_STEPS = 3  # to the source of the eigenvalues: with 2, slopes at n = 2 d are still off by half; noise grows with more
_FEWEST = 4  # samples; three span two directions, whatever the distribution
_LARGEST_BIAS = 0.05  # relative, beyond which a public function warns


@dataclasses.dataclass(frozen=True)
class BiasedEstimate(Estimate):
    """An estimate whose error has two parts: chance, and the bias of a finite sample.

    Attributes:
        error: √(standard_error² + bias²).
        standard_error: Standard deviation over draws of the samples.
        bias: Estimated mean of value less truth. It is not taken off the value.
    """

    standard_error: float
    bias: float

    @classmethod
    def of(cls, value: float, standard_error: float, bias: float, num_samples: int) -> BiasedEstimate:
        """Return the estimate with the error that the two parts make."""
        return cls(value, math.hypot(standard_error, bias), num_samples, standard_error, bias)

    @property
    def relative_bias(self) -> float:
        """bias/value; 0 where there is no bias."""
        if not self.bias:
            return 0.0
        return self.bias / self.value if self.value else math.copysign(math.inf, self.bias)

    @property
    def num_samples_needed(self) -> int | None:
        """About how many samples make the bias as small as 5 %, if it falls as 1/n; None where it cannot be told."""
        excess = abs(self.relative_bias) / _LARGEST_BIAS
        return math.ceil(self.num_samples * max(excess, 1.0)) if math.isfinite(excess) else None

    @property
    def is_too_biased(self) -> bool:
        """Whether the bias is beyond 5 % of the value, or unknown."""
        return not abs(self.relative_bias) <= _LARGEST_BIAS

    def warn(self, name: str, *, stacklevel: int) -> None:
        """Warn, on behalf of a public function, if the bias is beyond 5 % of the value.

        Args:
            name: Of the function.
            stacklevel: From here to the function's caller.
        """
        if not self.is_too_biased:
            return
        needed = self.num_samples_needed
        size = f"estimated at {self.relative_bias:+.0%} of it" if needed else "unknown"
        remedy = f"about {needed}" if needed else "a few times as many"
        warnings.warn(
            f"{name}={self.value:.4g} is biased by its num_samples={self.num_samples}: the bias is {size}, "
            f"beyond {_LARGEST_BIAS:.0%}; pass more samples, {remedy}, or compare at equal numbers only.",
            UserWarning,
            stacklevel=stacklevel,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenbasis:
    """Eigenvalues λ_j of the mean of x xᵀ over a sample, and its rows in the eigenvectors u_j.

    Attributes:
        eigenvalues: λ, (r,), float64, descending, those that are not 0.
        squares: (u_j · x_i)², (m, r), of m of the rows.
        mean: u_j · x̄, (r,); 0 for centred x.
        num_draws: Independent draws of x that the second moment is worth: n, or n - 1 for centred x.
        num_samples: n.
    """

    eigenvalues: Tensor
    squares: Tensor
    mean: Tensor
    num_draws: int
    num_samples: int

    def estimate(self, statistic: Callable[[Tensor], Tensor]) -> BiasedEstimate:
        """Return a function of the eigenvalues, with standard error and bias.

        The standard error is the infinitesimal jackknife's (Efron 1982): the row x_i moves λ_j by (u_j · x_i)² - λ_j,
        to first order and whatever the distribution, and the statistic by that times its gradient. It is somewhat too
        large where the spectrum is flat and n not much larger than d, where the bias is the larger part by far.

        The bias is the larger of two. The first is that of a simulated sample of n from a Gaussian with these
        eigenvalues for its own: the statistic there less its value here. It sees too little where n is near d, and the
        sign changes between these eigenvalues and the true ones at times (the slope of a power law). The second is the
        value here less that of those eigenvalues from which a simulated sample comes to have these, found in three
        steps. Changes of first order in the simulated sample, whose mean is 0, are left out, so that one is enough for
        r ≥ 512. It is simulated as the triangular factor of a second moment, r² numbers (Bartlett 1933), with a fixed
        seed. This costs one product and three times all eigenvalues of r×r matrices, once.

        Args:
            statistic: From all eigenvalues that are not 0, (r,), descending, to a number; differentiable.

        Returns:
            Error and bias are infinite below 4 samples.
        """
        values = self.eigenvalues
        value, gradient = _with_gradient(statistic, values)
        if self.num_samples < _FEWEST:
            return BiasedEstimate.of(value, math.inf, math.inf, self.num_samples)
        standard_error = (self.squares @ gradient).std().item() / math.sqrt(self.num_samples)
        first = [
            statistic(simulated).item() - value - (gradient @ (diagonal - values)).item()
            for simulated, diagonal in zip(self._simulated.eigenvalues, self._simulated.diagonals, strict=True)
        ]
        biases = sum(first) / len(first), value - statistic(self._simulated.source).item()
        return BiasedEstimate.of(value, standard_error, max(biases, key=abs), self.num_samples)

    @functools.cached_property
    def _simulated(self) -> _Simulation:
        values = self.eigenvalues
        W = self._white()
        own = W.diagonal(dim1=1, dim2=2)

        def seen(source: Tensor) -> Tensor:  # (r,) -> (s, r)
            scale = source.sqrt()
            eigenvalues = torch.linalg.eigvalsh(scale[:, None] * W * scale).flip(1)
            return eigenvalues.clamp_(min=torch.finfo(torch.float64).tiny)

        resolved = min(self.num_draws // 2, len(values) - 1)
        first = eigenvalues = seen(values)
        source = values
        for step in range(_STEPS):
            if step:
                eigenvalues = seen(source)
            pushed = (eigenvalues / (own * source)).mean(0)  # by the others, away from them
            pushed[resolved:] = pushed[resolved]  # further down it goes to 0, and its inverse would be noise
            source = (values / pushed).sort(descending=True).values
            source *= values.sum() / source.sum()  # the trace has no bias
        return _Simulation(first, own * values, source)

    def _white(self) -> Tensor:  # (s, r, r)
        """Return second moments W of simulated samples, in units where it is the identity.

        With ĉ = Λ^-½ c for the mean c, Λ = diag λ, and P = I - β ĉĉᵀ so that PP = I - ĉĉᵀ, draws of Λ^-½ x are ĉ + P z.
        An orthogonal map of the sample makes its first row √N times its mean, and of the N - 1 others the trapezoid R
        of their QR decomposition: a chi variable of N - i degrees of freedom at (i, i), normal ones to its right.
        """
        N, r = self.num_draws, len(self.eigenvalues)
        generator = torch.Generator().manual_seed(_SEED)
        samples, rows = math.ceil(_SIMULATED / r), min(N - 1, r)
        half_freedom = (N - 1 - torch.arange(rows, dtype=torch.float64)) / 2
        uniform = torch.rand(samples, rows, generator=generator, dtype=torch.float64)
        chi = torch.from_numpy(2 * special.gammaincinv(half_freedom.numpy(), uniform.numpy())).sqrt()
        R = torch.randn(samples, rows, r, generator=generator, dtype=torch.float64).triu_(1)
        R.diagonal(dim1=1, dim2=2).copy_(chi)
        first = torch.randn(samples, 1, r, generator=generator, dtype=torch.float64)
        Z = torch.cat([first, R], 1).to(self.eigenvalues.device)
        direction = self.mean / self.eigenvalues.sqrt()
        length = min((direction @ direction).item(), 1.0)
        Z -= (Z @ direction)[..., None] * (direction / (1 + math.sqrt(1 - length)))
        Z[:, 0] += math.sqrt(N) * direction
        return Z.mT @ Z / N


@dataclasses.dataclass(frozen=True, eq=False)
class _Simulation:
    """Samples of the same size as the one at hand.

    Attributes:
        eigenvalues: Of samples from its own eigenvalues, (s, r).
        diagonals: Of their second moments, in the basis of the source, (s, r).
        source: What samples must come from to have its eigenvalues, (r,).
    """

    eigenvalues: Tensor
    diagonals: Tensor
    source: Tensor


def _with_gradient(
    statistic: Callable[[Tensor], Tensor],
    values: Tensor,  # (r,)
) -> tuple[float, Tensor]:
    with torch.inference_mode(False), torch.enable_grad():
        variables = values.clone().requires_grad_()
        value = statistic(variables)
        (gradient,) = torch.autograd.grad(value, variables)
    return value.item(), gradient
