"""The metric of an optimizer: where its edge of stability lies at eigenvalue 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectral_callbacks.linalg import LinearOperator
from spectral_callbacks.operators import ParameterSpace
from spectral_callbacks.stability import Edge, Frame


class Preconditioned(LinearOperator):
    """S Q (A + weight decay) Qᵀ S + shift η / threshold, S = (P η / threshold)^½ with the preconditioner P.

    Q takes each parameter to the frame in which its preconditioner is diagonal, most often as it is. Each parameter
    with the edge of its own group; of -A under an optimizer that climbs.

    Args:
        A: Symmetric, (n, n), on parameter space.
        space: The parameters.
        edges: Of each of them.

    Attributes:
        shift: What is added to the diagonal, (n,).
    """

    def __init__(self, A: LinearOperator, space: ParameterSpace, edges: Sequence[Edge]) -> None:
        self._rotation = _Rotation(space, [edge.frame for edge in edges])
        preconditioners = [
            torch.ones_like(p) if edge.preconditioner is None else edge.preconditioner
            for p, edge in zip(space.tensors, edges, strict=True)
        ]
        metric = space.flatten(preconditioners) * space.broadcast([edge.weight for edge in edges])
        decay = space.broadcast([edge.weight_decay for edge in edges])
        self.shift = metric * decay + space.broadcast([edge.weight * edge.shift for edge in edges])
        self._scale = metric.sqrt()
        self._sign = -1 if edges[0].ascends else 1
        self._A = A
        self.shape = A.shape
        self.dtype = A.dtype
        self.device = A.device

    def coordinates(
        self,
        gradient: Tensor,  # (n,)
    ) -> Tensor:  # (n,)
        """Return S Q g: the vector along which this operator sees what A sees along the optimizer's step P g."""
        return self._scale * self._rotation.analyze(gradient[:, None])[:, 0]

    def matmat(self, X: Tensor) -> Tensor:
        """Return the product, at the cost of one product with A."""
        scale = self._scale[:, None]
        product = self._rotation.analyze(self._A.matmat(self._rotation.synthesize(scale * X)))
        return self._sign * scale * product + self.shift[:, None] * X

    def gram(self, X: Tensor, Y: Tensor) -> Tensor:
        """Return the inner products as A takes them."""
        return self._A.gram(X, Y)


class _Rotation:
    """Q: the vectors of parameter space, parameter by parameter, in the frames of their preconditioners."""

    def __init__(self, space: ParameterSpace, frames: Sequence[Frame | None]) -> None:
        self._framed = [
            (place, p.shape, frame)
            for p, place, frame in zip(space.tensors, space.slices.values(), frames, strict=True)
            if frame is not None
        ]

    def analyze(self, X: Tensor) -> Tensor:
        return self._each(X, lambda frame: frame.analyze)

    def synthesize(self, X: Tensor) -> Tensor:
        return self._each(X, lambda frame: frame.synthesize)

    def _each(self, X: Tensor, way: Callable[[Frame], Callable[[Tensor], Tensor]]) -> Tensor:
        if not self._framed:
            return X
        X = X.clone()
        for place, shape, frame in self._framed:
            for column in X[place].T:
                column.copy_(way(frame)(column.reshape(shape)).reshape(-1))
        return X
