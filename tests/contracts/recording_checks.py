"""What PyTorch asks of steps that are recorded: differentiated, compiled into a graph, or fused into a kernel.

After its test_optim.py and test_compiled_optimizers.py. Each function is one check.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from tests.contracts.optimizers import Settings, Subject, make_parameters, set_gradients, train


def _one_step(
    p: Tensor, grad: Tensor, keys: tuple[str, ...], rest: dict[str, Any], make: Any, *state: Tensor
) -> tuple[Tensor, ...]:
    """A step as a function of the parameter, its gradient and the state."""
    p = p.clone()
    p.grad = grad
    optimizer = make([p])
    optimizer.state[p].update({**copy.deepcopy(rest), **{k: v.clone() for k, v in zip(keys, state, strict=True)}})
    optimizer.step()
    after = [v for v in optimizer.state[p].values() if isinstance(v, Tensor) and v.requires_grad]
    return (p, *after)


def differentiable(subject: Subject) -> None:
    """The derivative through a step equals the difference quotient: in parameter, gradient and state."""
    for settings in subject.settings.values():

        def make(parameters: Any, settings: Any = settings) -> torch.optim.Optimizer:
            return subject(parameters, **{**settings, "differentiable": True})

        [first] = make_parameters(torch.float64, ((3, 2),))
        optimizer = subject([first], **settings)
        train(optimizer, range(3))
        keys = tuple(k for k, v in optimizer.state[first].items() if isinstance(v, Tensor) and v.shape == first.shape)
        rest = {k: v for k, v in optimizer.state[first].items() if k not in keys}
        p, grad, *state = (x.detach() for x in make_parameters(torch.float64, ((3, 2),) * (2 + len(keys)), seed=3))
        inputs = [x.abs() if i > 1 else x for i, x in enumerate((p, grad, *state))]
        for x in inputs:
            x.requires_grad_()
        arguments: Any = (*inputs[:2], keys, rest, make, *inputs[2:])
        assert torch.autograd.gradcheck(_one_step, arguments), settings


def fused_error_on_params_on_meta(subject: Subject) -> None:
    parameter = nn.Parameter(torch.empty(5, 2, device="meta"))
    parameter.grad = torch.empty_like(parameter)
    optimizer = subject([parameter], fused=True)
    with pytest.raises(RuntimeError, match="`fused=True` requires all the params to be floating"):
        optimizer.step()


def no_step_where_a_gradient_scaler_found_an_infinity(subject: Subject) -> None:
    """Whether the scaler skips the step, or the optimizer as a fused Adam does: nothing moves, and nothing counts."""
    for path in subject.paths("differentiable"):
        parameters = make_parameters()
        before = [p.detach().clone() for p in parameters]
        optimizer = subject(parameters, **path)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.ones(()))  # makes its scale
        set_gradients(parameters, 0)
        gradient = parameters[0].grad
        if gradient is not None:
            gradient.view(-1)[0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 2
        assert all(map(torch.equal, parameters, before)), path
        assert not any(state.get("step", 0) for state in optimizer.state.values()), path


def _compiled(subject: Subject) -> list[tuple[Settings, int, int]]:
    """Take six compiled steps, which must be right, and count the graphs and the places where one ended."""
    counts = []
    for path in subject.paths("differentiable", "fused"):
        torch._dynamo.reset()
        counters.clear()
        eager, compiled = make_parameters(torch.float64), make_parameters(torch.float64)
        optimizers = [subject(p, **path) for p in (eager, compiled)]
        counter = CompileCounter()
        step = torch.compile(optimizers[1].step, backend=counter)
        for i in range(6):
            for parameters in (eager, compiled):
                set_gradients(parameters, i)
            optimizers[0].step()
            step()
            torch.testing.assert_close(compiled, eager)
        counts.append((path, counter.frame_count, sum(counters["graph_break"].values())))
    return counts


def compiled_step_is_right(subject: Subject) -> None:
    _compiled(subject)


def compiled_step_is_one_graph(subject: Subject) -> None:
    """Or two, where the first step makes the state.

    PyTorch itself ends a graph once, where `step` turns gradients off.
    """
    for path, graphs, breaks in _compiled(subject):
        assert 1 <= graphs <= 2, (path, graphs)
        assert breaks <= 1, (path, breaks)
