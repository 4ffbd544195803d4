"""An operator in the metric of an optimizer, against dense algebra."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from spectral_callbacks.linalg import Matrix
from spectral_callbacks.operators import ParameterSpace
from spectral_callbacks.probe import Preconditioned
from spectral_callbacks.stability import Edge
from tests.frames import Turned
from tests.problems import SPECTRA, Scaled, symmetric

SHAPES = {"first": (2, 3), "second": (4,), "third": (3, 2)}


def space_of_three() -> ParameterSpace:
    tensors = {name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    return ParameterSpace(nn.ParameterDict(tensors))


def framed_edges(*, ascends: bool = False) -> tuple[tuple[Edge, ...], Tensor]:
    """Return the edges of three parameters, of which the first and the last have frames; and Q, dense."""
    first, last = Turned((2, 3)), Turned((3, 2))
    D = [torch.rand(shape, dtype=torch.float64) for shape in SHAPES.values()]
    D[0][:, 1] = 0  # a part of the space in which the optimizer does not move
    edges = (
        Edge(0.1, 2.0, shift=0.3, weight_decay=0.2, preconditioner=D[0], frame=first, ascends=ascends),
        Edge(0.2, 38.0, preconditioner=D[1], ascends=ascends),
        Edge(0.3, 3.8, weight_decay=0.5, preconditioner=D[2], frame=last, ascends=ascends),
    )
    return edges, torch.block_diag(first.matrix, torch.eye(4, dtype=torch.float64), last.matrix)


def dense(A: Tensor, edges: tuple[Edge, ...], Q: Tensor) -> Tensor:
    """Return S Q (±A + weight decay) Qᵀ S + shift η / threshold."""

    def each(numbers: list[float]) -> Tensor:
        return torch.cat([torch.full((6, 4, 6)[i : i + 1], x, dtype=torch.float64) for i, x in enumerate(numbers)])

    weight = each([edge.learning_rate / edge.threshold for edge in edges])
    S = torch.diag(
        (
            torch.cat([edge.preconditioner.reshape(-1) for edge in edges if edge.preconditioner is not None]) * weight
        ).sqrt()
    )
    signed = -A if edges[0].ascends else A
    inside = signed + torch.diag(each([edge.weight_decay for edge in edges]))
    return S @ Q @ inside @ Q.T @ S + torch.diag(weight * each([edge.shift for edge in edges]))


def test_an_operator_is_seen_in_the_frame_of_each_parameter() -> None:
    torch.manual_seed(0)
    A = torch.randn(16, 16, dtype=torch.float64)
    A = A + A.T
    for ascends in (False, True):
        edges, Q = framed_edges(ascends=ascends)
        found = Preconditioned(Matrix(A), space_of_three(), edges).to_dense()
        torch.testing.assert_close(found, dense(A, edges, Q), rtol=1e-12, atol=1e-12)


def test_its_curvature_along_the_coordinates_of_a_gradient_is_that_along_the_optimizers_step() -> None:
    torch.manual_seed(1)
    A, g = torch.randn(16, 16, dtype=torch.float64), torch.randn(16, dtype=torch.float64)
    A = A + A.T
    frame = Turned((2, 3))
    D = torch.rand(2, 3, dtype=torch.float64)
    edges = (Edge(1.0, 1.0, preconditioner=D, frame=frame), Edge(1.0, 1.0), Edge(1.0, 1.0))
    metric = Preconditioned(Matrix(A), space_of_three(), edges)
    y = metric.coordinates(g)
    P = torch.block_diag(frame.matrix.T @ torch.diag(D.reshape(-1)) @ frame.matrix, torch.eye(10, dtype=torch.float64))
    torch.testing.assert_close(y @ y, g @ P @ g)
    torch.testing.assert_close(y @ metric.matmat(y[:, None])[:, 0], g @ P @ A @ P @ g)


def test_it_takes_the_inner_products_of_what_it_wraps() -> None:
    A = Scaled(symmetric(SPECTRA["positive"])[:16, :16], torch.linspace(1.0, 2.0, 16, dtype=torch.float64))
    X, Y = torch.randn(16, 2, dtype=torch.float64), torch.randn(16, 3, dtype=torch.float64)
    edges, _ = framed_edges()
    assert torch.equal(Preconditioned(A, space_of_three(), edges).gram(X, Y), A.gram(X, Y))
