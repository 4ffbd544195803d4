"""An orthogonal change of coordinates of one parameter, in which an optimizer's metric is diagonal."""

from __future__ import annotations

import abc

from torch import Tensor


class Frame(abc.ABC):
    """An orthogonal map of tensors of one parameter's shape onto tensors of the same shape.

    An optimizer that works in other coordinates than the parameter's entries has the metric D = Qᵀ diag(d) Q, with Q
    `analyze`, Qᵀ `synthesize`, and d of the parameter's shape.
    """

    @abc.abstractmethod
    def analyze(
        self,
        tensor: Tensor,  # the parameter's shape
    ) -> Tensor:  # the same
        """Return the coordinates of a tensor, Q t: of the same norm."""

    @abc.abstractmethod
    def synthesize(
        self,
        tensor: Tensor,  # the parameter's shape
    ) -> Tensor:  # the same
        """Return the tensor with these coordinates, Qᵀ t: the inverse of `analyze`, and its adjoint."""
