"""Findings: what one measurement found, and how the computations behind it ended."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from spectral_callbacks.callbacks.reading import Picture, Reading
from spectral_callbacks.linalg import Density, Eigenpairs, Estimate, Status


@dataclasses.dataclass
class Findings:
    """What one measurement found.

    Attributes:
        readings: By tag.
        statuses: How each computation ended.
        num_matvecs: Products spent.
        counts_products: Whether there can be any.
    """

    readings: dict[str, Reading] = dataclasses.field(default_factory=dict)
    statuses: list[Status] = dataclasses.field(default_factory=lambda: [Status.CONVERGED])
    num_matvecs: int = 0
    counts_products: bool = True

    def count(self, ended: Eigenpairs | Density) -> None:
        """Count the products of a computation, and remember how it ended."""
        self.statuses.append(ended.status)
        self.num_matvecs += ended.num_matvecs

    def add_estimate(self, tag: str, estimate: Estimate, layer: str | None = None) -> None:
        """Add an estimate under its tag, and its standard error as `<tag>_error`, both of a layer if one is given."""
        behind = "" if layer is None else f"/{layer}"
        self.readings |= {f"{tag}{behind}": estimate.value, f"{tag}_error{behind}": estimate.error}

    def add_largest(self, family: str, pairs: Eigenpairs) -> None:
        """Add the largest eigenvalues as `lambda_max`, `lambda_2` and so on, each with its residual."""
        self.count(pairs)
        for index, (value, residual) in enumerate(zip(pairs.values.tolist(), pairs.residuals.tolist(), strict=True)):
            tag = f"lambda_{index + 1}" if index else "lambda_max"
            self.readings[f"{family}/{tag}"] = value
            self.readings[f"{family}/{tag}_residual" if index else f"{family}/residual"] = residual

    def add_smallest(self, family: str, pairs: Eigenpairs) -> None:
        """Add the smallest eigenvalue as `lambda_min`, with its residual."""
        self.count(pairs)
        self.readings[f"{family}/lambda_min"] = pairs.values[0].item()
        self.readings[f"{family}/lambda_min_residual"] = pairs.residuals[0].item()

    def concluded(self, family: str, say: Callable[[str], None]) -> dict[str, Reading]:
        """Return what is to be logged, with the status, and the products where they are counted.

        A number that is not finite is left out, and after a breakdown all are.

        Args:
            family: First segment of the two tags.
            say: Is told what to do about a status that is not good.
        """
        status = max(self.statuses)
        if status is not Status.CONVERGED:
            say(f"{status.name.lower()}: {status.remedy}")
        # Products of no symmetric matrix have no eigenvalues and no trace of a Hessian.
        found = {} if Status.BREAKDOWN in self.statuses else self.readings
        if self.counts_products:
            found = {**found, f"{family}/num_matvecs": self.num_matvecs}
        found = {**found, f"{family}/status": float(status)}
        return {tag: value for tag, value in found.items() if isinstance(value, Picture) or math.isfinite(value)}
