from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.optim import DCTAdamW
from spectral_callbacks.stability import Edge, Frame, NotSteppedYetError, edges
from tests.optim import dct_oracle


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _steps(optimizer: torch.optim.Optimizer, steps: range) -> None:
    [w] = optimizer.param_groups[0]["params"]
    for t in steps:
        w.grad = _normal(*w.shape, seed=t)
        optimizer.step()


def _metric(edge: Edge, shape: tuple[int, ...]) -> Tensor:  # (n, n)
    """D, one column at a time."""
    frame, diagonal = edge.frame, edge.preconditioner
    assert isinstance(frame, Frame)
    assert diagonal is not None
    n = diagonal.numel()
    units = torch.eye(n, dtype=torch.float64).reshape(n, *shape)
    return torch.stack([frame.synthesize(diagonal * frame.analyze(e)).flatten() for e in units], dim=1)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (3, 2, 1, 2)])
def test_the_metric_is_what_turns_the_mean_gradient_into_the_step(shape: tuple[int, ...]) -> None:
    """With columns of different ages: Δw = -η D m, where m lies in the selected columns."""
    w = nn.Parameter(_normal(*shape))
    optimizer = DCTAdamW([w], lr=0.1, betas=(0.8, 0.9), weight_decay=0.0, rank=2)
    _steps(optimizer, range(8))
    before = w.detach().clone()
    _steps(optimizer, range(8, 9))
    assert len(set(optimizer.state[w]["ages"].tolist())) == 2
    [[edge]] = edges(optimizer)
    state = optimizer.state[w]
    width = min(shape[0], w.numel() // shape[0])
    m = state["exp_avg"] @ torch.from_numpy(dct_oracle.cosines(width))[:, state["columns"].long()].T
    m = m if shape[0] >= w.numel() // shape[0] else m.T
    step = -edge.learning_rate * _metric(edge, shape) @ m.flatten()
    torch.testing.assert_close((w.detach() - before).flatten(), step, rtol=0, atol=1e-13)
    assert edge.learning_rate == pytest.approx(0.1 / (1 - 0.8 ** int(state["ages"].max())))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (3, 2, 1, 2), (4, 3)])
def test_a_frame_is_orthogonal(shape: tuple[int, ...]) -> None:
    w = nn.Parameter(_normal(*shape))
    optimizer = DCTAdamW([w])
    _steps(optimizer, range(1))
    frame = edges(optimizer)[0][0].frame
    assert frame is not None
    X, Y = _normal(*shape, seed=1), _normal(*shape, seed=2)
    assert frame.analyze(X).shape == X.shape
    torch.testing.assert_close(frame.synthesize(frame.analyze(X)), X, rtol=0, atol=1e-14)
    torch.testing.assert_close((frame.analyze(X) * Y).sum(), (X * frame.synthesize(Y)).sum(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
def test_the_edge_is_where_the_recursion_with_frozen_columns_starts_to_grow(beta: float, weight_decay: float) -> None:
    """Bisection on the learning rate of m' = b m + (1 - b) H w, w' = w - η (c D m' + wd w)."""
    w = nn.Parameter(_normal(4, 3))
    optimizer = DCTAdamW([w], lr=0.1, betas=(beta, 0.99), weight_decay=weight_decay, rank=2)
    _steps(optimizer, range(6))
    root = _normal(12, 12, seed=9)
    H = root @ root.T
    [[edge]] = edges(optimizer)
    D, c = _metric(edge, (4, 3)), edge.learning_rate / 0.1
    eye = torch.eye(12, dtype=torch.float64)

    def grows(lr: float) -> bool:
        m = torch.cat([beta * eye, (1 - beta) * H], dim=1)
        moved = torch.cat([0 * eye, (1 - lr * weight_decay) * eye], dim=1) - lr * c * D @ m
        return bool(torch.linalg.eigvals(torch.cat([m, moved])).abs().max() > 1 + 1e-12)

    low, high = 0.0, 1e3
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if grows(middle) else (middle, high)
    frame, diagonal = edge.frame, edge.preconditioner
    assert frame is not None
    assert diagonal is not None
    Q = torch.stack([frame.analyze(e).flatten() for e in eye.reshape(12, 4, 3)], dim=1)
    root_d = diagonal.flatten().sqrt()
    curvature = torch.linalg.eigvalsh(root_d[:, None] * (Q @ H @ Q.T) * root_d).max()
    at_the_edge = Edge(low * c, edge.threshold, edge.shift)
    assert at_the_edge.ratio(float(curvature)) == pytest.approx(1, abs=1e-9)


def test_the_metric_is_zero_on_columns_that_are_not_selected() -> None:
    w = nn.Parameter(_normal(5, 4))
    optimizer = DCTAdamW([w], rank=1)
    _steps(optimizer, range(3))
    diagonal = edges(optimizer)[0][0].preconditioner
    assert diagonal is not None
    assert diagonal.any(dim=0).nonzero().flatten().tolist() == optimizer.state[w]["columns"].tolist()


def test_edges_of_what_is_no_matrix_are_adamws() -> None:
    ours, theirs = nn.Parameter(_normal(3)), nn.Parameter(_normal(3))
    optimizer, reference = DCTAdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for each in (optimizer, reference):
        _steps(each, range(3))
    [[edge]], [[other]] = edges(optimizer), edges(reference)
    assert edge == other
    assert edge.preconditioner is not None
    assert other.preconditioner is not None
    assert torch.equal(edge.preconditioner, other.preconditioner)


def test_there_is_no_edge_before_the_first_step() -> None:
    with pytest.raises(NotSteppedYetError):
        edges(DCTAdamW([nn.Parameter(_normal(4, 3))]))
