"""What every optimizer keeps: each hyper-parameter acts, watching changes nothing, a refusal names the setting."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks import optim
from spectral_callbacks.stability import ObservableOptimizer
from tests.contracts.optimizers import (
    OPTIMIZERS,
    PATHS,
    SHAPES,
    YARDSTICK,
    Subject,
    make_parameters,
    set_gradients,
    train,
)
from tests.contracts.temporaries import peak_bytes
from tests.contracts.training import plain

NUM_STEPS = 6


def _hyper_parameters(subject: Subject) -> list[str]:
    return list(subject(make_parameters()).defaults)


def _trajectory(subject: Subject, settings: dict[str, Any], changed: dict[str, Any]) -> list[nn.Parameter]:
    """Train with a setting changed in the parameter group after construction."""
    parameters = make_parameters(torch.float64)
    optimizer = subject(parameters, **settings)
    optimizer.param_groups[0].update(changed)
    train(optimizer, range(NUM_STEPS))
    return parameters


def _dead(subject: Subject) -> list[str]:
    """The hyper-parameters whose change leaves the trajectory as it was."""
    dead = []
    for name, value in subject.changes.items():
        settings = {**subject.alive, **subject.alone.get(name, {})}
        before = _trajectory(subject, settings, {})
        if all(map(torch.equal, before, _trajectory(subject, settings, {name: value}))):
            dead.append(name)
    return dead


def _cases(select: Callable[[Subject], Any]) -> list[Any]:
    return [pytest.param(s, *row, id=f"{s.name}-{'-'.join(map(str, row))}") for s in OPTIMIZERS for row in select(s)]


each_optimizer = pytest.mark.parametrize("subject", OPTIMIZERS, ids=lambda s: s.name)
each_setting = pytest.mark.parametrize(
    ("subject", "setting"), _cases(lambda s: [(name,) for name in s.settings])
)  # fmt: skip


def test_every_public_optimizer_is_here() -> None:
    public = {
        value for name in dir(optim)
        if not name.startswith("_") and inspect.isclass(value := getattr(optim, name)) and not inspect.isabstract(value)
        and issubclass(value, torch.optim.Optimizer)
    }  # fmt: skip
    assert public == {subject.optimizer for subject in OPTIMIZERS}
    assert all(issubclass(optimizer, ObservableOptimizer) for optimizer in public)


@each_optimizer
def test_every_hyper_parameter_stands_in_the_group_and_is_tried(subject: Subject) -> None:
    names = set(_hyper_parameters(subject))
    assert names == subject.arguments
    assert names - set(PATHS) == set(subject.changes)


@pytest.mark.parametrize("subject", [YARDSTICK, *OPTIMIZERS], ids=lambda s: s.name)
def test_no_hyper_parameter_is_dead(subject: Subject) -> None:
    assert not _dead(subject)


@each_setting
def test_the_way_to_compute_a_step_does_not_change_it(subject: Subject, setting: str) -> None:
    """Beyond rounding, in parameters of float64; `fused` may compile, and is tried with the slow checks."""
    plainly, *ways = subject.paths("differentiable", "fused")
    expected = _trajectory(subject, {**subject.settings[setting], **plainly}, {})
    for way in [{}, *ways]:
        found = _trajectory(subject, {**subject.settings[setting], **way}, {})
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@each_setting
def test_watching_changes_no_bit_and_tells_finite_numbers(subject: Subject, setting: str) -> None:
    for path in subject.paths("differentiable", "fused"):
        runs = []
        for watched in (False, True):
            parameters = make_parameters()
            optimizer: Any = subject(parameters, **{**path, **subject.settings[setting]})
            assert not optimizer.is_observed
            if watched:
                optimizer.observe()
                optimizer.observe()
            for step in range(NUM_STEPS):
                train(optimizer, [step])
                if watched:
                    _told(optimizer, parameters)
            runs.append((plain(parameters), plain(optimizer.state_dict())))
        assert runs[0] == runs[1]


def _told(optimizer: ObservableOptimizer, parameters: list[nn.Parameter]) -> None:
    for parameter in parameters:
        before = plain(parameter), plain(optimizer.state.get(parameter))
        for name, value in optimizer.diagnostics(parameter).items():
            assert name.isidentifier()
            assert isinstance(value, Tensor)
            assert not value.requires_grad
            assert value.isfinite().all(), (name, value)
        assert (plain(parameter), plain(optimizer.state.get(parameter))) == before


@each_optimizer
def test_before_the_first_step_there_is_nothing_wrong_to_tell(subject: Subject) -> None:
    parameters = make_parameters()
    optimizer: Any = subject(parameters)
    assert all(v.isfinite().all() for p in parameters for v in optimizer.diagnostics(p).values())
    assert not any(optimizer.state.values())


@each_setting
def test_the_streams_of_random_numbers_stay_where_they_were(subject: Subject, setting: str) -> None:
    for path in subject.paths("differentiable", "fused"):
        parameters = make_parameters()
        before = torch.get_rng_state()
        optimizer = subject(parameters, **{**path, **subject.settings[setting]})
        train(optimizer, range(2))
        assert torch.equal(torch.get_rng_state(), before)


@each_setting
def test_autocast_around_a_step_does_not_change_it(subject: Subject, setting: str) -> None:
    """A training_step of manual optimization steps within it."""
    runs = []
    for enabled in (False, True):
        parameters = make_parameters(shapes=((40, 30), (5,)))
        optimizer = subject(parameters, **subject.settings[setting])
        for step in range(3):
            set_gradients(parameters, step)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                optimizer.step()
        runs.append(plain(parameters))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("subject", "name", "value"), _cases(lambda s: [(name, v) for name, values in s.wrong.items() for v in values])
)
def test_a_wrong_hyper_parameter_is_refused_by_name(subject: Subject, name: str, value: Any) -> None:
    """In the constructor, and in a group that is given with its own."""
    for make in (
        lambda: subject(make_parameters(), **{name: value}),
        lambda: subject([{"params": make_parameters(), name: value}]),
    ):
        with pytest.raises(ValueError, match=name):
            make()


@each_optimizer
def test_wrong_values_of_every_hyper_parameter_are_tried(subject: Subject) -> None:
    truths = {name for name, value in subject(make_parameters()).defaults.items() if isinstance(value, bool)}
    assert set(_hyper_parameters(subject)) - truths - set(PATHS) <= set(subject.wrong)


@each_setting
def test_maximizing_mirrors_minimizing(subject: Subject, setting: str) -> None:
    """Of a gradient of the other sign, without decay: the same steps."""
    settings = {**subject.settings[setting], "weight_decay": 0.0}
    runs = []
    for maximize in (False, True):
        parameters = make_parameters(torch.float64)
        optimizer = subject(parameters, **{**settings, "maximize": maximize})
        for step in range(NUM_STEPS):
            set_gradients(parameters, step)
            for p in parameters:
                assert p.grad is not None
                p.grad.mul_(-1 if maximize else 1)
            optimizer.step()
        runs.append(parameters)
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-14)


@each_optimizer
def test_empty_parameters_are_no_trouble(subject: Subject) -> None:
    for path in subject.paths("differentiable", "fused"):
        parameters = make_parameters(shapes=(*SHAPES, (0, 3), (0,)))
        train(subject(parameters, **path), range(2))
        assert all(p.isfinite().all() for p in parameters)


@pytest.mark.parametrize("subject", [s for s in OPTIMIZERS if s.elementwise], ids=lambda s: s.name)
def test_a_step_holds_a_few_blocks_and_no_copy_of_a_parameter(subject: Subject) -> None:
    for name, settings in subject.shortened().settings.items():
        parameter = nn.Parameter(torch.full((2**14, 64), 0.5))
        optimizer = subject([parameter], **settings)
        parameter.grad = torch.full_like(parameter, 0.1)
        optimizer.step()  # makes the state
        assert peak_bytes(optimizer.step) <= 0.5 * parameter.nbytes, name


def test_a_copy_of_a_parameter_is_noticed() -> None:
    [parameter] = make_parameters(shapes=((64, 64),))
    set_gradients([parameter], 0)
    assert peak_bytes(torch.optim.SGD([parameter], lr=0.1, foreach=False).step) == 0
    assert peak_bytes(torch.optim.SGD([parameter], lr=0.1, weight_decay=0.1, foreach=False).step) == 4 * 64 * 64


class _Deaf(torch.optim.SGD):
    """Takes a weight decay, and forgets it."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["weight_decay"] = 0.0
        return super().step(closure)


def test_a_dead_hyper_parameter_is_noticed() -> None:
    changes = {"lr": 0.02, "weight_decay": 0.2}
    for optimizer, dead in ((torch.optim.SGD, []), (_Deaf, ["weight_decay"])):
        assert _dead(Subject(optimizer, {}, (), {"lr": 0.01}, changes, {})) == dead


def test_gradients_of_the_common_problem_differ_from_step_to_step_and_are_the_same_again() -> None:
    parameters, gradients = make_parameters(), []
    for step in (0, 1, 0):
        set_gradients(parameters, step)
        gradients.append(plain([p.grad for p in parameters]))
    assert gradients[0] == gradients[2] != gradients[1]
    assert all(math.isfinite(p.item()) and abs(p.item()) >= 0.5 for q in parameters for p in q.flatten())
