"""Running a model's own loss in the middle of training leaves no trace."""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from spectral_callbacks.probe import undisturbed
from tests.faults import NestedBackward


def everything(module: nn.Module) -> dict[str, Any]:
    """Return all that training could notice, in a form that compares by value."""
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": repr(np.random.get_state()),
        "python": random.getstate(),
        "parameters": [(p.tolist(), p.requires_grad, p.data_ptr()) for p in module.parameters()],
        "gradients": [None if p.grad is None else (p.grad.tolist(), id(p.grad)) for p in module.parameters()],
        "buffers": [(name, b.tolist(), id(b)) for name, b in module.named_buffers()],
        "modes": [m.training for m in module.modules()],
        "attributes": [repr({k: v for k, v in vars(m).items() if k[0] != "_"}) for m in module.modules()],
        "grad enabled": torch.is_grad_enabled(),
        "math attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()),
    }


class Busy(nn.Module):
    """Does in its forward pass all that users do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))
        self.teacher = nn.Linear(3, 2).requires_grad_(False)
        self.accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=2)
        self.register_buffer("running", torch.zeros(2))
        self.running: Tensor
        self.calls = 0
        self.losses: list[float] = []
        self.by_kind: dict[str, list[int]] = {"train": []}
        self.generator = torch.Generator().manual_seed(3)
        self.numpy_generator = np.random.default_rng(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x + 0.1 * torch.randn(x.shape)) * (1 + np.random.rand()) + random.random()
        self.calls += 1
        self.by_kind["train"].append(self.calls)
        self.running.mul_(0.9).add_(y.detach().mean(0))
        for teacher, student in zip(self.teacher.parameters(), self.body[0].parameters(), strict=True):
            teacher.data.mul_(0.9).add_(student.data.mean(), alpha=0.1)
        with torch.no_grad():
            target = self.teacher(x) + torch.randn(2, generator=self.generator) + self.numpy_generator.random()
        self.accuracy(y, target.argmax(1))
        loss = (y - target - self.running).square().mean() * self.calls
        self.losses.append(loss.item())
        return loss


@pytest.fixture
def busy() -> Busy:
    torch.manual_seed(0)
    module = Busy()
    module.body[2].eval()
    module(torch.ones(4, 3)).backward()
    return module


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-1, 1, 12).reshape(4, 3)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("num_evaluations", [0, 1, 3])
def test_nothing_that_training_could_notice_changes(busy: Busy, x: Tensor, mode: Any, num_evaluations: int) -> None:
    before = everything(busy)
    with undisturbed(busy, mode=mode) as isolation:
        for _ in range(num_evaluations):
            loss = isolation.evaluate(lambda: busy(x), seed=1)
            gradient = torch.autograd.grad(loss, list(busy.body.parameters()), create_graph=True)
            torch.autograd.grad([g.sum() for g in gradient], list(busy.body.parameters()))
    assert everything(busy) == before


def test_the_comparison_sees_a_loss_run_without_isolation(busy: Busy, x: Tensor) -> None:
    before = everything(busy)
    busy(x)
    after = everything(busy)
    assert {key for key in before if before[key] != after[key]} >= {
        "torch", "numpy", "python", "parameters", "buffers", "attributes",
    }  # fmt: skip


def test_training_goes_on_as_if_nothing_had_been(x: Tensor) -> None:
    losses = []
    for measured in (False, True):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        module = Busy()
        for _ in range(3):
            if measured:
                with undisturbed(module) as isolation:
                    isolation.evaluate(functools.partial(module, x), seed=1)
            module(x)
        losses.append((module.losses, module.accuracy.compute().item()))
    assert losses[0] == losses[1]


def test_every_evaluation_starts_from_the_same_state(busy: Busy, x: Tensor) -> None:
    with undisturbed(busy) as isolation:
        values = [isolation.evaluate(lambda: busy(x), seed=1).item() for _ in range(3)]
    assert len(set(values)) == 1


def test_dropout_masks_are_frozen_across_evaluations_and_follow_the_seed() -> None:
    module = nn.Dropout(0.5)
    with undisturbed(module) as isolation:
        masks = [isolation.evaluate(lambda: module(torch.ones(64)), seed=s) for s in (0, 0, 1)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


def test_without_a_seed_the_closure_draws_what_training_draws_next(busy: Busy, x: Tensor) -> None:
    with undisturbed(busy) as isolation:
        isolation.evaluate(lambda: busy(x), seed=4)
        probed = [isolation.evaluate(lambda: busy(x), seed=None).item() for _ in range(2)]
    assert probed == [busy(x).item()] * 2


def test_modes_and_buffers_that_the_closure_changes_are_back_for_the_next_evaluation() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def loss() -> Tensor:
        assert module[1].training
        assert "late" not in dict(module.named_buffers())
        module[1].eval()
        module.register_buffer("late", torch.ones(1))
        return module(torch.ones(3, 2)).sum()

    with undisturbed(module) as isolation:
        for _ in range(2):
            isolation.evaluate(loss, seed=0)
    assert module[1].training
    assert "late" not in dict(module.named_buffers())


def test_eval_switches_every_submodule_and_brings_its_own_mode_back() -> None:
    frozen = nn.BatchNorm1d(1).eval()
    module = nn.Sequential(nn.Dropout(), nn.Sequential(frozen, nn.Dropout()))
    with undisturbed(module, mode="eval"):
        assert not any(m.training for m in module.modules())
    assert [m.training for m in module.modules()] == [True, True, True, False, True]


def test_train_leaves_a_frozen_batch_norm_frozen() -> None:
    module = nn.Sequential(nn.BatchNorm1d(1)).train()
    module[0].eval()
    with undisturbed(module, mode="train"):
        assert not module[0].training


def frozen_in_place(teacher: nn.Module, student: nn.Module) -> None:
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
            t.lerp_(s, 0.1)


def frozen_through_data(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.data.mul_(0.9).add_(s.data, alpha=0.1)


def frozen_by_assignment(teacher: nn.Module, student: nn.Module) -> None:
    for t, s in zip(teacher.parameters(), student.parameters(), strict=True):
        t.data = t.data * 0.9 + s.data * 0.1


def frozen_by_loading(teacher: nn.Module, student: nn.Module) -> None:
    teacher.load_state_dict(student.state_dict())


UPDATES = [frozen_in_place, frozen_through_data, frozen_by_assignment, frozen_by_loading]


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_moving_average_of_the_weights_is_put_back(
    update: Callable[[nn.Module, nn.Module], None], *, hidden: bool
) -> None:
    student, teacher = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)
    module: Any = nn.ModuleDict({"student": student})
    module.teacher = [teacher] if hidden else teacher
    before = [(p.clone(), p.data_ptr()) for p in teacher.parameters()]

    def loss() -> Tensor:
        update(teacher, student)
        with torch.no_grad():
            target = teacher(torch.ones(1, 2))
        return (student(torch.ones(1, 2)) - target).square().sum()

    with undisturbed(module) as isolation:
        losses = {isolation.evaluate(loss, seed=0).item() for _ in range(2)}
    assert len(losses) == 1
    for p, (value, address) in zip(teacher.parameters(), before, strict=True):
        assert torch.equal(p, value)
        assert p.data_ptr() == address


def trainable_in_place(p: Tensor) -> None:
    with torch.no_grad():
        p.clamp_(-0.01, 0.01)


def trainable_through_data(p: Tensor) -> None:
    p.data.mul_(0.5)


def trainable_by_assignment(p: Tensor) -> None:
    p.data = p.data * 0.5


@pytest.mark.parametrize("write", [trainable_in_place, trainable_through_data, trainable_by_assignment])
def test_a_loss_that_writes_to_trainable_parameters_is_refused_and_they_are_put_back(
    write: Callable[[Tensor], None],
) -> None:
    last = nn.Linear(2, 1)
    module = nn.Sequential(nn.Linear(2, 2), last)
    before = [p.clone() for p in module.parameters()]

    def loss() -> Tensor:
        write(last.weight)
        return module(torch.ones(1, 2)).sum()

    with undisturbed(module) as isolation:
        with pytest.raises(RuntimeError, match=r"writes to the trainable parameters 1\.weight, so it is no function"):
            isolation.evaluate(loss, seed=0)
        for p, value in zip(module.parameters(), before, strict=True):
            assert torch.equal(p, value)


def test_requires_grad_comes_back() -> None:
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)

    def loss() -> Tensor:
        value = module(torch.ones(1, 2)).sum()
        module.requires_grad_(not module.weight.requires_grad)
        return value

    with undisturbed(module) as isolation:
        isolation.evaluate(loss, seed=0)
        isolation.evaluate(loss, seed=0)
    assert [p.requires_grad for p in module.parameters()] == [True, False]


@pytest.mark.parametrize("where", ["inside the closure", "outside of it"])
def test_an_exception_changes_nothing_either(busy: Busy, x: Tensor, where: str) -> None:
    before = everything(busy)

    def fail() -> Tensor:
        busy(x)
        raise KeyError("planted")

    def probe() -> None:
        with undisturbed(busy, mode="eval") as isolation:
            isolation.evaluate(fail if where == "inside the closure" else lambda: busy(x), seed=0)
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        probe()
    assert everything(busy) == before


def test_it_nests(busy: Busy, x: Tensor) -> None:
    before = everything(busy)
    with undisturbed(busy) as outer:
        first = outer.evaluate(lambda: busy(x), seed=0).item()
        with undisturbed(busy, mode="eval") as inner:
            inner.evaluate(lambda: busy(x), seed=0)
        assert outer.evaluate(lambda: busy(x), seed=0).item() == first
    assert everything(busy) == before


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_also_where_they_are_off(context: Callable[[], Any]) -> None:
    module = nn.Linear(2, 1)
    with context(), undisturbed(module) as isolation:
        loss = isolation.evaluate(lambda: module(torch.ones(1, 2)).sum(), seed=0)
        assert torch.equal(torch.autograd.grad(loss, module.weight)[0], torch.ones(1, 2))
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("had_gradient", [False, True])
def test_gradients_survive_a_backward_pass_inside_the_backward_pass(*, had_gradient: bool) -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 1)
    module = nn.Sequential(first, second)
    if had_gradient:
        module(torch.ones(1, 2)).sum().backward()
    before = [(p.grad, None if p.grad is None else p.grad.clone()) for p in module.parameters()]
    with undisturbed(module) as isolation:
        loss = isolation.evaluate(lambda: NestedBackward.apply(first(torch.ones(1, 2)), second).sum(), seed=0)
        torch.autograd.grad(loss, first.weight)
    for p, (gradient, value) in zip(module.parameters(), before, strict=True):
        assert p.grad is gradient
        assert value is None or torch.equal(value, gradient if gradient is not None else torch.zeros(()))


NETS: dict[str, Callable[[], nn.Module]] = {
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 2)),
    "batch norm": lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)),
    "batch norm in eval mode": lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2).eval()),
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 2)),
}


@pytest.mark.parametrize("kind", NETS)
def test_an_early_graph_is_still_good_after_a_later_evaluation(kind: str, x: Tensor) -> None:
    torch.manual_seed(0)
    module = NETS[kind]()
    before = everything(module)
    with undisturbed(module) as isolation:
        first, second = (isolation.evaluate(lambda: module(x).square().sum(), seed=0) for _ in range(2))
        gradients = [torch.autograd.grad(loss, list(module.parameters())) for loss in (first, second)]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)
    assert everything(module) == before
