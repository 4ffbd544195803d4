from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from tests import oracles


def _mlp() -> tuple[nn.Module, oracles.Loss]:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    X = torch.randn(6, 3, dtype=torch.float64)
    return module, lambda: module(X).square().sin().mean()


class _WrongCurvature(torch.autograd.Function):
    """x³ with the right derivative, whose own derivative is planted to be twice what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        slope = 3 * x.detach() ** 2 + 12 * x.detach() * (x - x.detach())
        return gradients[0] * slope


def test_the_two_hessians_agree() -> None:
    module, loss = _mlp()
    parameters = list(module.parameters())
    before = [p.detach().clone() for p in parameters]
    differences = oracles.difference_hessian(loss, parameters)
    assert oracles.relative_error(differences, oracles.dense_hessian(loss, parameters)) < 1e-9
    assert all(torch.equal(p, b) for p, b in zip(parameters, before, strict=True))


def test_differences_see_a_wrong_second_derivative() -> None:
    x = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        return _WrongCurvature.apply(x).sum()

    assert oracles.relative_error(oracles.dense_hessian(loss, [x]), torch.diag(6 * x.detach())) == pytest.approx(1.0)
    assert oracles.relative_error(oracles.difference_hessian(loss, [x]), torch.diag(6 * x.detach())) < 1e-9


def test_a_parameter_without_a_part_in_the_loss_has_zero_rows() -> None:
    used, unused = torch.ones(2, dtype=torch.float64, requires_grad=True), torch.ones(1, requires_grad=True)
    H = oracles.dense_hessian(lambda: used.pow(3).sum(), [used, unused])
    assert torch.equal(H, torch.diag(torch.tensor([6.0, 6.0, 0.0], dtype=torch.float64)))


def test_extreme_eigenvalues_are_algebraic_and_in_order() -> None:
    matrix = torch.diag(torch.tensor([1.0, -5.0, 3.0, 2.0]))
    assert oracles.extreme_eigenvalues(matrix, 2, "LA").tolist() == [3.0, 2.0]
    assert oracles.extreme_eigenvalues(matrix, 2, "SA").tolist() == [-5.0, 1.0]
    assert oracles.extreme_eigenvalues(matrix, 3, "BE").tolist() == [3.0, 2.0, -5.0]


def test_relative_error_sees_a_planted_error() -> None:
    true = torch.tensor([2.0, 1.0])
    assert oracles.relative_error(true, true) == 0
    assert oracles.relative_error(torch.tensor([2.0, 1.1]), true) == pytest.approx(0.05)
    assert oracles.relative_error(torch.tensor([2.0]), true) == float("inf")
    assert oracles.relative_error(torch.tensor([2.0, float("nan")]), true) == float("inf")


def test_bisection_finds_an_edge_and_refuses_an_interval_without_one() -> None:
    assert oracles.last_stable(lambda x: x < 2**0.5, 0.0, 9.0) == pytest.approx(2**0.5, rel=1e-9)
    with pytest.raises(ValueError, match="does not bracket"):
        oracles.last_stable(lambda x: x < 10, 0.0, 9.0)


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), lambda: numpy.random.rand(), random.random])
def test_the_global_random_state_sees_every_draw(draw: Callable[[], object]) -> None:
    before = oracles.global_random_state()
    assert oracles.global_random_state() == before
    draw()
    assert oracles.global_random_state() != before
