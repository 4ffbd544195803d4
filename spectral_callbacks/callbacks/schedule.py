"""When to measure: by steps, by epochs, or by what it costs."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from typing import Any, Literal

import lightning.pytorch as pl
import torch

Every = int | Literal["geometric"] | None
_PER_DECADE = 10
_REMEMBERED = 3


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A fixed rhythm, or none: then the budget decides.

    Args:
        every_n_steps: Every so many optimizer steps, or "geometric" for about ten measurements a decade.
        every_n_epochs: The same in epochs, measured at an epoch's end.

    Raises:
        ValueError: If both are given, or one is not positive.

    Example:
        >>> [step for step in range(30) if Schedule(every_n_steps="geometric").due_at_step(step)]
        [0, 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, 25]
    """

    every_n_steps: Every = None
    every_n_epochs: Every = None

    def __post_init__(self) -> None:
        if self.every_n_steps is not None and self.every_n_epochs is not None:
            raise ValueError(
                f"every_n_steps={self.every_n_steps!r} and every_n_epochs={self.every_n_epochs!r} exclude each other; "
                "give one of them, or neither for a time budget."
            )
        for name, every in (("every_n_steps", self.every_n_steps), ("every_n_epochs", self.every_n_epochs)):
            whole = isinstance(every, int) and not isinstance(every, bool) and every >= 1
            if every is not None and every != "geometric" and not whole:
                raise ValueError(
                    f"{name}={every!r} must be a positive whole number or 'geometric'; leave it out for a time budget."
                )

    @property
    def is_fixed(self) -> bool:
        """Whether a rhythm was given."""
        return self.every_n_steps is not None or self.every_n_epochs is not None

    def due_at_step(self, step: int) -> bool:
        """Return whether the state before optimizer step `step` is due; step 0 always is."""
        return self.is_fixed and (step == 0 or _due(self.every_n_steps, step))

    def due_at_epoch_end(self, epochs: int) -> bool:
        """Return whether the state after so many epochs is due."""
        return _due(self.every_n_epochs, epochs)


def _due(every: Every, count: int) -> bool:
    if every is None:
        return False
    if every == "geometric":
        return round(10 ** (round(_PER_DECADE * math.log10(count)) / _PER_DECADE)) == count
    return count % every == 0


class Budget:
    """Wall time of the fit, and the share of it that measuring took.

    A measurement is affordable when the share stays within the limit after it, judged by the dearest of the last few,
    over the whole fit and since the last measurement: what a quiet time leaves over is not spent in a burst. The first
    is free: its cost is a debt repaid before the next. What callbacks with a rhythm of their own take is counted in
    `overhead`, but not against this budget.
    """

    def __init__(self) -> None:
        self.spent = 0.0
        self._budgeted = 0.0
        self._elapsed = 0.0
        self._started: float | None = None
        self._measured_at = 0.0
        self._is_cold = True
        self._paid_step: int | None = None
        self._costs: collections.deque[float] = collections.deque(maxlen=_REMEMBERED)

    @property
    def elapsed(self) -> float:
        """Seconds of training so far, measuring included, over all parts of a resumed run."""
        running = time.perf_counter() - self._started if self._started is not None else 0.0
        return self._elapsed + running

    @property
    def overhead(self) -> float:
        """Share of the elapsed time that was spent on measuring."""
        elapsed = self.elapsed
        return self.spent / elapsed if elapsed > 0 else 0.0

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Stop the clock, keeping what it shows."""
        self._elapsed = self.elapsed
        self._started = None

    def pay(self, seconds: float, *, budgeted: bool = True) -> None:
        """Book the cost of something that comes once, or that no budget limits."""
        self.spent += seconds
        if budgeted:
            self._budgeted += seconds

    def pay_measurement(self, seconds: float, *, step: int) -> None:
        """Book the cost of a measurement, and expect the like of it.

        Args:
            seconds: That it took.
            step: Where it took place: what comes at one step is one measurement.
        """
        self.pay(seconds)
        if step == self._paid_step:
            self._costs[-1] += seconds
            return
        self._paid_step = step
        if len(self._costs) == 1 and self._is_cold:  # the first search starts from nothing; no later one costs as much
            self._costs.clear()
            self._is_cold = False
        self._costs.append(seconds)
        self._measured_at = self.elapsed

    def affords(self, share: float) -> bool:
        """Return whether one more measurement keeps the spending within this share of the time."""
        if not self._costs:
            return True
        expected, elapsed = max(self._costs), self.elapsed
        rested = expected <= share * (elapsed - self._measured_at + expected)
        return rested and self._budgeted + expected <= share * (elapsed + expected)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"spent": self.spent, "budgeted": self._budgeted, "elapsed": self.elapsed, "costs": list(self._costs)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another part of the run ended."""
        self.spent = state["spent"]
        self._budgeted = state["budgeted"]
        self._elapsed = state["elapsed"]
        self._measured_at = self._elapsed
        self._paid_step = None
        self._costs.clear()
        self._costs.extend(state["costs"])


def clock(trainer: pl.Trainer) -> float:
    """Return a time in seconds, once the device has done what it was asked to."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
