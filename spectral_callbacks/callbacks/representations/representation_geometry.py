"""RepresentationGeometry: how many directions the features use, and which phase of training that tells of."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from torch import Tensor

from spectral_callbacks.callbacks.findings import Findings
from spectral_callbacks.callbacks.labels import Labels, LabelSource
from spectral_callbacks.callbacks.reading import Embedding, Reading, Spectrum, Text, check_axis
from spectral_callbacks.callbacks.representations.pooling import PoolingKind
from spectral_callbacks.callbacks.representations.representation import RepresentationCallback
from spectral_callbacks.linalg import Estimate, Status
from spectral_callbacks.metrics import PhaseDetector, cka
from spectral_callbacks.metrics.representations.alpha_req import power_law_fit
from spectral_callbacks.metrics.representations.intrinsic_dimension import two_nn_bias_warning, two_nn_estimate
from spectral_callbacks.metrics.representations.moments import FeatureMoments
from spectral_callbacks.metrics.representations.ranks import RANKS
from spectral_callbacks.metrics.representations.row_sample import RowSample
from spectral_callbacks.metrics.representations.spectrum import FeatureSpectrum
from spectral_callbacks.probe import Layer, Probe
from spectral_callbacks.tags import Chart

_NUM_KEPT = 1024  # samples for what is found from pairs of them, and for the projector
_OF_PAIRS = ("intrinsic_dimension", "cka_previous", "cka_next")
_TITLES = {
    "rankme": "RankMe, of singular values",
    "effective_rank": "effective rank, of the covariance",
    "participation_ratio": "participation ratio",
    "unbiased_participation_ratio": "participation ratio, unbiased",
    "stable_rank": "stable rank",
    "spectral_entropy": "spectral entropy, nats",
    "alpha_req": "alpha of the spectrum",
}
_PHASES = Chart("phase: 0 warm-up, 1 entropy-seeking, 2 compression-seeking", ("representation/phase",))
METRICS = (*_TITLES, *_OF_PAIRS)


class RepresentationGeometry(RepresentationCallback):
    """The spectrum of the features of named layers: how many directions they use, how it decays, and in which phase.

    Features are what a layer returns, one pooled vector a sample, on a fixed set of samples in eval mode; their
    covariance Σ has the eigenvalues λ_1 ≥ λ_2 ≥ .... Language models in training were seen to pass three phases: a
    warm-up in which the features collapse, an entropy-seeking one in which they spread into more directions, and a
    compression-seeking one in which they concentrate again (arXiv:2509.23024).

    Tags, for each layer: `representation/effective_rank/<layer>`, exp of the entropy of the λ over their sum, how many
    directions share the variance; `representation/rankme/<layer>`, the same of the singular values of the features, the
    mean left in (Garrido et al. 2023, arXiv:2210.02885), which counts the tail far more: the two are not to be
    compared; `representation/alpha_req/<layer>`, α of λ_i ~ i^-α fitted from rank 11 to 100 or to half the rank
    (Agrawal et al. 2022), and `representation/alpha_req_r2/<layer>`, how well it fits; left out where there are too few
    ranks. `representation/effective_rank_error/<layer>`, `representation/rankme_error/<layer>` and
    `representation/alpha_req_error/<layer>`: chance and the bias of too few samples, added in squares.
    `representation/spectrum/<layer>`, the eigenvalues, as a histogram on a logarithmic axis, and under
    `representation/spectrum/<layer>_points` as a tensor. `representation/num_samples`, of the set;
    `representation/status` (0 fine, 2 a failure that was reported, 3 features that are not finite).

    Of the last layer alone, if `metrics` has its effective rank, `representation/phase`: 0 warm-up, 1 entropy-seeking,
    2 compression-seeking, from effective rank and α together on the axis log(1 + step), by a sequential test for a
    change of slope that looks at no later measurement; `representation/phase_change` says in words, in TensorBoard's
    text tab, what began where and on which evidence. In a run without a change it says so falsely in at most
    `false_alarm_rate` of the cases (`spectral_callbacks.metrics.PhaseDetector`, which works on lists of measurements
    too). A resumed run goes on.

    With `metrics`, any of these with its `_error`: `participation_ratio`, (Σ λ)² / Σ λ², and
    `unbiased_participation_ratio`; `stable_rank`, Σ λ / λ_1; `spectral_entropy`, in nats; and from pairs of at most
    1,024 of the samples `intrinsic_dimension` by the two nearest neighbours, `cka_previous`, the similarity to the
    features of the measurement before (1 is the same up to a rotation, 0 unrelated), and `cka_next`, to those of the
    next layer, both by unbiased linear CKA.

    How to read it: compare at equal `num_samples` only, all but the unbiased ones depend on it; 4 times as many as
    there are features are enough for most. A fall of the effective rank to near 1 is a collapse. Measure with
    `every_n_steps="geometric"`, or the warm-up is over before the second look.

    Cost: a forward pass over the samples, and some four decompositions of the smaller of covariance and Gram matrix,
    most for the errors; as many again for `rankme`: together 0.3 s for 512 features on one core, 4 minutes for
    4,096. Memory: the samples, and for each layer d² + 1024 d numbers, or n d where n is below d.

    Args:
        layers: Dotted names of submodules, or patterns such as "encoder.*", of which those that return no tensor are
            left out; behind a colon the entry of a tuple or mapping that is meant, as "lstm:0".
        pooling: How a sample becomes one vector: "mean" over positions, "last_token", "cls", the first, "flatten" for
            all side by side, "none" for a row each.
        num_samples: How many samples, at most. `data` other than "fixed" and "current" loads as many batches as hold
            them, whatever `num_batches`; they stay in memory.
        metrics: Which numbers, of the names above.
        false_alarm_rate: Of the phases, in a whole run.
        projector: Whether the samples are written for TensorBoard's projector, `representation/embedding/<layer>`, at
            every measurement: at most 1,024 of them.
        labels: What to call them there: key or index of the batch, or a function batch -> (N,) integers, or its path.
        linear_below: Eigenvalue up to which the axis of the histogram is linear.
        **options: Those of `RepresentationCallback`: `mask`, which positions of a sequence are real, `feature_dim` and
            `batch_dim`, and those of `SpectralCallback`; `data` is "train" and `mode` "eval" unless given. The loss is
            run to run the layers, so `loss` may be any function that does.

    Example:
        >>> RepresentationGeometry(["encoder"], "last_token", every_n_steps="geometric").name
        'representation'
    """

    diagnostic: ClassVar[str] = "representation"

    def __init__(
        self,
        layers: Sequence[str],
        pooling: PoolingKind = "mean",
        num_samples: int = 1024,
        *,
        metrics: Sequence[str] = ("rankme", "effective_rank", "alpha_req"),
        false_alarm_rate: float = 0.05,
        projector: bool = False,
        labels: LabelSource | None = None,
        linear_below: float = 1e-3,
        **options: Any,
    ) -> None:
        super().__init__(layers, pooling, num_samples, **options)
        for name in metrics:
            if name not in METRICS:
                close = difflib.get_close_matches(name, METRICS, n=1) or METRICS
                raise ValueError(f"metrics: {name!r} is none; did you mean {' or '.join(map(repr, close))}?")
        check_axis(linear_below)
        if labels is not None and pooling == "none":
            raise ValueError('pooling="none" makes several rows of a sample, which has one label; leave labels out.')
        self._metrics = tuple(metrics)
        self._projector = projector
        self._labels = None if labels is None else Labels(labels)
        self._linear_below = linear_below
        self._false_alarm_rate = false_alarm_rate
        self._phases = PhaseDetector(false_alarm_rate=false_alarm_rate)
        self._resumed: dict[str, Any] | None = None
        self._earlier: dict[str, Tensor] = {}

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Find the layers, and draw their charts."""
        super().prepare(trainer, module)
        drawn = [name for name in self._metrics if name not in _OF_PAIRS]
        self.charts = (
            *(self._chart(_TITLES[name], name) for name in drawn),
            *((_PHASES,) if "effective_rank" in self._metrics else ()),
        )

    def forget(self) -> None:
        """Begin the phases anew, or where the run that is resumed left them."""
        super().forget()
        self._earlier = {}
        self._phases = PhaseDetector(false_alarm_rate=self._false_alarm_rate)
        if self._resumed is not None:
            self._phases.load_state_dict(self._resumed)
            self._resumed = None

    def state_dict(self) -> dict[str, Any]:
        """Return what all callbacks share, and the phases so far."""
        return {**super().state_dict(), "phases": self._phases.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run."""
        super().load_state_dict(state_dict)
        self._resumed = state_dict.get("phases")

    def failure(self) -> Mapping[str, float]:
        """Return the status of a failed measurement."""
        return {"representation/status": float(Status.BREAKDOWN)}

    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        """Return the geometry of the layers' features."""
        found = Findings(counts_products=False)
        features = self._collect(probe, found)
        kept = {layer: moments.rows() for layer, moments in features.items()}
        following = dict(itertools.pairwise(self._layers))
        words = self._words(probe, self._labels) if self._projector and self._labels is not None else []
        for layer, rows in kept.items():
            after = following.get(layer)
            spectrum = self._attempt(f"the geometry of {layer.name}", features[layer].spectrum)
            if spectrum is not None:
                self._look_at(layer, spectrum, found)
                self._compare(layer, rows, None if after is None else kept.get(after), found)
            if self._projector:
                found.readings[f"representation/embedding/{self._tags[layer.name]}"] = Embedding(rows, words)
        if "cka_previous" in self._metrics and self.data == "current":
            self.say("cka_previous left out: data='current' has other samples each time; pass data='train'.")
        elif "cka_previous" in self._metrics:
            self._earlier = {layer.name: rows for layer, rows in kept.items()}
        self._follow(probe.step, found)
        return found.concluded("representation", self.say)

    def _collect(self, probe: Probe, found: Findings) -> dict[Layer, FeatureMoments]:
        """Return the moments of the features of each layer, where they are finite."""
        moments: dict[Layer, FeatureMoments] = {}
        broken: set[Layer] = set()
        num_samples = 0
        for size, features in self._batches(probe):
            num_samples += min(size, self._num_samples - num_samples)
            for layer, rows in features.items():
                if not rows.isfinite().all():
                    broken.add(layer)
                    found.statuses.append(Status.NONFINITE)
                elif layer not in broken:
                    moments.setdefault(layer, FeatureMoments(_NUM_KEPT, generator=self._choice())).update(rows)
        found.readings["representation/num_samples"] = float(num_samples)
        return {layer: moments[layer] for layer in self._layers if layer in moments and layer not in broken}

    def _choice(self) -> torch.Generator:
        """Return random numbers that keep the same rows in every layer and at every measurement."""
        return torch.Generator().manual_seed(self.seed)

    def _look_at(self, layer: Layer, spectrum: FeatureSpectrum, found: Findings) -> None:
        """Find what the spectrum of a layer tells."""
        tag = self._tags[layer.name]
        for name in self._metrics:
            if name in RANKS:
                number = RANKS[name]
                estimate = self._attempt(f"{name}/{tag}", lambda number=number: number(spectrum))
            elif name == "alpha_req":
                fit = self._attempt(f"{name}/{tag}", lambda: power_law_fit(spectrum))
                estimate = fit
                if fit is not None:
                    found.readings[f"representation/alpha_req_r2/{tag}"] = fit.r2
            else:
                continue
            if estimate is not None:
                found.add_estimate(f"representation/{name}", estimate, tag)
                if estimate.is_too_biased:
                    self._say_biased(f"{name}/{tag}", spectrum.num_samples)
        values = spectrum.eigenvalues
        weights = torch.full_like(values, 1 / len(values))
        found.readings[f"representation/spectrum/{tag}"] = Spectrum(values, weights, len(values), self._linear_below)

    def _compare(self, layer: Layer, rows: Tensor, after: Tensor | None, found: Findings) -> None:
        """Find what pairs of samples tell."""
        tag = self._tags[layer.name]
        earlier = self._earlier.get(layer.name)
        comparisons: dict[str, Callable[[], Estimate] | None] = {
            "intrinsic_dimension": lambda: self._dimension(tag, rows),
            "cka_previous": None if earlier is None else lambda: cka(earlier, rows),
            "cka_next": None if after is None or len(after) != len(rows) else lambda: cka(rows, after),
        }
        for name in self._metrics:
            find = comparisons.get(name)
            if find is not None:
                estimate = self._attempt(f"{name}/{tag}", find)
                if estimate is not None:
                    found.add_estimate(f"representation/{name}", estimate, tag)

    def _dimension(self, tag: str, rows: Tensor) -> Estimate:
        found = two_nn_estimate(rows)
        if two_nn_bias_warning(found.num_samples, found.value) is not None:
            self._say_biased(f"intrinsic_dimension/{tag}", len(rows))
        return found

    def _say_biased(self, name: str, num_rows: int) -> None:
        self.say(
            f"{name} is biased by more than 5 % at {num_rows} rows of features. Raise num_samples, or compare at equal "
            "numbers only."
        )

    def _follow(self, step: int, found: Findings) -> None:
        """Tell the phase of the last layer."""
        if not self._layers:
            return
        tag = self._tags[self._layers[-1].name]
        rank = found.readings.get(f"representation/effective_rank/{tag}")
        alpha = found.readings.get(f"representation/alpha_req/{tag}")
        if not isinstance(rank, float):
            return
        change = self._phases.update(step, rank, alpha if isinstance(alpha, float) else None)
        found.readings["representation/phase"] = float(self._phases.phase)
        if change is not None:
            found.readings["representation/phase_change"] = Text(f"{tag}: {change.evidence}")

    def _words(self, probe: Probe, find: Labels) -> list[str]:
        """Return the label of each row that is kept."""
        labels = find([batch.batch for batch in probe.batches])[: self._num_samples]
        sample = RowSample(_NUM_KEPT, generator=self._choice())
        sample.update(labels[:, None])
        return [str(label) for label in sample.rows.flatten().tolist()]
