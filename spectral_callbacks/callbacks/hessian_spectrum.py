"""The spectrum of the Hessian: outliers, bulk and negative part."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch

from spectral_callbacks.callbacks.base import SpectralCallback
from spectral_callbacks.callbacks.features import conditioning, output_shape
from spectral_callbacks.callbacks.reading import Reading, Spectrum
from spectral_callbacks.callbacks.residual import NUM_VECTORS, residual_ratio
from spectral_callbacks.linalg import Eigenpairs, LinearOperator, Status, Tracker
from spectral_callbacks.linalg.density import Density, spectral_density
from spectral_callbacks.metrics import condition_number, outliers
from spectral_callbacks.operators import GaussNewton, Hessian
from spectral_callbacks.probe import Probe
from spectral_callbacks.tags import Chart

_BULK = 8  # eigenvalues below the outliers, the fewest that `outliers` reads a bulk from
_LOOSE = 2.0  # residual, in units of rtol, up to which an eigenvalue counts when the budget ran out


@dataclasses.dataclass(frozen=True)
class _Measured:
    readings: dict[str, Reading]
    status: Status
    num_matvecs: int


class HessianSpectrum(SpectralCallback):
    """The whole spectrum of the Hessian: outliers, bulk, negative part, and how far it is from Gauss-Newton.

    The Hessian of a network is H = G + R: the Gauss-Newton matrix G, positive semi-definite and of rank at most samples
    times outputs, and a residual term R that vanishes as the outputs fit. Its spectrum has a bulk of eigenvalues near
    zero, whose number grows with the parameters, and a few outliers above, whose number goes with the classes or
    clusters in the data (Sagun et al. 2017, arXiv:1706.04454). All negative curvature comes from R.

    Tags: `hessian/lambda_max`, `hessian/lambda_2` and so on down to `num_eigenvalues`, and `hessian/lambda_min`, in
    units of loss per parameter squared; some eigenvalue lies within `hessian/residual`, `hessian/lambda_2_residual`,
    ..., `hessian/lambda_min_residual` of each. `hessian/density`, the distribution of all eigenvalues by stochastic
    Lanczos quadrature: a histogram on a signed logarithmic axis, and under `hessian/density_points` a tensor of
    eigenvalues and weights. `hessian/mean` of the eigenvalues and `hessian/mean_error`; `hessian/negative_mass`, the
    share of eigenvalues below zero: of those too near zero for the quadrature to tell, exact zeros among them, one half
    counts, and `hessian/negative_mass_error` allows for it. `hessian/num_outliers`, how many of the largest stand clear
    of the bulk, `hessian/bulk_edge`, where it ends, and `hessian/outlier_gap`, what the count rests on: at 5 an
    eigenvalue begins to count, 10 is beyond doubt (see `spectral_callbacks.metrics.outliers`).
    `hessian/condition_number`, the largest eigenvalue over the smallest one in the quadrature above
    `hessian/condition_cutoff` (a full Hessian is singular, so without a cut-off there is none). `hessian/num_matvecs`,
    all products; `hessian/status` (0 converged, 1 budget spent, 2 breakdown or a failure that was reported, 3 not
    finite), that of the worst search.

    With `outputs=`: `hessian/residual_ratio` = ‖H - G‖ / ‖H‖ in the Frobenius norm and `hessian/residual_ratio_error`,
    from 10 random vectors that both matrices are multiplied with; 0 for a model linear in its parameters. With
    `gauss_newton` the set is logged of G as well, as `gauss_newton/...`, without the smallest eigenvalue and the
    negative mass, which are 0.

    Of the input of the last layer on the probe's batches, `features/condition_number` (a column of ones stands for the
    bias; zero is what rounding leaves of it) and `features/unfitted_modes`: the share of its modes that as many steps
    of plain gradient descent as were taken, all at the present learning rate (the largest, if there are several), would
    not have fitted, were the features fixed. The loss counts as quadratic in the layer's outputs with the mean
    curvature that it has now, or with 1/samples where `outputs` is not named. Test error peaks where features are as
    many as samples and the condition number is largest, but only once those slow modes are fitted (Liu and Flanigan
    2023, arXiv:2312.03951).

    How to read it: a count of outliers that holds while its gap stays above 10 is a fact; otherwise the spectrum has no
    clear edge, which is common in trained networks. A negative mass that falls with the residual ratio shows training
    reach a valley. Nothing is counted where a batch has fewer samples than classes, or the list is too short for a bulk
    below as many outliers as there are classes. A network at initialization may have classes times classes less one.

    Cost: 30 to 130 products for the 10 largest eigenvalues (many where there is no gap, as at initialization), 25 to 55
    for the smallest, `num_steps` x `num_probes` = 90 for the density, 20 for the residual ratio: some 160 to 250, and
    120 to 220 more for G. A product is 1.5 to 1.9 gradient passes, and all share one gradient graph.

    Args:
        num_eigenvalues: How many of the largest are logged, and searched for outliers.
        num_steps: Lanczos steps for the density.
        num_probes: Random vectors for the density.
        gauss_newton: Whether the Gauss-Newton matrix is measured too.
        features: Dotted name of the layer whose input is the feature matrix; by default the last `nn.Linear` that runs.
        cutoff: Eigenvalues below this share of the largest do not enter the condition number.
        linear_below: |λ| up to which the axis of the histogram is linear.
        rtol: Residual at which an eigenvalue is accepted, relative to it.
        max_matvecs: Products that one search may spend; there are up to three.
        **options: Those of `SpectralCallback`.

    Example:
        >>> HessianSpectrum(20, outputs="net", every_n_epochs=1).name
        'hessian'
    """

    diagnostic: ClassVar[str] = "hessian"
    differentiates_twice: ClassVar[bool] = True
    charts: tuple[Chart, ...] = ()

    def __init__(
        self,
        num_eigenvalues: int = 10,
        *,
        num_steps: int = 30,
        num_probes: int = 3,
        gauss_newton: bool = False,
        features: str | None = None,
        cutoff: float = 1e-3,
        linear_below: float = 1e-3,
        rtol: float = 3e-3,
        max_matvecs: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for name, number in (("num_steps", num_steps), ("num_probes", num_probes)):
            if number < 1:
                raise ValueError(f"{name}={number} must be at least 1; 30 steps from 3 probes are a good start.")
        if not 0 < cutoff < 1:
            raise ValueError(f"cutoff={cutoff} must lie between 0 and 1, for example 1e-3.")
        if not linear_below > 0:
            raise ValueError(f"linear_below={linear_below} must be a positive eigenvalue, for example 1e-3.")
        self.num_eigenvalues = num_eigenvalues
        self.num_steps, self.num_probes = num_steps, num_probes
        self.gauss_newton = gauss_newton
        self.features = features
        self.cutoff = cutoff
        self.linear_below = linear_below
        self.rtol = rtol
        # A budget below the number asked for finds as many as it can pay, and the status says so.
        self._num_searched = min(num_eigenvalues, max(max_matvecs, 1))
        self._top = Tracker(self._num_searched, rtol=rtol, max_matvecs=max_matvecs)
        self._bottom = Tracker(which="SA", rtol=rtol, max_matvecs=max_matvecs)
        self._top_of_gauss_newton = Tracker(self._num_searched, rtol=rtol, max_matvecs=max_matvecs)
        self._refused = False
        self.charts = _charts(self._num_searched, with_ratio=self.outputs is not None)

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check the name of the features."""
        names = [name for name, _ in module.named_modules() if name]
        if self.features is not None and self.features not in names:
            close = difflib.get_close_matches(self.features, names, n=3, cutoff=0.3)
            hint = f"; close names are {', '.join(map(repr, close))}" if close else ""
            raise ValueError(
                f"features={self.features!r} names no submodule of {type(module).__name__}{hint}. Pass the dotted name "
                "of the layer whose input is the feature matrix."
            )

    def forget(self) -> None:
        """Start the next searches cold."""
        self._refused = False
        for tracker in (self._top, self._bottom, self._top_of_gauss_newton):
            tracker.forget()

    def failure(self) -> Mapping[str, float]:
        """Return the status of a failed measurement."""
        return {"hessian/status": float(Status.BREAKDOWN)}

    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        """Return the spectrum of the Hessian at this step, and what goes with it."""
        hessian = probe.operator(Hessian)
        gauss_newton, ratio = self._compare(hessian, probe)
        num_classes, num_rows = (1, probe.num_samples) if gauss_newton is None else output_shape(gauss_newton)
        counts = self._counts_outliers(num_classes, num_rows)
        measured = [self._spectrum("hessian", hessian, self._top, self._bottom, probe, counts=counts)]
        if gauss_newton is not None and self.gauss_newton:
            top = self._top_of_gauss_newton
            measured.append(self._spectrum("gauss_newton", gauss_newton, top, None, probe, counts=counts))
        status = max(each.status for each in measured)
        if status is not Status.CONVERGED:
            self.say(f"{status.name.lower()}: {status.remedy}")
        readings = {tag: value for each in measured for tag, value in each.readings.items()} | ratio
        if status is Status.BREAKDOWN:  # of no symmetric matrix, so these numbers are none of a spectrum
            readings = {}
        readings |= self._conditioning(probe, gauss_newton)
        num_more = 2 * NUM_VECTORS if gauss_newton is not None else 0
        readings["hessian/num_matvecs"] = sum(each.num_matvecs for each in measured) + num_more
        readings["hessian/status"] = float(status)
        return {tag: value for tag, value in readings.items() if isinstance(value, Spectrum) or math.isfinite(value)}

    def _compare(self, hessian: LinearOperator, probe: Probe) -> tuple[GaussNewton | None, dict[str, Reading]]:
        """Return the Gauss-Newton matrix, if there is one, and its distance from the Hessian."""
        if self._refused:
            return None, {}
        try:
            gauss_newton = probe.gauss_newton()
            ratio = residual_ratio(hessian, gauss_newton, probe.generator)
        except ValueError as reason:
            wanted = "hessian/residual_ratio" + (" and gauss_newton/*" if self.gauss_newton else "")
            self._refused = True
            self.say(f"{wanted} left out: {reason}")
            return None, {}
        return gauss_newton, {"hessian/residual_ratio": ratio.value, "hessian/residual_ratio_error": ratio.error}

    def _spectrum(
        self, name: str, A: LinearOperator, top: Tracker, bottom: Tracker | None, probe: Probe, *, counts: bool
    ) -> _Measured:
        largest = top(A, generator=probe.generator)
        searches = [largest]
        readings = _eigenvalues(name, largest)
        if bottom is not None:
            smallest = bottom(A, generator=probe.generator)
            searches.append(smallest)
            readings[f"{name}/lambda_min"] = smallest.values[0].item()
            readings[f"{name}/lambda_min_residual"] = smallest.residuals[0].item()
        known = largest if largest.status is Status.CONVERGED else None
        density = spectral_density(
            A, num_steps=self.num_steps, num_probes=self.num_probes, generator=probe.generator, eigenpairs=known
        )
        status = max(density.status, *(search.status for search in searches))
        if self._num_searched < min(self.num_eigenvalues, A.shape[0]):
            status = max(status, Status.BUDGET)
        if status < Status.BREAKDOWN:
            readings |= self._distribution(name, density, largest, signed=bottom is not None)
            if counts:
                readings |= self._bulk(name, largest, A.shape[0])
        return _Measured(readings, status, density.num_matvecs + sum(search.num_matvecs for search in searches))

    def _distribution(self, name: str, density: Density, largest: Eigenpairs, *, signed: bool) -> dict[str, Reading]:
        nodes, weights = density.nodes[density.weights > 0], density.weights[density.weights > 0]
        mean = density.moment(1)
        top = largest.values[:1]
        # A node of less than half an eigenvalue may lie in a gap, where there is none.
        seen = nodes[weights * density.size >= 0.5]
        readings: dict[str, Reading] = {
            f"{name}/density": Spectrum(nodes, weights / len(density.weights), density.size, self.linear_below),
            f"{name}/mean": mean.value,
            f"{name}/mean_error": mean.error,
            f"{name}/condition_number": condition_number(torch.cat([seen, top]), cutoff=self.cutoff),
            f"{name}/condition_cutoff": self.cutoff * max(top.item(), 0.0),
        }
        if signed:
            negative = density.mass_below(-2 * density.rounding)
            readings[f"{name}/negative_mass"] = negative.value
            readings[f"{name}/negative_mass_error"] = negative.error
        return readings

    def _counts_outliers(self, num_classes: int, num_rows: int) -> bool:
        """Return whether a count could mean anything, and say why not."""
        num_expected = num_classes if num_classes > 1 else 0
        if num_rows < num_classes:
            reason = f"the probe has fewer samples than there are classes, {num_classes}. Raise num_batches."
        elif self.num_eigenvalues < num_expected + _BULK:
            reason = (
                f"num_eigenvalues={self.num_eigenvalues} is too few to see a bulk below {num_expected} outliers. Pass "
                f"num_eigenvalues={2 * num_expected + _BULK}."
            )
        else:
            return True
        self.say(f"num_outliers, bulk_edge and outlier_gap left out: {reason}")
        return False

    def _bulk(self, name: str, largest: Eigenpairs, size: int) -> dict[str, Reading]:
        reached = (largest.residuals <= _LOOSE * self.rtol * largest.values.abs()).long().cumprod(0).sum().item()
        found = outliers(largest.values[: int(reached)], size=size)
        if found.count is None:
            self.say(
                f"{name}/num_outliers, bulk_edge and outlier_gap left out at some steps: the largest eigenvalues, as "
                "far as they converged, show no edge of a bulk. Raise num_eigenvalues or max_matvecs; a spectrum that "
                "decays like a power law has none."
            )
            return {}
        return {
            f"{name}/num_outliers": float(found.count),
            f"{name}/bulk_edge": found.bulk_edge,
            f"{name}/outlier_gap": found.gap,
        }

    def _conditioning(self, probe: Probe, gauss_newton: GaussNewton | None) -> dict[str, float]:
        readings = conditioning(probe, self.features, gauss_newton, seed=self.seed)
        if readings is None:
            layer = "an nn.Linear" if self.features is None else repr(self.features)
            self.say(f"features/* left out: the loss did not run {layer}. Pass as features= a layer that it runs.")
        return readings or {}


def _charts(num_eigenvalues: int, *, with_ratio: bool) -> tuple[Chart, ...]:
    values = ["hessian/lambda_max", *(f"hessian/lambda_{i}" for i in range(2, num_eigenvalues + 1))]
    edge = ["hessian/bulk_edge"] if num_eigenvalues >= _BULK else []
    ratio = Chart("residual ratio: how far the Hessian is from Gauss-Newton", ("hessian/residual_ratio",))
    return (
        Chart("largest eigenvalues and the bulk edge", (*values, *edge)),
        Chart("negative mass", ("hessian/negative_mass",)),
        *((ratio,) if with_ratio else ()),
    )


def _eigenvalues(name: str, pairs: Eigenpairs) -> dict[str, Reading]:
    readings: dict[str, Reading] = {
        f"{name}/lambda_max": pairs.values[0].item(),
        f"{name}/residual": pairs.residuals[0].item(),
    }
    for index in range(1, len(pairs.values)):
        readings[f"{name}/lambda_{index + 1}"] = pairs.values[index].item()
        readings[f"{name}/lambda_{index + 1}_residual"] = pairs.residuals[index].item()
    return readings
