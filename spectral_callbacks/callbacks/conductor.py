"""The conductor: decides who measures when, builds the probes, and books what they cost."""

from __future__ import annotations

import dataclasses
import time
import traceback
import zlib
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from spectral_callbacks.callbacks.batches import Data, FixedBatches, FrozenBatch, load_batches
from spectral_callbacks.callbacks.loss import loss_of
from spectral_callbacks.callbacks.muting import muted
from spectral_callbacks.callbacks.reading import Reading
from spectral_callbacks.callbacks.record import draw_layout, logging_step, record
from spectral_callbacks.callbacks.schedule import Budget
from spectral_callbacks.callbacks.verification import Verification
from spectral_callbacks.probe import Probe, explain
from spectral_callbacks.tags import COST_OVERHEAD

if TYPE_CHECKING:
    from spectral_callbacks.callbacks.base import SpectralCallback


@dataclasses.dataclass
class _Outcome:
    """What came of one group: readings under their final tags, errors, and the seconds that went into it.

    `seconds` are those of each callback's own, `once` those of what does not come again.
    """

    readings: dict[SpectralCallback, dict[str, Reading]] = dataclasses.field(default_factory=dict)
    failures: dict[SpectralCallback, Exception] = dataclasses.field(default_factory=dict)
    seconds: dict[SpectralCallback, float] = dataclasses.field(default_factory=dict)
    once: float = 0.0


