"""The spectrum of the Hessian: outliers, bulk and negative part."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch

from spectral_callbacks.callbacks.attempts import Attempts
from spectral_callbacks.callbacks.base import SpectralCallback
from spectral_callbacks.callbacks.features import spectrum_of_features, unfitted_share
from spectral_callbacks.callbacks.findings import Findings
from spectral_callbacks.callbacks.reading import Reading, Spectrum, check_axis
from spectral_callbacks.linalg import Density, Eigenpairs, LinearOperator, Status, Tracker, spectral_density
from spectral_callbacks.linalg.quadrature import check_quadrature
from spectral_callbacks.metrics import condition_number, outliers
from spectral_callbacks.metrics.outliers import SMALLEST_BULK
from spectral_callbacks.metrics.residual import residual_ratio
from spectral_callbacks.operators import GaussNewton, Hessian
from spectral_callbacks.probe import Probe, named_module
from spectral_callbacks.tags import Chart

_LOOSE = 2.0  # residual, in units of rtol, up to which an eigenvalue counts when the budget ran out


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
    share of eigenvalues below zero: of those too near zero for the quadrature to tell, exact zeros among them, about
    one half counts, or none where nothing else is negative, and `hessian/negative_mass_error` allows for it.
    `hessian/num_outliers`, how many of the largest stand clear of the bulk, `hessian/bulk_edge`, where it ends, and
    `hessian/outlier_gap`, what the count rests on: at 5 an eigenvalue begins to count, 10 is beyond doubt (see
    `spectral_callbacks.metrics.outliers`). `hessian/condition_number`, the largest eigenvalue over the smallest one in
    the quadrature above `hessian/condition_cutoff` (a full Hessian is singular, so without a cut-off there is none).
    `hessian/num_matvecs`, all products; `hessian/status` (0 converged, 1 budget spent, 2 breakdown or a failure that
    was reported, 3 not finite), that of the worst search.

    With `outputs=`: `hessian/residual_ratio` = ‖H - G‖ / ‖H‖ in the Frobenius norm and `hessian/residual_ratio_error`,
    from 10 random vectors that both matrices are multiplied with (so few that the truth is within two errors in 83 to
    93 of 100 cases); 0 for a model linear in its parameters. With `gauss_newton` the set is logged of G as well, as
    `gauss_newton/...`, without the smallest eigenvalue and the negative mass, which are 0.

    Of the input of the last layer on the probe's batches, a matrix with a column for each entry of the last dimension
    and a row for each index of all others, `features/condition_number` (a column of ones stands for the bias; zero is
    what rounding leaves of it) and `features/unfitted_modes`: the share of its modes that as many steps of plain
    gradient descent as were taken, all at the present learning rate (the largest, if there are several), would not have
    fitted, were the features fixed. The loss counts as quadratic in the layer's own outputs, with the mean curvature
    that it has there now. Test error peaks where features are as many as samples and the condition number is largest,
    but only once those slow modes are fitted (Liu and Flanigan 2023, arXiv:2312.03951).

    How to read it: a count of outliers that holds while its gap stays above 10 is a fact; otherwise the spectrum has no
    clear edge, which is common in trained networks. A negative mass that falls with the residual ratio shows training
    reach a valley. To count outliers, pass `num_eigenvalues` = 2 x classes + 8: nothing is counted where the list is
    too short for a bulk below as many outliers as the model has outputs, or the probe has fewer samples than outputs.
    At initialization there are often more outliers, up to classes times classes less one, or no edge of a bulk.

    Cost: 30 to 100 products for the 10 largest eigenvalues (`max_matvecs` where there is no gap, as at initialization),
    25 to 55 for the smallest, `num_steps` x `num_probes` = 90 for the density, 20 for the residual ratio: some 160 to
    260, and 120 to 190 more for G. A product is 1.5 to 1.9 gradient passes, and all share one gradient graph. Memory,
    in vectors of the parameters' size, beside that graph: a search holds one for each product, at most about 80 (or 4
    `num_eigenvalues`, if that is more), in room that doubles as it grows, up to 160; then the density `num_steps`, the
    residual ratio 40. Between measurements at most 2 `num_eigenvalues` + 6 = 26 stay, and 22 more for G.

    Args:
        num_eigenvalues: How many of the largest are logged, and searched for outliers.
        num_steps: Lanczos steps for the density.
        num_probes: Random vectors for the density.
        gauss_newton: Whether the Gauss-Newton matrix is measured too.
        features: Dotted name of the layer whose input is the feature matrix, (samples, features) or (samples,
            positions, features), its first floating tensor; by default the last `nn.Linear` that runs.
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
    differentiates_twice: bool = True
    shares_eigenpairs: ClassVar[bool] = True
    more_families: ClassVar[tuple[str, ...]] = ("gauss_newton", "features")
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
        check_quadrature(num_steps, num_probes)
        if not 0 < cutoff < 1:
            raise ValueError(f"cutoff={cutoff} must lie between 0 and 1, for example 1e-3.")
        check_axis(linear_below)
        self._num_eigenvalues = num_eigenvalues
        self._num_steps, self._num_probes = num_steps, num_probes
        self._gauss_newton = gauss_newton
        self._features = features
        self._cutoff = cutoff
        self._linear_below = linear_below
        self._rtol = rtol
        # A budget below the number asked for finds as many as it can pay, and the status says so.
        self._num_searched = min(num_eigenvalues, max(max_matvecs, 1))
        search: dict[str, Any] = {"rtol": rtol, "max_matvecs": max_matvecs, "look_every": self.looks_every}
        self._top = Tracker(self._num_searched, **search)
        self._bottom = Tracker(which="SA", **search)
        self._top_of_gauss_newton = Tracker(self._num_searched, **search)
        self._attempt = Attempts(self.say)
        self.charts = _charts(self._num_searched, with_ratio=self.outputs is not None)

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Check the name of the features."""
        if self._features is not None:
            named_module(module, self._features, knob="features")

    def forget(self) -> None:
        """Start the next searches cold, and try again what failed."""
        self._attempt.forget()
        for tracker in (self._top, self._bottom, self._top_of_gauss_newton):
            tracker.forget()

    def failure(self) -> Mapping[str, float]:
        """Return the status of a failed measurement."""
        return {"hessian/status": float(Status.BREAKDOWN)}

    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        """Return the spectrum of the Hessian at this step, and what goes with it."""
        hessian, found = probe.operator(Hessian), Findings()
        gauss_newton = self._compare(hessian, probe, found)
        num_outputs, num_rows = (1, probe.num_samples) if gauss_newton is None else _outputs(gauss_newton)
        counts = self._counts_outliers(num_outputs, num_rows)
        largest = self._look_at("hessian", hessian, self._top, self._bottom, probe, found, counts=counts)
        probe.share_eigenpairs(largest)
        if gauss_newton is not None and self._gauss_newton:
            top = self._top_of_gauss_newton
            self._look_at("gauss_newton", gauss_newton, top, None, probe, found, counts=counts)
        found.readings |= self._conditioning(probe)
        return found.concluded("hessian", self.say)

    def _compare(self, hessian: LinearOperator, probe: Probe, found: Findings) -> GaussNewton | None:
        """Find how far the Gauss-Newton matrix is from the Hessian, and return it, if there is one."""
        wanted = "hessian/residual_ratio" + (" and gauss_newton/*" if self._gauss_newton else "")
        ratio = self._attempt(wanted, lambda: residual_ratio(hessian, probe.gauss_newton(), generator=probe.generator))
        if ratio is None:
            return None
        found.num_matvecs += 2 * ratio.num_samples
        found.readings |= {"hessian/residual_ratio": ratio.value, "hessian/residual_ratio_error": ratio.error}
        return probe.gauss_newton()

    def _look_at(
        self,
        name: str,
        A: LinearOperator,
        top: Tracker,
        bottom: Tracker | None,
        probe: Probe,
        found: Findings,
        *,
        counts: bool,
    ) -> Eigenpairs:
        """Find the spectrum of one matrix, and return its largest eigenpairs."""
        largest = top(A, generator=probe.generator)
        found.add_largest(name, largest)
        statuses = [largest.status]
        if bottom is not None:
            smallest = bottom(A, generator=probe.generator)
            found.add_smallest(name, smallest)
            statuses.append(smallest.status)
        known = largest if largest.status is Status.CONVERGED else None
        density = spectral_density(
            A, num_steps=self._num_steps, num_probes=self._num_probes, generator=probe.generator, eigenpairs=known
        )
        found.count(density)
        if self._num_searched < min(self._num_eigenvalues, A.shape[0]):
            found.statuses.append(Status.BUDGET)
        if max(density.status, *statuses) < Status.BREAKDOWN:
            found.readings |= self._distribution(name, density, largest, signed=bottom is not None)
            if counts:
                found.readings |= self._bulk(name, largest, A.shape[0])
        return largest

    def _distribution(self, name: str, density: Density, largest: Eigenpairs, *, signed: bool) -> dict[str, Reading]:
        nodes, weights = density.nodes[density.weights > 0], density.weights[density.weights > 0]
        mean = density.moment(1)
        top = largest.values[:1]
        # A node of less than half an eigenvalue may lie in a gap, where there is none.
        seen = nodes[weights * density.size >= 0.5]
        readings: dict[str, Reading] = {
            f"{name}/density": Spectrum(nodes, weights / len(density.weights), density.size, self._linear_below),
            f"{name}/mean": mean.value,
            f"{name}/mean_error": mean.error,
            f"{name}/condition_number": condition_number(torch.cat([seen, top]), cutoff=self._cutoff),
            f"{name}/condition_cutoff": self._cutoff * max(top.item(), 0.0),
        }
        if signed:
            negative = density.mass_below(0.0)
            readings[f"{name}/negative_mass"] = negative.value
            readings[f"{name}/negative_mass_error"] = negative.error
        return readings

    def _counts_outliers(self, num_outputs: int, num_rows: int) -> bool:
        """Return whether a count could mean anything, and say why not."""
        several = num_outputs if num_outputs > 1 else 0
        if num_rows < num_outputs:
            reason = f"the probe has {num_rows} samples, and the model more outputs, {num_outputs}. Raise num_batches."
        elif self._num_eigenvalues < several + SMALLEST_BULK:
            below = f": the model has {several} outputs, and there may be as many outliers" if several else ""
            reason = (
                f"num_eigenvalues={self._num_eigenvalues} is too few to see a bulk{below}. Pass "
                f"num_eigenvalues={2 * several + SMALLEST_BULK}."
            )
        else:
            return True
        self.say(f"num_outliers, bulk_edge and outlier_gap left out: {reason}")
        return False

    def _bulk(self, name: str, largest: Eigenpairs, size: int) -> dict[str, Reading]:
        reached = (largest.residuals <= _LOOSE * self._rtol * largest.values.abs()).long().cumprod(0).sum().item()
        found = outliers(largest.values[: int(reached)], size=size)
        if found.count is None:
            self.say(
                "num_outliers, bulk_edge and outlier_gap left out wherever no bulk ends among the largest eigenvalues, "
                "as is usual at initialization and in a spectrum that decays like a power law. If they stay away, "
                "raise num_eigenvalues, and max_matvecs where the status is not 0."
            )
            return {}
        return {
            f"{name}/num_outliers": float(found.count),
            f"{name}/bulk_edge": found.bulk_edge,
            f"{name}/outlier_gap": found.gap,
        }

    def _conditioning(self, probe: Probe) -> dict[str, float]:
        seen = self._attempt("features/*", lambda: spectrum_of_features(probe, self._features, seed=self.seed))
        if seen is None:
            return {}
        readings = {"features/condition_number": seen.condition_number}
        share = self._attempt("features/unfitted_modes", lambda: unfitted_share(probe, seen))
        return readings if share is None else readings | {"features/unfitted_modes": share}


def _outputs(gauss_newton: GaussNewton) -> tuple[int, int]:
    """Return how many outputs and samples there are, for outputs (samples, outputs); (1, samples) for any others."""
    first = [shapes[0] for shapes in gauss_newton.output_shapes]
    return first[0][1] if len(first[0]) == 2 else 1, sum(shape[0] if shape else 1 for shape in first)


def _charts(num_eigenvalues: int, *, with_ratio: bool) -> tuple[Chart, ...]:
    values = ["hessian/lambda_max", *(f"hessian/lambda_{i}" for i in range(2, num_eigenvalues + 1))]
    edge = ["hessian/bulk_edge"] if num_eigenvalues >= SMALLEST_BULK else []
    ratio = Chart("residual ratio: how far the Hessian is from Gauss-Newton", ("hessian/residual_ratio",))
    return (
        Chart("largest eigenvalues and the bulk edge", (*values, *edge)),
        Chart("negative mass", ("hessian/negative_mass",)),
        *((ratio,) if with_ratio else ()),
    )
