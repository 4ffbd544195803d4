from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from spectral_callbacks.demo.valleys import FUNCTIONS, OPTIMIZERS, descend, f2, lowest, main


def derivative_1(x: float) -> float:
    return 2 * (x + 0.3) if x <= 0 else 2 * (x - 0.2)


def derivative_2(x: float) -> float:
    return -40.0 if x <= -0.9 else 8 * x * math.cos(8 * x) + math.sin(8 * x) + 3 * x**2


def derivative_3(x: float) -> float:
    size = abs(x)
    return 2 * x if size > 0.5 else math.copysign(1.0, x) * (-1.0 if size > 0.4 else 7 / 8)


DERIVATIVES = {"F1": derivative_1, "F2": derivative_2, "F3": derivative_3}


def end(
    derivative: Callable[[float], float], *, has_friction: bool, beta1: float = 0.95, beta2: float = 0.999
) -> float:
    """The papers' recursions in plain numbers."""
    x, m, v, previous = -1.0, 0.0, 0.0, 0.0
    for t in range(1, 301):
        g = derivative(x)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        friction = 1 / (1 + math.exp(-abs(g - previous))) if has_friction else 1.0
        x -= 0.1 * friction * (m / (1 - beta1**t)) / (math.sqrt(v / (1 - beta2**t)) + 1e-8)
        previous = g
    return x


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_derivatives_are_the_true_ones(name: str) -> None:
    for value in torch.linspace(-1.2, 1.2, 400, dtype=torch.float64).tolist():
        x = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        (slope,) = torch.autograd.grad(FUNCTIONS[name](x), x)
        assert slope.item() == pytest.approx(DERIVATIVES[name](value), abs=1e-12)


@pytest.mark.parametrize(("optimizer", "has_friction"), [("Adam", False), ("DiffGrad", True)])
@pytest.mark.parametrize("name", ["F1", "F2"])
def test_runs_end_where_the_papers_recursion_ends(name: str, optimizer: str, has_friction: bool) -> None:
    found = descend(FUNCTIONS[name], OPTIMIZERS[optimizer])
    assert found.x == pytest.approx(end(DERIVATIVES[name], has_friction=has_friction), abs=1e-9)


@pytest.mark.parametrize(
    ("name", "adam", "diffgrad"), [("F1", 0.2001, -0.3001), ("F2", 0.0001, -0.6430)], ids=["F1", "F2"]
)
def test_diffgrad_ends_at_the_lowest_point_and_adam_beside_it(name: str, adam: float, diffgrad: float) -> None:
    found = descend(FUNCTIONS[name], OPTIMIZERS["DiffGrad"])
    assert found.x == pytest.approx(diffgrad, abs=2e-4)
    assert found.is_lowest
    of_adam = descend(FUNCTIONS[name], OPTIMIZERS["Adam"])
    assert of_adam.x == pytest.approx(adam, abs=2e-4)
    assert not of_adam.is_lowest
    assert of_adam.value > found.value + 0.04


@pytest.mark.parametrize("name", ["F1", "F2"])
def test_so_does_adam_at_half_the_learning_rate(name: str) -> None:
    """What the friction brings here is its floor of one half."""
    assert descend(FUNCTIONS[name], OPTIMIZERS["Adam, half the learning rate"]).is_lowest


def test_lowest_points_are_those_of_a_fine_search() -> None:
    assert lowest(FUNCTIONS["F1"]) == pytest.approx(-0.3, abs=1e-4)
    assert lowest(FUNCTIONS["F3"]) == pytest.approx(0.0, abs=1e-4)
    x = torch.tensor(lowest(f2), dtype=torch.float64)
    assert abs(derivative_2(x.item())) < 5e-3
    assert f2(x).item() == pytest.approx(1e-4, abs=1e-4)


def test_the_table_has_a_row_an_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    printed = capsys.readouterr().out
    for name in OPTIMIZERS:
        assert len([line for line in printed.splitlines() if f" {name} " in line]) == 1
    (line,) = (line for line in printed.splitlines() if " DiffGrad " in line)
    assert line.count("✓") == 3
