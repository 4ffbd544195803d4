"""Sharpness: how far the run is from the edge of stability."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl

from spectral_callbacks.callbacks.base import SpectralCallback
from spectral_callbacks.callbacks.findings import Findings
from spectral_callbacks.callbacks.reading import Reading
from spectral_callbacks.linalg import Eigenpairs, Status, Tracker
from spectral_callbacks.operators import Hessian
from spectral_callbacks.probe import Preconditioned, Probe
from spectral_callbacks.stability import Edge, NoThresholdError, NotSteppedYetError, edges
from spectral_callbacks.tags import Chart

_RATIOS = Chart("stability ratio (1 is the edge)", ("sharpness/stability_ratio", "sharpness/directional_ratio"))
_PLAIN = Chart(
    "lambda_max and the edge of stability", ("sharpness/lambda_max", "sharpness/threshold", "sharpness/two_over_lr")
)
_PRECONDITIONED = Chart(
    "preconditioned lambda_max and the edge of stability",
    ("sharpness/preconditioned_lambda_max", "sharpness/preconditioned_threshold"),
)


class Sharpness(SpectralCallback):
    """The largest eigenvalue of the Hessian against the edge of stability of the optimizer in use.

    Gradient descent on a quadratic diverges along every direction whose curvature λ exceeds 2/η. Full-batch training
    raises λ_max up to that edge and then hovers there (Cohen et al. 2021, arXiv:2103.00065). An adaptive optimizer does
    the same in its own metric: with preconditioner D what counts is λ_max of D^½ H D^½ (Cohen et al. 2022,
    arXiv:2207.14484). `sharpness/stability_ratio` is 1 at the edge for every optimizer with a rule in
    `spectral_callbacks.stability`, whatever its momentum, weight decay or parameter groups.

    Tags: `sharpness/lambda_max`, largest algebraic eigenvalue, in units of loss per parameter squared;
    `sharpness/residual`, within which of it some eigenvalue lies; `sharpness/two_over_lr` for the largest learning
    rate; `sharpness/threshold`, the λ at the edge (one parameter group, or groups that agree);
    `sharpness/stability_ratio`; `sharpness/directional_ratio`, the same ratio for the curvature along the gradient, in
    the optimizer's metric: gᵀ D H D g / gᵀ D g in place of the largest eigenvalue; `sharpness/num_matvecs`;
    `sharpness/status` (0 converged, 1 budget spent, 2 breakdown or a failure that was reported, 3 not finite).
    For an adaptive optimizer, from its first step on: `sharpness/preconditioned_lambda_max`, the largest eigenvalue of
    D^½ H D^½, and `sharpness/preconditioned_threshold`, its value at the edge (left out where groups differ);
    `sharpness/stability_ratio_residual`. On request `sharpness/lambda_2` and so on, and `sharpness/lambda_min`, each
    with its `_residual`.

    How to read it: a ratio that climbs to 1 and stays is progressive sharpening and then the edge of stability; a ratio
    well above 1 for long comes before divergence, or belongs to mini-batch noise on a batch that training does not see.
    The directional ratio is never above the stability ratio. It stays low while the gradient has little part in the
    sharpest direction; when it crosses 1 too, the loss itself rises: the spikes of Adam (arXiv:2506.04805).

    Cost: 3 to 7 products when warm, 6 to 15 when cold (more where the spectrum has no gap, as at initialisation), twice
    that for an adaptive optimizer or groups that differ, and one along the gradient. A product is 1.5 to 1.9 gradient
    passes on the probe's batches; a vector of the parameters' size is kept for each product of a search, at most about
    80.

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
    differentiates_twice: bool = True
    shares_eigenpairs: ClassVar[bool] = True
    charts: tuple[Chart, ...] = (_PLAIN, _RATIOS)

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
        search: dict[str, Any] = {"rtol": rtol, "max_matvecs": max_matvecs, "look_every": self.looks_every}
        self._top = Tracker(num_eigenvalues, **search)
        self._bottom = Tracker(1, which="SA", **search) if lambda_min else None
        self._metric = Tracker(1, **search)

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Draw the chart of the preconditioned edge only where there is one."""
        try:
            adapts = any(
                edge.preconditioner is not None for group in edges(trainer.optimizers[self.optimizer]) for edge in group
            )
        except NotSteppedYetError:
            adapts = True
        except NoThresholdError:
            adapts = False
        self.charts = (_PLAIN, _PRECONDITIONED, _RATIOS) if adapts else (_PLAIN, _RATIOS)

    def forget(self) -> None:
        """Start the next search cold."""
        for tracker in (self._top, self._bottom, self._metric):
            if tracker is not None:
                tracker.forget()

    def failure(self) -> Mapping[str, float]:
        """Return the status of a failed measurement."""
        return {"sharpness/status": float(Status.BREAKDOWN)}

    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        """Return the largest eigenvalues, and where they lie against the edge at this step."""
        hessian = probe.operator(Hessian)
        top = self._top(hessian, generator=probe.generator)
        probe.share_eigenpairs(top)
        found = Findings()
        found.add_largest("sharpness", top)
        if self._bottom is not None:
            found.add_smallest("sharpness", self._bottom(hessian, generator=probe.generator))
        learning_rate = max(probe.learning_rates())
        if learning_rate:
            found.readings["sharpness/two_over_lr"] = 2 / learning_rate
        else:
            self.say("the learning rate is 0, so nothing moves: ratios are 0, and 2 / lr is left out until it rises.")
        try:
            edge = _common(probe.edges())
            metric = probe.preconditioned(Hessian)
        except NotSteppedYetError:
            pass
        except NoThresholdError as reason:
            self.say(str(reason))
        else:
            if edge is None:
                ratio = self._metric(metric, generator=probe.generator)
                found.count(ratio)
                found.readings |= _in_metric(ratio, metric, probe.edges())
            else:
                found.readings["sharpness/threshold"] = edge.curvature
                found.readings["sharpness/stability_ratio"] = edge.ratio(top.values[0].item())
            found.readings["sharpness/directional_ratio"] = _along_gradient(metric, probe)
            found.num_matvecs += 1
        return found.concluded("sharpness", self.say)


def _common(edges: tuple[Edge, ...]) -> Edge | None:
    """Return the edge that all parameters share in the metric of the plain Hessian, if there is one."""
    first = edges[0]
    return first if first.is_plain and all(edge.is_plain and edge == first for edge in edges) else None


def _in_metric(ratio: Eigenpairs, metric: Preconditioned, edges: tuple[Edge, ...]) -> dict[str, float]:
    readings = {
        "sharpness/stability_ratio": ratio.values[0].item(),
        "sharpness/stability_ratio_residual": ratio.residuals[0].item(),
    }
    weights = {edge.weight for edge in edges if edge.weight}
    if len(weights) == 1 and any(edge.preconditioner is not None for edge in edges):
        [weight] = weights
        x = ratio.vectors[:, :1]
        # The shift is taken off along the eigenvector: exact for one weight decay, to second order for several.
        shift = metric.gram(x, metric.shift[:, None] * x).item()
        readings["sharpness/preconditioned_lambda_max"] = (ratio.values[0].item() - shift) / weight
        readings["sharpness/preconditioned_threshold"] = (1 - shift) / weight
    return readings


def _along_gradient(metric: Preconditioned, probe: Probe) -> float:
    """Return the curvature along the gradient in the optimizer's metric, which is 1 at the edge; NaN without one."""
    y = metric.coordinates(probe.gradient())[:, None]
    size = metric.gram(y, y).sqrt()
    if not size > 0:
        return math.nan
    y = y / size
    return metric.gram(y, metric.matmat(y)).item()
