"""What PyTorch asks of how an optimizer is called: groups, hooks, closures, gradients that are missing.

After its test_optim.py; those from `gradients_may_be_kept` on are ours. Each function is one check.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from tests.contracts.optimizers import Subject, make_parameters, set_gradients, train
from tests.contracts.training import plain


def _refuses(error: type[Exception], says: str, make: Callable[[], object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=re.escape(says)):
            make()


def errors(subject: Subject) -> None:
    one, two = make_parameters(shapes=((1, 1), (1, 1)))
    _refuses(TypeError, "params argument given to the optimizer should be an iterable", lambda: subject(one))
    _refuses(UserWarning, "a parameter group with duplicate parameters", lambda: subject([one, one]))
    groups: Any = [{"params": one}, {"params": one}]
    _refuses(ValueError, "some parameters appear in more than one parameter group", lambda: subject(groups))
    lr = torch.tensor([0.001, 0.001])
    _refuses(ValueError, "Tensor lr must be 1-element", lambda: subject([one], lr=lr))
    _refuses(ValueError, "optimizer got an empty parameter list", lambda: subject([]))
    _refuses(ValueError, "all optimizer params should be with/without names", lambda: subject([("weight", one), two]))
    groups = [{"params": [one], "lr": 1e-2}, {"params": [("weight", two)]}]
    _refuses(ValueError, "all optimizer param groups should be with/without names", lambda: subject(groups))


def param_groups_lr(subject: Subject) -> None:
    """A group's learning rate holds for that group: of 0, and with no decay, nothing moves."""
    for settings in subject.all_settings("differentiable"):
        moved, still = make_parameters(shapes=((3, 4), (3, 4)))
        before = [p.detach().clone() for p in (moved, still)]
        train(subject([{"params": [moved]}, {"params": [still], "lr": 0.0}], **{**settings, "lr": 1e-2}), range(2))
        assert not torch.equal(moved, before[0])
        assert torch.equal(still, before[1])


def param_groups_weight_decay(subject: Subject) -> None:
    """A group's decay holds for that group: it pulls towards zero."""
    for path in subject.paths("differentiable"):
        parameters = make_parameters(torch.float64, ((3, 4), (3, 4)))
        parameters[1].data.copy_(parameters[0].data)
        decayed, free = parameters
        groups = [{"params": [decayed], "weight_decay": 0.5}, {"params": [free]}]
        optimizer = subject(groups, **{**path, "weight_decay": 0.0})
        for _ in range(3):
            for p in parameters:
                p.grad = 1e-9 * torch.ones_like(p)
            optimizer.step()
        assert (decayed.abs() < free.abs()).all(), path


def step_is_noop_when_params_have_no_grad(subject: Subject) -> None:
    for settings in subject.all_settings():
        parameters = make_parameters()
        before = [p.detach().clone() for p in parameters]
        optimizer = subject(parameters, **settings)
        optimizer.step()
        assert all(map(torch.equal, parameters, before))
        assert not any(optimizer.state.values())


def step_is_noop_for_zero_grads(subject: Subject) -> None:
    for settings in subject.all_settings("differentiable", but=subject.noisy):
        parameters = make_parameters()
        before = [p.detach().clone() for p in parameters]
        optimizer = subject(parameters, **{**settings, "weight_decay": 0.0})
        for _ in range(3):
            for p in parameters:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        assert all(map(torch.equal, parameters, before)), settings


def optimizer_can_be_printed(subject: Subject) -> None:
    for settings in subject.all_settings():
        text = repr(subject([{"params": make_parameters()[:1]}], **settings))
        assert text.startswith(subject.name)
        assert "Parameter Group 0" in text


def step_hooks(subject: Subject) -> None:
    """The order is: before of all optimizers, before of this one, after of this one, after of all."""
    order: list[str] = []
    parameters = make_parameters()
    optimizer = subject(parameters)

    def note(name: str) -> Any:
        return lambda opt, args, kwargs: order.append(name)

    handles = [
        register_optimizer_step_pre_hook(note("all before")), register_optimizer_step_post_hook(note("all after")),
        optimizer.register_step_pre_hook(note("before")), optimizer.register_step_post_hook(note("after")),
    ]  # fmt: skip
    set_gradients(parameters, 0)
    optimizer.step()
    for handle in handles:
        handle.remove()
    optimizer.step()
    assert order == ["all before", "before", "after", "all after"]


def step_pre_hook_changes_the_arguments(subject: Subject) -> None:
    parameters, seen = make_parameters(), []
    optimizer = subject(parameters)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: (args[:1], {"closure": lambda: seen.append(1) or 2.0}))
    set_gradients(parameters, 0)
    assert optimizer.step() == 2.0
    assert seen == [1]


