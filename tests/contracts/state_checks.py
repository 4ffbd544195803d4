"""What PyTorch asks of an optimizer's state, after its test_optim.py. Each function is one check."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from tests.contracts.optimizers import Settings, Subject, make_parameters, set_gradients, train
from tests.contracts.training import plain

LATER_FLAGS = ("foreach", "differentiable", "maximize", "capturable", "fused")  # that older checkpoints lack


def _trained(subject: Subject, settings: Settings, num_steps: int = 3) -> tuple[list[nn.Parameter], Any]:
    parameters = make_parameters()
    optimizer = subject(parameters, **settings)
    train(optimizer, range(num_steps))
    return parameters, optimizer


def _twin(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return [nn.Parameter(p.detach().clone()) for p in parameters]


def _goes_on_alike(one: Any, other: Any, steps: Any = range(3, 6)) -> None:
    train(one, steps)
    train(other, steps)
    assert plain(one.state_dict()["state"]) == plain(other.state_dict()["state"])
    for left, right in zip(one.param_groups, other.param_groups, strict=True):
        assert all(map(torch.equal, left["params"], right["params"]))


def non_empty_state(subject: Subject) -> None:
    """After a step there is a state of tensors and numbers for each parameter, and no more for a second step."""
    for settings in subject.all_settings("differentiable"):
        parameters, optimizer = _trained(subject, settings, 1)
        keys = [set(optimizer.state[p]) for p in parameters]
        assert all(keys), settings
        train(optimizer, range(1, 3))
        assert [set(optimizer.state[p]) for p in parameters] == keys


def state_holds_tensors_and_numbers_only(subject: Subject) -> None:
    for settings in subject.all_settings("differentiable"):
        parameters, optimizer = _trained(subject, settings)
        assert set(optimizer.state) <= set(parameters)
        values = [v for p in parameters for v in optimizer.state[p].values()]
        assert all(isinstance(v, (Tensor, int, float)) for v in values), settings
        assert all(v.is_contiguous() and v.untyped_storage().nbytes() <= max(64, 2 * v.nbytes)
                   for v in values if isinstance(v, Tensor) and v.dim()), settings  # fmt: skip


def state_dict_deterministic(subject: Subject) -> None:
    """Two runs have equal state dicts, loading one changes nothing, and the run goes on from it alike."""
    for settings in subject.all_settings("differentiable"):
        for named in (False, True):
            parameters = make_parameters()
            given: Any = [(f"p{i}", p) for i, p in enumerate(parameters)] if named else parameters
            optimizer = subject(given, **settings)
            train(optimizer, range(3))
            state = optimizer.state_dict()
            again = _trained(subject, settings)[1].state_dict()
            assert plain(state["state"]) == plain(again["state"])
            assert ("param_names" in state["param_groups"][0]) == named
            copied = _twin(parameters)
            other = subject([(f"p{i}", p) for i, p in enumerate(copied)] if named else copied, **settings)
            before = plain(state)
            other.load_state_dict(copy.deepcopy(state))
            assert plain(other.state_dict()) == before
            _goes_on_alike(optimizer, other)


def cpu_load_state_dict(subject: Subject) -> None:
    """Loading casts the moments to the parameter's type, and a step counter stays what it is."""
    for settings in subject.all_settings("differentiable"):
        _, optimizer = _trained(subject, settings)
        wide = make_parameters(torch.float64)
        other = subject(wide, **settings)
        other.load_state_dict(optimizer.state_dict())
        source = optimizer.state_dict()["state"]
        for key, state in other.state_dict()["state"].items():
            for name, value in state.items():
                was = source[key][name]
                if name == "step" or not isinstance(value, Tensor) or not value.is_floating_point():
                    assert plain(value) == plain(was), name
        train(other, range(3, 5))
        assert all(p.dtype == torch.float64 and p.isfinite().all() for p in wide)


def can_load_older_state_dict(subject: Subject) -> None:
    for settings in subject.settings.values():
        if settings.keys() & set(LATER_FLAGS):
            continue
        parameters, optimizer = _trained(subject, settings)
        older = copy.deepcopy(optimizer.state_dict())
        for group in older["param_groups"]:
            for flag in LATER_FLAGS:
                group.pop(flag, None)
        other = subject(_twin(parameters), **settings)
        other.load_state_dict(older)
        _goes_on_alike(optimizer, other)


