"""Passengers: who is on board of the coming backward pass or optimizer step of training, and what that costs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from lightning.pytorch.plugins import FSDPPrecision, MixedPrecision
from torch import Tensor

from spectral_callbacks.callbacks.batches import FrozenBatch
from spectral_callbacks.callbacks.muting import muted
from spectral_callbacks.callbacks.probing import Probes
from spectral_callbacks.callbacks.reading import Reading
from spectral_callbacks.callbacks.schedule import Budget, clock
from spectral_callbacks.linalg import Eigenpairs, Status
from spectral_callbacks.operators import ParameterSpace

if TYPE_CHECKING:
    from spectral_callbacks.callbacks.base import SpectralCallback
    from spectral_callbacks.callbacks.rider import Rider

Fail = Callable[[pl.Trainer, "SpectralCallback", Exception, int], None]


class Passengers:
    """The callbacks of one trainer that ride on its backward passes and optimizer steps.

    Args:
        probes: Makes those that they learn on.
        budget: Pays for what they do.
        fail: Is told whose look failed.
        owed: Takes those whose look is still to come.
    """

    def __init__(self, probes: Probes, budget: Budget, fail: Fail, owed: set[SpectralCallback]) -> None:
        self._probes = probes
        self._budget = budget
        self._fail = fail
        self._owed = owed
        self._aboard: dict[SpectralCallback, Rider] = {}
        self._pairs: Eigenpairs | None = None
        self._factor = 1.0
        self._overflowing: object | None = None

    def board(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        due: Iterable[SpectralCallback],
        step: int,
        current: FrozenBatch | None,
    ) -> list[SpectralCallback]:
        """Let those that ride wait for what training does with a batch; return who is left to measure now.

        At an epoch's end there is no batch, and who waits for a step takes the next one.
        """
        staying: list[SpectralCallback] = []
        for callback in due:
            rider = callback.rider
            if rider is None:
                staying.append(callback)
                continue
            if current is None:
                self._owed.add(callback)
                continue
            probe = functools.partial(
                self._probes.make, trainer, module, callback, [current], step, "training", learns_anew=True
            )
            began = clock(trainer)
            try:
                with muted(trainer, module):
                    boarded = rider.board(current, probe)
            except Exception as error:  # noqa: BLE001 - training must go on
                self._fail(trainer, callback, error, step)
            else:
                if boarded:
                    self._aboard[callback] = rider
                else:
                    staying.append(callback)
            self._pay(callback, clock(trainer) - began)
        return staying

    def offer(self, pairs: Eigenpairs | None) -> None:
        """Take note of eigenpairs of the Hessian that a probe of this step has found, if they are the most so far."""
        if not self._aboard or pairs is None or pairs.status >= Status.BREAKDOWN:
            return
        if self._pairs is None or len(pairs.values) > len(self._pairs.values):
            self._pairs = pairs

    def attach(self, trainer: pl.Trainer, loss: Tensor, step: int) -> None:
        """Let those on board hook on to the loss that training is about to differentiate."""
        if not self._aboard:
            return
        plugin = trainer.precision_plugin
        scaler = plugin.scaler if isinstance(plugin, (MixedPrecision, FSDPPrecision)) else None
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._overflowing = scaler if scale > 1 else None  # a factor of 1 is not what makes gradients overflow
        self._factor = scale / trainer.accumulate_grad_batches
        for callback, rider in list(self._aboard.items()):
            try:
                optimizer = trainer.optimizers[callback.optimizer]
                trained = functools.partial(ParameterSpace.trained_by, trainer.lightning_module, optimizer)
                if not rider.attach(loss, self._pairs, trained):
                    del self._aboard[callback]
                    self._owed.add(callback)
            except Exception as error:  # noqa: BLE001
                rider.get_off()
                del self._aboard[callback]
                self._fail(trainer, callback, error, step)

    def conclude(
        self, trainer: pl.Trainer, step: int, *, at_step: bool
    ) -> tuple[dict[SpectralCallback, dict[str, Reading]], float]:
        """Let all get off that have seen what they waited for.

        Args:
            trainer: That they ride with.
            step: Where the training is.
            at_step: Whether an optimizer step lies behind, or a backward pass.

        Returns:
            The readings of each, under its final tags, and the seconds that the budgeted callbacks cost each time.
        """
        aboard = {c: rider for c, rider in self._aboard.items() if rider.waits_for_step == at_step}
        self._aboard = {c: rider for c, rider in self._aboard.items() if c not in aboard}
        self._pairs = None
        readings: dict[SpectralCallback, dict[str, Reading]] = {}
        recurring = 0.0
        try:
            for callback, rider in aboard.items():
                began = clock(trainer)
                try:
                    passed = rider.conclude(self._factor, self._overflowing)
                    if passed is None:
                        self._aboard[callback] = rider
                        continue
                    if passed.readings is not None:
                        readings[callback] = callback.renamed(passed.readings)
                except Exception as error:  # noqa: BLE001
                    self._fail(trainer, callback, error, step)
                    continue
                seconds = clock(trainer) - began + passed.seconds
                if passed.readings is None:
                    self._owed.add(callback)
                if passed.readings is None or callback.schedule.is_fixed:
                    self._pay(callback, seconds)
                else:
                    recurring += seconds
        finally:
            for callback, rider in aboard.items():  # those behind one whose failure is raised
                if callback not in self._aboard:
                    rider.get_off()
        return readings, recurring

    def release(self, *, at_step: bool = True) -> None:
        """Take the hooks of what did not come away.

        Args:
            at_step: Whether a new optimizer step begins, and not just another batch that is accumulated for it.
        """
        late = {c: rider for c, rider in self._aboard.items() if at_step or not rider.waits_for_step}
        self._owed.update(late)
        for callback, rider in late.items():
            del self._aboard[callback]
            rider.get_off()
        self._pairs = None

    def _pay(self, callback: SpectralCallback, seconds: float) -> None:
        """Book what does not come again, or not out of the budget."""
        self._budget.pay(seconds, budgeted=not callback.schedule.is_fixed)
