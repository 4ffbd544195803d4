"""Where each optimizer of torch, stepped for real, leaves a quadratic, against what its rule says."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from spectral_callbacks.stability import (
    Edge,
    NoThresholdError,
    NotSteppedYetError,
    edges,
    no_threshold,
    stability_rule,
)
from spectral_callbacks.stability.torch_optim import adam
from tests import oracles, problems

Optimizer = torch.optim.Optimizer

SIZE = 6
TOLERANCE = 2e-6
TINY = 1e-100  # squared gradients are then nothing against the second moments
LINEAR = {"exp_avg", "momentum_buffer"}  # state that belongs to the linear dynamics; the rest is its metric
READ_BEFORE = {"eta", "acc_delta"}  # what a step uses as it finds it, and updates for the next


def random(*shape: int, seed: int = 0) -> Tensor:
    """Numbers between 0.5 and 2, for second moments."""
    return 0.5 + 1.5 * torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SECOND, LARGER, COMPONENT = random(SIZE, seed=1), 2 + random(SIZE, seed=2), 0.3 * random(SIZE, seed=3)
HESSIAN = problems.symmetric(torch.linspace(1.0, 4.0, SIZE, dtype=torch.float64), seed=4)


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer, its settings, and the metric that it is held at.

    Attributes:
        kind: The class.
        settings: Its arguments.
        state: What each entry of its state is before every step, the first moment aside.
        shape: Of one parameter a quadratic, for a rule that mixes the entries of a parameter; else all quadratics are
            the rows of one.
        center: Where the quadratics have their minimum.
    """

    kind: type[Optimizer]
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    state: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    shape: tuple[int, ...] | None = None
    center: float = 0.0


