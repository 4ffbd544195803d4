from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_callbacks.operators.gauss_newton import GaussNewton
from spectral_callbacks.operators.outputs import Cut, OutputObjective
from spectral_callbacks.operators.parameters import ParameterSpace
from tests.operators.dense import jacobian


def cut_of(outputs: tuple[Tensor, ...], loss: Callable[..., Tensor]) -> Cut:
    leaves = tuple(z.detach().requires_grad_() for z in outputs)
    return Cut(outputs, leaves, loss(*leaves))


class Counter:
    """A batch of a regression, and how often it was evaluated."""

    def __init__(self, module: nn.Module, X: Tensor, Y: Tensor) -> None:
        self._module, self._X, self._Y = module, X, Y
        self.calls = 0

    def __call__(self) -> Cut:
        self.calls += 1
        return cut_of((self._module(self._X),), lambda z: F.mse_loss(z, self._Y))


def regression(*sizes: int) -> tuple[nn.Module, list[Counter]]:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batches = [(torch.randn(n, 3).double(), torch.randn(n, 2).double()) for n in sizes]
    return module, [Counter(module, *batch) for batch in batches]


def squared(module: nn.Module, X: Tensor) -> Tensor:
    """Of the mean squared error: (2/m) Jᵀ J over all m outputs."""
    J = jacobian(module(X), list(module.parameters()))
    return 2 * J.mT @ J / len(J)


@pytest.mark.parametrize("keep_graphs", [True, False, None])
@pytest.mark.parametrize("sizes", [(12,), (6, 6), (8, 4), (9, 2, 1)])
def test_batches_weighted_by_their_size_are_the_full_batch(sizes: tuple[int, ...], keep_graphs: bool | None) -> None:
    module, cuts = regression(*sizes)
    objective = OutputObjective(ParameterSpace(module), cuts, sizes, keep_graphs=keep_graphs)
    X = torch.cat([cut._X for cut in cuts])
    torch.testing.assert_close(GaussNewton(objective).to_dense(), squared(module, X))
    assert objective.weights == tuple(n / sum(sizes) for n in sizes)


@pytest.mark.parametrize(("keep_graphs", "passes"), [(True, 1), (False, 3)])
def test_graphs_are_built_once_or_for_every_pass(keep_graphs: bool, passes: int) -> None:
    module, cuts = regression(8, 4)
    G = GaussNewton(OutputObjective(ParameterSpace(module), cuts, [8, 4], keep_graphs=keep_graphs))
    for _ in range(3):
        G.matmat(torch.randn(26, 2, dtype=torch.float64))
    assert [cut.calls for cut in cuts] == [passes, passes]


