"""Probing: the probes that callbacks of like settings share, and the random numbers that each has on them."""

from __future__ import annotations

import zlib
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from spectral_callbacks.callbacks.batches import FrozenBatch
from spectral_callbacks.callbacks.loss import loss_of
from spectral_callbacks.callbacks.muting import Precision
from spectral_callbacks.operators import SampleStructure
from spectral_callbacks.probe import Probe

if TYPE_CHECKING:
    from spectral_callbacks.callbacks.base import SpectralCallback


def likeness(callback: SpectralCallback) -> Hashable:
    """Return what two callbacks have in common that can share a probe."""
    data = callback.data if isinstance(callback.data, str) else id(callback.data)
    batches = data, callback.num_batches, callback.loads_samples, callback.seed
    return batches, callback.mode, id(callback.loss), callback.precision, callback.optimizer


class Probes:
    """Makes the probes of one run, and keeps what each learns about the network for those behind it."""

    def __init__(self) -> None:
        self._structures: dict[Hashable, dict[Any, SampleStructure]] = {}

    def make(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        callback: SpectralCallback,
        batches: Sequence[FrozenBatch],
        step: int,
        precision: Precision,
        *,
        learns_anew: bool = False,
    ) -> Probe:
        """Return the probe that a callback and those like it measure on."""
        network = callback.mode, id(callback.loss), precision, callback.optimizer
        structures = {} if learns_anew else self._structures.setdefault(network, {})
        return Probe(
            module, trainer.optimizers[callback.optimizer], batches,
            loss=loss_of(trainer, callback.loss, precision), step=step, mode=callback.mode, seed=callback.seed,
            structures=structures,
        )  # fmt: skip


def generator_of(probe: Probe, callback: SpectralCallback, step: int) -> torch.Generator:
    """Return random numbers that depend on the callback and the step alone."""
    seed = zlib.crc32(f"{callback.name}/{callback.seed}/{step}".encode())
    return torch.Generator(probe.space.device).manual_seed(seed)
