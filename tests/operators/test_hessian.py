from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_callbacks.linalg import Status, eigsh
from spectral_callbacks.operators import Hessian, Objective, ParameterSpace
from spectral_callbacks.probe import Probe
from tests import oracles, problems
from tests.operators import networks

FLOATS = (torch.float32, torch.float64)


@functools.lru_cache
def _oracle(name: str) -> Tensor:
    """Central differences of the gradient in float64, on the plain module, outside every guard."""
    case = networks.case(name, torch.float64)
    parameters = [p for p in case.module.parameters() if p.requires_grad]
    return oracles.difference_hessian(lambda: case.loss(case.module, case.batch), parameters)


def _probe(name: str, dtype: torch.dtype, *, shift: float = 0.0) -> Probe:
    case = networks.case(name, dtype)
    optimizer = torch.optim.SGD([p for p in case.module.parameters() if p.requires_grad], lr=0.1)
    return Probe(case.module, optimizer, [case.batch], loss=functools.partial(case.loss, shift=shift))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_products_are_those_of_the_second_derivatives(name: str, dtype: torch.dtype) -> None:
    with _probe(name, dtype) as probe:
        H = probe.operator(Hessian).to_dense()
    assert oracles.relative_error(H, _oracle(name)) <= (1e-5 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", networks.NETWORKS)
def test_the_largest_eigenvalue_is_right_to_1e_5_at_rtol_1e_3(name: str, dtype: torch.dtype) -> None:
    true = torch.linalg.eigvalsh(_oracle(name))[-1:]
    with _probe(name, dtype) as probe:
        pairs = eigsh(probe.operator(Hessian), rtol=1e-3, generator=probe.generator)
    assert pairs.status is Status.CONVERGED
    assert oracles.relative_error(pairs.values, true) <= 1e-5


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", [name for name in networks.NETWORKS if name != "sparse embedding"])
def test_it_is_the_algebraically_largest_one_where_a_negative_one_is_larger(name: str, dtype: torch.dtype) -> None:
    eigenvalues = torch.linalg.eigvalsh(_oracle(name))
    shift = 0.7 * eigenvalues[-1].item()
    true = eigenvalues[-1:] - shift
    assert true > 0
    assert eigenvalues[0] - shift < -2 * true
    with _probe(name, dtype, shift=shift) as probe:
        pairs = eigsh(probe.operator(Hessian), rtol=1e-3, generator=probe.generator)
    assert pairs.status is Status.CONVERGED
    assert oracles.relative_error(pairs.values, true) <= 1e-5


def test_five_eigenvalues_of_a_network_are_right() -> None:
    true = oracles.extreme_eigenvalues(_oracle("MLP"), 5, "BE")
    with _probe("MLP", torch.float64) as probe:
        pairs = eigsh(probe.operator(Hessian), 5, which="BE", rtol=1e-3, generator=probe.generator)
    assert pairs.status is Status.CONVERGED
    assert oracles.relative_error(pairs.values, true) <= 1e-5


def test_differences_are_as_good_as_a_loop_of_backward_passes() -> None:
    case = networks.case("MLP", torch.float64)
    H = oracles.dense_hessian(lambda: case.loss(case.module, case.batch), list(case.module.parameters()))
    assert oracles.relative_error(_oracle("MLP"), H) <= 1e-9


def test_a_wrong_derivative_would_be_seen() -> None:
    """The loss changed in a thousandth of one term moves the Hessian further than the tolerance."""
    case = networks.case("MLP", torch.float64)

    def loss() -> Tensor:
        return case.loss(case.module, case.batch) + 1e-3 * next(case.module.parameters())[0, 0] ** 2

    planted = oracles.dense_hessian(loss, list(case.module.parameters()))
    assert oracles.relative_error(planted, _oracle("MLP")) > 1e-4


@pytest.mark.parametrize("name", ["indefinite", "repeated", "rank deficient", "graded"])
def test_a_quadratic_has_its_own_matrix(name: str) -> None:
    module = problems.Quadratic(problems.symmetric(problems.SPECTRA[name]))
    H = Hessian(Objective(ParameterSpace(module), [module])).to_dense()
    torch.testing.assert_close(H, module.A)


def test_linear_regression_has_its_closed_form() -> None:
    X, Y = torch.randn(9, 3, dtype=torch.float64), torch.randn(9, 2, dtype=torch.float64)
    module = nn.Linear(3, 2, bias=False).double()
    objective = Objective(ParameterSpace(module), [lambda: (module(X) - Y).square().sum(dim=1).mean()])
    torch.testing.assert_close(Hessian(objective).to_dense(), problems.linear_regression_hessian(X, 2))


def test_logistic_regression_has_its_closed_form() -> None:
    X, y = torch.randn(9, 3, dtype=torch.float64), torch.randint(0, 2, (9, 1)).double()
    module = nn.Linear(3, 1, bias=False).double()
    objective = Objective(ParameterSpace(module), [lambda: F.binary_cross_entropy_with_logits(module(X), y)])
    expected = problems.logistic_regression_hessian(X, module.weight.detach()[0])
    torch.testing.assert_close(Hessian(objective).to_dense(), expected)


@pytest.mark.parametrize(("a", "b", "y"), [(1.0, 1.0, 1.0), (0.1, 0.2, 3.0), (2.0, -0.5, 3.0)])
def test_a_deep_linear_net_has_its_closed_form(a: float, b: float, y: float) -> None:
    factors = nn.ParameterList([nn.Parameter(torch.tensor(x, dtype=torch.float64)) for x in (a, b)])
    objective = Objective(ParameterSpace(factors), [lambda: (factors[0] * factors[1] - y).square() / 2])
    torch.testing.assert_close(Hessian(objective).to_dense(), problems.deep_linear_hessian(a, b, y))


def test_parameters_that_are_not_measured_are_held_fixed() -> None:
    module = problems.Quadratic(problems.symmetric(problems.SPECTRA["positive"]))
    both = nn.ModuleList([module, nn.Linear(2, 2).double()])
    space = ParameterSpace(both, [module.w])
    H = Hessian(Objective(space, [lambda: module() + both[1](torch.ones(2).double()).sum() * module.w.sum()]))
    torch.testing.assert_close(H.to_dense(), module.A)


def test_a_half_precision_model_has_float32_products() -> None:
    exact = networks.case("MLP")
    module = exact.module.to(torch.bfloat16)
    batch = exact.batch[0].bfloat16(), exact.batch[1]
    H = Hessian(Objective(ParameterSpace(module), [lambda: exact.loss(module, batch)]))
    assert H.dtype == torch.float32
    product = H.to_dense()
    assert product.dtype == torch.float32
    assert oracles.relative_error(product, _oracle("MLP")) < 0.1
