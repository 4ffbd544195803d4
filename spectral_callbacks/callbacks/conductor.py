"""The conductor: decides who measures when, builds the probes, and books what they cost."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from spectral_callbacks.callbacks.batches import FrozenBatch
from spectral_callbacks.callbacks.learning_rates import LearningRates
from spectral_callbacks.callbacks.muting import muted
from spectral_callbacks.callbacks.passengers import Passengers
from spectral_callbacks.callbacks.probing import Probes, generator_of, likeness
from spectral_callbacks.callbacks.reading import Reading
from spectral_callbacks.callbacks.record import draw_layout, logging_step, record
from spectral_callbacks.callbacks.schedule import Budget, clock
from spectral_callbacks.callbacks.supply import BatchSupply
from spectral_callbacks.callbacks.verification import Verification
from spectral_callbacks.linalg import Eigenpairs
from spectral_callbacks.probe import explain
from spectral_callbacks.tags import COST_OVERHEAD

if TYPE_CHECKING:
    from spectral_callbacks.callbacks.base import SpectralCallback


@dataclasses.dataclass
class _Outcome:
    """What came of one group: readings under their final tags, errors, and the seconds that went into it.

    `seconds` are those of each callback's own, `once` those of what does not come again; `pairs` are the Hessian's that
    one of them has found.
    """

    readings: dict[SpectralCallback, dict[str, Reading]] = dataclasses.field(default_factory=dict)
    failures: dict[SpectralCallback, Exception] = dataclasses.field(default_factory=dict)
    seconds: dict[SpectralCallback, float] = dataclasses.field(default_factory=dict)
    once: float = 0.0
    pairs: Eigenpairs | None = None


class Conductor:
    """Leads the spectral callbacks of one trainer through one fit.

    Args:
        callbacks: All of them, in the trainer's order.
    """

    def __init__(self, callbacks: Sequence[SpectralCallback]) -> None:
        self._callbacks = list(callbacks)
        self._supply = BatchSupply(callbacks)
        self._budget = Budget()
        self._overhead_at: int | None = None  # the step at which it was logged last
        self._owed: set[SpectralCallback] = set()
        self._verification = Verification()
        self._learning_rates = LearningRates()
        self._probes = Probes()
        self._passengers = Passengers(self._probes, self._budget, self._fail, self._owed)

    def is_led_by(self, callback: SpectralCallback) -> bool:
        """Return whether this callback passes Lightning's hooks on."""
        return self._callbacks[0] is callback

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Turn away what cannot be measured, draw the charts, start the clock."""
        for callback in self._callbacks:
            callback.begin(trainer, module)
        if self._supply.fixed.lost_on_resume:
            for callback in self._active():
                if callback.data == "fixed":
                    callback.say(
                        "the checkpoint could not carry the fixed batches, so the probe set changed on resuming. Pass "
                        "a DataLoader as data= for one that stays."
                    )
        draw_layout(trainer, [(callback.name, callback.charts) for callback in self._active()])
        self._budget.start()

    def before_batch(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch if it is to be kept, and measure who is due."""
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        begins_step = (ready - 1) % trainer.accumulate_grad_batches == 0
        self._passengers.release(at_step=begins_step)
        self._keep(trainer, batch, batch_idx)
        self._supply.see(batch, batch_idx)
        if not begins_step:
            return
        step = logging_step(trainer)
        active = self._active()
        shares = [c.max_overhead for c in active if not c.schedule.is_fixed]
        affordable = bool(shares) and self._budget.affords(min(shares))
        due = [
            c for c in active
            if c in self._owed or (c.schedule.due_at_step(step) if c.schedule.is_fixed else affordable)
        ]  # fmt: skip
        if due:
            self._measure(trainer, module, due, step, FrozenBatch(batch, batch_idx))

    def _keep(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        if self._supply.fixed.is_complete:
            return
        waiting = [callback for callback in self._active() if callback.data == "fixed"]
        if not waiting:
            return
        try:
            self._supply.fixed.see(batch, batch_idx)
        except Exception as error:  # noqa: BLE001 - batches are objects of the user's
            for callback in waiting:
                self._fail(trainer, callback, error, logging_step(trainer))

    def before_backward(self, trainer: pl.Trainer, loss: Tensor) -> None:
        """Let those on board hook on to the loss that training is about to differentiate."""
        self._passengers.attach(trainer, loss, logging_step(trainer))

    def after_backward(self, trainer: pl.Trainer) -> None:
        """Take the readings of the rides; silence callbacks whose probe missed a parameter that has a gradient."""
        self._conclude(trainer, at_step=False)
        if self._verification.awaits_gradients:
            for callback, error in self._verification.judge().items():
                self._fail(trainer, callback, error, logging_step(trainer))

    def before_step(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Say so if a learning rate is no longer the one that was measured with."""
        self._learning_rates.compare(trainer, optimizer)

    def after_batch(self, trainer: pl.Trainer) -> None:
        """Take the readings of the rides on this batch's optimizer step."""
        self._conclude(trainer, at_step=True)

    def after_epoch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure who is due at the end of this epoch."""
        due = [c for c in self._active() if c.schedule.due_at_epoch_end(trainer.current_epoch + 1)]
        if due:
            self._measure(trainer, module, due, logging_step(trainer), None)

    def stop(self, trainer: pl.Trainer) -> None:
        """Stop the clock and log the overhead of the whole fit."""
        self._budget.stop()
        step = logging_step(trainer)
        if self._budget.spent and step != self._overhead_at:
            record(trainer, {COST_OVERHEAD.name: self._budget.overhead}, step)

    def release(self) -> None:
        """Take all hooks away."""
        self._passengers.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the clock and the fixed batches."""
        return {"budget": self._budget.state_dict(), "fixed": self._supply.fixed.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the clock, and measure on the same batches as before."""
        self._budget.load_state_dict(state["budget"])
        self._supply.fixed.load_state_dict(state["fixed"])

    def _active(self) -> list[SpectralCallback]:
        return [callback for callback in self._callbacks if not callback.silenced]

    def _measure(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        due: list[SpectralCallback],
        step: int,
        current: FrozenBatch | None,
    ) -> None:
        due = sorted(due, key=lambda c: c.takes_eigenpairs)
        self._owed.difference_update(due)
        due = self._passengers.board(trainer, module, due, step, current)
        groups: dict[Hashable, list[SpectralCallback]] = {}
        for c in due:
            groups.setdefault(likeness(c), []).append(c)
        readings: dict[SpectralCallback, dict[str, Reading]] = {}
        recurring = 0.0
        for key, group in groups.items():
            outcome = _Outcome()
            began = clock(trainer)
            try:
                with muted(trainer, module):
                    self._measure_group(trainer, module, key, group, step, current, outcome)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong here, training must go on
                outcome = _Outcome(failures=dict.fromkeys(group, error), once=outcome.once)
            recurring += self._book(group, outcome, clock(trainer) - began)
            for callback, error in outcome.failures.items():  # here the loggers listen again
                self._fail(trainer, callback, error, step)
            readings |= outcome.readings
            self._passengers.offer(outcome.pairs)
        if not readings:
            self._budget.pay(recurring)
            return
        if recurring:
            self._budget.pay_measurement(recurring, step=step)
        if current is not None:
            for callback in readings:
                self._learning_rates.remember(trainer, callback)
        self._publish(trainer, readings, step)

    def _conclude(self, trainer: pl.Trainer, *, at_step: bool) -> None:
        step = logging_step(trainer)
        readings, recurring = self._passengers.conclude(trainer, step, at_step=at_step)
        if recurring:
            self._budget.pay_measurement(recurring, step=step)
        if readings:
            self._publish(trainer, readings, step)

    def _publish(self, trainer: pl.Trainer, readings: dict[SpectralCallback, dict[str, Reading]], step: int) -> None:
        """Append readings to the histories, and send them to the loggers."""
        cost = {COST_OVERHEAD.name: self._budget.overhead}
        everything: dict[str, Reading] = {}
        for callback, named in readings.items():
            callback.history.append({"step": step, **named, **cost})
            everything |= named
        record(trainer, everything if step == self._overhead_at else everything | cost, step)
        self._overhead_at = step

    def _measure_group(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        key: Hashable,
        group: list[SpectralCallback],
        step: int,
        current: FrozenBatch | None,
        outcome: _Outcome,
    ) -> None:
        """Let a group measure on one probe."""
        first = group[0]
        if self._supply.awaits_loading(first):
            began = clock(trainer)
            self._supply.load(trainer, first)
            outcome.once += clock(trainer) - began
        batches = self._supply.take(module, first)
        if batches is None:
            self._owed.update(group)
            return
        with self._probes.make(trainer, module, first, batches, step, first.precision) as probe:
            curved = [callback for callback in group if callback.differentiates_twice]
            if curved and self._verification.is_due(key):
                began = clock(trainer)
                upcoming = current if first.loss is None and first.mode == "train" else None
                try:
                    self._verification.test(probe, key, curved, upcoming, generator_of(probe, first, -1))
                except Exception as error:  # noqa: BLE001
                    outcome.failures.update(dict.fromkeys(curved, error))
                outcome.once += clock(trainer) - began
            for callback in group:
                if callback in outcome.failures:
                    continue
                began = clock(trainer)
                try:
                    own = probe.seen_by(generator_of(probe, callback, step), callback.outputs)
                    measured = callback.measure(own)
                    outcome.readings[callback] = callback.renamed(measured)
                except Exception as error:  # noqa: BLE001
                    outcome.failures[callback] = error
                outcome.seconds[callback] = clock(trainer) - began
            outcome.pairs = probe.eigenpairs

    def _book(self, group: list[SpectralCallback], outcome: _Outcome, seconds: float) -> float:
        """Pay what does not come again, or not out of the budget; return what the budgeted callbacks cost each time."""
        if not any(callback.schedule.is_fixed for callback in group):
            self._budget.pay(outcome.once)
            return seconds - outcome.once
        added = sum(spent for callback, spent in outcome.seconds.items() if not callback.schedule.is_fixed)
        self._budget.pay(seconds - added, budgeted=False)
        return added

    def _fail(self, trainer: pl.Trainer, callback: SpectralCallback, error: Exception, step: int) -> None:
        explanation = explain(error)
        callback.fail(error if explanation is None else RuntimeError(explanation))
        named = callback.renamed(callback.failure())
        record(trainer, named, step)
        callback.history.append({"step": step, **named})
        if error.__traceback__ is not None:  # its frames hold the graph of the probe
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None