LATE = 10_000_000
ADAM = {"step": LATE, "exp_avg_sq": SECOND}
EARLY = ADAM | {"step": 2}
FACTORS = {"step": 4, "row_var": random(2, 1, seed=6), "col_var": random(1, 3, seed=7)}
CASES: dict[str, Case] = {
    "SGD": Case(torch.optim.SGD),
    "SGD, weight decay": Case(torch.optim.SGD, {"weight_decay": 0.7}),
    "SGD, momentum 0.5": Case(torch.optim.SGD, {"momentum": 0.5}),
    "SGD, momentum 0.9": Case(torch.optim.SGD, {"momentum": 0.9}),
    "SGD, momentum and weight decay": Case(torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.7}),
    "SGD, dampening": Case(torch.optim.SGD, {"momentum": 0.8, "dampening": 0.3}),
    "SGD, dampening as an average": Case(torch.optim.SGD, {"momentum": 0.9, "dampening": 0.9}),
    "SGD, dampening without momentum": Case(torch.optim.SGD, {"dampening": 0.5}),
    "SGD, Nesterov": Case(torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "SGD, Nesterov and weight decay": Case(torch.optim.SGD, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.7}),
    "SGD, foreach": Case(torch.optim.SGD, {"momentum": 0.9, "foreach": True}),
    "SGD, fused": Case(torch.optim.SGD, {"momentum": 0.9, "fused": True}),
    "ASGD": Case(torch.optim.ASGD, {"lambd": 0.0}),
    "ASGD, both decays": Case(torch.optim.ASGD, {"lambd": 0.3, "weight_decay": 0.7}, {"step": 7, "eta": 0.2}),
    "Adam": Case(torch.optim.Adam, {}, ADAM),
    "Adam, first step": Case(torch.optim.Adam, {}, ADAM | {"step": 0}),
    "Adam, third step": Case(torch.optim.Adam, {}, EARLY),
    "Adam, betas": Case(torch.optim.Adam, {"betas": (0.5, 0.9)}, EARLY),
    "Adam without momentum": Case(torch.optim.Adam, {"betas": (0.0, 0.9)}, EARLY),
    "Adam, eps dominates": Case(torch.optim.Adam, {"eps": 0.7}, EARLY | {"exp_avg_sq": 1e-6 * SECOND}),
    "Adam, eps matters": Case(torch.optim.Adam, {"eps": 0.7}, EARLY),
    "Adam, no second moment": Case(torch.optim.Adam, {"eps": 0.7}, {"step": 5}),
    "Adam, coupled decay": Case(torch.optim.Adam, {"weight_decay": 20.0}, EARLY),
    "Adam, AMSGrad": Case(torch.optim.Adam, {"amsgrad": True}, EARLY | {"max_exp_avg_sq": LARGER}),
    "Adam, foreach": Case(torch.optim.Adam, {"foreach": True, "eps": 0.7}, EARLY),
    "Adam, fused": Case(torch.optim.Adam, {"fused": True, "eps": 0.7, "weight_decay": 20.0}, EARLY),
    "AdamW": Case(torch.optim.AdamW, {"weight_decay": 0.7}, ADAM),
    "AdamW, third step": Case(torch.optim.AdamW, {"weight_decay": 0.7}, EARLY),
    "AdamW, AMSGrad": Case(
        torch.optim.AdamW, {"weight_decay": 0.7, "amsgrad": True}, EARLY | {"max_exp_avg_sq": LARGER}
    ),
    "SparseAdam": Case(torch.optim.SparseAdam, {}, ADAM),
    "SparseAdam, eps matters": Case(torch.optim.SparseAdam, {"eps": 0.7}, EARLY),
    "NAdam": Case(torch.optim.NAdam, {}, ADAM | {"mu_product": 0.0}),
    "NAdam, third step": Case(torch.optim.NAdam, {"eps": 0.7}, EARLY | {"mu_product": 0.2}),
    "NAdam, coupled decay": Case(torch.optim.NAdam, {"weight_decay": 20.0}, EARLY | {"mu_product": 0.2}),
    "NAdam, decoupled decay": Case(
        torch.optim.NAdam, {"weight_decay": 0.7, "decoupled_weight_decay": True}, EARLY | {"mu_product": 0.2}
    ),
    "RAdam": Case(torch.optim.RAdam, {}, ADAM),
    "RAdam, rectified": Case(torch.optim.RAdam, {"eps": 0.7}, ADAM | {"step": 10}),
    "RAdam, rectified, coupled decay": Case(torch.optim.RAdam, {"weight_decay": 200.0}, ADAM | {"step": 10}),
    "RAdam, rectified, decoupled decay": Case(
        torch.optim.RAdam, {"weight_decay": 0.7, "decoupled_weight_decay": True}, ADAM | {"step": 10}
    ),
    "RAdam, not rectified": Case(torch.optim.RAdam, {"weight_decay": 0.7}, EARLY),
    "RAdam, not rectified, decoupled decay": Case(
        torch.optim.RAdam, {"weight_decay": 0.7, "decoupled_weight_decay": True}, EARLY
    ),
    "Adamax": Case(torch.optim.Adamax, {}, {"step": LATE, "exp_inf": SECOND}),
    "Adamax, third step, coupled decay": Case(
        torch.optim.Adamax, {"weight_decay": 2.0}, {"step": 2, "exp_inf": SECOND}
    ),
    "Adamax, eps dominates": Case(torch.optim.Adamax, {"eps": 0.7}, {"step": 2, "exp_inf": 1e-3 * SECOND}),
    "RMSprop": Case(torch.optim.RMSprop, {}, {"square_avg": SECOND}),
    "RMSprop, momentum": Case(torch.optim.RMSprop, {"momentum": 0.9, "eps": 0.7}, {"square_avg": SECOND}),
    "RMSprop, centered": Case(
        torch.optim.RMSprop, {"centered": True, "weight_decay": 0.7}, {"square_avg": SECOND, "grad_avg": COMPONENT}
    ),
    "RMSprop, centered, momentum": Case(
        torch.optim.RMSprop, {"centered": True, "momentum": 0.5}, {"square_avg": SECOND, "grad_avg": COMPONENT}
    ),
    "Adagrad": Case(torch.optim.Adagrad, {}, {"sum": SECOND}),
    "Adagrad, decays": Case(
        torch.optim.Adagrad, {"lr_decay": 0.3, "weight_decay": 0.7, "eps": 0.7}, {"step": 4, "sum": SECOND}
    ),
    "Adagrad, its own accumulator": Case(torch.optim.Adagrad, {"initial_accumulator_value": 0.6}),
    "Adadelta": Case(torch.optim.Adadelta, {}, {"square_avg": SECOND, "acc_delta": LARGER}),
    "Adadelta, eps matters": Case(
        torch.optim.Adadelta, {"eps": 0.7, "weight_decay": 0.7}, {"square_avg": SECOND, "acc_delta": LARGER}
    ),
    "Adafactor, a vector": Case(torch.optim.Adafactor, {"weight_decay": 0.7}, {"step": 4, "variance": SECOND}, (SIZE,)),
    "Adafactor, a matrix": Case(torch.optim.Adafactor, {}, FACTORS, (2, 3)),
    "Adafactor, weights above eps": Case(torch.optim.Adafactor, {}, FACTORS | {"step": 20}, (2, 3), 0.8),
    "Adafactor, foreach, eps above the moment": Case(
        torch.optim.Adafactor, {"eps": (3.0, 0.01), "weight_decay": 0.7, "foreach": True}, FACTORS, (2, 3)
    ),
}

