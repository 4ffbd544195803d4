"""The base of every diagnostic: one abstract method, and all that Lightning needs around it."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, get_args

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from spectral_callbacks.callbacks.batches import Data
from spectral_callbacks.callbacks.conductor import Conductor
from spectral_callbacks.callbacks.dotted import resolved
from spectral_callbacks.callbacks.loss import Loss
from spectral_callbacks.callbacks.muting import Precision
from spectral_callbacks.callbacks.reading import Reading
from spectral_callbacks.callbacks.refusals import refusal, refusal_of_batches, refusal_of_loss
from spectral_callbacks.callbacks.rider import Rider
from spectral_callbacks.callbacks.schedule import Schedule
from spectral_callbacks.probe import Mode, Probe, named_module
from spectral_callbacks.tags import Chart, check_tag, rename


class SpectralCallback(pl.Callback, abc.ABC):
    """A diagnostic of a model in training: schedule, isolation, batches and logging around one method, `measure`.

    Training with the callback is bit-identical to training without it. Diagnostics of one trainer share a probe where
    their settings allow. A diagnostic that fails says so once, logs its status and lets the run go on.

    Args:
        every_n_steps: Measure every so many optimizer steps, from step 0 on, whatever it costs; "geometric" for about
            ten measurements a decade.
        every_n_epochs: The same in epochs, measured at their end, and once at step 0.
        max_overhead: With neither given: the share of the wall time that all such callbacks together may take. The
            first measurement is at step 0, and its cost is earned back before the next.
        data: What to measure on. "fixed": the first `num_batches` training batches, always the same, for smooth curves.
            "current": the batch at hand. "train", "val": batches drawn once from a second loader over the training or
            validation set. Or a DataLoader of your own.
        num_batches: How many batches the loss is averaged over, weighted by their size.
        mode: "train" measures the function that the optimizer sees, dropout masks frozen; "eval" the one that predicts.
        loss: The loss that is differentiated: (pl_module, batch) -> scalar Tensor, or the dotted path of such a
            function. By default `training_step` is run again. Required under manual optimization.
        outputs: Dotted name of the submodule whose output is the model's output, for quantities that need more than
            a scalar loss, such as the Gauss-Newton matrix; "" is the module's own forward. Left out, so are they.
        precision: "full" measures in the parameters' own dtype; "training" under the autocast of training.
        optimizer: Index of the optimizer that is judged, and whose parameters are measured.
        name: First segment of the tags, so that two instances can stand side by side.
        seed: Of all random numbers of the diagnostic.
        on_error: "warn" reports a failure once and lets training go on; "raise" is for tests.

    Attributes:
        history: One dict a measurement, `{"step": int, tag: reading, ...}`; a logger is not needed.

    Raises:
        ValueError: If an argument is out of its range.
    """

    diagnostic: ClassVar[str]
    charts: tuple[Chart, ...] = ()
    differentiates_twice: bool = False
    shares_eigenpairs: ClassVar[bool] = False  # hands those of the Hessian on to the others on its probe
    takes_eigenpairs: ClassVar[bool] = False  # takes them, and so measures last
    rider: Rider | None = None  # looks on at what training does anyway instead of opening a probe
    runs_loss: ClassVar[bool] = True  # cannot do without the loss
    takes_batches: ClassVar[bool] = True  # cannot do without batches
    loads_samples: int | None = None  # as many batches as hold so many samples, from a loader of its own
    more_families: ClassVar[tuple[str, ...]] = ()  # first segments of its tags beside `diagnostic`

    def __init__(
        self,
        *,
        every_n_steps: int | Literal["geometric"] | None = None,
        every_n_epochs: int | Literal["geometric"] | None = None,
        max_overhead: float = 0.05,
        data: Literal["fixed", "current", "train", "val"] | DataLoader[Any] = "fixed",
        num_batches: int = 1,
        mode: Literal["train", "eval"] = "train",
        loss: Callable[[Any, Any], Tensor] | str | None = None,
        outputs: str | None = None,
        precision: Literal["full", "training"] = "full",
        optimizer: int = 0,
        name: str | None = None,
        seed: int = 0,
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        self.schedule = Schedule(every_n_steps, every_n_epochs)
        if not 0 < max_overhead < 1:
            raise ValueError(
                f"max_overhead={max_overhead!r} must lie between 0 and 1, for example 0.05 for 5 % of the time."
            )
        if num_batches < 1:
            raise ValueError(f"num_batches={num_batches!r} must be at least 1.")
        if optimizer < 0:
            raise ValueError(f"optimizer={optimizer!r} must be the index of an optimizer, counted from 0.")
        if not isinstance(data, DataLoader):
            _check_choice("data", data, ("fixed", "current", "train", "val"), or_else=", or a DataLoader")
        _check_choice("mode", mode, get_args(Mode))
        _check_choice("precision", precision, get_args(Precision))
        _check_choice("on_error", on_error, ("warn", "raise"))
        if data == "current" and num_batches > 1:
            raise ValueError(
                f"data='current' is one batch, and num_batches={num_batches}; use data='fixed' for several."
            )
        self.max_overhead = max_overhead
        self.data: Data = data
        self.num_batches = num_batches
        self.mode: Mode = mode
        self.loss: Loss | None = None if loss is None else resolved(loss, "loss", "(pl_module, batch) -> scalar Tensor")
        self.outputs = outputs
        self.precision: Precision = precision
        self.optimizer = optimizer
        self.name = name or self.diagnostic
        check_tag(f"{self.name}/x")
        self.seed = seed
        self.on_error = on_error
        self.history: list[dict[str, Any]] = []
        self.silenced = False
        self._said: set[str] = set()
        self._conductor: Conductor | None = None

    @abc.abstractmethod
    def measure(self, probe: Probe) -> Mapping[str, Reading]:
        """Return the readings of one probe, tag -> number or spectrum; most tags begin with `diagnostic`."""

    def failure(self) -> Mapping[str, float]:
        """Return what is logged in place of readings when measuring failed."""
        return {}

    def forget(self) -> None:
        """Drop what earlier measurements left behind; called when a fit begins."""

    def prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Read what the run has to tell, for example its batch size; called when a fit begins that can be measured."""

    @property
    def looks_every(self) -> int:
        """How many searches of a `Tracker` come to one look; eigenvectors of another batch may tell it little."""
        return 1 if self.data == "current" else 10

    @property
    def families(self) -> tuple[str, ...]:
        """The first segments of its tags."""
        return (self.name, *(self.more_families if self.name == self.diagnostic else ()))

    @property
    def state_key(self) -> str:
        """Tells instances apart in checkpoints: by name and rhythm."""
        return self._generate_state_key(
            name=self.name, every_n_steps=self.schedule.every_n_steps, every_n_epochs=self.schedule.every_n_epochs
        )

    def begin(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin a fit cold, or stay silent in one that cannot be measured."""
        self.forget()
        reason = self.refusal(trainer, module)
        if reason is not None:
            self.fail(ValueError(reason))
            return
        try:
            if self.outputs is not None:
                named_module(module, self.outputs, knob="outputs")
            self.prepare(trainer, module)
        except Exception as error:  # noqa: BLE001 - training must go on
            self.fail(error)

    def say(self, message: str) -> None:
        """Warn, once a run for each message."""
        if message not in self._said:
            self._said.add(message)
            rank_zero_warn(f"{type(self).__name__}({self.name!r}): {message}")

    def fail(self, error: Exception) -> None:
        """Report an error as `on_error` asks, and measure no more in this run."""
        if self.on_error == "raise":
            raise error
        self.silenced = True
        self.forget()
        self.say(f"{error} Training goes on without this diagnostic.")

    def renamed(self, readings: Mapping[str, Reading]) -> dict[str, Reading]:
        """Return the readings under this instance's name, or raise if a logger could not take a tag."""
        return {self._own(check_tag(tag)): value for tag, value in readings.items()}

    def _own(self, tag: str) -> str:
        """Return a tag under this instance's name; under a name of its own also what begins with another word."""
        if self.name == self.diagnostic:
            return tag
        return rename(tag, self.name) if tag.startswith(f"{self.diagnostic}/") else f"{self.name}/{tag}"

    def refusal(self, trainer: pl.Trainer, module: pl.LightningModule) -> str | None:
        """Return why this run cannot be measured, or None."""
        reason = refusal(trainer, module, optimizer=self.optimizer)
        if reason is None and self.runs_loss:
            reason = refusal_of_loss(module, self.loss)
        if reason is None and self.takes_batches:
            reason = refusal_of_batches(module, loss=self.loss, data=self.data)
        return reason

    # Lightning's hooks: the first spectral callback of the trainer conducts, the others are conducted.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take the lead if this is the trainer's first spectral callback."""
        if stage != "fit":
            return
        callbacks: list[pl.Callback] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
        spectral = [callback for callback in callbacks if isinstance(callback, SpectralCallback)]
        self.silenced = False
        self._said.clear()
        if spectral[0] is not self:
            return
        names = [name for callback in spectral for name in callback.families]
        if len(set(names)) < len(names):
            raise ValueError(f"the callbacks log as {', '.join(names)}; give each a name= of its own for its tags.")
        conductor = Conductor(spectral)
        for callback in spectral:
            callback._conductor = conductor

    @property
    def _leads(self) -> Conductor | None:
        """The conductor, for the callback that passes Lightning's hooks on to it."""
        return self._conductor if self._conductor and self._conductor.is_led_by(self) else None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock, and draw the layout of the charts."""
        if conductor := self._leads:
            conductor.start(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure what is due before this batch's optimizer step."""
        if conductor := self._leads:
            conductor.before_batch(trainer, pl_module, batch, batch_idx)

    def on_before_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule, loss: Tensor) -> None:
        """Let those that are due ride on this backward pass."""
        if conductor := self._leads:
            conductor.before_backward(trainer, loss)

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what rode along; compare the parameters that training reached with those that the probe reached."""
        if conductor := self._leads:
            conductor.after_backward(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Compare the learning rate of the step with the one that was measured with."""
        if conductor := self._leads:
            conductor.before_step(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure what rode along with this batch's optimizer step."""
        if conductor := self._leads:
            conductor.after_batch(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measure what is due at the end of this epoch."""
        if conductor := self._leads:
            conductor.after_epoch(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop the clock and log what it shows."""
        if conductor := self._leads:
            conductor.stop(trainer)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Take all hooks away."""
        if conductor := self._leads:
            conductor.release()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Take all hooks away."""
        if conductor := self._leads:
            conductor.release()

    def state_dict(self) -> dict[str, Any]:
        """Return the clock and the fixed batches, the same for all callbacks: any of them brings them back."""
        return self._conductor.state_dict() if self._conductor else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a run: the same batches, and the time already spent."""
        if self._conductor and state_dict:
            self._conductor.load_state_dict(state_dict)


def _check_choice(name: str, value: object, choices: tuple[str, ...], *, or_else: str = "") -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, choices))}{or_else}.")
