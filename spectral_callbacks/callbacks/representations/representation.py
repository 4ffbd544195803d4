"""The base of diagnostics of features: named layers, pooled, on a fixed set of samples."""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from spectral_callbacks.callbacks.attempts import Attempts
from spectral_callbacks.callbacks.base import SpectralCallback
from spectral_callbacks.callbacks.batch_entries import EntrySource
from spectral_callbacks.callbacks.layers import layer_tags
from spectral_callbacks.callbacks.representations.pooling import Pooling, PoolingKind
from spectral_callbacks.probe import Layer, Probe, activations, find_layers
from spectral_callbacks.tags import Chart


class RepresentationCallback(SpectralCallback, abc.ABC):
    """A diagnostic of what named layers return on a fixed set of samples, in eval mode.

    The loss is run on the samples, and the layers' outputs are caught on the way, one batch at a time; its value and
    its gradients have no part in it. By default the samples are drawn once from a second loader over the training set.

    Args:
        layers: Dotted names of submodules, or patterns such as "encoder.*", of which those that return no tensor are
            left out; behind a colon the entry of a tuple or mapping that is meant, as "lstm:0".
        pooling: How a sample becomes one vector: "mean" over positions, "last_token", "cls", the first, "flatten" for
            all side by side, "none" for a row each.
        num_samples: How many samples, at most. `data` other than "fixed" and "current" loads as many batches as hold
            them, whatever `num_batches`; they stay in memory.
        mask: Which positions of a sequence are real: key or index of the batch, or a function batch -> (N, T), or its
            dotted path; by default "attention_mask" in batches that are mappings and have it.
        feature_dim: Dimension of the features in what a layer returns, where it is not the usual one.
        batch_dim: Dimension of the samples in outputs of three dimensions or more.
        **options: Those of `SpectralCallback`; `data` is "train" and `mode` "eval" unless given. The loss is run to run
            the layers, so `loss` may be any function that does.
    """

    def __init__(
        self,
        layers: Sequence[str],
        pooling: PoolingKind = "mean",
        num_samples: int = 1024,
        *,
        mask: EntrySource | None = None,
        feature_dim: int | None = None,
        batch_dim: int = 0,
        **options: Any,
    ) -> None:
        options.setdefault("data", "train")
        options.setdefault("mode", "eval")
        super().__init__(**options)
        if isinstance(layers, str) or not layers:
            raise ValueError(f'layers={layers!r} must be a list of names or patterns, for example ["encoder.*"].')
        if num_samples < 2:
            raise ValueError(f"num_samples={num_samples!r} must be at least 2: a single sample has no spread.")
        self._patterns = tuple(layers)
        self._pooling = Pooling(pooling, mask=mask, feature_dim=feature_dim, batch_dim=batch_dim)
        self._num_samples = num_samples
        self.loads_samples = num_samples if self.data not in ("fixed", "current") else None
        self._layers: tuple[Layer, ...] = ()
        self._tags: dict[str, str] = {}
        self._attempt = Attempts(self.say, retries=True)

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Find the layers."""
        self._layers = find_layers(module, self._patterns)
        self._tags = layer_tags(layer.name for layer in self._layers)

    def forget(self) -> None:
        """Try again what failed."""
        self._attempt.forget()

    def _chart(self, title: str, quantity: str) -> Chart:
        """Return the chart of one quantity of all layers."""
        return Chart(title, tuple(f"{self.diagnostic}/{quantity}/{tag}" for tag in self._tags.values()))

    def _batches(self, probe: Probe) -> Iterator[tuple[int, dict[Layer, Tensor]]]:
        """Yield each batch's size with the features of its samples in each layer, (rows, d), up to `num_samples`.

        Raises:
            ValueError: If a layer that was chosen by name gives none, or no layer is left.
        """
        room = self._num_samples
        widths: dict[Layer, int] = {}
        for frozen, found in activations(probe, self._layers, seed=self.seed, left_out=self._leave_out):
            size = self._pooling.num_samples(frozen.batch, found.values())
            features: dict[Layer, Tensor] = {}
            for layer, output in found.items():
                try:
                    rows = self._pooling(layer, output, frozen.batch, at_most=room)
                    _check_width(layer, rows.shape[1], widths.setdefault(layer, rows.shape[1]))
                    features[layer] = rows
                except ValueError as error:
                    if layer.is_chosen:
                        raise
                    self._leave_out(layer, str(error))
            yield size, {layer: rows for layer, rows in features.items() if layer in self._layers}
            room -= size
            if room <= 0:
                return

    def _leave_out(self, layer: Layer, reason: str) -> None:
        """Go on without a layer that a pattern met."""
        if layer not in self._layers:
            return
        self._layers = tuple(other for other in self._layers if other is not layer)
        self.say(f"a layer that a pattern met is left out: {reason}")
        if not self._layers:
            raise ValueError(f"layers={list(self._patterns)} met no layer that returns features; name one.")


def _check_width(layer: Layer, width: int, before: int) -> None:
    if width != before:
        raise ValueError(
            f"layer {layer.name!r} has {before} features in one batch and {width} in another; pass "
            'pooling="mean", pad the samples to one size, or name another layer.'
        )
