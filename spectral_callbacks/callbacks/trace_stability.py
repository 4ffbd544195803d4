"""TraceStability: how far SGD is from instability, its batch size counted."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl

from spectral_callbacks.callbacks.attempts import Attempts
from spectral_callbacks.callbacks.base import SpectralCallback
from spectral_callbacks.callbacks.batch_sharpness import batch_sharpness
from spectral_callbacks.callbacks.curvature_along import curvature_along
from spectral_callbacks.callbacks.findings import Findings
from spectral_callbacks.callbacks.reading import Reading
from spectral_callbacks.callbacks.sample_conditions import sample_conditions
from spectral_callbacks.callbacks.sampling import Sampling, sampling_of
from spectral_callbacks.linalg import Estimate, LinearOperator, Status, Tracker, frobenius_norm
from spectral_callbacks.linalg.trace import trace
from spectral_callbacks.linalg.watched import Watched
from spectral_callbacks.metrics import noise_fraction
from spectral_callbacks.operators import Hessian
from spectral_callbacks.probe import Probe
from spectral_callbacks.stability import Edge, NoThresholdError, edges
from spectral_callbacks.tags import Chart

_ROUNDING = 1e-5  # relative errors below are those of float32
_OF_SAMPLES = "gauss_newton, batch_ratio, directional_ratio and alignment"


@dataclasses.dataclass
class _Found(Findings):
    """What one measurement found.

    Attributes:
        conditions: Curvatures that are at most 2/η in a stable run; each becomes the ratio of its name.
    """

    conditions: dict[str, Estimate] = dataclasses.field(default_factory=dict)

    def add(self, tag: str, estimate: Estimate) -> None:
        """Add a number, and its error if it has more than that of rounding."""
        self.readings[f"trace/{tag}"] = estimate.value
        if estimate.error > _ROUNDING * abs(estimate.value):
            self.readings[f"trace/{tag}_error"] = estimate.error


class TraceStability(SpectralCallback):
    """The curvature that SGD can stay at: the trace of the Hessian and its kin against 2/η, the batch size counted.

    At a minimum that fits every sample SGD is less stable than gradient descent, because its noise is as large as the
    distance from the minimum: batches of B of n samples are stable only while (Mulayoff and Michaeli 2024,
    arXiv:2306.07850, with H_i the Hessians of single samples and p the `noise_fraction`)

        (16)  [(1 - p) ‖H‖² + p mean ‖H_i‖²] / tr H  ≤  2/η        (15)  λ + p/λ mean (vᵀH_i v - λ)²  ≤  2/η

    where v is the top eigenvector and λ its eigenvalue. So SGD cannot stay at minima where gradient descent can. A
    ratio is η/2 times a left side: above 1 such a minimum is unstable; below 1 it need not be stable.

    Tags: `trace/hessian`, tr H over the probe's batches, in units of loss per parameter squared, and
    `trace/hessian_error`; `trace/two_over_lr`; `trace/ratio`, η tr H / 2, which must be below 1 for batch size 1 and a
    scalar output (Wu and Su 2023, arXiv:2305.17490) and for no others: the bound for C outputs is C/p;
    `trace/frobenius_ratio`, η ‖H‖ / √B, which noise of the size of the loss and the shape of H keeps below 1 (Wu, Wang
    and Su 2022, arXiv:2207.02628); `trace/batch_sharpness`, the mean over batches of g_BᵀH_B g_B / |g_B|², with the
    gradient and Hessian of one batch, which SGD raises to 2/η (Andreyev and Beneventano 2024, arXiv:2412.20553);
    `trace/num_matvecs`; `trace/status` (0 converged, 1 budget spent, 2 breakdown or a failure that was reported, 3 not
    finite). With `outputs=` and batches whose samples lie along dimension 0, from the Gauss-Newton matrices G_i of
    single samples, G for H: `trace/gauss_newton`, tr G, which is tr H where the residuals vanish;
    `trace/batch_ratio`, condition (16); `trace/directional_ratio`, condition (15); `trace/frobenius_ratio`, of G; and
    `trace/alignment`, μ of `spectral_callbacks.metrics.alignment`, with which ‖G‖ ≤ √(B/μ) / η. Where a number rests on
    random vectors, random batches or a part of the dataset, its standard error is the tag that ends in `_error`:
    `trace/ratio_error`, `trace/frobenius_ratio_error`, `trace/batch_sharpness_error`, and so on.

    Ratios are for plain SGD: with momentum, weight decay, an adaptive optimizer or learning rates that differ they and
    2/η are left out. They assume a loss that is the mean over samples; away from a minimum, or for another loss than
    the squared one, they are an empirical statement.

    How to read it: where `trace/batch_ratio` or `trace/directional_ratio` climbs to 1 and turns back, the noise has
    driven the run to a flatter region, though λ_max is far below 2/η. Name a second instance with `batch_size=1` to see
    how a solution would fare under the smallest batches. The probe should be the whole dataset where it is small
    (`num_batches`), and no more than that, for then samples would count twice; else what depends on samples is
    estimated without bias from those it has, the top eigenvector of (15) excepted, which fits the probe better than the
    dataset. With one training batch as the probe, `trace/batch_sharpness` is of that batch alone and has no error.

    Cost: `num_matvecs` products for the trace, as many for ‖H‖ without `outputs=`, a gradient and a product of a batch
    for each draw; with `outputs=`, the search for v, one backward pass per output for each of `num_samples`, and
    `num_matvecs` more if the probe has more samples than that. Memory, in vectors of the parameters' size, beside the
    gradient graph: 2 `num_matvecs` at a time for the trace or ‖H‖, one for each product of the search (at most about
    80, in room that doubles as it grows: up to 160); between measurements at most 4 stay, with `outputs=` alone.

    Args:
        num_matvecs: Products that the trace may spend.
        num_samples: Samples, at most, whose Jacobians are compared; all are counted in (15).
        num_draws: Batches that batch sharpness is averaged over, drawn from the probe's samples.
        batch_size: Samples of a step; None reads the DataLoader, with the batches that are accumulated.
        dataset_size: Samples of the dataset; None reads the DataLoader.
        replacement: Whether a sample can come twice in a batch; None reads the DataLoader.
        rtol: Residual at which the top eigenvalue of G is accepted, relative to it.
        max_matvecs: Products that one search or one trace may spend.
        **options: Those of `SpectralCallback`.

    Example:
        >>> TraceStability(batch_size=1, name="trace_b1").name
        'trace_b1'
    """

    diagnostic: ClassVar[str] = "trace"
    differentiates_twice: bool = True
    charts: tuple[Chart, ...] = ()

    def __init__(
        self,
        *,
        num_matvecs: int = 30,
        num_samples: int = 64,
        num_draws: int = 8,
        batch_size: int | None = None,
        dataset_size: int | None = None,
        replacement: bool | None = None,
        rtol: float = 3e-3,
        max_matvecs: int = 100,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        for knob, value in (("num_matvecs", num_matvecs), ("num_samples", num_samples), ("num_draws", num_draws)):
            if value < 1:
                raise ValueError(f"{knob}={value!r} must be at least 1.")
        for knob, value in (("batch_size", batch_size), ("dataset_size", dataset_size)):
            if value is not None and value < 1:
                raise ValueError(f"{knob}={value!r} must be at least 1, or None for that of the DataLoader.")
        self._num_matvecs = num_matvecs
        self._num_samples = num_samples
        self._num_draws = num_draws
        self._max_matvecs = max_matvecs
        self._given = Sampling(batch_size, dataset_size, replacement)
        self._sampling = self._given
        self._read: Callable[[], Sampling] = lambda: self._given
        self._top = Tracker(rtol=rtol, max_matvecs=max_matvecs, look_every=self.looks_every)
        self._attempt = Attempts(self.say)

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read how the DataLoader draws batches, and draw the charts of what will be logged."""
        self._read = lambda: self._given.or_else(sampling_of(trainer))
        self._sampling = sampling = self._read()
        if sampling.unknown:
            self.say(
                f"the training DataLoader does not tell {', '.join(sampling.unknown)}, and what depends on that is "
                "left out; pass it as an argument."
            )
        elif sampling.batch_size and sampling.dataset_size:
            noise_fraction(sampling.dataset_size, sampling.batch_size, replacement=bool(sampling.replacement))
        if self.outputs is None:
            self.say(
                f"without outputs= {_OF_SAMPLES} are left out; pass the dotted name of the submodule whose output the "
                "loss scores, or '' for the module's own forward."
            )
        optimizer = trainer.optimizers[self.optimizer]
        self.charts = self._draw(_learning_rate(lambda: [edge for group in edges(optimizer) for edge in group]))

    def _draw(self, learning_rate: float | None) -> tuple[Chart, ...]:
        per_sample = self.outputs is not None
        line = ("trace/two_over_lr",) if learning_rate else ()
        conditions = ("trace/batch_ratio", "trace/directional_ratio")
        traces = Chart("trace and 2 / lr", ("trace/hessian", *(("trace/gauss_newton",) if per_sample else ()), *line))
        batches = Chart("batch sharpness and 2 / lr", ("trace/batch_sharpness", *line))
        ratios = Chart(
            "stability of SGD (1 is the bound)",
            ("trace/ratio", *(conditions if per_sample and not self._sampling.unknown else ())),
        )
        return (traces, batches, ratios) if learning_rate else (traces, batches)

    def forget(self) -> None:
        """Start the next search cold, and try again what failed."""
        self._top.forget()
        self._attempt.forget()

    def failure(self) -> Mapping[str, float]:
        """Return the status of a failed measurement."""
        return {"trace/status": float(Status.BREAKDOWN)}

    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        """Return traces, conditions and batch sharpness at this step."""
        self._sampling = self._read()  # batches may be accumulated by a schedule
        found = _Found()
        hessian = self._estimate(trace, probe.operator(Hessian), probe, found)
        found.add("hessian", hessian)
        found.readings["trace/hessian_error"] = hessian.error  # also where it is 0
        found.conditions["ratio"] = hessian
        norm = None
        if self.outputs is not None:
            norm = self._attempt(_OF_SAMPLES, lambda: self._look_at_samples(probe, found))
        sampling = self._sampling
        if sampling.batch_size is not None:
            if norm is None:
                norm = self._estimate(frobenius_norm, probe.operator(Hessian), probe, found)
            found.conditions["frobenius_ratio"] = _scaled(norm, 2 / sampling.batch_size**0.5)
            sharpness = self._attempt(
                "batch_sharpness", lambda: batch_sharpness(probe, sampling, num_draws=self._num_draws)
            )
            if sharpness is not None:
                found.add("batch_sharpness", sharpness)
                found.num_matvecs += sharpness.num_samples
        self._judge(probe, found)
        return found.concluded("trace", self.say)

    def _judge(self, probe: Probe, found: _Found) -> None:
        """Turn conditions into ratios, where the optimizer is one that the theory is of."""
        learning_rate = _learning_rate(probe.edges)
        if learning_rate is None:
            self.say(
                "2 / lr and the ratios left out: their theory is for SGD without momentum and weight decay and "
                f"with one learning rate, and this {type(probe.optimizer).__name__} is not that."
            )
        elif not learning_rate:
            self.say("the learning rate is 0, so nothing moves: 2 / lr and the ratios are left out until it rises.")
        else:
            found.readings["trace/two_over_lr"] = 2 / learning_rate
            for tag, condition in found.conditions.items():
                found.add(tag, _scaled(condition, learning_rate / 2))

    def _estimate(self, estimator: Callable[..., Estimate], A: LinearOperator, probe: Probe, found: _Found) -> Estimate:
        budget = min(self._num_matvecs, self._max_matvecs)
        if budget < min(self._num_matvecs, A.shape[0]):
            found.statuses.append(Status.BUDGET)
        watched = Watched(A)
        estimate = estimator(watched, num_matvecs=budget, generator=probe.generator)
        found.statuses.append(watched.status)
        found.num_matvecs += min(budget, A.shape[0])
        if not math.isfinite(estimate.value):
            found.statuses.append(Status.NONFINITE)
        return estimate

    def _look_at_samples(self, probe: Probe, found: _Found) -> Estimate:
        """Compare the Gauss-Newton matrices of single samples; return the norm of their mean."""
        sampling, probed = self._sampling, probe.num_samples
        if sampling.dataset_size is not None and probed > sampling.dataset_size:
            raise ValueError(
                f"the probe has {probed} samples, the dataset {sampling.dataset_size}, so that some would count twice; "
                "lower num_batches, or pass the dataset_size= there is."
            )
        curved, gauss_newton = probe.sample_curvature(self._num_samples), probe.gauss_newton()
        top = self._top(gauss_newton, generator=probe.generator)
        found.count(top)
        along = curvature_along(gauss_newton, top.vectors[:, 0], probe.batches)
        found.num_matvecs += 1
        of_samples = sample_conditions(curved, along, sampling)
        m = len(curved.losses)
        if m == probed:
            found.add("gauss_newton", Estimate(of_samples.trace, 0.0, m))
        else:
            found.add("gauss_newton", self._estimate(trace, gauss_newton, probe, found))
        found.add("alignment", of_samples.alignment)
        found.conditions |= of_samples.conditions
        return of_samples.norm


def _learning_rate(find: Callable[[], Sequence[Edge]]) -> float | None:
    """Return the learning rate that all parameters share under plain SGD; None where something else moves them."""
    try:
        first, *others = find()
    except NoThresholdError:
        return None
    is_plain = first.is_plain and first == Edge(first.learning_rate, 2.0)
    return first.learning_rate if is_plain and all(edge.is_plain and edge == first for edge in others) else None


def _scaled(estimate: Estimate, factor: float) -> Estimate:
    return Estimate(factor * estimate.value, factor * estimate.error, estimate.num_samples)