Make = Callable[[Sequence[Tensor]], Optimizer]
Again = Callable[[Iterable[str] | None], None]


def making(case: Case, **settings: Any) -> Make:
    return lambda parameters: case.kind(parameters, **{"lr": 0.3, **case.settings, **settings})


def started(make: Make, parameters: Sequence[Tensor], state: Mapping[str, Any]) -> tuple[Optimizer, Again]:
    """An optimizer with its metric set, and what sets it again.

    So every step is taken by the optimizer itself, at the same step count and out of the same second moments.
    """
    start = [p.detach().clone() for p in parameters]
    optimizer = make(parameters)
    give(optimizer, [torch.zeros_like(p) for p in parameters])
    optimizer.step()
    for p, value in zip(parameters, start, strict=True):
        p.detach().copy_(value)
    kept: dict[Tensor, dict[str, Any]] = {}
    for p, values in optimizer.state.items():
        kept[p] = {name: value for name, value in values.items() if name not in LINEAR}
        for name, value in kept[p].items():
            wanted = torch.as_tensor(state.get(name, value))
            wanted = wanted[..., : p.shape[-1]] if wanted.ndim else wanted
            kept[p][name] = wanted.expand_as(value).clone() if torch.is_tensor(value) else wanted.item()

    def again(names: Iterable[str] | None = None) -> None:
        for p, values in kept.items():
            for name in values if names is None else values.keys() & names:
                if torch.is_tensor(values[name]):
                    optimizer.state[p][name].copy_(values[name])
                else:
                    optimizer.state[p][name] = values[name]

    again(None)
    return optimizer, again


