"""GradientCovariance: spectrum and size of the mini-batch noise, and how it lies against the curvature."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from spectral_callbacks.callbacks.attempts import Attempts
from spectral_callbacks.callbacks.base import SpectralCallback
from spectral_callbacks.callbacks.batches import FrozenBatch
from spectral_callbacks.callbacks.findings import Findings
from spectral_callbacks.callbacks.gradient_statistics import add_classes, add_noise, add_overlap, add_spectrum
from spectral_callbacks.callbacks.gram_rider import GramRider, Read, options_of_a_ride
from spectral_callbacks.callbacks.labels import Labels, LabelSource
from spectral_callbacks.callbacks.noise_average import NoiseAverage
from spectral_callbacks.callbacks.reading import Reading, check_axis
from spectral_callbacks.callbacks.sample_conditions import loss_noise_alignment
from spectral_callbacks.callbacks.sampling import population
from spectral_callbacks.linalg import Eigenpairs, Estimate, Status, Tracker
from spectral_callbacks.linalg.trace import trace
from spectral_callbacks.metrics.covariance_spectrum import CovarianceSpectrum
from spectral_callbacks.metrics.subspaces import noise_curvature_alignment, noise_weights
from spectral_callbacks.operators import Hessian, SampleGram
from spectral_callbacks.probe import Probe
from spectral_callbacks.tags import Chart

_CLASSES = "within_class_trace and between_class_trace"
_NOISE_VECTORS = 10  # products with the Hessian for tr(ΣH)
_TRACE_MATVECS = 30  # products with the Hessian for its mean eigenvalue
_NOISE = Chart(
    "noise scale and its 95 % interval",
    ("gradient/noise_scale", "gradient/noise_scale_low", "gradient/noise_scale_high"),
)
_TOP = Chart(
    "trace of the covariance and its largest eigenvalue",
    ("gradient/covariance_trace", "gradient/covariance_lambda_max"),
)
_OVERLAP = Chart(
    "overlap of noise and curvature, and that of random subspaces",
    ("gradient/hessian_overlap", "gradient/hessian_overlap_null"),
)


class GradientCovariance(SpectralCallback):
    """What the noise of mini-batches looks like: its spectrum, its size, and how it lies against the curvature.

    Every sample i pulls with the gradient g_i of its own loss; a batch takes the mean of B of them, and the covariance
    of that mean is Σ/B. All that is logged here follows from the inner products of N samples' gradients, exactly: no
    N x parameters numbers are formed. Σ is the covariance of *gradients*, not of features, and neither the Fisher
    information nor the Hessian, though its outliers and the Hessian's are often of the same directions, those between
    classes (Sagun et al. 2017, arXiv:1706.04454).

    Tags: `gradient/noise_scale` = tr Σ / |G|², G the expected gradient: the batch size at which noise and signal are of
    one size, the "simple" noise scale (McCandlish et al. 2018, arXiv:1812.06162; left out where the estimate of |G|² is
    not positive), with `gradient/noise_scale_error` and a 95 % interval that is not symmetric,
    `gradient/noise_scale_low` and `gradient/noise_scale_high` (left out where unbounded: |G|² is then not told from 0).
    These and the noise scales of layers are the only ones that are smoothed: numerator and denominator are averaged
    over looks, each apart, and then divided; `ema` = 0 takes each look by itself. All others are of this look alone:
    `gradient/covariance_trace` = tr Σ, without bias, and `gradient/covariance_trace_error`, in units of loss² per
    parameter²; `gradient/signal_to_noise` = |G|² / tr Σ of one sample and its `gradient/signal_to_noise_error` (it can
    come out negative); `gradient/mean_cosine` between two samples' gradients and `gradient/mean_cosine_error`;
    `gradient/norm` of the mean of the N gradients; `gradient/covariance_lambda_max`, the largest eigenvalue of 1/N Σ_i
    (g_i - ḡ)(g_i - ḡ)ᵀ, and `gradient/covariance_lambda_max_error`; `gradient/second_moment_lambda_max`, the same of
    1/N Σ_i g_i g_iᵀ, the empirical Fisher matrix; `gradient/effective_rank`, exp of the entropy of the eigenvalues: how
    many directions share the noise, at most N - 1; `gradient/covariance`, the N - 1 eigenvalues, as a histogram on a
    signed logarithmic axis and under `gradient/covariance_points` as a tensor; `gradient/num_samples` = N;
    `gradient/status` (0 converged, 1 budget spent, 2 breakdown or a failure that was reported, 3 not finite).

    Where eigenvectors of the Hessian are known, those of `Sharpness` or `HessianSpectrum` at the same step and on the
    same probe (the same `data`, `num_batches`, `mode`, `loss`, `precision`, `optimizer` and `seed`; a ride takes those
    of any), or own ones with `hessian`, and else left out: `gradient/hessian_overlap`, the mean squared cosine of the
    angles between the top eigenvectors of Σ and of the Hessian, `num_eigenvalues` of each or as many as are known, and
    `gradient/hessian_overlap_null`, what random subspaces would have; `gradient/top_subspace_share`, the share of |ḡ|²
    in the span of all eigenvectors that are known, its `gradient/top_subspace_share_error`, and
    `gradient/top_subspace_share_null`. Much of the gradient often lies in as many directions as there are classes
    (Gur-Ari et al. 2018, arXiv:1812.04754). With `hessian` also `gradient/noise_curvature_alignment` = tr(ΣH) / (tr Σ
    λ̄), the curvature that the noise sees against the mean eigenvalue λ̄ (left out where that is not positive), and
    with `outputs=` `gradient/loss_noise_alignment`, μ of `spectral_callbacks.metrics.alignment`, each with its
    `_error`; and `gradient/num_matvecs`. With `per_layer`, `gradient/noise_scale/<module>` and
    `gradient/noise_scale_error/<module>` for the parameters of each module. With `labels`,
    `gradient/within_class_trace` and `gradient/between_class_trace`, each with its `_error`: tr Σ is their sum.

    How to read it: a batch far below the noise scale is mostly noise, and twice the batch allows nearly twice the step;
    one far above it wastes samples. It grows as the loss falls. An eigenvalue of Σ is biased upward by some tr Σ/N, so
    compare looks at equal N. An overlap is large or small against its null value alone. Errors are over draws of N
    samples without replacement from the dataset of their DataLoader, and 0 where all of it was seen; over draws from
    endless data where it draws with replacement or does not tell. On fixed batches all looks are at the same samples:
    averaging them then smooths, but takes nothing from the error.

    Cost: on a probe one forward and backward pass over the samples and the inner products, which come to less than a
    pass more for most networks; what has no kernel goes through torch.func.vmap, on those parameters alone; some five
    passes, once a run for each shape of batch, to find out which entries belong to which sample. With `ride` the
    backward pass is training's own, and only the inner products are spent. Then, on the CPU, a decomposition of an
    N x N matrix and the errors, 1.3 ms for N = 64 and 3 ms for 128, and 12 to 23 ms more with `labels`: dearer than the
    step of a small network. With `hessian`, 30 to 100 products of the search, 10 for tr(ΣH) and 30 for λ̄, with
    `outputs=` the Jacobians of the samples. Memory: what the backward pass holds, and N² numbers.

    Args:
        num_samples: N, at most, the first ones over the probe's batches.
        num_eigenvalues: How many eigenvectors of Σ and of the Hessian are compared, at most.
        hessian: Whether eigenvectors of the Hessian are searched where too few are known.
        ride: Whether to look on at training's own backward pass, by hooks that change nothing, on the batch at hand and
            in the precision of training (of batches that are accumulated, on the first). It needs no `outputs`. Where
            the network does not allow it, that is said, and a probe of the current batch takes its place, measured in
            `precision`, by default the parameters' own.
        per_layer: Whether the noise scale of each module is logged.
        labels: Classes of the samples: a key or index of the batch, or a function batch -> (N,) integers, or its dotted
            path.
        ema: Weight of a look against that of the next in the averages of the noise scale, which a resumed run begins
            anew.
        linear_below: Eigenvalue up to which the axis of the histogram is linear.
        rtol: Residual at which an eigenvalue of the Hessian is accepted, relative to it.
        max_matvecs: Products that the search with `hessian` may spend.
        **options: Those of `SpectralCallback`; a ride needs automatic optimization, and takes no `loss`, `data`,
            `num_batches`, `mode` or `every_n_epochs`.

    Example:
        >>> GradientCovariance(128, labels=1, every_n_steps=10).name
        'gradient'
    """

    diagnostic: ClassVar[str] = "gradient"
    takes_eigenpairs: ClassVar[bool] = True
    charts: tuple[Chart, ...] = (_NOISE, _TOP)

    def __init__(
        self,
        num_samples: int = 64,
        num_eigenvalues: int = 10,
        *,
        hessian: bool = False,
        ride: bool = False,
        per_layer: bool = False,
        labels: LabelSource | None = None,
        ema: float = 0.9,
        linear_below: float = 1e-3,
        rtol: float = 3e-3,
        max_matvecs: int = 100,
        **options: Any,
    ) -> None:
        if ride:
            options = options_of_a_ride(options, hessian=hessian)
        super().__init__(**options)
        if num_samples < 2:
            raise ValueError(f"num_samples={num_samples!r} must be at least 2: a single gradient has no covariance.")
        if num_eigenvalues < 1:
            raise ValueError(f"num_eigenvalues={num_eigenvalues!r} must be at least 1.")
        if not 0 <= ema < 1:
            raise ValueError(f"ema={ema!r} must lie between 0, where each look stands alone, and 1; for example 0.9.")
        check_axis(linear_below)
        self.differentiates_twice = hessian
        self._num_samples = num_samples
        self._num_eigenvalues = num_eigenvalues
        self._hessian = hessian
        self._per_layer = per_layer
        self._labels = None if labels is None else Labels(labels)
        self._linear_below = linear_below
        self._max_matvecs = max_matvecs
        self._dataset_size: int | None = None
        self._noise = NoiseAverage(ema, same_samples=self.data != "current")
        # A budget below the number asked for finds as many as it can pay, and the status says so.
        self._num_searched = min(num_eigenvalues, max(max_matvecs, 1))
        self._top = Tracker(self._num_searched, rtol=rtol, max_matvecs=max_matvecs, look_every=self.looks_every)
        self._attempt = Attempts(self.say)
        self.rider = GramRider(num_samples, by_parameter=per_layer, reader=self._reader, say=self.say) if ride else None

    def refusal(self, trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
        """Return why this run cannot be measured, or None."""
        if self.rider is not None and not module.automatic_optimization:
            return (
                "under manual optimization training_step runs its own backward passes, and ride=True cannot tell which "
                "of them is the loss's. Pass ride=False and loss=(pl_module, batch) -> scalar Tensor."
            )
        return super().refusal(trainer, module)

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read how many samples there are, and draw the charts of what will be logged."""
        self._dataset_size = population(trainer, self.data)
        callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        shared = any(isinstance(c, SpectralCallback) and c.shares_eigenpairs for c in callbacks)
        self.charts = (_NOISE, _TOP, _OVERLAP) if self._hessian or shared else (_NOISE, _TOP)

    def forget(self) -> None:
        """Begin the averages anew and the next search cold, and try again what failed."""
        self._noise.forget()
        self._top.forget()
        self._attempt.forget()
        if self.rider is not None:
            self.rider.forget()

    def failure(self) -> Mapping[str, float]:
        """Return the status of a failed measurement."""
        return {"gradient/status": float(Status.BREAKDOWN)}

    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        """Return the statistics of the gradients of the probe's samples."""
        found, labels = Findings(counts_products=self._hessian), self._classes(probe.batches)
        pairs = self._eigenpairs(probe, found)
        gram = probe.sample_gram(
            self._num_samples, by_parameter=self._per_layer, directions=None if pairs is None else pairs.vectors
        )
        if self._look_at(gram, pairs, labels, found) and self._hessian:
            self._attempt("noise_curvature_alignment", lambda: self._align_with_curvature(probe, found))
            if self.outputs is not None:
                self._attempt("loss_noise_alignment", lambda: self._align_with_loss(probe, found))
        return found.concluded("gradient", self.say)

    def _reader(self, batch: FrozenBatch) -> Read:
        """Return what makes readings of what training's backward pass over a batch brings."""
        labels = self._classes([batch])  # training may change them

        def read(gram: SampleGram, pairs: Eigenpairs | None) -> Mapping[str, Reading]:
            found = Findings(counts_products=self._hessian)
            self._look_at(gram, pairs, labels, found)
            return found.concluded("gradient", self.say)

        return read

    def _eigenpairs(self, probe: Probe, found: Findings) -> Eigenpairs | None:
        """Return the Hessian's eigenpairs that others have found, or own ones if they are asked for and too few."""
        known, n = probe.eigenpairs, probe.space.size
        if self._hessian and (known is None or len(known.values) < min(self._num_eigenvalues, n)):
            known = self._top(probe.operator(Hessian), generator=probe.generator)
            found.count(known)
            if self._num_searched < min(self._num_eigenvalues, n):
                found.statuses.append(Status.BUDGET)
            probe.share_eigenpairs(known)
        return None if known is None or known.status >= Status.BREAKDOWN else known

    def _classes(self, batches: Sequence[Any]) -> Tensor | None:
        """Return the labels of all samples, where there are some."""
        labels = self._labels
        return None if labels is None else self._attempt(_CLASSES, lambda: labels([b.batch for b in batches]))

    def _look_at(self, seen: SampleGram, pairs: Eigenpairs | None, labels: Tensor | None, found: Findings) -> bool:
        """Find what inner products tell; return whether they tell anything."""
        gram, N, size = seen.gram, len(seen.gram), self._dataset_size
        found.readings["gradient/num_samples"] = float(N)
        if not gram.isfinite().all():
            found.statuses.append(Status.NONFINITE)
            return False
        if N < 2:
            self.say("a batch of a single sample has no covariance, and was left out.")
            return False
        spectrum = CovarianceSpectrum.from_gram(gram)
        add_spectrum(found, spectrum, dataset_size=size, linear_below=self._linear_below)
        add_noise(found, seen, self._noise, dataset_size=size)
        if pairs is not None:
            self._attempt(
                "hessian_overlap and top_subspace_share",
                lambda: add_overlap(found, seen, spectrum, pairs, self._num_eigenvalues, dataset_size=size),
            )
        if labels is not None:
            self._attempt(_CLASSES, lambda: add_classes(found, gram, labels[:N], dataset_size=size))
        return True

    def _align_with_curvature(self, probe: Probe, found: Findings) -> None:
        hessian, gradients = probe.operator(Hessian), probe.sample_gradients(self._num_samples)
        num_vectors, num_matvecs = min(_NOISE_VECTORS, self._max_matvecs), min(_TRACE_MATVECS, self._max_matvecs)
        if num_matvecs < min(_TRACE_MATVECS, hessian.shape[0]):
            found.statuses.append(Status.BUDGET)
        w = gradients.combined(noise_weights(gradients.num_samples, num_vectors, generator=_on_cpu(probe.generator)))
        curvatures, squares = hessian.gram(w, hessian.matmat(w)).diagonal(), hessian.gram(w, w).diagonal()
        total = trace(hessian, num_matvecs=num_matvecs, generator=probe.generator)
        n = hessian.shape[0]
        mean = Estimate(total.value / n, total.error / n, total.num_samples)
        found.num_matvecs += num_vectors + min(num_matvecs, n)
        found.add_estimate("gradient/noise_curvature_alignment", noise_curvature_alignment(curvatures, squares, mean))

    def _align_with_loss(self, probe: Probe, found: Findings) -> None:
        curved = probe.sample_curvature(self._num_samples)
        size = self._dataset_size
        whole = None if size is None else max(size, len(curved.losses))
        found.add_estimate("gradient/loss_noise_alignment", loss_noise_alignment(curved, whole))


def _on_cpu(generator: torch.Generator) -> torch.Generator:
    seed = torch.randint(2**31, (1,), generator=generator, device=generator.device)
    return torch.Generator().manual_seed(int(seed.item()))
