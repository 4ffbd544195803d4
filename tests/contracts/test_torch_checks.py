"""PyTorch's own checks of its optimizers, run over every optimizer of the package and over torch.optim.Adam.

`torch.testing._internal.common_optimizers` ships in the wheel, the tests that use it do not: `step_checks`,
`calling_checks`, `recording_checks` and `state_checks` say them in our words. Those that need a GPU are not here.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from spectral_callbacks import optim
from tests.contracts import calling_checks, recording_checks, state_checks, step_checks
from tests.contracts.optimizers import OPTIMIZERS, YARDSTICK, Subject, make_parameters

Check = Callable[[Subject], None]
SLOW = {"compiled_step_is_right", "compiled_step_is_one_graph"}


def _checks(module: ModuleType) -> dict[str, Check]:
    functions = inspect.getmembers(module, inspect.isfunction)
    return {name: f for name, f in functions if f.__module__ == module.__name__ and not name.startswith("_")}


CHECKS = {
    name: check
    for module in (step_checks, calling_checks, recording_checks, state_checks)
    for name, check in _checks(module).items()
}
SUBJECTS = [YARDSTICK, *OPTIMIZERS]

torch_compile_may_warn = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning:torch",
    "ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning",
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning",
)


def _pairs(*, applicable: bool) -> list[object]:
    """Each optimizer with each check: its brief settings in the quick tests, all of them in the slow ones."""
    return [
        pytest.param(chosen, name, id=f"{subject.name}-{name}{label}", marks=pytest.mark.slow if slow else ())
        for subject in SUBJECTS
        for name in CHECKS
        if (name not in subject.not_applicable) == applicable
        for chosen, label, slow in ((subject.shortened(), "", name in SLOW), (subject, "-all", True))
        if not (slow and label) or name not in SLOW
    ]


@torch_compile_may_warn
@pytest.mark.parametrize(("subject", "name"), _pairs(applicable=True))
def test_passes_what_pytorch_asks(subject: Subject, name: str) -> None:
    CHECKS[name](subject)


@torch_compile_may_warn
@pytest.mark.parametrize(("subject", "name"), _pairs(applicable=False))
def test_an_excuse_is_needed(subject: Subject, name: str) -> None:
    """What is said not to apply does not pass either: an excuse that is out of date is noticed."""
    assert subject.not_applicable[name]
    with pytest.raises((AssertionError, RuntimeError, TypeError, ValueError, pytest.fail.Exception)):
        CHECKS[name](subject)


def test_excuses_are_of_checks_that_exist() -> None:
    assert all(subject.not_applicable.keys() <= CHECKS.keys() for subject in SUBJECTS)
    assert not YARDSTICK.not_applicable


def test_diffgrad_passes_as_many_as_adam() -> None:
    numbers = {subject.name: len(CHECKS.keys() - subject.not_applicable.keys()) for subject in SUBJECTS}
    assert numbers["Adam"] == len(CHECKS) >= 40
    assert numbers["DiffGrad"] >= numbers["Adam"]
    assert min(numbers.values()) >= 30


class _Overwriting(torch.optim.SGD):
    """Adds the decay to the gradient in place, as many do."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                p.grad.add_(p.detach(), alpha=0.1)
        return super().step(closure)


class _Aliasing(optim.DiffGrad):
    """Keeps the gradient itself as the last one, as the first published code did."""

    def step(self, closure: Any = None) -> Any:
        value = super().step(closure)
        for p, state in self.state.items():
            state["previous_grad"] = p.grad
        return value


class _Grouped(torch.optim.SGD):
    """Counts steps for all parameters together, and slows down by them."""

    count = 0

    def step(self, closure: Any = None) -> Any:
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data.sub_(p.grad, alpha=group["lr"] / self.count)


class _Leaking(torch.optim.SGD):
    """Leaves a part of its state out of what it saves."""

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "state": {}}


class _Rising(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        value = super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.data.add_(p.grad, alpha=2 * group["lr"])
        return value


@pytest.mark.parametrize(
    ("optimizer", "settings", "name"),
    [
        (_Overwriting, {}, "grad_is_left_as_it_was"),
        (_Aliasing, {}, "gradients_may_be_kept"),
        (_Grouped, {}, "parameters_count_their_own_steps"),
        (_Grouped, {}, "groups_are_added_later"),
        (_Leaking, {"momentum": 0.9}, "save_load_equality_with_weights_only"),
        (_Leaking, {"momentum": 0.9}, "can_load_from_to_named_state_dict"),
        (_Rising, {}, "forloop_goes_right_direction"),
        (_Rising, {}, "param_group_with_lrscheduler_goes_right_direction"),
        (_Overwriting, {}, "step_is_noop_for_zero_grads"),
    ],
)
def test_a_planted_error_is_noticed(
    optimizer: type[torch.optim.Optimizer], settings: dict[str, Any], name: str
) -> None:
    """The same check passes without it."""
    sound = Subject(optimizer.__base__, {"default": settings}, ("default",), {}, {}, {})  # type: ignore[arg-type]
    CHECKS[name](sound)
    with pytest.raises(AssertionError):
        CHECKS[name](dataclasses.replace(sound, optimizer=optimizer))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: s.name)
def test_inputs_that_pytorch_names_wrong_are_refused(subject: Subject) -> None:
    """Its own list, where the wheel has it: the errors that every optimizer raises."""
    flags = torch.backends.disable_global_flags.__globals__
    before = dict(flags)
    try:
        named = importlib.import_module("torch.testing._internal.common_optimizers")
    except ImportError as error:
        pytest.skip(f"PyTorch's own test data cannot be imported: {error}")
    finally:  # that import forbids to set global flags for the rest of the process
        flags.update(before)
    inputs = named.get_error_inputs_for_all_optims("cpu", torch.float32)
    assert len(inputs) >= 5
    for wrong in inputs:
        given = wrong.optimizer_error_input
        parameters = make_parameters() if given.params is None else given.params
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(wrong.error_type, match=wrong.error_regex):
                subject(parameters, **given.kwargs)
