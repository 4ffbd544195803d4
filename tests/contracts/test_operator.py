"""What every linear operator of the package promises."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

import spectral_callbacks
from spectral_callbacks.linalg import LinearOperator, Matrix
from spectral_callbacks.linalg.subspace import Complement, Normalized
from spectral_callbacks.linalg.watched import Watched
from spectral_callbacks.operators import (
    Cut,
    EmpiricalFisher,
    Factors,
    FactorStream,
    GaussNewton,
    GradientCovarianceOperator,
    Hessian,
    Objective,
    OutputGraph,
    OutputObjective,
    ParameterSpace,
    SampleGradients,
    find_uses,
    visit,
)
from spectral_callbacks.operators.gauss_newton import OutputCurvature
from spectral_callbacks.operators.layout import Layout
from spectral_callbacks.operators.outputs import slopes_of
from spectral_callbacks.probe import Preconditioned
from spectral_callbacks.stability import Edge
from tests import oracles, problems
from tests.frames import Turned
from tests.operators.dense import dense_gauss_newton

FLOATS = (torch.float32, torch.float64)


@dataclasses.dataclass(frozen=True)
class Case:
    """An operator, the same matrix from an oracle, and what it must leave alone."""

    operator: LinearOperator
    dense: Tensor  # float64
    symmetric: bool = True
    parameters: tuple[nn.Parameter, ...] = ()


def _matrix(dtype: torch.dtype) -> Case:
    B = torch.randn(7, 4, dtype=torch.float64)
    return Case(Matrix(B.to(dtype)), B.to(dtype).double(), symmetric=False)


def _symmetric_matrix(dtype: torch.dtype) -> Case:
    A = problems.symmetric(problems.SPECTRA["indefinite"]).to(dtype)
    return Case(Matrix(A), A.double())


def _preconditioned(dtype: torch.dtype) -> Case:
    A = problems.symmetric(problems.SPECTRA["indefinite"])
    parameters = nn.ParameterDict({"one": nn.Parameter(torch.zeros(len(A) - 6, dtype=dtype))})
    parameters["two"] = nn.Parameter(torch.zeros(2, 3, dtype=dtype))
    frame, D, shift = Turned((2, 3)), torch.rand(2, 3, dtype=torch.float64), 0.5
    edges = (Edge(0.5, 2.0, shift=shift), Edge(0.1, 3.8, preconditioner=D, frame=frame))
    Q = torch.block_diag(torch.eye(len(A) - 6, dtype=torch.float64), frame.matrix)
    weight = torch.cat([torch.full((len(A) - 6,), 0.25), torch.full((6,), 0.1 / 3.8, dtype=torch.float64)])
    S = torch.cat([torch.ones(len(A) - 6), D.reshape(-1)]).mul(weight).sqrt()
    dense = S[:, None] * (Q @ A @ Q.T) * S
    dense.diagonal()[: len(A) - 6] += 0.25 * shift
    return Case(Preconditioned(Matrix(A.to(dtype)), ParameterSpace(parameters), edges), dense)


def _complement(dtype: torch.dtype) -> Case:
    A = problems.symmetric(problems.SPECTRA["indefinite"])
    X, _ = torch.linalg.qr(torch.randn(len(A), 3, dtype=torch.float64))
    P = torch.eye(len(A), dtype=torch.float64) - X @ X.mT
    return Case(Complement(Matrix(A.to(dtype)), X.to(dtype)), P @ A @ P)


def _watched(dtype: torch.dtype) -> Case:
    A = problems.symmetric(problems.SPECTRA["indefinite"])
    return Case(Watched(Matrix(A.to(dtype))), A)


def _normalized(dtype: torch.dtype) -> Case:
    A = problems.symmetric(problems.SPECTRA["indefinite"])
    operator = Normalized(Matrix(A.to(dtype)))
    operator.matmat(torch.ones(len(A), 1, dtype=dtype))  # whose size is the unit
    return Case(operator, A / operator.unit)


def _curvature_at_layer(dtype: torch.dtype) -> Case:
    module, B = nn.Linear(3, 2).to(dtype), problems.symmetric(torch.tensor([3.0, 2.0, 1.0, 0.5]))

    def cut() -> Cut:
        outputs = module(torch.ones(2, 3, dtype=dtype))
        leaf = outputs.detach().requires_grad_()
        return Cut((outputs,), (leaf,), leaf.flatten() @ (B.to(dtype) @ leaf.flatten()) / 2)

    [curvature] = GaussNewton(OutputObjective(ParameterSpace(module), [cut])).output_curvatures()
    return Case(curvature, B)


def _hessian(dtype: torch.dtype, *, keep_graphs: bool = True) -> Case:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    both = nn.ModuleDict({"module": module, "unused": nn.ParameterList([unused])})
    X = torch.randn(6, 3, dtype=torch.float64)
    weights = (2 / 3, 1 / 3)

    def losses() -> list[Callable[[], Tensor]]:
        return [lambda batch=batch: module(batch.to(dtype_now())).square().sin().mean() for batch in X.split([4, 2])]

    def dtype_now() -> torch.dtype:
        return next(module.parameters()).dtype

    def full() -> Tensor:
        return torch.stack([w * loss() for w, loss in zip(weights, losses(), strict=True)]).sum()

    dense = oracles.dense_hessian(full, list(both.parameters()))
    both.to(dtype)
    objective = Objective(ParameterSpace(both), losses(), weights, keep_graphs=keep_graphs)
    return Case(Hessian(objective), dense, parameters=tuple(both.parameters()))


def _gauss_newton(dtype: torch.dtype, *, keep_graphs: bool = True) -> Case:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    both = nn.ModuleDict({"module": module, "unused": nn.ParameterList([unused])})
    batches = torch.randn(6, 3, dtype=torch.float64).split([4, 2])
    weights = (2 / 3, 1 / 3)

    def loss(z: Tensor) -> Tensor:
        return z.logsumexp(1).square().mean() + z.exp().mean()

    def cut(batch: Tensor) -> Cut:
        outputs = module(batch.to(next(module.parameters()).dtype))
        leaf = outputs.detach().requires_grad_()
        return Cut((outputs,), (leaf,), loss(leaf))

    parameters = list(both.parameters())
    parts = [w * dense_gauss_newton(module(X), loss, parameters) for w, X in zip(weights, batches, strict=True)]
    both.to(dtype)
    cuts = [functools.partial(cut, batch) for batch in batches]
    objective = OutputObjective(ParameterSpace(both), cuts, weights, keep_graphs=keep_graphs)
    return Case(GaussNewton(objective), torch.stack(parts).sum(0), parameters=tuple(both.parameters()))


def _output_curvature(dtype: torch.dtype) -> Case:
    A = problems.symmetric(problems.SPECTRA["indefinite"])[:8, :8]
    first, second = torch.randn(2, 3, dtype=dtype, requires_grad=True), torch.randn(2, dtype=dtype, requires_grad=True)
    z = torch.cat([first.reshape(-1), second])
    cut = Cut((), (first, second), z @ (A.to(dtype) @ z) / 2)
    graph = OutputGraph(1.0, (), cut, slopes_of(cut), (), ())
    return Case(OutputCurvature(graph), A)


def _sample_gradients(dtype: torch.dtype) -> tuple[SampleGradients, Tensor, tuple[nn.Parameter, ...]]:
    """The gradients of four and two samples by a network and a parameter that it does not use, and their rows."""
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    both = nn.ModuleDict({"module": module, "unused": nn.ParameterList([unused])})
    X, parameters = torch.randn(6, 3, dtype=torch.float64), tuple(both.parameters())

    def loss(batch: Tensor) -> Tensor:
        return module(batch.to(parameters[0].dtype)).square().sin().sum(1).mean()

    def rows(x: Tensor) -> Tensor:
        found = torch.autograd.grad(loss(x[None]), parameters, allow_unused=True, materialize_grads=True)
        return torch.cat([g.reshape(-1) for g in found])

    G = torch.stack([rows(x) for x in X])
    both.to(dtype)
    space = ParameterSpace(both)

    def factors(batch: Tensor) -> Factors:
        found: Factors = []
        value = loss(batch)
        uses = find_uses(value, space.tensors)
        N = len(batch)
        stream = FactorStream(uses.uses, [Layout(1, 1)] * len(uses.uses), N, N, lambda p, f: found.append((p, f)))
        visit(value, uses, stream.see)
        return found

    batches = [functools.partial(factors, batch) for batch in X.split([4, 2])]
    return SampleGradients(space, batches, [4, 2]), G, tuple(both.parameters())


def _empirical_fisher(dtype: torch.dtype) -> Case:
    gradients, G, parameters = _sample_gradients(dtype)
    return Case(EmpiricalFisher(gradients), G.mT @ G / 6, parameters=parameters)


def _gradient_covariance(dtype: torch.dtype) -> Case:
    gradients, G, parameters = _sample_gradients(dtype)
    return Case(GradientCovarianceOperator(gradients), torch.cov(G.mT, correction=0), parameters=parameters)


OPERATORS: dict[str, tuple[type[LinearOperator], Callable[[torch.dtype], Case]]] = {
    "Matrix": (Matrix, _matrix),
    "Matrix, symmetric": (Matrix, _symmetric_matrix),
    "Preconditioned": (Preconditioned, _preconditioned),
    "Complement": (Complement, _complement),
    "Normalized": (Normalized, _normalized),
    "Watched": (Watched, _watched),
    "OutputCurvature, of a Gauss-Newton matrix": (OutputCurvature, _curvature_at_layer),
    "Hessian": (Hessian, _hessian),
    "Hessian, graphs not kept": (Hessian, lambda dtype: _hessian(dtype, keep_graphs=False)),
    "GaussNewton": (GaussNewton, _gauss_newton),
    "GaussNewton, graphs not kept": (GaussNewton, lambda dtype: _gauss_newton(dtype, keep_graphs=False)),
    "OutputCurvature": (OutputCurvature, _output_curvature),
    "EmpiricalFisher": (EmpiricalFisher, _empirical_fisher),
    "GradientCovarianceOperator": (GradientCovarianceOperator, _gradient_covariance),
}


def _broken_promises(case: Case, dtype: torch.dtype) -> list[str]:
    """Of an operator as a linear map; `dtype` is that of its vectors."""
    A, (m, n) = case.operator, case.operator.shape
    X, Y = torch.randn(2, n, 3, dtype=dtype)
    tolerance = 50 * torch.finfo(dtype).eps * case.dense.abs().sum(dim=1).max().item()
    X_before, AX = X.clone(), A.matmat(X)
    one_by_one = torch.cat([A.matmat(x[:, None]) for x in X.unbind(dim=1)], dim=1)

    def close(first: Tensor, second: Tensor) -> bool:
        return first.shape == second.shape and bool(((first.double() - second.double()).abs() <= tolerance).all())

    promises = {
        "shape": lambda: AX.shape == (m, 3) and case.dense.shape == (m, n),
        "dtype": lambda: AX.dtype == A.dtype == dtype,
        "device": lambda: AX.device == A.device == X.device,
        "no graph": lambda: not AX.requires_grad,
        "argument left alone": lambda: torch.equal(X, X_before),
        "repeatable": lambda: torch.equal(AX, A.matmat(X)),
        "linear": lambda: close(A.matmat(2 * X - 3 * Y), 2 * AX - 3 * A.matmat(Y)),
        "zero": lambda: not A.matmat(torch.zeros_like(X)).any(),
        "block is its columns": lambda: close(AX, one_by_one),
        "equals the oracle": lambda: close(A.to_dense(), case.dense),
        "any layout": lambda: close(A.matmat(X.mT.contiguous().mT), AX) and close(A.matmat(X[:, ::2]), AX[:, ::2]),
        "no column": lambda: A.matmat(X[:, :0]).shape == (m, 0),
        "symmetric": lambda: not case.symmetric or close(A.gram(Y, AX) / n, A.gram(A.matmat(Y), X) / n),
        "gram": lambda: close(A.gram(X, Y), X.mT @ Y),
    }

    def kept(promise: Callable[[], bool]) -> bool:
        try:
            return promise()
        except RuntimeError:
            return False

    return [name for name, promise in promises.items() if not kept(promise)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_keeps_its_promises(name: str, dtype: torch.dtype) -> None:
    kind, build = OPERATORS[name]
    case = build(dtype)
    assert type(case.operator) is kind
    assert not _broken_promises(case, dtype)


@pytest.mark.parametrize("name", OPERATORS)
def test_products_touch_neither_gradients_nor_global_random_numbers(name: str) -> None:
    case = OPERATORS[name][1](torch.float32)
    given = [torch.full_like(p, 7.0) for p in case.parameters]
    values = [p.detach().clone() for p in case.parameters]
    for p, g in zip(case.parameters, given, strict=True):
        p.grad = g
    before = oracles.global_random_state()
    case.operator.matmat(torch.ones(case.operator.shape[1], 2))
    assert oracles.global_random_state() == before
    for p, g, value in zip(case.parameters, given, values, strict=True):
        assert p.grad is g
        assert (g == 7).all()
        assert torch.equal(p, value)
        assert p.requires_grad


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (lambda A, X: A @ X + 1e-3, "linear"),
        (lambda A, X: A @ X.abs(), "linear"),
        (lambda A, X: A @ X + 1e-6, "zero"),
        (lambda A, X: A @ X + X.flip(1) * (X.shape[1] > 1), "block is its columns"),
        (lambda A, X: 1.0001 * (A @ X), "equals the oracle"),
        (lambda A, X: A.triu() @ X, "symmetric"),
        (lambda A, X: (A @ X).float(), "dtype"),
        (lambda A, X: A.clone().requires_grad_() @ X, "no graph"),
        (lambda A, X: A @ X.mul_(2) / 2, "argument left alone"),
        (lambda A, X: A @ X + 1e-3 * torch.rand(1, dtype=X.dtype), "repeatable"),
        (lambda A, X: (A @ X)[:-1], "shape"),
    ],
)
def test_the_promises_see_a_planted_error(broken: Callable[[Tensor, Tensor], Tensor], promise: str) -> None:
    class Planted(Matrix):
        def matmat(self, X: Tensor) -> Tensor:
            return broken(A, X)

    A = problems.symmetric(problems.SPECTRA["indefinite"])
    assert not _broken_promises(Case(Matrix(A), A), torch.float64)
    assert promise in _broken_promises(Case(Planted(A), A), torch.float64)


def _operators_of(package: str, classes: Iterable[type[LinearOperator]]) -> set[type[LinearOperator]]:
    """Those that are defined in a package and can be built."""
    return {kind for kind in classes if kind.__module__.split(".")[0] == package and not inspect.isabstract(kind)}


def _subclasses(kind: type[LinearOperator]) -> set[type[LinearOperator]]:
    return {kind}.union(*(_subclasses(child) for child in kind.__subclasses__()))


def _unregistered(classes: Iterable[type[LinearOperator]]) -> set[str]:
    registered = {kind for kind, _ in OPERATORS.values()}
    return {kind.__qualname__ for kind in _operators_of("spectral_callbacks", classes) - registered}


def test_every_operator_of_the_package_is_held_to_the_contract() -> None:
    for module in pkgutil.walk_packages(spectral_callbacks.__path__, "spectral_callbacks."):
        if not module.name.endswith("__main__"):  # which runs
            importlib.import_module(module.name)
    assert not _unregistered(_subclasses(LinearOperator))


def test_an_operator_without_an_entry_is_noticed() -> None:
    class Planted(Matrix):
        pass

    Planted.__module__ = "spectral_callbacks.operators.planted"
    assert {name.split(".")[-1] for name in _unregistered([Matrix, Planted])} == {"Planted"}
    Planted.__module__ = __name__
    assert Planted in _subclasses(LinearOperator)
    assert not _unregistered([Matrix, Planted])
