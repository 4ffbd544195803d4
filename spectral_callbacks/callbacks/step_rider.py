"""StepRider: looks at the optimizer steps that training takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from spectral_callbacks.callbacks.batches import FrozenBatch
from spectral_callbacks.callbacks.reading import Reading
from spectral_callbacks.callbacks.rider import Passed, Rider
from spectral_callbacks.linalg import Eigenpairs
from spectral_callbacks.operators import ParameterSpace
from spectral_callbacks.probe import Probe

Read = Callable[[Mapping[Tensor, Tensor]], Mapping[str, Reading] | None]
_MANY = 10  # steps that were waited for in vain


class StepRider(Rider):
    """Takes the looks of one callback at an optimizer's own step, from the hooks that PyTorch runs around it.

    Behind the step the gradients are those that it has used: unscaled, accumulated and clipped. Of several steps within
    one batch the first is seen. A copy of the trained parameters is held while the step runs; where a closure runs the
    network inside the step, as Lightning's does, that includes the forward and backward passes.

    Args:
        read: Makes readings behind the step of what the parameters were before it; None if it was none.
        say: Is told what goes wrong.
    """

    waits_for_step: ClassVar[bool] = True

    def __init__(self, read: Read, say: Callable[[str], None]) -> None:
        self._read = read
        self._say = say
        self._optimizer: torch.optim.Optimizer | None = None
        self._clock: Callable[[], float] | None = None
        self._hooks: list[RemovableHandle] = []
        self._before: dict[Tensor, Tensor] = {}
        self._has_seen = False
        self._readings: Mapping[str, Reading] | None = None
        self._error: Exception | None = None
        self._seconds = 0.0
        self._in_vain = 0

    def follow(self, optimizer: torch.optim.Optimizer, clock: Callable[[], float]) -> None:
        """Look at this optimizer from now on, and tell time by this clock."""
        self._optimizer, self._clock = optimizer, clock

    def forget(self) -> None:
        """Get off, and know nothing of the optimizer."""
        self.get_off()
        self._optimizer = self._clock = None
        self._in_vain = 0

    def board(self, batch: FrozenBatch, open_probe: Callable[[], Probe]) -> bool:
        """Wait for the optimizer's next step."""
        if self._optimizer is None:
            return False
        if self._in_vain == _MANY:
            self._say(
                f"{type(self._optimizer).__name__} took no step in {_MANY} batches, or takes it without the hooks of "
                "torch.optim.Optimizer; the look waits for one."
            )
        self._in_vain += 1
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._copy),
            self._optimizer.register_step_post_hook(self._compare),
        ]
        return True

    def attach(self, loss: Tensor, pairs: Eigenpairs | None, trained: Callable[[], ParameterSpace]) -> bool:
        """Do nothing: the hooks are on the optimizer."""
        return True

    def conclude(self, factor: float, scaler: object | None) -> Passed | None:
        """Get off, and return what was seen; None while the step is still to come.

        Raises:
            Exception: That came up in a hook, where training must not meet it.
        """
        if not self._has_seen:
            return None
        passed, error = Passed(self._readings, self._seconds), self._error
        self.get_off()
        if error is not None:
            raise error
        return passed

    def get_off(self) -> None:
        """Take the hooks away, and wait for nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._before = [], {}
        self._has_seen = False
        self._readings = self._error = None
        self._seconds = 0.0

    def _copy(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Copy the parameters before the step."""

        def copy() -> None:
            trained = (p for group in optimizer.param_groups for p in group["params"] if p.requires_grad)
            self._before = {p: p.detach().clone() for p in trained}

        if not self._has_seen:
            self._timed(copy)

    def _compare(self, *_: Any) -> None:
        """Take the readings behind the step; the hooks stay for now, as PyTorch walks through them."""

        def compare() -> None:
            if self._error is None:
                self._readings = self._read(self._before)

        if self._has_seen:
            return
        self._timed(compare)
        if self._readings is not None:
            self._in_vain = 0
        self._has_seen = True
        self._before = {}

    def _timed(self, work: Callable[[], None]) -> None:
        """Do something in a hook, count its time, and keep what goes wrong out of training."""
        if self._clock is None:
            return
        began = self._clock()
        try:
            with torch.no_grad():
                work()
        except Exception as error:  # noqa: BLE001 - training must go on
            self._error = error
        self._seconds += self._clock() - began
