from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_callbacks.operators import Hessian, Objective, ParameterSpace
from tests import oracles


class _Counter:
    """A loss, and how often it was evaluated."""

    def __init__(self, loss: Callable[[], Tensor]) -> None:
        self._loss = loss
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return self._loss()


def _regression(sizes: tuple[int, ...]) -> tuple[nn.Module, list[_Counter], Callable[[], Tensor]]:
    """A net, the mean losses of its batches, and the mean loss of all samples at once."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    X, Y = torch.randn(sum(sizes), 3, dtype=torch.float64), torch.randn(sum(sizes), 2, dtype=torch.float64)

    def mean(X: Tensor, Y: Tensor) -> Tensor:
        return F.mse_loss(module(X), Y)

    losses = [_Counter(functools.partial(mean, *pair)) for pair in zip(X.split(sizes), Y.split(sizes), strict=True)]
    return module, losses, functools.partial(mean, X, Y)


@pytest.mark.parametrize("keep_graphs", [True, False, None])
@pytest.mark.parametrize("sizes", [(12,), (6, 6), (8, 4), (9, 2, 1)])
def test_batches_weighted_by_their_size_are_the_full_batch(sizes: tuple[int, ...], keep_graphs: bool | None) -> None:
    module, losses, full = _regression(sizes)
    space = ParameterSpace(module)
    objective = Objective(space, losses, sizes, keep_graphs=keep_graphs)
    assert objective.loss() == pytest.approx(full().item(), rel=1e-14)
    torch.testing.assert_close(objective.gradient(), oracles.dense_gradient(full, space.tensors))
    torch.testing.assert_close(Hessian(objective).to_dense(), oracles.dense_hessian(full, space.tensors))


def test_ragged_batches_weighted_alike_are_not_the_full_batch() -> None:
    module, losses, full = _regression((8, 4))
    assert Objective(ParameterSpace(module), losses).loss() != pytest.approx(full().item(), rel=1e-3)


def test_only_the_ratio_of_the_weights_counts() -> None:
    module, losses, _ = _regression((8, 4))
    space = ParameterSpace(module)
    counts, shares = Objective(space, losses, [8, 4]), Objective(space, losses, [2 / 3, 1 / 3])
    assert counts.loss() == pytest.approx(shares.loss(), rel=1e-14)


def test_a_batch_of_weight_zero_has_no_part() -> None:
    module, losses, _ = _regression((8, 4))
    space = ParameterSpace(module)
    torch.testing.assert_close(Objective(space, losses, [1, 0]).gradient(), Objective(space, losses[:1]).gradient())


@pytest.mark.parametrize(
    ("num_losses", "weights", "message"),
    [
        (0, None, r"got 0 losses with weights \[\]; pass at least one loss, and one weight ≥ 0 for each"),
        (1, [1.0, 2.0], r"got 1 losses with weights \[1\.0, 2\.0\]"),
        (2, [1.0, -1.0], r"got 2 losses with weights \[1\.0, -1\.0\]"),
        (2, [0.0, 0.0], r"got 2 losses with weights \[0\.0, 0\.0\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(num_losses: int, weights: list[float] | None, message: str) -> None:
    module, losses, _ = _regression((8, 4))
    with pytest.raises(ValueError, match=message):
        Objective(ParameterSpace(module), losses[:num_losses], weights)


def test_a_loss_linear_in_the_parameters_has_no_curvature() -> None:
    module = nn.Linear(3, 1)
    X = torch.randn(4, 3)
    space = ParameterSpace(module)
    objective = Objective(space, [lambda: module(X).mean()])
    assert torch.equal(Hessian(objective).to_dense(), torch.zeros(4, 4))
    torch.testing.assert_close(objective.gradient(), torch.cat([X.mean(0), torch.ones(1)]))


def test_a_loss_linear_in_some_parameters_has_the_curvature_of_the_others() -> None:
    a, b = nn.Parameter(torch.tensor([2.0, 3.0])), nn.Parameter(torch.tensor([1.0]))
    space = ParameterSpace(nn.ParameterDict({"a": a, "b": b}))
    H = Hessian(Objective(space, [lambda: a.pow(3).sum() + 5 * b.sum()])).to_dense()
    assert torch.equal(H, torch.diag(torch.tensor([12.0, 18.0, 0.0])))


def test_a_loss_that_does_not_depend_on_the_parameters_has_no_derivatives() -> None:
    objective = Objective(ParameterSpace(nn.Linear(2, 1)), [lambda: torch.tensor(3.0)])
    assert objective.loss() == 3.0
    assert torch.equal(objective.gradient(), torch.zeros(3))
    assert torch.equal(Hessian(objective).to_dense(), torch.zeros(3, 3))


def test_one_batch_without_curvature_leaves_the_others_theirs() -> None:
    module = nn.Linear(1, 1, bias=False)
    losses: list[Callable[[], Tensor]] = [
        lambda: module.weight.square().sum(),
        lambda: module.weight.sum(),
        lambda: torch.tensor(1.0),
    ]
    torch.testing.assert_close(
        Hessian(Objective(ParameterSpace(module), losses, [1, 1, 2])).to_dense(), torch.tensor([[0.5]])
    )


def test_a_loss_of_one_element_is_a_scalar_and_one_of_more_is_refused() -> None:
    module = nn.Linear(2, 1, bias=False)
    space = ParameterSpace(module)
    assert Objective(space, [lambda: module(torch.ones(1, 2))]).gradient().tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match=r"the loss has shape \(3, 1\); return a scalar, for example loss\.mean\(\)\."):
        Objective(space, [lambda: module(torch.ones(3, 2))]).loss()


def _in_place(module: nn.Module) -> None:
    with torch.no_grad():
        next(module.parameters()).add_(1.0)


def _by_an_optimizer(module: nn.Module) -> None:
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    module.zero_grad()


def _by_another_tensor(module: nn.Module) -> None:
    p = next(module.parameters())
    p.data = p.detach() + 1.0


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("change", [_in_place, _by_an_optimizer, _by_another_tensor])
def test_products_on_stale_weights_are_refused(change: Callable[[nn.Module], None], keep_graphs: bool) -> None:
    module, losses, _ = _regression((6,))
    objective = Objective(ParameterSpace(module), losses, keep_graphs=keep_graphs)
    H, x = Hessian(objective), torch.ones(26, 1, dtype=torch.float64)
    H.matmat(x)
    objective.gradient()
    change(module)
    for use in (lambda: H.matmat(x), objective.gradient, objective.loss):
        with pytest.raises(
            RuntimeError, match=r"the parameters changed .* build a new objective \(or probe\) after every"
        ):
            use()


def test_weights_that_change_before_the_first_look_are_no_matter() -> None:
    module, losses, full = _regression((6,))
    objective = Objective(ParameterSpace(module), losses)
    _in_place(module)
    assert objective.loss() == pytest.approx(full().item(), rel=1e-14)


def test_graphs_are_built_once_for_all_products() -> None:
    module, losses, _ = _regression((8, 4))
    objective = Objective(ParameterSpace(module), losses, [8, 4], keep_graphs=True)
    for _ in range(3):
        Hessian(objective).matmat(torch.randn(26, 2, dtype=torch.float64))
    objective.loss()
    objective.gradient()
    assert objective.keeps_graphs
    assert [loss.calls for loss in losses] == [1, 1]


def test_graphs_that_are_not_kept_are_built_for_every_pass() -> None:
    module, losses, _ = _regression((8, 4))
    objective = Objective(ParameterSpace(module), losses, [8, 4], keep_graphs=False)
    objective.loss()
    objective.gradient()  # of the same pass
    for _ in range(3):
        Hessian(objective).matmat(torch.randn(26, 2, dtype=torch.float64))
    assert not objective.keeps_graphs
    assert [loss.calls for loss in losses] == [4, 4]


def _free(monkeypatch: pytest.MonkeyPatch, readings: Iterator[int | None]) -> None:
    monkeypatch.setattr("spectral_callbacks.operators.graphs.free_bytes", lambda device: next(readings))


def test_graphs_are_kept_where_memory_is_plenty_or_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    for readings in (itertools.count(10**12, -(10**6)), itertools.repeat(None)):
        _free(monkeypatch, readings)
        module, losses, _ = _regression((8, 4))
        objective = Objective(ParameterSpace(module), losses)
        for _ in range(2):
            Hessian(objective).matmat(torch.ones(26, 1, dtype=torch.float64))
        assert objective.keeps_graphs
        assert [loss.calls for loss in losses] == [1, 1]


@pytest.mark.parametrize("short_after", [1, 2, 3])
def test_graphs_are_dropped_as_soon_as_less_is_free_than_one_more_takes(
    monkeypatch: pytest.MonkeyPatch, short_after: int
) -> None:
    """A batch takes 100 MB; less than that is left after some batch, and from then on nothing is kept."""
    left = 10**8 * (short_after + 1) - 10**7  # before the first batch
    _free(monkeypatch, (left - 10**8 * (i // 2 + i % 2) for i in itertools.count()))
    module, losses, full = _regression((6, 3, 2, 1))
    space = ParameterSpace(module)
    objective = Objective(space, losses, [6, 3, 2, 1])
    X = torch.randn(26, 2, dtype=torch.float64)
    expected = oracles.dense_hessian(full, space.tensors) @ X
    for products in range(1, 4):
        torch.testing.assert_close(Hessian(objective).matmat(X), expected)
        assert not objective.keeps_graphs
        assert [loss.calls for loss in losses] == [products] * 4


def test_an_objective_touches_no_grad_field() -> None:
    module, losses, _ = _regression((6,))
    given = [torch.full_like(p, 7.0) for p in module.parameters()]
    for p, g in zip(module.parameters(), given, strict=True):
        p.grad = g
    objective = Objective(ParameterSpace(module), losses)
    objective.gradient()
    Hessian(objective).matmat(torch.ones(26, 1, dtype=torch.float64))
    for p, g in zip(module.parameters(), given, strict=True):
        assert p.grad is g
        assert (g == 7).all()


def test_it_works_where_gradients_are_switched_off() -> None:
    module, losses, full = _regression((6,))
    with torch.no_grad():
        objective = Objective(ParameterSpace(module), losses)
        gradient, product = objective.gradient(), Hessian(objective).matmat(torch.ones(26, 1, dtype=torch.float64))
    assert not gradient.requires_grad
    assert not product.requires_grad
    torch.testing.assert_close(gradient, oracles.dense_gradient(full, tuple(module.parameters())))