def give(optimizer: Optimizer, gradients: Iterable[Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p, gradient in zip(parameters, gradients, strict=True):
        p.grad = gradient.to_sparse() if isinstance(optimizer, torch.optim.SparseAdam) else gradient.contiguous()


@dataclasses.dataclass(frozen=True)
class Quadratics:
    """½ s (w - c)ᵀ H (w - c) for many scales s at once, w in one or several parameters.

    Attributes:
        H: (n, n).
        sizes: Of the parameters; each has one row a quadratic.
        shape: Of one parameter a quadratic instead.
        center: c.
        held: Set the metric before every step.
    """

    H: Tensor = HESSIAN
    sizes: tuple[int, ...] = (SIZE,)
    shape: tuple[int, ...] | None = None
    center: float = 0.0
    held: bool = True

    def parameters(self, W: Tensor) -> list[Tensor]:
        """The parameters of all quadratics, or gradients like them; W is (p, n)."""
        if self.shape is None:
            return [part.contiguous() for part in W.split(list(self.sizes), dim=1)]
        return [row.view(self.shape) for row in W]

    def weights(self, parameters: Sequence[Tensor]) -> Tensor:  # (p, n)
        """Back from parameters."""
        if self.shape is None:
            return torch.cat([p.detach() for p in parameters], dim=1)
        return torch.stack([p.detach().flatten() for p in parameters])

    def stay(self, make: Make, state: Mapping[str, Any], scales: Tensor) -> Tensor:  # (p,) -> (p,) bool
        """Which of them an optimizer, stepped for real, does not leave."""
        num_steps = 240 if self.shape is None else 100
        start = torch.randn(len(scales), len(self.H), dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        start *= 1e-9 if self.center else TINY
        parameters = [p.clone().requires_grad_() for p in self.parameters(self.center + start)]
        optimizer, again = started(make, parameters, state)
        left = torch.zeros(len(scales), dtype=torch.bool)
        halfway = start.norm(dim=1)
        for step in range(num_steps):
            w = self.weights(parameters) - self.center
            left |= w.norm(dim=1) > 1e6 * start.norm(dim=1)
            if step == num_steps // 2:
                halfway = w.norm(dim=1)
            if self.held:
                again(None)
            give(optimizer, self.parameters((~left * scales)[:, None] * (w @ self.H)))
            optimizer.step()
        return ~left & ((self.weights(parameters) - self.center).norm(dim=1) <= halfway)

    def edge(self, make: Make, state: Mapping[str, Any]) -> float:
        """The scale at the edge, according to the rule and a dense solver.

        There the largest eigenvalue of S (±sH + weight decay) S + weight · shift is 1.
        """
        w = torch.full((1, len(self.H)), self.center, dtype=torch.float64)
        parameters = [p.clone().requires_grad_() for p in self.parameters(w)]
        optimizer, again = started(make, parameters, state)
        give(optimizer, [torch.full_like(p, TINY) for p in parameters])
        optimizer.step()
        again(READ_BEFORE)
        found = [edge for group in edges(optimizer) for edge in group]
        metric, constant = [], []
        for edge, p in zip(found, parameters, strict=True):
            D = torch.ones_like(p) if edge.preconditioner is None else edge.preconditioner
            metric.append(edge.weight * D.flatten())
            constant.append(edge.weight * (D * edge.weight_decay + edge.shift).flatten())
        S = (torch.cat(metric) / (1 - torch.cat(constant))).sqrt()
        H = -self.H if found[0].ascends else self.H
        return 1 / torch.linalg.eigvalsh(S[:, None] * H * S)[-1].item()

    def seen(self, make: Make, state: Mapping[str, Any], near: float) -> float:
        """The scale at which the optimizer is seen to leave, within an order of magnitude of another."""
        wide, num_points, num_rounds = (8, 101, 4) if self.shape is None else (3, 14, 6)
        return oracles.last_stable(
            lambda scales: self.stay(make, state, scales),
            near / wide,
            near * wide,
            num_points=num_points,
            num_rounds=num_rounds,
        )

    def error(self, make: Make, state: Mapping[str, Any]) -> float:
        """What is seen / what the rule says - 1."""
        expected = self.edge(make, state)
        return self.seen(make, state, expected) / expected - 1


def quadratics_of(case: Case, H: Tensor = HESSIAN) -> Quadratics:
    return Quadratics(H, shape=case.shape, center=case.center)


@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_leaves_a_quadratic_exactly_beyond_its_edge(name: str) -> None:
    case = CASES[name]
    assert abs(quadratics_of(case).error(making(case), case.state)) < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "SGD, momentum and weight decay",
        "ASGD, both decays",
        "Adam, coupled decay",
        "AdamW, third step",
        "SparseAdam",
        "NAdam, decoupled decay",
        "RAdam, not rectified",
        "Adamax, third step, coupled decay",
        "RMSprop, centered",
        "Adagrad, decays",
        "Adadelta, eps matters",
        "Adafactor, a vector",
    ],
)
def test_an_optimizer_that_climbs_leaves_a_concave_quadratic_there_too(name: str) -> None:
    """Its decay still shrinks the weights."""
    case = CASES[name]
    assert abs(quadratics_of(case, -HESSIAN).error(making(case, maximize=True), case.state)) < TOLERANCE


GROUPS: dict[str, tuple[Case, list[dict[str, Any]]]] = {
    "SGD, learning rates": (Case(torch.optim.SGD), [{"lr": 0.1}, {}, {"lr": 0.9}]),
    "SGD, rules": (
        Case(torch.optim.SGD),
        [{"momentum": 0.9}, {"momentum": 0.5, "nesterov": True, "weight_decay": 0.7}, {"lr": 0.1}],
    ),
    "ASGD": (Case(torch.optim.ASGD), [{"lambd": 0.3}, {"weight_decay": 0.7}, {"lr": 0.1}]),
    "Adam": (
        Case(torch.optim.Adam, {}, EARLY),
        [{"lr": 0.1}, {"betas": (0.5, 0.9), "weight_decay": 0.7}, {"eps": 0.7}],
    ),
    "AdamW": (
        Case(torch.optim.AdamW, {}, EARLY),
        [{"weight_decay": 0.7}, {"betas": (0.5, 0.9), "weight_decay": 0.0}, {"lr": 0.1, "weight_decay": 0.1}],
    ),
    "NAdam": (
        Case(torch.optim.NAdam, {}, EARLY | {"mu_product": 0.2}),
        [{"decoupled_weight_decay": True, "weight_decay": 0.7}, {"weight_decay": 0.7}, {"lr": 0.1}],
    ),
    "RAdam, some rectified": (
        Case(torch.optim.RAdam, {"weight_decay": 0.1}, ADAM | {"step": 10}),
        [{}, {"betas": (0.9, 0.5)}, {"lr": 0.1, "decoupled_weight_decay": True}],
    ),
    "RMSprop": (Case(torch.optim.RMSprop, {}, {"square_avg": SECOND}), [{"lr": 0.1}, {"momentum": 0.9}, {"eps": 0.7}]),
}


@pytest.mark.parametrize("name", GROUPS)
def test_groups_leave_together_where_the_ratio_in_the_metric_of_their_edges_is_one(name: str) -> None:
    """Exactly so even where their momentum differs."""
    case, groups = GROUPS[name]

    def make(parameters: Sequence[Tensor]) -> Optimizer:
        return making(case)([{"params": [p], **group} for p, group in zip(parameters, groups, strict=True)])  # pyright: ignore[reportArgumentType]

    assert abs(Quadratics(sizes=(2, 1, 3)).error(make, case.state)) < TOLERANCE


def test_adam_left_to_itself_leaves_there_too() -> None:
    """Late in training, with a second moment that hardly forgets, so that nothing has to be set again."""
    case = Case(torch.optim.Adam, {"betas": (0.9, 1 - 1e-9), "eps": 0.7}, {"step": 1e12, "exp_avg_sq": SECOND})
    assert abs(Quadratics(held=False).error(making(case), case.state)) < 1e-5


MISTAKES: dict[str, Callable[[Edge], Edge]] = {
    "no preconditioner": lambda edge: dataclasses.replace(edge, preconditioner=None),
    "no bias correction": lambda edge: dataclasses.replace(edge, learning_rate=0.3),
    "the threshold of gradient descent": lambda edge: dataclasses.replace(edge, threshold=2.0),
    "coupled decay outside the metric": lambda edge: dataclasses.replace(edge, shift=20.0, weight_decay=0.0),
    "no decay": lambda edge: dataclasses.replace(edge, weight_decay=0.0),
}


class _Mistaken(torch.optim.Adam):
    pass


@pytest.mark.parametrize("name", MISTAKES)
def test_the_bisection_sees_a_planted_error(name: str) -> None:
    case = CASES["Adam, coupled decay"]
    true = Quadratics().edge(making(case), case.state)
    seen = Quadratics().seen(making(case), case.state, true)

    @stability_rule(_Mistaken)
    def rule(parameter: Tensor, group: dict[str, Any], state: Mapping[str, Any]) -> Edge:
        return MISTAKES[name](adam(parameter, group, state))

    mistaken = Quadratics().edge(making(dataclasses.replace(case, kind=_Mistaken)), case.state)
    assert abs(seen / true - 1) < TOLERANCE < 1e-2 < abs(seen / mistaken - 1), rule


def _of_torch() -> list[type[Optimizer]]:
    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, Optimizer)]
    return [kind for kind in kinds if kind is not Optimizer]