def second_order_optims_return_consistent_types(subject: Subject) -> None:
    """What a closure returns is what the step returns, of whatever type."""
    parameters = make_parameters()
    optimizer = subject(parameters)
    set_gradients(parameters, 0)
    for value in (1.5, torch.tensor(1.5), None):

        def closure(value: Any = value) -> Any:
            return value

        assert optimizer.step(closure) is value
    assert optimizer.step() is None


def gradients_may_be_kept(subject: Subject) -> None:
    """`zero_grad(set_to_none=False)` and accumulation write each gradient where the last one was."""
    for settings in subject.all_settings("differentiable"):
        fresh, kept = make_parameters(), make_parameters()
        optimizers = [subject(fresh, **settings), subject(kept, **settings)]
        for step in range(4):
            set_gradients(fresh, step)
            for p, q in zip(fresh, kept, strict=True):
                assert p.grad is not None
                q.grad = p.grad.clone() if q.grad is None else q.grad.copy_(p.grad)
            for optimizer in optimizers:
                optimizer.step()
        assert plain(kept) == plain(fresh), settings


def grad_is_left_as_it_was(subject: Subject) -> None:
    for settings in subject.all_settings("differentiable"):
        parameters = make_parameters()
        optimizer = subject(parameters, **settings)
        for step in range(3):
            set_gradients(parameters, step)
            gradients = [p.grad for p in parameters]
            before = copy.deepcopy(gradients)
            optimizer.step()
            assert all(p.grad is g for p, g in zip(parameters, gradients, strict=True))
            assert plain(gradients) == plain(before), settings


def parameters_count_their_own_steps(subject: Subject) -> None:
    """A parameter whose first gradient comes late moves as if training began there."""
    for settings in subject.all_settings("differentiable", but=subject.noisy):
        early, late = make_parameters(torch.float64, ((3, 4), (3, 4)))
        alone = nn.Parameter(late.detach().clone())
        both, one = subject([early, late], **settings), subject([alone], **settings)
        for step in range(8):
            set_gradients([early], step)
            if step >= 5:
                set_gradients([late], step)
                set_gradients([alone], step)
                one.step()
            both.step()
        assert torch.equal(late, alone), settings


def no_graph_is_kept(subject: Subject) -> None:
    for settings in subject.all_settings("differentiable"):
        parameters = make_parameters()
        optimizer = subject(parameters, **settings)
        train(optimizer, range(2))
        state = [v for p in parameters for v in optimizer.state[p].values() if isinstance(v, Tensor)]
        assert not any(x.requires_grad for x in state)
        assert all(p.is_leaf and p.requires_grad for p in parameters)


def half_types_step(subject: Subject) -> None:
    """bfloat16 parameters move as those of the float64 run do, by more than what they differ by."""
    rates = {name: 0.1 for name in ("lr", "adamw_lr") if name in subject.arguments}
    for settings in subject.all_settings("differentiable"):
        begin = make_parameters(torch.bfloat16, ((6, 5), (5,)))
        fine, coarse = (make_parameters(dtype, ((6, 5), (5,))) for dtype in (torch.float64, torch.bfloat16))
        for parameters in (fine, coarse):
            train(subject(parameters, **{**settings, **rates}), range(3))
        for p, q, w in zip(coarse, fine, begin, strict=True):
            moved = (q - w.double()).norm()
            assert moved > 0.1
            assert (p.double() - q).norm() < 0.5 * moved, settings


def sparse_gradients_are_refused(subject: Subject) -> None:
    [parameter] = make_parameters(shapes=((4, 3),))
    parameter.grad = torch.zeros(4, 3).index_fill_(0, torch.tensor([1]), 1.0).to_sparse()
    _refuses(RuntimeError, "not support sparse gradients", subject([parameter]).step)


def closure_runs_with_gradients(subject: Subject) -> None:
    """Called under `no_grad`, the step still gives its closure gradients, and once."""
    for settings in subject.all_settings("differentiable"):
        parameters, calls = make_parameters(), []
        before = [p.detach().clone() for p in parameters]
        optimizer = subject(parameters, **settings)

        def closure(parameters: Any = parameters, calls: list[int] = calls, opt: Any = optimizer) -> Any:
            opt.zero_grad()
            calls.append(1)
            loss = sum((p.square().sum() for p in parameters), torch.tensor(0.0))
            loss.backward()
            return loss

        with torch.no_grad():
            loss = optimizer.step(closure)
        assert isinstance(loss, Tensor)
        assert calls == [1]
        assert not any(map(torch.equal, parameters, before))
