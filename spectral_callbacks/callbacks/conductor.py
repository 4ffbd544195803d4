"""The conductor: decides who measures when, builds the probes, and books what they cost."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from spectral_callbacks.callbacks.batches import FixedBatches, FrozenBatch, load_batches
from spectral_callbacks.callbacks.loss import loss_of
from spectral_callbacks.callbacks.muting import muted, precision_of
from spectral_callbacks.callbacks.record import draw_layout, logging_step, record
from spectral_callbacks.callbacks.schedule import Budget
from spectral_callbacks.operators import Hessian, ParameterSpace
from spectral_callbacks.probe import (
    Probe,
    WrongDerivativeError,
    check_reached,
    check_symmetry,
    explain,
    unreached_parameters,
)
from spectral_callbacks.tags import COST_OVERHEAD, rename

if TYPE_CHECKING:
    from spectral_callbacks.callbacks.base import SpectralCallback

_HALF_PRECISION_NOISE = 0.1  # products under bfloat16 autocast were off by up to 1.2e-2


@dataclasses.dataclass(frozen=True)
class _Reach:
    """Parameters that the probe did not reach, until training's own gradients tell whether it should have."""

    key: tuple[Any, ...]
    callbacks: list[SpectralCallback]
    space: ParameterSpace
    unreached: tuple[str, ...]


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
        self._tested: set[tuple[Any, ...]] = set()
        self._reaches: list[_Reach] = []
        self._latest: FrozenBatch | None = None
        self._keeps_latest = any(callback.data == "current" for callback in callbacks)

    @property
    def awaits_gradients(self) -> bool:
        """Whether training's next gradients are to be compared with what the probe reached."""
        return bool(self._reaches)

    def start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Turn away what cannot be measured, draw the charts, start the clock."""
        for callback in self._callbacks:
            callback.forget()
            reason = callback.refusal(trainer, module)
            if reason is not None:
                callback.fail(ValueError(reason))
        if self._fixed.lost_on_resume:
            for callback in self._active():
                if callback.data == "fixed":
                    callback.say(
                        "the checkpoint could not carry the fixed batches, so the probe set changed on resuming. Pass "
                        "a DataLoader as data= for one that stays."
                    )
        charts = [
            (
                callback.name,
                tuple(
                    dataclasses.replace(chart, tags=tuple(rename(tag, callback.name) for tag in chart.tags))
                    for chart in callback.charts
                ),
            )
            for callback in self._active()
        ]
        draw_layout(trainer, charts)
        self._budget.start()

    def before_batch(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the batch if it is to be kept, and measure who is due."""
        if not self._fixed.is_complete:
            self._fixed.see(batch, batch_idx)
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

    def after_backward(self, trainer: pl.Trainer) -> None:
        """Silence callbacks whose probe missed a parameter that training has a gradient for."""
        reaches, self._reaches = self._reaches, []
        for reach in reaches:
            try:
                check_reached(reach.unreached, reach.space)
            except WrongDerivativeError as error:
                self._tested.discard(reach.key)  # for callbacks that were not due yet
                for callback in reach.callbacks:
                    self._fail(trainer, callback, error, logging_step(trainer))

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
        groups: dict[tuple[Any, ...], list[SpectralCallback]] = {}
        for c in due:
            data = c.data if isinstance(c.data, str) else id(c.data)
            groups.setdefault((data, c.num_batches, c.mode, c.loss, c.precision, c.optimizer, c.seed), []).append(c)
        readings: dict[SpectralCallback, Mapping[str, float]] = {}
        began = _clock(trainer)
        once = 0.0
        for key, group in groups.items():
            failures: dict[SpectralCallback, Exception] = {}
            try:
                with _undisturbed_run(trainer, module, group[0]):
                    batches = self._batches(trainer, module, group[0])
                    if batches is None:
                        self._owed.update(group)
                        continue
                    self._owed.difference_update(group)
                    once += self._measure_group(trainer, module, key, group, batches, step, current, readings, failures)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong here, training must go on
                failures = dict.fromkeys(group, error)
            for callback, error in failures.items():  # here the loggers listen again
                self._fail(trainer, callback, error, step)
        if not readings:
            self._budget.pay(_clock(trainer) - began)
            return
        self._budget.pay(once)
        self._budget.pay_measurement(_clock(trainer) - began - once)
        cost = {COST_OVERHEAD.name: self._budget.overhead}
        for callback, measured in readings.items():
            named = callback.renamed(measured)
            record(trainer, named, step)
            callback.history.append({"step": step, **named, **cost})
        record(trainer, cost, step)

    def _measure_group(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        key: tuple[Any, ...],
        group: list[SpectralCallback],
        batches: list[FrozenBatch],
        step: int,
        current: FrozenBatch | None,
        readings: dict[SpectralCallback, Mapping[str, float]],
        failures: dict[SpectralCallback, Exception],
    ) -> float:
        """Let a group measure on one probe; return the seconds that went into the self-test."""
        first = group[0]
        probe = Probe(
            module, trainer.optimizers[first.optimizer], batches, loss=loss_of(first.loss), step=step, mode=first.mode,
            seed=first.seed,
        )  # fmt: skip
        once = 0.0
        with probe:
            curved = [callback for callback in group if callback.differentiates_twice]
            if curved and key not in self._tested:
                began = _clock(trainer)
                if self._test(trainer, probe, key, curved, current):
                    self._tested.add(key)
                once = _clock(trainer) - began
            for callback in group:
                try:
                    readings[callback] = callback.measure(probe.with_generator(_generator(probe, callback, step)))
                except Exception as error:  # noqa: BLE001
                    failures[callback] = error
        return once

    def _test(
        self,
        trainer: pl.Trainer,
        probe: Probe,
        key: tuple[Any, ...],
        callbacks: list[SpectralCallback],
        current: FrozenBatch | None,
    ) -> bool:
        """Test the products, and remember the parameters that were missed until training has its gradients.

        Returns whether the products told anything.
        """
        first = callbacks[0]
        noise = _HALF_PRECISION_NOISE if _is_rough(probe.space, trainer, first) else None
        generator = _generator(probe, first, -1)
        told = check_symmetry(probe.operator(Hessian), probe.space, probe.module, generator=generator, noise=noise)
        if current is not None and first.loss is None and first.mode == "train":
            unreached = unreached_parameters(probe.evaluate(current, seed=None), probe.space)
            if unreached:
                self._reaches.append(_Reach(key, callbacks, probe.space, unreached))
        return told

    def _batches(
        self, trainer: pl.Trainer, module: pl.LightningModule, callback: SpectralCallback
    ) -> list[FrozenBatch] | None:
        """Return the callback's batches on the module's device, or None while they have not passed."""
        if callback.data == "current":
            batches = [self._latest] if self._latest is not None else None
        elif callback.data == "fixed":
            batches = self._fixed.take(callback.num_batches)
        else:
            data = callback.data if isinstance(callback.data, str) else id(callback.data)
            key = (data, callback.num_batches, callback.seed)
            if key not in self._loaded:
                self._loaded[key] = load_batches(trainer, callback.data, callback.num_batches, callback.seed)
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


@contextlib.contextmanager
def _undisturbed_run(trainer: pl.Trainer, module: pl.LightningModule, callback: SpectralCallback) -> Iterator[None]:
    with muted(trainer, module), precision_of(trainer, callback.precision):
        yield


def _is_rough(space: ParameterSpace, trainer: pl.Trainer, callback: SpectralCallback) -> bool:
    half = any(p.dtype.itemsize < space.dtype.itemsize for p in space.tensors)
    return half or (callback.precision == "training" and trainer.precision not in ("32-true", "64-true"))


def _generator(probe: Probe, callback: SpectralCallback, step: int) -> torch.Generator:
    seed = zlib.crc32(f"{callback.name}/{callback.seed}/{step}".encode())
    return torch.Generator(probe.space.device).manual_seed(seed)


def _clock(trainer: pl.Trainer) -> float:
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