class Conductor:
    """Leads the spectral callbacks of one trainer through one fit.

    Args:
        callbacks: All of them, in the trainer's order.
    """

    def __init__(self, callbacks: Sequence[SpectralCallback]) -> None:
        self._callbacks = list(callbacks)
        fixed = [callback.num_batches for callback in callbacks if callback.data == "fixed"]
        self._fixed = FixedBatches(max(fixed, default=0))
        self._loaded: dict[Any, list[FrozenBatch]] = {}
        self._budget = Budget()
        self._owed: set[SpectralCallback] = set()
        self._verification = Verification()
        self._learning_rates: dict[SpectralCallback, list[float]] = {}
        self._latest: FrozenBatch | None = None
        self._keeps_latest = any(callback.data == "current" for callback in callbacks)

    def is_led_by(self, callback: SpectralCallback) -> bool:
        """Return whether this callback passes Lightning's hooks on."""
        return self._callbacks[0] is callback

    @property
    def awaits_gradients(self) -> bool:
        """Whether training's next gradients are to be compared with what the probe reached."""
        return self._verification.awaits_gradients

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Turn away what cannot be measured, draw the charts, start the clock."""
        for callback in self._callbacks:
            callback.begin(trainer, module)
        if self._fixed.lost_on_resume:
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
        self._keep(trainer, batch, batch_idx)
        if self._keeps_latest:
            self._latest = FrozenBatch(batch, batch_idx)
        ready = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if (ready - 1) % trainer.accumulate_grad_batches != 0:
            return
        step = logging_step(trainer)
        active = self._active()
        fixed = [c for c in active if c.schedule.is_fixed and (c in self._owed or c.schedule.due_at_step(step))]
        budgeted = [c for c in active if not c.schedule.is_fixed]
        share = min((c.max_overhead for c in budgeted), default=0.0)
        due = [*fixed, *(budgeted if budgeted and self._budget.affords(share) else [])]
        if due:
            self._measure(trainer, module, due, step, FrozenBatch(batch, batch_idx))

    def _keep(self, trainer: pl.Trainer, batch: Any, batch_idx: int) -> None:
        if self._fixed.is_complete:
            return
        waiting = [callback for callback in self._active() if callback.data == "fixed"]
        if not waiting:
            return
        try:
            self._fixed.see(batch, batch_idx)
        except Exception as error:  # noqa: BLE001 - batches are objects of the user's
            for callback in waiting:
                self._fail(trainer, callback, error, logging_step(trainer))

    def after_backward(self, trainer: pl.Trainer) -> None:
        """Silence callbacks whose probe missed a parameter that training has a gradient for."""
        for callback, error in self._verification.judge().items():
            self._fail(trainer, callback, error, logging_step(trainer))

    def before_step(self, trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Say so if a learning rate is no longer the one that was measured with."""
        for callback, measured in list(self._learning_rates.items()):
            if trainer.optimizers[callback.optimizer] is optimizer:
                del self._learning_rates[callback]
                if _learning_rates(optimizer) != measured:
                    callback.say(
                        f"the learning rates {measured} became {_learning_rates(optimizer)} between measuring and the "
                        "optimizer step, and what was logged belongs to the former. Set them in a scheduler, or list "
                        "this callback after the one that sets them."
                    )

    def after_epoch(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Measure who is due at the end of this epoch."""
        due = [c for c in self._active() if c.schedule.due_at_epoch_end(trainer.current_epoch + 1)]
        if due:
            self._measure(trainer, module, due, logging_step(trainer), None)

    def stop(self, trainer: pl.Trainer) -> None:
        """Stop the clock and log the overhead of the whole fit."""
        self._budget.stop()
        if self._budget.spent:
            record(trainer, {COST_OVERHEAD.name: self._budget.overhead}, logging_step(trainer))

    def state_dict(self) -> dict[str, Any]:
        """Return the clock and the fixed batches."""
        return {"budget": self._budget.state_dict(), "fixed": self._fixed.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the clock, and measure on the same batches as before."""
        self._budget.load_state_dict(state["budget"])
        self._fixed.load_state_dict(state["fixed"])

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
        groups: dict[Hashable, list[SpectralCallback]] = {}
        for c in due:
            key = (_identity(c.data), c.num_batches, c.mode, id(c.loss), c.precision, c.optimizer, c.seed)
            groups.setdefault(key, []).append(c)
        readings: dict[SpectralCallback, dict[str, Reading]] = {}
        recurring = 0.0
        for key, group in groups.items():
            outcome = _Outcome()
            began = _clock(trainer)
            try:
                with muted(trainer, module):
                    self._measure_group(trainer, module, key, group, step, current, outcome)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong here, training must go on
                outcome = _Outcome(failures=dict.fromkeys(group, error), once=outcome.once)
            recurring += self._book(group, outcome, _clock(trainer) - began)
            for callback, error in outcome.failures.items():  # here the loggers listen again
                self._fail(trainer, callback, error, step)
            readings |= outcome.readings
        if not readings:
            self._budget.pay(recurring)
            return
        if recurring:
            self._budget.pay_measurement(recurring)
        cost = {COST_OVERHEAD.name: self._budget.overhead}
        everything: dict[str, Reading] = {}
        for callback, named in readings.items():
            callback.history.append({"step": step, **named, **cost})
            everything |= named
            if current is not None:
                self._learning_rates[callback] = _learning_rates(trainer.optimizers[callback.optimizer])
        record(trainer, everything | cost, step)

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
        batches = self._batches(trainer, module, first, outcome)
        if batches is None:
            self._owed.update(group)
            return
        self._owed.difference_update(group)
        probe = Probe(
            module, trainer.optimizers[first.optimizer], batches,
            loss=loss_of(trainer, first.loss, first.precision), step=step, mode=first.mode, seed=first.seed,
        )  # fmt: skip
        with probe:
            curved = [callback for callback in group if callback.differentiates_twice]
            if curved and self._verification.is_due(key):
                began = _clock(trainer)
                upcoming = current if first.loss is None and first.mode == "train" else None
                try:
                    self._verification.test(probe, key, curved, upcoming, _generator(probe, first, -1))
                except Exception as error:  # noqa: BLE001
                    outcome.failures.update(dict.fromkeys(curved, error))
                outcome.once += _clock(trainer) - began
            for callback in group:
                if callback in outcome.failures:
                    continue
                began = _clock(trainer)
                try:
                    own = probe.seen_by(_generator(probe, callback, step), callback.outputs)
                    measured = callback.measure(own)
                    outcome.readings[callback] = callback.renamed(measured)
                except Exception as error:  # noqa: BLE001
                    outcome.failures[callback] = error
                outcome.seconds[callback] = _clock(trainer) - began

    def _book(self, group: list[SpectralCallback], outcome: _Outcome, seconds: float) -> float:
        """Pay what does not come again, or not out of the budget; return what the budgeted callbacks cost each time."""
        if not any(callback.schedule.is_fixed for callback in group):
            self._budget.pay(outcome.once)
            return seconds - outcome.once
        added = sum(spent for callback, spent in outcome.seconds.items() if not callback.schedule.is_fixed)
        self._budget.pay(seconds - added, budgeted=False)
        return added

    def _batches(
        self, trainer: pl.Trainer, module: pl.LightningModule, callback: SpectralCallback, outcome: _Outcome
    ) -> list[FrozenBatch] | None:
        """Return the callback's batches on the module's device, or None while they have not passed."""
        if callback.data == "current":
            batches = [self._latest] if self._latest is not None else None
        elif callback.data == "fixed":
            batches = self._fixed.take(callback.num_batches)
        else:
            key = (_identity(callback.data), callback.num_batches, callback.seed)
            if key not in self._loaded:
                began = _clock(trainer)
                self._loaded[key] = load_batches(trainer, callback.data, callback.num_batches, callback.seed)
                outcome.once += _clock(trainer) - began
            batches = self._loaded[key]
        if batches is None:
            return None
        return [FrozenBatch(move_data_to_device(b.batch, module.device), b.batch_idx) for b in batches]

    def _fail(self, trainer: pl.Trainer, callback: SpectralCallback, error: Exception, step: int) -> None:
        explanation = explain(error)
        callback.fail(error if explanation is None else RuntimeError(explanation))
        named = callback.renamed(callback.failure())
        record(trainer, named, step)
        callback.history.append({"step": step, **named})
        if error.__traceback__ is not None:  # its frames hold the graph of the probe
            traceback.clear_frames(error.__traceback__)
            error.__traceback__ = None


def _identity(data: Data) -> Hashable:
    return data if isinstance(data, str) else id(data)


def _learning_rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def _generator(probe: Probe, callback: SpectralCallback, step: int) -> torch.Generator:
    seed = zlib.crc32(f"{callback.name}/{callback.seed}/{step}".encode())
    return torch.Generator(probe.space.device).manual_seed(seed)


def _clock(trainer: pl.Trainer) -> float:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
