"""Rider: looks at what training does anyway, by hooks alone."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

from torch import Tensor

from spectral_callbacks.callbacks.batches import FrozenBatch
from spectral_callbacks.callbacks.reading import Reading
from spectral_callbacks.linalg import Eigenpairs
from spectral_callbacks.operators import ParameterSpace
from spectral_callbacks.probe import Probe


@dataclasses.dataclass(frozen=True)
class Passed:
    """A look that a ride has brought.

    Attributes:
        readings: By tag; None where what was seen is no step to be measured, as under an overflow of scaled gradients.
        seconds: Spent in hooks while training ran.
    """

    readings: Mapping[str, Reading] | None
    seconds: float


class Rider(abc.ABC):
    """Takes the looks of one callback from hooks on a backward pass, or on an optimizer step, of training.

    Attributes:
        waits_for_step: Whether it is the optimizer step at the end of accumulation that it looks at, and not the coming
            backward pass.
    """

    waits_for_step: ClassVar[bool]

    @abc.abstractmethod
    def board(self, batch: FrozenBatch, open_probe: Callable[[], Probe]) -> bool:
        """Wait for what training does with a batch; return False if the look must be taken on a probe.

        Args:
            batch: That training takes next.
            open_probe: Makes a probe of this batch and the loss of training.
        """

    @abc.abstractmethod
    def attach(self, loss: Tensor, pairs: Eigenpairs | None, trained: Callable[[], ParameterSpace]) -> bool:
        """Hook on to the loss that training is about to differentiate, if need be; return whether there is a way.

        Args:
            loss: As it is differentiated, scaled if it is.
            pairs: Eigenpairs of the Hessian, where some are known.
            trained: Finds the parameters that are trained.
        """

    @abc.abstractmethod
    def conclude(self, factor: float, scaler: object | None) -> Passed | None:
        """Get off, and return what was seen; None while it is still to come.

        Args:
            factor: Of the loss that was hooked on to, against the loss of the batch.
            scaler: Of gradients, if there is one whose factor may be too large.

        Raises:
            RuntimeError: If the ride failed.
        """

    @abc.abstractmethod
    def get_off(self) -> None:
        """Take the hooks away, and wait for nothing."""

    @abc.abstractmethod
    def forget(self) -> None:
        """Get off, and know nothing of the network."""
