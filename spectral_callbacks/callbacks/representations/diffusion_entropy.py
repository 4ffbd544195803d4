"""DiffusionEntropy: how many states the features of a layer fill, and what they know of labels and inputs."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from torch import Tensor

from spectral_callbacks.callbacks.batch_entries import BatchEntry, EntrySource
from spectral_callbacks.callbacks.findings import Findings
from spectral_callbacks.callbacks.reading import Reading
from spectral_callbacks.callbacks.representations.pooling import PoolingKind
from spectral_callbacks.callbacks.representations.representation import RepresentationCallback
from spectral_callbacks.linalg import Status
from spectral_callbacks.metrics import diffusion_entropy, diffusion_mutual_information, kernel_width, label_groups
from spectral_callbacks.metrics.representations.diffusion_kernel import Sigma
from spectral_callbacks.probe import Layer, Probe, tensors_of

Target = Literal["label", "input"]


class DiffusionEntropy(RepresentationCallback):
    """Diffusion spectral entropy of layers, and their diffusion spectral mutual information with labels and inputs.

    A random walk steps between the samples' features, to near ones rather than far ones. The entropy of its spectrum
    tells how many clusters or cells it keeps apart: 0 bits where all samples are one point, log2 k for k tight
    clusters, log2 N for N samples far from each other. It withstands noise and many dimensions, where binned entropies
    fail (Liao et al. 2024, arXiv:2312.04823).

    Tags, for each layer: `entropy/dse/<layer>`, the entropy in bits, and `entropy/dse_error/<layer>`, its standard
    error: 0, as it is computed exactly, below 10,000 samples. `entropy/dsmi_label/<layer>`, the mutual information with
    the labels in bits: the entropy of as many samples as a class has, drawn from all, less that of the class, averaged
    over classes; `entropy/dsmi_input/<layer>`, the same with clusters of the inputs in place of classes; and
    `entropy/dsmi_label_error/<layer>` and `entropy/dsmi_input_error/<layer>`, standard errors of the draws.
    `entropy/sigma/<layer>`, the width of the walk's kernel, in units of the features. `entropy/dse_max`, log2 N;
    `entropy/num_samples`, N; `entropy/status` (0 fine, 2 a failure that was reported, 3 features that are not finite).

    How to read it: information with the label that grows on held-out samples is generalisation; where training labels
    are memorised it stays flat. With the kernel as wide as the median distance, the default, nothing depends on the
    scale of the features, and the entropy falls as classes gather into clusters. At a fixed width, as in the paper, it
    rises as the features grow. It holds for the very samples, and grows with their number: compare at equal N.

    Cost: a forward pass over the samples and a decomposition of an N x N matrix, .1 to .3 s for N = 1,024, and for each
    target as many of the size of each class as `num_repetitions` and one. Memory: the samples, their features, 3 N²
    numbers. Clusters of inputs are found once a run.

    Args:
        layers: Dotted names of submodules, or patterns such as "encoder.*", of which those that return no tensor are
            left out; behind a colon the entry of a tuple or mapping that is meant, as "lstm:0".
        targets: What the information is about: "label", "input", both or none.
        pooling: How a sample becomes one vector: "mean" over positions, "last_token", "cls", the first, "flatten" for
            all side by side, "none" for a row each, which excludes targets.
        num_samples: N, at most. `data` other than "fixed" and "current" loads as many batches as hold them, whatever
            `num_batches`; they stay in memory.
        labels: Integers are classes, floating-point numbers are cut into `num_classes` bins, vectors are clustered: key
            or index of the batch, or a function batch -> (N, ...), or its dotted path. By default the second entry of a
            batch, or the one called "labels" of a mapping.
        inputs: What "input" is, in the same way; by default the first floating-point tensor of a batch, which must not
            be its labels.
        num_classes: Bins of continuous labels, and clusters of vectors and inputs.
        sigma: Width of the kernel: "median", that of all distances between the samples; a number; "sqrt_dim"; or
            "official", 10.
        t: Steps of the walk.
        alpha: How far the walk is freed of the samples' density, 0 to 1.
        num_repetitions: Draws for each class.
        **options: Those of `RepresentationCallback`: `mask`, which positions of a sequence are real, `feature_dim` and
            `batch_dim`, and those of `SpectralCallback`; `data` is "train" and `mode` "eval" unless given. The loss is
            run to run the layers, so `loss` may be any function that does.

    Example:
        >>> DiffusionEntropy(["net.3"], targets=["label"], every_n_epochs=1).name
        'entropy'
    """

    diagnostic: ClassVar[str] = "entropy"

    def __init__(
        self,
        layers: Sequence[str],
        targets: Sequence[Target] = ("label", "input"),
        pooling: PoolingKind = "mean",
        num_samples: int = 1024,
        *,
        labels: EntrySource | None = None,
        inputs: EntrySource | None = None,
        num_classes: int = 10,
        sigma: Sigma = "median",
        t: float = 1,
        alpha: float = 0.0,
        num_repetitions: int = 5,
        **options: Any,
    ) -> None:
        super().__init__(layers, pooling, num_samples, **options)
        for target in targets:
            if target not in get_args(Target):
                raise ValueError(f"targets: {target!r} must be one of {', '.join(map(repr, get_args(Target)))}.")
        if targets and pooling == "none":
            raise ValueError('pooling="none" makes several rows of a sample, which has one label; pass targets=[].')
        if num_repetitions < 2:
            raise ValueError(f"num_repetitions={num_repetitions!r} must be at least 2: one draw has no error.")
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes!r} must be at least 2.")
        two = torch.tensor([[0.0], [1.0]])
        diffusion_entropy(two, sigma=sigma, t=t, alpha=alpha, generator=torch.Generator())  # refuses what it must
        self._targets = tuple(targets)
        default_input = _first_floating_but_labels if labels is None else _first_floating
        self._entries: dict[Target, Callable[[Any], Any]] = {
            "label": _usual_labels if labels is None else BatchEntry(labels, "labels", "(N, ...)"),
            "input": default_input if inputs is None else BatchEntry(inputs, "inputs", "(N, ...)"),
        }
        self._num_classes = num_classes
        self._sigma: Sigma = sigma
        self._t, self._alpha = t, alpha
        self._num_repetitions = num_repetitions
        self._groups: dict[Target, Tensor] = {}

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Find the layers, and draw their charts."""
        super().prepare(trainer, module)
        about = (self._chart(f"information with the {name}, bits", f"dsmi_{name}") for name in self._targets)
        self.charts = (self._chart("diffusion entropy, bits", "dse"), *about)

    def forget(self) -> None:
        """Find the groups of the next samples anew."""
        super().forget()
        self._groups.clear()

    def failure(self) -> Mapping[str, float]:
        """Return the status of a failed measurement."""
        return {"entropy/status": float(Status.BREAKDOWN)}

    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        """Return entropy and information of the layers' features."""
        found = Findings(counts_products=False)
        features, sizes = self._collect(probe, found)
        groups: dict[Target, Tensor | None] = {
            target: self._groups_of(target, probe, sizes) for target in self._targets
        }
        for layer, rows in features.items():
            tag = self._tags[layer.name]
            if not rows.isfinite().all():
                found.statuses.append(Status.NONFINITE)
                continue
            self._attempt(f"dse/{tag}", lambda tag=tag, rows=rows: self._look_at(tag, rows, groups, found))
        return found.concluded("entropy", self.say)

    def _collect(self, probe: Probe, found: Findings) -> tuple[dict[Layer, Tensor], list[int]]:
        """Return the features of each layer, and the size of each batch that they are of."""
        collected: dict[Layer, list[Tensor]] = {}
        sizes: list[int] = []
        for size, features in self._batches(probe):
            sizes.append(size)
            for layer, rows in features.items():
                collected.setdefault(layer, []).append(rows)
        found.readings["entropy/num_samples"] = float(min(sum(sizes), self._num_samples))
        return {layer: torch.cat(rows) for layer, rows in collected.items() if layer in self._layers}, sizes

    def _groups_of(self, target: Target, probe: Probe, sizes: Sequence[int]) -> Tensor | None:  # (N,)
        """Return which group each sample is in; of samples that stay the same, found once."""
        if target in self._groups:
            return self._groups[target]
        groups = self._attempt(f"dsmi_{target}", lambda: self._find_groups(target, probe, sizes))
        if groups is not None and self.data != "current":
            self._groups[target] = groups
        return groups

    def _find_groups(self, target: Target, probe: Probe, sizes: Sequence[int]) -> Tensor:  # (N,)
        batches = probe.batches[: len(sizes)]  # that are looked at
        found = [self._checked(target, frozen.batch, size) for frozen, size in zip(batches, sizes, strict=True)]
        if len({entry.shape[1:] for entry in found}) > 1:
            raise ValueError(f"the {target}s of the batches have several shapes; pad them, or pass a function of them.")
        return label_groups(
            torch.cat(found)[: self._num_samples], num_classes=self._num_classes, generator=self._randomness()
        )

    def _checked(self, target: Target, batch: Any, size: int) -> Tensor:  # (N, ...)
        entry = self._entries[target](batch)
        if isinstance(entry, (list, tuple)) and all(isinstance(label, (int, float)) for label in entry):
            entry = torch.tensor(entry)
        if not isinstance(entry, Tensor) or not entry.ndim or len(entry) != size:
            what = f"shape {tuple(entry.shape)}" if isinstance(entry, Tensor) else type(entry).__name__
            raise ValueError(f"the {target}s are {what} for a batch of {size} samples; there must be one for each.")
        return entry.detach().cpu()

    def _look_at(self, tag: str, rows: Tensor, groups: Mapping[Target, Tensor | None], found: Findings) -> None:
        """Find entropy and information of one layer."""
        sigma = kernel_width(rows, self._sigma)
        walk: dict[str, Any] = {"sigma": sigma, "t": self._t, "alpha": self._alpha, "max_samples": len(rows)}
        entropy = diffusion_entropy(rows, **walk, generator=self._randomness())
        found.add_estimate("entropy/dse", entropy, tag)
        found.readings[f"entropy/sigma/{tag}"] = sigma
        found.readings["entropy/dse_max"] = math.log2(len(rows))
        for target, members in groups.items():
            if members is None:
                continue
            information = self._attempt(
                f"dsmi_{target}/{tag}",
                functools.partial(
                    diffusion_mutual_information, rows, members,
                    **walk, num_repetitions=self._num_repetitions, generator=self._randomness(),
                ),
            )  # fmt: skip
            if information is not None:
                found.add_estimate(f"entropy/dsmi_{target}", information, tag)

    def _randomness(self) -> torch.Generator:
        """Return the same random numbers at every measurement."""
        return torch.Generator().manual_seed(self.seed)


