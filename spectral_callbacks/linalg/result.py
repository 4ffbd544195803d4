"""What an algorithm found, and whether to believe it."""

from __future__ import annotations

import dataclasses
import enum

from torch import Tensor


class Status(enum.IntEnum):
    """How a computation ended, from the best end to the worst.

    Example:
        >>> Status.BUDGET.remedy
        'The budget of products was spent before the tolerance was met. Raise max_matvecs or rtol.'
    """

    CONVERGED = 0
    BUDGET = 1
    BREAKDOWN = 2
    NONFINITE = 3

    @property
    def remedy(self) -> str:
        """What happened, and what to do about it."""
        return _REMEDIES[self]


_REMEDIES = {
    Status.CONVERGED: "The residuals are within the tolerance.",
    Status.BUDGET: "The budget of products was spent before the tolerance was met. Raise max_matvecs or rtol.",
    Status.BREAKDOWN: (
        "The products are not those of one symmetric matrix. Look for randomness in the loss, or for an operation "
        "whose second derivative is wrong."
    ),
    Status.NONFINITE: "A product is not finite. Look for NaN or infinity in the loss, the weights or the batch.",
}


MAX_ASYMMETRY = 0.05  # of products that count as those of a symmetric matrix: beyond any rounding, in bfloat16 too


@dataclasses.dataclass(frozen=True)
class Eigenpairs:
    """Eigenpairs of a symmetric operator, each with its residual.

    Attributes:
        values: (k,), float64, on the CPU.
        vectors: (n, k), orthonormal, in the operator's dtype and on its device.
        residuals: (k,), float64, on the CPU. ‖A x - θ x‖ for each pair: some eigenvalue of A lies within this distance
            of θ. That this eigenvalue is the k-th largest is not certified by it.
        status: Whether the residuals met the tolerance, and if not, why.
        num_matvecs: Products that were spent.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    status: Status
    num_matvecs: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number that was estimated from random samples.

    Attributes:
        value: The estimate.
        error: Its standard error (one standard deviation), from the samples themselves; infinite where they are too few
            to tell.
        num_samples: Independent samples behind it.

    Example:
        >>> Estimate(3.0, 0.5, num_samples=8)
        Estimate(value=3.0, error=0.5, num_samples=8)
    """

    value: float
    error: float
    num_samples: int
