"""Pooling: one feature vector for each sample, out of what a layer returns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd

from spectral_callbacks.callbacks.batch_entries import BatchEntry, EntrySource
from spectral_callbacks.probe import Layer, num_samples

PoolingKind = Literal["mean", "last_token", "cls", "flatten", "none"]
_CHANNELS_FIRST = (
    *(_ConvNd, _BatchNorm, _InstanceNorm, nn.GroupNorm),
    *(_AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd),
)
_MASK_OF_A_TOKENIZER = "attention_mask"
_TOKENS = ("last_token", "cls")


class Pooling:
    """Makes features, (rows, d), of the outputs of layers.

    A vector for each sample is taken as it is. Of an image or a sequence, "mean" is the mean over all positions,
    "last_token" and "cls" are the last and the first position of a sequence, "flatten" lays all positions side by side,
    and "none" takes each position as a row of its own. Positions that the mask excludes do not count, and the last one
    is the last that the mask has, on whichever side a sequence was padded.

    Args:
        kind: Which of them.
        mask: Which positions of a sequence are real: a key or index of the batch, or a function batch -> (N, T) of
            zeros and ones, or its dotted path. By default the entry "attention_mask" of a batch that is a mapping, if
            it has one; all are real otherwise.
        feature_dim: Dimension of features in a layer's output. By default dimension 1 behind convolutions, their
            norms and poolings, and where there are 4 dimensions or more, (N, C, H, W); else the last, (N, T, d).
        batch_dim: Dimension of samples in outputs of three dimensions or more: 1 for sequences of the shape (T, N, d).

    Raises:
        ValueError: If there is no such pooling, or the mask is none of these.

    Example:
        >>> layer = Layer("norm", nn.LayerNorm(1), (), True)
        >>> batch = {"attention_mask": torch.tensor([[1, 1, 0], [0, 1, 1]])}  # padded right and left
        >>> output = torch.arange(6.0).reshape(2, 3, 1)
        >>> Pooling("last_token")(layer, output, batch).flatten().tolist()
        [1.0, 5.0]
        >>> Pooling("mean")(layer, output, batch).flatten().tolist()
        [0.5, 4.5]
    """

    def __init__(
        self,
        kind: PoolingKind,
        *,
        mask: EntrySource | None = None,
        feature_dim: int | None = None,
        batch_dim: int = 0,
    ) -> None:
        if kind not in get_args(PoolingKind):
            raise ValueError(f"pooling={kind!r} must be one of {', '.join(map(repr, get_args(PoolingKind)))}.")
        self._kind: PoolingKind = kind
        self._mask = None if mask is None else BatchEntry(mask, "mask", "(N, T) zeros and ones")
        self._feature_dim = feature_dim
        self._batch_dim = batch_dim

    def __call__(self, layer: Layer, output: Tensor, batch: Any, *, at_most: int | None = None) -> Tensor:  # (rows, d)
        """Return the features of a batch on the CPU, half precision widened to float32.

        Args:
            layer: Which returned it.
            output: What the layer returned.
            batch: What the network was given.
            at_most: Samples to take, the first ones; all if None.

        Raises:
            ValueError: If the output's shape or type, or the mask's, does not allow it.
        """
        if not output.is_floating_point():
            raise ValueError(f"layer {layer.name!r} returned {output.dtype}, and features are floating-point numbers.")
        if output.ndim < 2 or (output.ndim > 2 and not -output.ndim <= self._batch_dim < output.ndim):
            raise ValueError(
                f"layer {layer.name!r} returned the shape {tuple(output.shape)}, and features are (N, d) or more, with "
                f"samples along dimension batch_dim={self._batch_dim}; name a layer that returns them."
            )
        if output.ndim > 2:  # a head behind (T, N, d) returns (N, d)
            output = output.movedim(self._batch_dim, 0)
        if self._batch_dim == 0 and len(output) != num_samples(batch):
            raise ValueError(
                f"layer {layer.name!r} returned {len(output)} entries along dimension batch_dim=0 for a batch of "
                f"{num_samples(batch)} samples; pass batch_dim=, or loss= that runs the layer on the batch once."
            )
        output = output[:at_most]
        output = output.to("cpu", torch.float64 if output.dtype is torch.float64 else torch.float32)
        if output.ndim == 2:
            return output
        dim = self._feature_dim_of(layer, output)
        positions = output.movedim(dim, -1)
        if output.ndim > 3 and self._kind in _TOKENS:
            raise ValueError(
                f"layer {layer.name!r} returned the shape {tuple(output.shape)}, no sequence (N, T, d), and "
                f'pooling={self._kind!r} takes one of its positions; pass pooling="mean" or "flatten".'
            )
        return self._pooled(positions, self._mask_of(layer, batch, positions) if output.ndim == 3 else None)

    def num_samples(self, batch: Any, outputs: Iterable[Tensor]) -> int:
        """Return how many samples a batch has; where a batch may begin with time steps, the outputs tell.

        Args:
            batch: What the network was given.
            outputs: What layers returned.
        """
        if self._batch_dim != 0:
            for output in outputs:
                if output.ndim > 2 and -output.ndim <= self._batch_dim < output.ndim:
                    return output.shape[self._batch_dim]
        return num_samples(batch)

    def _feature_dim_of(self, layer: Layer, output: Tensor) -> int:
        dim = self._feature_dim
        if dim is None:
            return 1 if output.ndim > 3 or isinstance(layer.module, _CHANNELS_FIRST) else output.ndim - 1
        if not -output.ndim <= dim < output.ndim or dim % output.ndim == 0:
            raise ValueError(
                f"feature_dim={dim} is no dimension of features of layer {layer.name!r}, which returned the shape "
                f"{tuple(output.shape)} with samples along the first; pass one from 1 to {output.ndim - 1}."
            )
        return dim % output.ndim

    def _mask_of(self, layer: Layer, batch: Any, positions: Tensor) -> Tensor | None:  # (N, T), bool
        if self._mask is not None:
            mask = self._mask(batch)
        elif isinstance(batch, Mapping) and _MASK_OF_A_TOKENIZER in batch:
            mask = batch[_MASK_OF_A_TOKENIZER]
        else:
            return None
        source = self._mask or _MASK_OF_A_TOKENIZER
        if isinstance(mask, Tensor) and mask.ndim == 2:
            mask = mask[: len(positions)]
        if not isinstance(mask, Tensor) or mask.shape != positions.shape[:2]:
            what = f"shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"{source} gives {what}, and layer {layer.name!r} returned {tuple(positions.shape)}; a mask has an "
                "entry for each position of each sample, (N, T)."
            )
        mask = mask.cpu() != 0
        empty = int((~mask.any(1)).sum())
        if empty:
            raise ValueError(f"{source} leaves {empty} of {len(mask)} samples without a position; leave these out.")
        return mask

    def _pooled(self, x: Tensor, mask: Tensor | None) -> Tensor:  # (N, ..., d), (N, T) -> (rows, d)
        if self._kind == "flatten":
            return x.flatten(1) if mask is None else torch.where(mask[..., None], x, 0).flatten(1)
        if self._kind == "none":
            return x.flatten(0, -2) if mask is None else x[mask]
        if self._kind == "mean":
            if mask is None:
                return x.flatten(1, -2).mean(1)
            return torch.where(mask[..., None], x, 0).sum(1) / mask.sum(1, keepdim=True)
        if mask is None:
            return x[:, 0 if self._kind == "cls" else -1]
        place = mask.int()  # of equal numbers argmax returns the first
        last = place.shape[1] - 1 - place.flip(1).argmax(1)
        return x[torch.arange(len(x)), place.argmax(1) if self._kind == "cls" else last]