NONE = {"Rprop": "sign of the gradient", "LBFGS": "curvature that it estimates itself", "Muon": "orthogonalizes"}


def test_every_optimizer_of_torch_is_bisected_above_or_has_no_finite_threshold() -> None:
    bisected = {case.kind for case in CASES.values()}
    assert {kind.__name__ for kind in _of_torch()} == {kind.__name__ for kind in bisected} | (
        NONE.keys() & vars(torch.optim).keys()
    )


@pytest.mark.parametrize("name", NONE)
def test_no_finite_threshold_is_said_with_its_reason(name: str) -> None:
    if name not in vars(torch.optim):
        pytest.skip(f"torch {torch.__version__} has no {name}")
    optimizer = vars(torch.optim)[name]([torch.zeros(2, 2)])
    with pytest.raises(
        NoThresholdError, match=rf"^{name} has no finite threshold: .*{NONE[name]}.* without a ratio\.$"
    ):
        edges(optimizer)


def test_a_reason_can_be_registered() -> None:
    class Signed(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any: ...

    no_threshold(Signed, "because")
    with pytest.raises(NoThresholdError, match="Signed has no finite threshold: because;"):
        edges(Signed([torch.zeros(1)], lr=0.1))


def test_dampening_that_shuts_the_gradients_out_has_no_edge() -> None:
    with pytest.raises(NoThresholdError, match=r"dampening=1\.0 does not move by its gradients"):
        edges(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9, dampening=1.0))