def test_graphs_are_dropped_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each batch takes 100 MB, and less than that is left after the second."""
    free = (10**8 * 3 - 10**7 - 10**8 * (i // 2 + i % 2) for i in itertools.count())
    monkeypatch.setattr("spectral_callbacks.operators.graphs.free_bytes", lambda device: next(free))
    module, cuts = regression(4, 4, 4)
    objective = OutputObjective(ParameterSpace(module), cuts)
    G = GaussNewton(objective)
    X = torch.randn(26, 1, dtype=torch.float64)
    products = [G.matmat(X) for _ in range(2)]
    assert not objective.keeps_graphs
    assert [cut.calls for cut in cuts] == [2, 2, 2]
    torch.testing.assert_close(products[0], squared(module, torch.cat([cut._X for cut in cuts])) @ X)
    assert torch.equal(products[0], products[1])


def test_weights_that_do_not_fit_are_refused() -> None:
    module, cuts = regression(4)
    with pytest.raises(ValueError, match=r"got 1 losses with weights \[1\.0, 2\.0\]; pass at least one loss"):
        OutputObjective(ParameterSpace(module), cuts, [1.0, 2.0])


def test_products_on_stale_weights_are_refused() -> None:
    module, cuts = regression(4)
    G = GaussNewton(OutputObjective(ParameterSpace(module), cuts))
    x = torch.ones(26, 1, dtype=torch.float64)
    G.matmat(x)
    with torch.no_grad():
        next(module.parameters()).add_(1)
    for use in (lambda: G.matmat(x), lambda: G.jvp(x[:, 0])):
        with pytest.raises(RuntimeError, match="the parameters changed since"):
            use()


def test_a_loss_that_is_no_number_is_refused() -> None:
    module = nn.Linear(2, 3)
    objective = OutputObjective(ParameterSpace(module), [lambda: cut_of((module(torch.ones(1, 2)),), torch.square)])
    with pytest.raises(ValueError, match=r"the loss has shape \(1, 3\); return a scalar, for example loss\.mean\(\)\."):
        next(objective.graphs())


def test_outputs_that_feed_the_next_call_are_refused() -> None:
    module = nn.Linear(2, 2)

    def recurrent() -> Cut:
        first = module(torch.ones(1, 2))
        leaf = first.detach().requires_grad_()
        second = module(leaf)
        other = second.detach().requires_grad_()
        return Cut((first, second), (leaf, other), other.square().sum())

    objective = OutputObjective(ParameterSpace(module), [recurrent], source="outputs='cell'")
    with pytest.raises(ValueError, match="an output of outputs='cell' is the input of its next call"):
        next(objective.graphs())


def test_outputs_of_several_shapes_couple_through_the_loss() -> None:
    """Of (Σ a + Σ b)²/2 the curvature is all ones, also across the two outputs."""
    module = nn.Linear(2, 3, bias=False).double()
    X, Y = torch.randn(4, 2).double(), torch.randn(2, 5, 2).double()
    constant = torch.ones(2).double()  # an output that no parameter reaches

    def both() -> Cut:
        return cut_of((module(X), module(Y), constant), lambda *z: sum((t.sum() for t in z), constant[0]).square() / 2)

    G = GaussNewton(OutputObjective(ParameterSpace(module), [both]))
    total = (X.sum(0) + Y.sum((0, 1))).repeat(3)
    torch.testing.assert_close(G.to_dense(), torch.outer(total, total))
    ((a, b, c),) = G.jvp(torch.ones(6).double())
    assert (a.shape, b.shape, c.shape) == ((4, 3), (2, 5, 3), (2,))
    assert not c.any()
    ((u, v, w),) = G.output_curvature([[a, b, c]])
    for t, z in ((u, a), (v, b), (w, c)):
        torch.testing.assert_close(t, torch.full_like(z, (a.sum() + b.sum()).item()))


def test_the_two_halves_of_a_product_are_those_of_autograd() -> None:
    module, cuts = regression(5, 3)
    space = ParameterSpace(module)
    G = GaussNewton(OutputObjective(space, cuts, [5, 3]))
    v = torch.randn(space.size, dtype=torch.float64)
    for cut, (pushed,), (curved,) in zip(cuts, G.jvp(v), G.output_curvature(G.jvp(v)), strict=True):
        expected = jacobian(module(cut._X), space.tensors) @ v
        torch.testing.assert_close(pushed, expected.view(pushed.shape))
        torch.testing.assert_close(curved, 2 * pushed / pushed.numel())


@pytest.mark.parametrize("loss", [lambda z: 3 * z.sum(), lambda z: torch.ones(())])
def test_a_loss_linear_in_the_outputs_is_known_by_its_curvature(loss: Callable[[Tensor], Tensor]) -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
    G = GaussNewton(OutputObjective(ParameterSpace(module), [lambda: cut_of((module(torch.ones(4, 2)),), loss)]))
    assert not G.output_curvature([(torch.ones(4, 1),)])[0][0].any()
    with pytest.raises(ValueError, match="the loss has no curvature in the outputs of the model"):
        G.to_dense()


def test_outputs_that_no_parameter_reaches_have_no_jacobian() -> None:
    module = nn.Linear(2, 1)
    constant = torch.ones(3)
    cut = functools.partial(cut_of, (constant,), lambda z: z.square().sum())
    G = GaussNewton(OutputObjective(ParameterSpace(module), [cut]))
    assert not G.to_dense().any()
    assert not G.jvp(torch.ones(3))[0][0].any()


def test_it_touches_no_grad_field_and_works_where_gradients_are_switched_off() -> None:
    module, cuts = regression(6)
    given = [torch.full_like(p, 7.0) for p in module.parameters()]
    for p, g in zip(module.parameters(), given, strict=True):
        p.grad = g
    with torch.no_grad():
        G = GaussNewton(OutputObjective(ParameterSpace(module), cuts))
        product = G.matmat(torch.ones(26, 1, dtype=torch.float64))
    assert not product.requires_grad
    for p, g in zip(module.parameters(), given, strict=True):
        assert p.grad is g
        assert (g == 7).all()
