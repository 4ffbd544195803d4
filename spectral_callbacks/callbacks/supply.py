"""The supply of batches: kept as they pass, at hand, or loaded."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.fabric.utilities.apply_func import move_data_to_device

from spectral_callbacks.callbacks.batches import FixedBatches, FrozenBatch, load_batches

if TYPE_CHECKING:
    from spectral_callbacks.callbacks.base import SpectralCallback


class BatchSupply:
    """Hands out the batches that each callback measures on.

    Args:
        callbacks: All that will ask.
    """

    def __init__(self, callbacks: Sequence[SpectralCallback]) -> None:
        self.fixed = FixedBatches(max((c.num_batches for c in callbacks if c.data == "fixed"), default=0))
        self._loaded: dict[Hashable, list[FrozenBatch]] = {}
        self._latest: FrozenBatch | None = None
        self._keeps_latest = any(callback.data == "current" for callback in callbacks)

    def see(self, batch: Any, batch_idx: int) -> None:
        """Remember the batch at hand, if it will be asked for."""
        if self._keeps_latest:
            self._latest = FrozenBatch(batch, batch_idx)

    def awaits_loading(self, callback: SpectralCallback) -> bool:
        """Return whether this callback's batches come from a second loader, and have not been loaded."""
        return callback.data not in ("fixed", "current") and _source(callback) not in self._loaded

    def load(self, trainer: pl.Trainer, callback: SpectralCallback) -> None:
        """Load the callback's batches, once a run."""
        self._loaded[_source(callback)] = load_batches(
            trainer, callback.data, callback.num_batches, callback.seed, at_least=callback.loads_samples
        )

    def take(self, module: pl.LightningModule, callback: SpectralCallback) -> list[FrozenBatch] | None:
        """Return the callback's batches on the module's device, or None while they have not passed."""
        if callback.data == "current":
            batches = None if self._latest is None else [self._latest]
        elif callback.data == "fixed":
            batches = self.fixed.take(callback.num_batches)
        else:
            batches = self._loaded[_source(callback)]
        if batches is None:
            return None
        return [FrozenBatch(move_data_to_device(b.batch, module.device), b.batch_idx) for b in batches]


def _source(callback: SpectralCallback) -> Hashable:
    data = callback.data
    key = data if isinstance(data, str) else id(data)
    return key, callback.num_batches, callback.loads_samples, callback.seed
