"""What PyTorch asks of an optimizer's step, after `TestOptimRenewed` of its test_optim.py.

Each function is one check, named as there, and raises AssertionError where an optimizer fails it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau, StepLR

from tests.contracts.optimizers import Settings, Subject, make_parameters, set_gradients, train
from tests.contracts.temporaries import peak_bytes

SCHEDULERS: tuple[Callable[[torch.optim.Optimizer], LRScheduler], ...] = (
    lambda optimizer: StepLR(optimizer, gamma=0.9, step_size=10),
    lambda optimizer: ReduceLROnPlateau(optimizer),
)


def _linear(dtype: torch.dtype, *, contiguous: bool = True) -> tuple[nn.Parameter, nn.Parameter, Tensor]:
    weight, bias = make_parameters(dtype, ((10, 5), (10,)))
    if not contiguous:
        weight = nn.Parameter(torch.stack([weight.detach()] * 2, dim=-1)[..., 0])
        assert not weight.is_contiguous()
    return weight, bias, make_parameters(dtype, ((5,),), seed=1)[0].detach()


def _descend(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], num_steps: int, *schedulers: Any) -> float:
    """Train, and return the last loss less the first."""

    def closure() -> Any:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    first = closure().item()
    for _ in range(num_steps):
        value: Any = optimizer.step(closure)
        for scheduler in schedulers:
            scheduler.step(value.detach()) if isinstance(scheduler, ReduceLROnPlateau) else scheduler.step()
    return closure().item() - first


def forloop_goes_right_direction(subject: Subject) -> None:
    for settings in subject.all_settings("differentiable"):
        for schedulers in ((), SCHEDULERS):
            for contiguous in (True, False):
                weight, bias, x = _linear(torch.float32, contiguous=contiguous)
                optimizer = subject([weight, bias], **settings)
                change = _descend(
                    optimizer, lambda w=weight, b=bias, x=x: (w.mv(x) + b).pow(2).sum(), 20,
                    *(make(optimizer) for make in schedulers),
                )  # fmt: skip
                assert change > 0 if settings.get("maximize") else change < 0, (settings, change)


def param_group_with_lrscheduler_goes_right_direction(subject: Subject) -> None:
    for settings in subject.all_settings("differentiable"):
        for make in SCHEDULERS:
            weight, bias, x = _linear(torch.float32)
            optimizer = subject([{"params": [weight]}, {"params": [bias], "lr": 0.01}], **settings)
            change = _descend(
                optimizer, lambda w=weight, b=bias, x=x: (w.mv(x) + b).pow(2).sum(), 20, make(optimizer)
            )  # fmt: skip
            assert change > 0 if settings.get("maximize") else change < 0, (settings, change)


def tensor_lr(subject: Subject) -> None:
    for settings in subject.all_settings("differentiable"):
        for lr in (torch.tensor(1e-3), torch.tensor([1e-3]), torch.tensor([[1e-3]])):
            plain, of_tensor = make_parameters(), make_parameters()
            train(subject(plain, **{**settings, "lr": 1e-3}), range(5))
            try:
                optimizer = subject(of_tensor, **{**settings, "lr": lr})
            except ValueError as error:
                if not settings.get("foreach") or "lr as a Tensor is not supported" not in str(error):
                    raise
                continue
            train(optimizer, range(5))
            torch.testing.assert_close(of_tensor, plain)
            torch.testing.assert_close(lr, torch.full_like(lr, 1e-3))


def _complex_is_two_reals(subject: Subject, settings: Settings) -> None:
    reals = make_parameters(torch.float64, ((6, 5, 2), (4, 2)))
    numbers = [nn.Parameter(torch.view_as_complex(p.detach().clone())) for p in reals]
    of_reals, of_numbers = subject(reals, **settings), subject(numbers, **settings)
    for step in range(4):
        set_gradients(reals, step)
        for real, number in zip(reals, numbers, strict=True):
            assert real.grad is not None
            number.grad = torch.view_as_complex(real.grad.clone())
        of_reals.step()
        of_numbers.step()
        for real, number in zip(reals, numbers, strict=True):
            assert number.is_complex()
            torch.testing.assert_close(torch.view_as_real(number), real, rtol=1e-12, atol=1e-14)


def complex_parameters(subject: Subject) -> None:
    for settings in subject.all_settings("differentiable", "fused", but=subject.real):
        _complex_is_two_reals(subject, settings)


def complex_2d(subject: Subject) -> None:
    """A complex number and its two parts descend a Rosenbrock function alike."""
    for settings in subject.all_settings("differentiable", "fused", but=subject.real):
        number = nn.Parameter(torch.tensor(-0.5 + 0.7j, dtype=torch.complex128))
        real, imag = (nn.Parameter(part.detach().clone()) for part in (number.real, number.imag))

        def rosenbrock(x: Tensor, y: Tensor) -> Tensor:
            return ((1 - x) ** 2 + 100 * (y - x**2) ** 2) * 1e-2

        of_number, of_parts = subject([number], **settings), subject([real, imag], **settings)
        for _ in range(3):
            for optimizer in (of_number, of_parts):
                optimizer.zero_grad()
            rosenbrock(number.real, number.imag).backward()
            rosenbrock(real, imag).backward()
            of_number.step()
            of_parts.step()
            torch.testing.assert_close(torch.stack([number.real, number.imag]), torch.stack([real, imag]))


def _same_trajectory(subject: Subject, settings: Settings, one: Settings, other: Settings, **options: Any) -> None:
    """Seven steps: no gradients at the third, the first parameter frozen at the fourth and fifth, a scalar apart."""
    runs = [make_parameters(torch.float64) for _ in range(2)]
    optimizers = [subject(p, **{**settings, **way}) for p, way in zip(runs, (one, other), strict=True)]
    for step in range(7):
        for parameters, optimizer in zip(runs, optimizers, strict=True):
            set_gradients(parameters, step)
            if step == 2:
                optimizer.zero_grad()
            parameters[0].requires_grad_(step not in (3, 4))
            if step in (3, 4):
                parameters[0].grad = None
            optimizer.step()
        torch.testing.assert_close(runs[1], runs[0], **options)
        for left, right in zip(*runs, strict=True):
            states = [optimizer.state[p] for optimizer, p in zip(optimizers, (left, right), strict=True)]
            assert states[0].keys() == states[1].keys()
            for key, value in states[0].items():
                torch.testing.assert_close(states[1][key], value, **options)


def foreach_matches_forloop(subject: Subject) -> None:
    for settings in subject.settings.values():
        _same_trajectory(subject, settings, {"foreach": False}, {"foreach": True})


def fused_matches_forloop(subject: Subject) -> None:
    for settings in subject.settings.values():
        _same_trajectory(subject, settings, {"foreach": False, "fused": False}, {"fused": True})


def set_default_dtype_works_with_foreach(subject: Subject) -> None:
    """A counter of steps is float32, and float64 where that is the default."""
    before = torch.get_default_dtype()
    try:
        for default in (torch.float64, torch.float32):
            torch.set_default_dtype(default)
            for settings in subject.all_settings("differentiable", "fused"):
                parameters = make_parameters(torch.float32)
                optimizer = subject(parameters, **settings)
                train(optimizer, range(2))
                for p in parameters:
                    step = optimizer.state[p].get("step", torch.tensor(0.0))
                    assert isinstance(step, Tensor), type(step)
                    assert step.dtype == default, (settings, step.dtype, default)
    finally:
        torch.set_default_dtype(before)


def mixed_device_dtype(subject: Subject) -> None:
    """Parameters of several types in one group move as each alone does."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float32)
    for settings in subject.all_settings("differentiable", but=subject.noisy):
        together = [make_parameters(dtype, seed=i)[0] for i, dtype in enumerate(dtypes)]
        alone = copy.deepcopy(together)
        optimizers = [subject(together, **settings), *(subject([p], **settings) for p in alone)]
        for step in range(3):
            set_gradients(together, step)
            for p, q in zip(together, alone, strict=True):
                assert p.grad is not None
                q.grad = p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
            assert all(map(torch.equal, together, alone)), settings


def peak_memory_foreach(subject: Subject) -> None:
    """No more bytes live at once than in the plain loop and one more intermediate of every parameter, or a few."""
    for settings in subject.settings.values():
        peaks = {}
        for foreach in (False, True):
            parameters = make_parameters(shapes=((64, 64),) * 10)
            optimizer = subject(parameters, **{**settings, "foreach": foreach})
            train(optimizer, range(2))
            set_gradients(parameters, 2)
            peaks[foreach] = peak_bytes(optimizer.step)
        total = 10 * 64 * 64 * 4
        assert peaks[True] <= peaks[False] + subject.intermediates * total, (settings, peaks)
