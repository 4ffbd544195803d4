"""An orthogonal change of coordinates of one parameter, in which an optimizer's metric is diagonal."""

from __future__ import annotations

import abc

from torch import Tensor


class Frame(abc.ABC):
    """An orthogonal map of tensors of one parameter's shape onto tensors of the same shape.

    An optimizer that works in other coordinates than the parameter's entries has the metric
    ``D = synthesize ∘ diag(d) ∘ analyze``, where ``d`` has the parameter's shape.
    """

    @abc.abstractmethod
    def analyze(self, tensor: Tensor) -> Tensor:
        """The coordinates of ``tensor``: same shape, same norm."""

    @abc.abstractmethod
    def synthesize(self, tensor: Tensor) -> Tensor:
        """The tensor with the coordinates ``tensor``: the inverse, and the adjoint, of `analyze`."""
