"""The metric of an optimizer: where its edge of stability lies at eigenvalue 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spectral_callbacks.linalg import DiagonalCongruence, LinearOperator
from spectral_callbacks.operators import ParameterSpace
from spectral_callbacks.stability import Edge


def in_metric(A: LinearOperator, space: ParameterSpace, edges: Sequence[Edge]) -> DiagonalCongruence:  # (n, n)
    """Return S (A + weight decay) S + shift η / threshold, S = (P η / threshold)^½ with the preconditioner P.

    Each parameter with the edge of its own group; of -A under an optimizer that climbs.

    Args:
        A: (n, n), on parameter space.
        space: The parameters.
        edges: Of each of them.
    """
    preconditioners = [
        torch.ones_like(p) if edge.preconditioner is None else edge.preconditioner
        for p, edge in zip(space.tensors, edges, strict=True)
    ]
    metric = space.flatten(preconditioners) * space.broadcast([edge.weight for edge in edges])
    decay = space.broadcast([edge.weight_decay for edge in edges])
    shift = space.broadcast([edge.weight * edge.shift for edge in edges])
    return DiagonalCongruence(A, scale=metric.sqrt(), shift=metric * decay + shift, negative=edges[0].ascends)