def can_load_from_to_named_state_dict(subject: Subject) -> None:
    for settings in subject.all_settings("differentiable"):
        for first, second in ((True, False), (False, True), (True, True)):
            parameters = make_parameters()
            copied = _twin(parameters)
            names = [f"p{i}" for i in range(len(parameters))]
            one = subject(list(zip(names, parameters, strict=True)) if first else parameters, **settings)
            train(one, range(3))
            for p, q in zip(parameters, copied, strict=True):
                q.data.copy_(p.data)
            other = subject(list(zip(names, copied, strict=True)) if second else copied, **settings)
            other.load_state_dict(copy.deepcopy(one.state_dict()))
            assert ("param_names" in other.state_dict()["param_groups"][0]) == (first or second)
            _goes_on_alike(one, other)


def save_load_equality_with_weights_only(subject: Subject) -> None:
    for settings in subject.all_settings("differentiable"):
        parameters, optimizer = _trained(subject, settings)
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        assert plain(loaded) == plain(optimizer.state_dict())
        other = subject(_twin(parameters), **settings)
        other.load_state_dict(loaded)
        _goes_on_alike(optimizer, other)


def load_nontensor_step(subject: Subject) -> None:
    """Older checkpoints count steps in plain numbers."""
    for settings in subject.all_settings("differentiable"):
        parameters, optimizer = _trained(subject, settings)
        older = copy.deepcopy(optimizer.state_dict())
        for state in older["state"].values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].item()
        other = subject(_twin(parameters), **settings)
        other.load_state_dict(older)
        _goes_on_alike(optimizer, other)


def state_dict_hooks(subject: Subject) -> None:
    """A hook before `state_dict` sees the optimizer, one after it may change what is returned."""
    _, optimizer = _trained(subject, {})
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "test": True})
    optimizer.register_state_dict_post_hook(lambda opt, state: seen.append("after"))
    assert optimizer.state_dict()["test"] is True
    assert seen == ["before", "after"]


def load_state_dict_hooks(subject: Subject) -> None:
    """Hooks before and after loading, in their order, and one that changes what is loaded."""
    parameters, optimizer = _trained(subject, {})
    state = optimizer.state_dict()
    other = subject(_twin(parameters))
    order: list[int] = []

    def halve(opt: Any, loaded: Any) -> Any:
        order.append(1)
        groups = [{**group, "lr": group["lr"] / 2} for group in loaded["param_groups"]]
        return {**loaded, "param_groups": groups}

    other.register_load_state_dict_pre_hook(halve)
    other.register_load_state_dict_pre_hook(lambda opt, loaded: order.append(0), prepend=True)
    other.register_load_state_dict_post_hook(lambda opt: order.append(3))
    other.register_load_state_dict_post_hook(lambda opt: order.append(2), prepend=True)
    other.load_state_dict(state)
    assert order == [0, 1, 2, 3]
    assert other.param_groups[0]["lr"] == state["param_groups"][0]["lr"] / 2


def deepcopy_copies_all_public_attrs(subject: Subject) -> None:
    for settings in subject.all_settings("differentiable"):
        for through in (copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))):
            _, optimizer = _trained(subject, settings)
            other = through(optimizer)
            public = [{name for name in vars(opt) if not name.startswith("_")} for opt in (optimizer, other)]
            assert public[0] == public[1]
            assert plain(other.state_dict()) == plain(optimizer.state_dict())
            assert repr(other) == repr(optimizer)
            _goes_on_alike(optimizer, other)


def groups_are_added_later(subject: Subject) -> None:
    """A group added during training gets the defaults, and moves from then on as if it were alone."""
    for settings in subject.all_settings("differentiable", but=subject.noisy):
        early, late = make_parameters(torch.float64, ((3, 4), (3, 4)))
        alone = nn.Parameter(late.detach().clone())
        optimizer, other = subject([early], **settings), subject([alone], **settings)
        train(optimizer, range(2))
        optimizer.add_param_group({"params": [late]})
        for step in range(3):
            set_gradients([early], step)
            set_gradients([late], step)
            set_gradients([alone], step)
            optimizer.step()
            other.step()
        assert torch.equal(late, alone), settings