def test_each_group_has_an_edge_of_its_own_and_one_a_parameter() -> None:
    groups = [
        {"params": [torch.zeros(1), torch.zeros(2)], "lr": 0.1},
        {"params": [torch.zeros(1)], "momentum": 0.5, "weight_decay": 2.0},
    ]
    plain = Edge(0.1, 2.0)
    assert edges(torch.optim.SGD(groups, lr=0.4)) == ((plain, plain), (Edge(0.4, 3.0, 2.0),))


def test_an_edge_is_where_its_ratio_is_one() -> None:
    edge = Edge(learning_rate=0.1, threshold=3.8, shift=0.5)
    assert edge.curvature == pytest.approx(37.5)
    assert edge.ratio(edge.curvature) == pytest.approx(1.0)
    assert edge.ratio(0.0) == pytest.approx(0.1 * 0.5 / 3.8)
    assert edge.weight == pytest.approx(0.1 / 3.8)


def test_an_edge_is_plain_where_it_is_one_of_the_hessian_itself() -> None:
    assert Edge(0.1, 2.0, shift=0.5).is_plain
    assert not Edge(0.1, 2.0, weight_decay=0.5).is_plain
    assert not Edge(0.1, 2.0, preconditioner=torch.ones(1)).is_plain
    assert not Edge(0.1, 2.0, ascends=True).is_plain


