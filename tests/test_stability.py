from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_callbacks.stability import Edge, NoThresholdError, edges, stability_rule
from tests import oracles, problems

NUM_STEPS = 800

SGD_SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight decay": {"weight_decay": 0.7},
    "momentum 0.5": {"momentum": 0.5},
    "momentum 0.9": {"momentum": 0.9},
    "momentum and weight decay": {"momentum": 0.9, "weight_decay": 0.7},
    "dampening": {"momentum": 0.8, "dampening": 0.3},
    "dampening as an average": {"momentum": 0.9, "dampening": 0.9},
    "dampening without momentum": {"dampening": 0.5},
    "Nesterov": {"momentum": 0.9, "nesterov": True},
    "Nesterov and weight decay": {"momentum": 0.5, "nesterov": True, "weight_decay": 0.7},
    "foreach": {"momentum": 0.9, "foreach": True},
}


def _bounded(kind: type[torch.optim.Optimizer], settings: dict[str, Any], curvature: Tensor) -> Tensor:
    """Which of many one-dimensional quadratics ½ λ w² an optimizer, stepped for real, does not leave."""
    w = torch.ones_like(curvature, requires_grad=True)
    optimizer = kind([w], **settings)
    halfway = w.detach().abs()
    for step in range(NUM_STEPS):
        w.grad = curvature * w.detach()
        optimizer.step()
        if step == NUM_STEPS // 2:
            halfway = w.detach().abs()
    return w.detach().abs() <= halfway


@pytest.mark.parametrize("name", SGD_SETTINGS)
def test_sgd_leaves_a_quadratic_exactly_beyond_its_edge(name: str) -> None:
    settings = {"lr": 0.3, **SGD_SETTINGS[name]}
    [edge] = edges(torch.optim.SGD([torch.zeros(1)], **settings))
    found = oracles.last_stable(lambda curvature: _bounded(torch.optim.SGD, settings, curvature), 0.01, 400.0)
    assert edge.curvature == pytest.approx(found, rel=1e-7)
    assert edge.ratio(found) == pytest.approx(1.0, rel=1e-7)


@pytest.mark.parametrize("name", ["plain", "momentum and weight decay", "Nesterov"])
def test_a_ratio_of_one_parts_the_quadratics_in_many_dimensions(name: str) -> None:
    """Only the largest eigenvalue counts, and the ratio says on which side of the edge it lies."""
    settings = SGD_SETTINGS[name]
    A = problems.symmetric(torch.linspace(0.1, 5.0, 12, dtype=torch.float64))
    [unit] = edges(torch.optim.SGD([torch.zeros(1)], lr=1.0, **settings))
    for ratio in (0.97, 1.03):
        w = torch.ones(12, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.SGD([w], lr=ratio * unit.threshold / (5.0 + unit.shift), **settings)
        assert edges(optimizer)[0].ratio(5.0) == pytest.approx(ratio)
        for _ in range(NUM_STEPS):
            w.grad = A @ w.detach()
            optimizer.step()
        assert (w.detach().norm().item() > 1e3) == (ratio > 1)


def test_the_bisection_sees_a_planted_error() -> None:
    """A rule that forgets the dampening lies far from where the optimizer really leaves."""
    settings = {"lr": 0.3, "momentum": 0.8, "dampening": 0.3}
    found = oracles.last_stable(lambda curvature: _bounded(torch.optim.SGD, settings, curvature), 0.01, 400.0)
    [without] = edges(torch.optim.SGD([torch.zeros(1)], lr=0.3, momentum=0.8))
    assert abs(without.curvature / found - 1) > 0.2


def test_each_group_has_an_edge_of_its_own() -> None:
    groups = [
        {"params": [torch.zeros(1)], "lr": 0.1},
        {"params": [torch.zeros(1)], "momentum": 0.5, "weight_decay": 2.0},
    ]
    assert edges(torch.optim.SGD(groups, lr=0.4)) == (Edge(0.1, 2.0, 0.0), Edge(0.4, 3.0, 2.0))


def test_an_edge_is_where_its_ratio_is_one() -> None:
    edge = Edge(learning_rate=0.1, threshold=3.8, shift=0.5)
    assert edge.curvature == pytest.approx(37.5)
    assert edge.ratio(edge.curvature) == pytest.approx(1.0)
    assert edge.ratio(0.0) == pytest.approx(0.1 * 0.5 / 3.8)
    assert edge.weight == pytest.approx(0.1 / 3.8)


def test_without_a_learning_rate_nothing_is_unstable() -> None:
    [edge] = edges(torch.optim.SGD([torch.zeros(1)], lr=0.0))
    assert edge.curvature == math.inf
    assert edge.ratio(1e9) == 0.0


def test_a_learning_rate_may_be_a_tensor() -> None:
    [edge] = edges(torch.optim.SGD([torch.zeros(1)], lr=torch.tensor(0.5)))
    assert isinstance(edge.learning_rate, float)
    assert edge == Edge(0.5, 2.0, 0.0)


def test_an_edge_follows_the_scheduler() -> None:
    w = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    w.grad = torch.ones(1)
    optimizer.step()
    scheduler.step()
    assert edges(optimizer)[0].learning_rate == pytest.approx(0.2)


def test_climbing_has_no_edge() -> None:
    with pytest.raises(NoThresholdError, match=r"SGD\(maximize=True\) climbs the loss, .* no ratio is logged"):
        edges(torch.optim.SGD([torch.zeros(1)], lr=0.1, maximize=True))


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Rprop])
def test_an_optimizer_without_a_rule_is_named_with_the_remedy(kind: type[torch.optim.Optimizer]) -> None:
    with pytest.raises(
        NoThresholdError, match=rf"no stability rule is known for {kind.__name__}; .* Register one with"
    ):
        edges(kind([torch.zeros(1)]))  # pyright: ignore[reportCallIssue]


class _Renamed(torch.optim.SGD):
    pass


class _Stepping(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class _Registered(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class _RegisteredChild(_Registered):
    pass


@pytest.fixture
def registered() -> Iterator[None]:
    @stability_rule(_Registered)
    def rule(group: dict[str, Any]) -> Edge:
        return Edge(group["lr"], threshold=7.0)

    yield
    assert rule({"lr": 0.1}) == Edge(0.1, 7.0), "the decorator gives the function back"


def test_a_subclass_with_the_same_step_has_the_same_rule() -> None:
    optimizer = _Renamed([torch.zeros(1)], lr=0.1, momentum=0.9)
    assert edges(optimizer) == edges(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))


def test_a_subclass_with_a_step_of_its_own_has_none() -> None:
    with pytest.raises(NoThresholdError, match="no stability rule is known for _Stepping"):
        edges(_Stepping([torch.zeros(1)], lr=0.1))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", [_Registered, _RegisteredChild])
def test_the_rule_of_the_nearest_class_counts(kind: type[torch.optim.SGD]) -> None:
    assert edges(kind([torch.zeros(1)], lr=0.1)) == (Edge(0.1, 7.0),)
    assert edges(torch.optim.SGD([torch.zeros(1)], lr=0.1)) == (Edge(0.1, 2.0),)


def test_what_wraps_step_from_outside_does_not_hide_the_rule() -> None:
    """Schedulers wrap `step` of the instance, torch's profiler that of the class."""
    optimizer = _Renamed([torch.zeros(1)], lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    assert edges(optimizer) == (Edge(0.1, 2.0),)


def test_no_edge_is_a_value_error() -> None:
    assert issubclass(NoThresholdError, ValueError)
