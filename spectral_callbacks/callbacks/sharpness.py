"""Sharpness: how far the run is from the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from spectral_callbacks.callbacks.base import SpectralCallback
from spectral_callbacks.linalg import Eigenpairs, Status, Tracker
from spectral_callbacks.operators import Hessian
from spectral_callbacks.probe import Probe
from spectral_callbacks.stability import NoThresholdError
from spectral_callbacks.tags import Chart


class Sharpness(SpectralCallback):
    """The largest eigenvalue of the Hessian against the edge of stability of the optimizer in use.

    Gradient descent on a quadratic diverges along every direction whose curvature λ exceeds 2/η. Full-batch training
    raises λ_max up to that edge and then hovers there (Cohen et al. 2021, arXiv:2103.00065);
    `sharpness/stability_ratio` is 1 at the edge, whatever the momentum, dampening, Nesterov or weight decay.

    Tags: `sharpness/lambda_max`, largest algebraic eigenvalue, in units of loss per parameter squared;
    `sharpness/residual`, within which of it some eigenvalue lies; `sharpness/two_over_lr` for the largest learning
    rate; `sharpness/threshold`, the λ at the edge (one parameter group, or groups that agree);
    `sharpness/stability_ratio`; `sharpness/num_matvecs`; `sharpness/status` (0 converged, 1 budget spent, 2 breakdown
    or a failure that was reported, 3 not finite). On request `sharpness/lambda_2` and so on, and
    `sharpness/lambda_min`, each with its `_residual`.

    How to read it: a ratio that climbs to 1 and stays is progressive sharpening and then the edge of stability; a ratio
    well above 1 for long comes before divergence, or belongs to mini-batch noise on a batch that training does not see.

    Cost: 3 to 7 products when warm, 6 to 15 when cold (more where the spectrum has no gap, as at initialisation), each
    1.5 to 1.9 gradient passes on the probe's batches; a vector of the parameters' size for each product of a search, at
    most about 80.

    Args:
        num_eigenvalues: How many of the largest eigenvalues are logged.
        lambda_min: Whether the smallest is logged too, from a search of its own.
        rtol: Residual at which an eigenvalue is accepted, relative to it. The error is of the order of its square.
        max_matvecs: Products that one search may spend.
        **options: Those of `SpectralCallback`.

    Example:
        >>> Sharpness(every_n_steps=10).name
        'sharpness'
    """

    diagnostic: ClassVar[str] = "sharpness"
    differentiates_twice: ClassVar[bool] = True
    charts: ClassVar[tuple[Chart, ...]] = (
        Chart(
            "lambda_max and the edge of stability",
            ("sharpness/lambda_max", "sharpness/threshold", "sharpness/two_over_lr"),
        ),
        Chart("stability ratio (1 is the edge)", ("sharpness/stability_ratio",)),
    )

    def __init__(
        self,
        num_eigenvalues: int = 1,
        *,
        lambda_min: bool = False,
        rtol: float = 3e-3,
        max_matvecs: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self._top = Tracker(num_eigenvalues, rtol=rtol, max_matvecs=max_matvecs)
        self._bottom = Tracker(1, which="SA", rtol=rtol, max_matvecs=max_matvecs) if lambda_min else None
        self._metric = Tracker(1, rtol=rtol, max_matvecs=max_matvecs)

    def forget(self) -> None:
        """Start the next search cold."""
        for tracker in (self._top, self._bottom, self._metric):
            if tracker is not None:
                tracker.forget()

    def failure(self) -> Mapping[str, float]:
        """Return the status of a failed measurement."""
        return {"sharpness/status": float(Status.BREAKDOWN)}

    def measure(self, probe: Probe) -> Mapping[str, float]:
        """Return the largest eigenvalues, and where they lie against the edge at this step."""
        hessian = probe.operator(Hessian)
        top = self._top(hessian, generator=probe.generator)
        searches = [top]
        readings = _eigenvalues(top)
        if self._bottom is not None:
            bottom = self._bottom(hessian, generator=probe.generator)
            searches.append(bottom)
            readings |= {
                "sharpness/lambda_min": bottom.values[0].item(),
                "sharpness/lambda_min_residual": bottom.residuals[0].item(),
            }
        learning_rate = max(probe.learning_rates())
        readings["sharpness/two_over_lr"] = 2 / learning_rate if learning_rate else math.inf
        try:
            edges = set(probe.edges())
        except NoThresholdError as reason:
            self.say(str(reason))
        else:
            if len(edges) == 1:
                [edge] = edges
                readings["sharpness/threshold"] = edge.curvature
                readings["sharpness/stability_ratio"] = edge.ratio(top.values[0].item())
            else:
                metric = self._metric(probe.preconditioned(Hessian), generator=probe.generator)
                searches.append(metric)
                readings |= {
                    "sharpness/stability_ratio": metric.values[0].item(),
                    "sharpness/stability_ratio_residual": metric.residuals[0].item(),
                }
        status = max(search.status for search in searches)
        if status is not Status.CONVERGED:
            self.say(f"{status.name.lower()}: {status.remedy}")
        if status is Status.BREAKDOWN:  # of no symmetric matrix, so these numbers are no eigenvalues
            readings = {}
        readings["sharpness/num_matvecs"] = sum(search.num_matvecs for search in searches)
        readings["sharpness/status"] = float(status)
        return {tag: value for tag, value in readings.items() if math.isfinite(value)}


def _eigenvalues(pairs: Eigenpairs) -> dict[str, float]:
    readings = {"sharpness/lambda_max": pairs.values[0].item(), "sharpness/residual": pairs.residuals[0].item()}
    for index in range(1, len(pairs.values)):
        readings[f"sharpness/lambda_{index + 1}"] = pairs.values[index].item()
        readings[f"sharpness/lambda_{index + 1}_residual"] = pairs.residuals[index].item()
    return readings
