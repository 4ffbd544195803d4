"""A progress bar over optimizer steps."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

_SECONDS_IN_TERMINAL = 0.2
_SECONDS_IN_LOG = 10.0  # where every state of the bar is a line


class StepProgressBar(ProgressBar):
    """One bar over the steps of the whole run, with the latest metrics.

    Lightning's own bars start anew with every epoch, which in full-batch training is every step.

    Args:
        metrics: What to show of `trainer.callback_metrics`.
        refresh_rate: Optimizer steps between two looks.
    """

    def __init__(
        self, metrics: Sequence[str] = ("train/loss", "sharpness/stability_ratio"), refresh_rate: int = 20
    ) -> None:
        super().__init__()
        if refresh_rate < 1:
            raise ValueError(f"refresh_rate={refresh_rate!r} must be at least 1 step.")
        self.metrics = tuple(metrics)
        self.refresh_rate = refresh_rate
        self._is_enabled = True
        self._bar: tqdm[Any] | None = None

    def disable(self) -> None:
        """Show nothing; Lightning calls this on all processes but the first."""
        self._is_enabled = False

    def enable(self) -> None:
        """Show the bar again."""
        self._is_enabled = True

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw the bar."""
        total = trainer.estimated_stepping_batches
        self._bar = tqdm(
            total=None if math.isinf(total) else int(total),
            initial=trainer.global_step,
            unit=" steps",
            disable=not self._is_enabled,
            dynamic_ncols=True,
            mininterval=_SECONDS_IN_TERMINAL if sys.stderr.isatty() else _SECONDS_IN_LOG,
        )

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Advance the bar."""
        if self._bar is not None and trainer.global_step >= self._bar.n + self.refresh_rate:
            self._advance(self._bar, trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Complete the bar."""
        if self._bar is not None:
            self._advance(self._bar, trainer)
        self._close()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the bar as it stands."""
        self._close()

    def _advance(self, bar: tqdm[Any], trainer: pl.Trainer) -> None:
        latest = trainer.callback_metrics
        shown = {name.rpartition("/")[2]: f"{latest[name].item():.3g}" for name in self.metrics if name in latest}
        bar.set_postfix(shown, refresh=False)
        bar.update(trainer.global_step - bar.n)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
