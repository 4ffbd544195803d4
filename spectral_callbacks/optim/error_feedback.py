"""Error feedback: what a projection left out of a gradient is added to the next one."""

from __future__ import annotations

import abc
from typing import ClassVar

import torch
from torch import Tensor

from spectral_callbacks.optim.base import local
from spectral_callbacks.optim.lines import Lines

_LEVELS = 127  # on each side of zero


def quantize(
    lines: Tensor,  # (lines, width)
) -> tuple[Tensor, Tensor]:  # (lines, width) int8, (lines, 1)
    """Round each line to 255 levels, symmetric about 0, from minus its largest absolute value to that.

    Halves go to the even level, so that they are not biased. The relative error of numbers spread evenly over their
    range is 1 / (2 · 127) = 0.0039; a line of zeros stays one.

    Example:
        >>> import torch
        >>> levels, scales = quantize(torch.tensor([[0.1, -1.0, 0.5]]))
        >>> levels, levels * scales
        (tensor([[  13, -127,   64]], dtype=torch.int8), tensor([[ 0.1024, -1.0000,  0.5039]]))
    """
    scales = lines.abs().amax(dim=1, keepdim=True) / _LEVELS
    levels = (lines / torch.where(scales > 0, scales, 1)).round_()
    return levels.to(torch.int8), scales


class ErrorFeedback(abc.ABC):
    """How the error of a projection is kept from one step to the next.

    Attributes:
        names: Of its part of the state.
    """

    names: ClassVar[frozenset[str]] = frozenset()

    def fit(self, state: dict[str, Tensor], lines: Lines, dtype: torch.dtype) -> None:
        """Make a state one of this kind: what another kind kept is dropped, and no error is held."""
        held = state.keys() & {"error", "error_scale"}
        if held != self.names:
            for name in held:
                del state[name]
            state |= self.empty(lines, dtype)

    @abc.abstractmethod
    def empty(self, lines: Lines, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the part of the state that holds no error yet."""

    @abc.abstractmethod
    def recall(self, state: dict[str, Tensor]) -> Tensor | None:  # (lines, width)
        """Return the error of the last step on this process; None if it is not kept."""

    @abc.abstractmethod
    def keep(self, state: dict[str, Tensor], error: Tensor) -> None:
        """Keep the error (lines, width) of this step."""


class Forgotten(ErrorFeedback):
    """No feedback, and no state."""

    def empty(self, lines: Lines, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ErrorFeedback`."""
        return {}

    def recall(self, state: dict[str, Tensor]) -> Tensor | None:
        """See `ErrorFeedback`."""
        return None

    def keep(self, state: dict[str, Tensor], error: Tensor) -> None:
        """See `ErrorFeedback`."""


class Exact(ErrorFeedback):
    """The error as it is: one number an entry of the parameter."""

    names: ClassVar[frozenset[str]] = frozenset({"error"})

    def empty(self, lines: Lines, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ErrorFeedback`."""
        return {"error": lines.zeros(lines.width, dtype)}

    def recall(self, state: dict[str, Tensor]) -> Tensor | None:
        """See `ErrorFeedback`."""
        return local(state["error"])

    def keep(self, state: dict[str, Tensor], error: Tensor) -> None:
        """See `ErrorFeedback`."""
        local(state["error"]).copy_(error)


class Quantized(ErrorFeedback):
    """The error in one byte an entry, and one number a line."""

    names: ClassVar[frozenset[str]] = frozenset({"error", "error_scale"})

    def empty(self, lines: Lines, dtype: torch.dtype) -> dict[str, Tensor]:
        """See `ErrorFeedback`."""
        return {"error": lines.zeros(lines.width, torch.int8), "error_scale": lines.zeros(1, dtype)}

    def recall(self, state: dict[str, Tensor]) -> Tensor | None:
        """See `ErrorFeedback`."""
        return local(state["error"]) * local(state["error_scale"])

    def keep(self, state: dict[str, Tensor], error: Tensor) -> None:
        """See `ErrorFeedback`."""
        levels, scales = quantize(error)
        local(state["error"]).copy_(levels)
        local(state["error_scale"]).copy_(scales)


ERROR_FEEDBACKS: dict[str, ErrorFeedback] = {"none": Forgotten(), "full": Exact(), "8bit": Quantized()}
