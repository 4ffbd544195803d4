"""Learning rates: whether an optimizer steps with those that were measured with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

if TYPE_CHECKING:
    from spectral_callbacks.callbacks.base import SpectralCallback


class LearningRates:
    """Remembers the learning rates of a measurement until the optimizer step that it belongs to."""

    def __init__(self) -> None:
        self._measured: dict[SpectralCallback, list[float]] = {}

    def remember(self, trainer: pl.Trainer, callback: SpectralCallback) -> None:
        """Remember those that a callback has measured with."""
        self._measured[callback] = _of(trainer.optimizers[callback.optimizer])

    def compare(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Let callbacks say so whose optimizer is about to step with others."""
        for callback, measured in list(self._measured.items()):
            if trainer.optimizers[callback.optimizer] is optimizer:
                del self._measured[callback]
                if _of(optimizer) != measured:
                    callback.say(
                        f"the learning rates {measured} became {_of(optimizer)} between measuring and the optimizer "
                        "step, and what was logged belongs to the former. Set them in a scheduler, or list this "
                        "callback after the one that sets them."
                    )


def _of(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]