def test_decays_of_the_plain_metric_are_one_shift() -> None:
    edge = Edge.from_threshold(4.0, learning_rate=0.1, correction=0.5, coupled=0.3, decoupled=0.1)
    assert edge == Edge(0.05, 4.0, shift=0.3 + 0.1 * 4 / 2 / 0.5)


def test_edges_are_compared_by_their_numbers() -> None:
    """Tensors have no cheap equality, and no hash by value."""
    one, other = (Edge(0.1, 2.0, preconditioner=torch.full((2,), x)) for x in (1.0, 2.0))
    assert one == other
    assert len({one, other, Edge(0.2, 2.0)}) == 2


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adafactor])
def test_without_a_learning_rate_nothing_is_unstable(kind: type[Optimizer]) -> None:
    [[edge]] = edges(_stepped(kind, lr=0.0, weight_decay=0.1))
    assert edge.curvature == math.inf
    assert edge.ratio(1e9) == 0.0


def _stepped(kind: Any, *, gradients: Sequence[float] = (1.0,), **settings: Any) -> Optimizer:
    w = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = kind([w], **settings)
    for gradient in gradients:
        w.grad = gradient * torch.tensor([1.0, 3.0], dtype=torch.float64)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_the_bias_corrections_of_adam_are_those_of_its_last_step(num_steps: int, *, amsgrad: bool) -> None:
    gradients = [1.0, -3.0, 0.5, 0.2, 0.1, 0.0, 0.1][:num_steps]
    optimizer = _stepped(
        torch.optim.AdamW, gradients=gradients, lr=0.1, betas=(0.8, 0.6), eps=0.1, weight_decay=0.2, amsgrad=amsgrad
    )
    [[edge]] = edges(optimizer)
    v, seen = torch.zeros(2, dtype=torch.float64), []
    for gradient in gradients:
        v = 0.6 * v + 0.4 * (gradient * torch.tensor([1.0, 3.0], dtype=torch.float64)) ** 2
        seen.append(v)
    v = torch.stack(seen).amax(0) if amsgrad else v
    torch.testing.assert_close(edge.preconditioner, 1 / ((v / (1 - 0.6**num_steps)).sqrt() + 0.1))
    assert edge.learning_rate == pytest.approx(0.1 / (1 - 0.8**num_steps))
    assert edge.threshold == pytest.approx(18.0)
    assert edge.shift == pytest.approx(0.2 * 9 * (1 - 0.8**num_steps))


ADAPTIVE = [kind for kind in _of_torch() if kind.__name__ not in {"SGD", "ASGD", *NONE}]


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_an_adaptive_optimizer_has_no_edge_before_its_first_step(kind: Any) -> None:
    optimizer = kind([torch.zeros(1)], lr=0.1)
    before = dict(optimizer.state)
    with pytest.raises(NotSteppedYetError, match="has not stepped yet"):
        edges(optimizer)
    assert optimizer.state == before, "asking leaves no trace"


@pytest.mark.parametrize("kind", ADAPTIVE)
def test_a_parameter_that_never_stepped_weighs_nothing(kind: Any) -> None:
    moved, rests = torch.zeros(2, 2, requires_grad=True), torch.zeros(3)
    optimizer = kind([{"params": [rests]}, {"params": [moved]}], lr=0.1)
    moved.grad = torch.ones(2, 2).to_sparse() if kind is torch.optim.SparseAdam else torch.ones(2, 2)
    optimizer.step()
    [[idle], [edge]] = edges(optimizer)
    assert (idle.weight, idle.weight * idle.shift) == (0.0, 0.0)
    assert edge.weight > 0
    assert edge.preconditioner is None or edge.preconditioner.shape == moved.shape