def _usual_labels(batch: Any) -> Any:
    labels = BatchEntry("labels" if isinstance(batch, Mapping) else 1, "labels", "(N, ...)")(batch)
    if isinstance(labels, Tensor) and labels.ndim > 1 and labels[:1].numel() > 1 and not labels.is_floating_point():
        raise ValueError(
            f"the labels are integers of the shape {tuple(labels.shape)}, such as tokens, and no class each; pass a "
            "function (batch) -> (N,) as labels=, or leave that target out."
        )
    return labels


def _first_floating(batch: Any) -> Tensor:
    found = next((t for t in tensors_of(batch) if t.is_floating_point() and t.ndim), None)
    if found is None:
        raise ValueError("the batch holds no floating-point tensor, and inputs= is None; pass inputs= or no target.")
    return found


def _first_floating_but_labels(batch: Any) -> Tensor:
    found = _first_floating(batch)
    beside: Any = batch
    if isinstance(batch, Mapping):
        beside = [value for key, value in batch.items() if key != "labels"]
    elif isinstance(batch, (list, tuple)):
        beside = [*batch[:1], *batch[2:]]
    if not any(found is tensor for tensor in tensors_of(beside)):
        raise ValueError("the first floating-point tensor of the batch is where labels are; pass inputs=, or labels=.")
    return found