def test_the_learning_rate_and_betas_may_be_tensors() -> None:
    [[edge]] = edges(torch.optim.SGD([torch.zeros(1)], lr=torch.tensor(0.5)))
    assert isinstance(edge.learning_rate, float)
    assert edge == Edge(0.5, 2.0)
    betas = (torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.75, dtype=torch.float64))
    settings = {"foreach": False, "gradients": (1.0, 2.0)}
    [[edge]] = edges(_stepped(torch.optim.Adam, lr=torch.tensor(0.125, dtype=torch.float64), betas=betas, **settings))
    [[same]] = edges(_stepped(torch.optim.Adam, lr=0.125, betas=(0.5, 0.75), **settings))
    assert edge == same
    assert isinstance(edge.learning_rate, float)
    torch.testing.assert_close(edge.preconditioner, same.preconditioner)


def test_a_metric_needs_no_gradient() -> None:
    w = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.Adam([w], lr=torch.tensor(0.1, requires_grad=True), differentiable=True, foreach=False)
    v = w.clone()
    optimizer.param_groups[0]["params"] = [v]
    v.grad = w.detach() * 2
    optimizer.step()
    [[edge]] = edges(optimizer)
    assert edge.preconditioner is not None
    assert not edge.preconditioner.requires_grad


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_edge_follows_the_scheduler(kind: type[Optimizer]) -> None:
    optimizer = _stepped(kind, lr=0.4)
    [[before]] = edges(optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimizer.step()
    scheduler.step()
    [[after]] = edges(optimizer)
    bias = 1.0 if kind is torch.optim.SGD else 0.1 / 0.19
    assert after.learning_rate == pytest.approx(0.5 * bias * before.learning_rate)


def test_groups_of_which_only_some_climb_have_no_edge() -> None:
    groups = [{"params": [torch.zeros(1)], "maximize": True}, {"params": [torch.zeros(1)]}]
    with pytest.raises(NoThresholdError, match="some parameter groups of SGD have maximize=True and others False"):
        edges(torch.optim.SGD(groups, lr=0.1))


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
    def rule(parameter: Tensor, group: dict[str, Any], state: Mapping[str, Any]) -> Edge:
        return Edge(group["lr"], threshold=7.0)

    yield
    assert rule(torch.zeros(1), {"lr": 0.1}, {}) == Edge(0.1, 7.0), "the decorator gives the function back"


def test_a_subclass_with_the_same_step_has_the_same_rule() -> None:
    optimizer = _Renamed([torch.zeros(1)], lr=0.1, momentum=0.9)
    assert edges(optimizer) == edges(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))


@pytest.mark.parametrize("lacks", [False, True])
def test_adamw_decays_decoupled_whether_or_not_its_groups_say_so(*, lacks: bool) -> None:
    optimizer = _stepped(torch.optim.AdamW, lr=0.1, weight_decay=0.2)
    if lacks:
        optimizer.param_groups[0].pop("decoupled_weight_decay", None)
    [[edge]] = edges(optimizer)
    assert edge.weight_decay == 0.0
    assert edge.shift == pytest.approx(0.2 * 19 * 0.1)


def test_a_subclass_with_a_step_of_its_own_has_none() -> None:
    with pytest.raises(NoThresholdError, match=r"no stability rule is known for _Stepping; .* Register one with"):
        edges(_Stepping([torch.zeros(1)], lr=0.1))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("kind", [_Registered, _RegisteredChild])
def test_the_rule_of_the_nearest_class_counts(kind: type[torch.optim.SGD]) -> None:
    assert edges(kind([torch.zeros(1)], lr=0.1)) == ((Edge(0.1, 7.0),),)
    assert edges(torch.optim.SGD([torch.zeros(1)], lr=0.1)) == ((Edge(0.1, 2.0),),)


def test_what_wraps_step_from_outside_does_not_hide_the_rule() -> None:
    """Schedulers wrap `step` of the instance, torch's profiler that of the class."""
    optimizer = _Renamed([torch.zeros(1)], lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    assert edges(optimizer) == ((Edge(0.1, 2.0),),)


def test_no_edge_is_a_value_error() -> None:
    assert issubclass(NoThresholdError, ValueError)
    assert issubclass(NotSteppedYetError, NoThresholdError)
