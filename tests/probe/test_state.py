"""What a forward pass may change beside the parameters, and that it all comes back."""

from __future__ import annotations

import collections
import dataclasses
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from spectral_callbacks.probe.state import ModuleState


class AverageMeter:
    def __init__(self) -> None:
        self.total, self.count, self.seen = 0.0, 0, [1.0]

    def update(self, value: float) -> None:
        self.total += value
        self.count += 1
        self.seen.append(value)


@dataclasses.dataclass
class Nested:
    meter: AverageMeter
    by_name: dict[str, list[int]]


class Slotted:
    __slots__ = ("count", "seen")

    def __init__(self) -> None:
        self.count, self.seen = 0, [1]


class SlottedChild(Slotted):
    __slots__ = ("unset", "word")

    def __init__(self) -> None:
        super().__init__()
        self.word = "a"


class Holder(nn.Module):
    """A module with one attribute of the user's."""

    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.inner = nn.Linear(1, 1)
        self.inner.value = value


def same(a: Any, b: Any) -> bool:
    return bool(np.array_equal(a, b)) if isinstance(a, np.ndarray) else a == b


def change_slots(value: Any) -> None:
    value.count += 1
    value.seen.append(2)
    value.unset = 1
    value.word = "b"


def change_nested(value: Nested) -> None:
    value.meter.update(3.0)
    value.meter = AverageMeter()
    value.by_name["a"].append(2)
    value.by_name["b"] = []


# name -> (value, how a training step changes it in place, what of it is compared)
CONTENTS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "list": (lambda: [1, 2], lambda v: v.append(3), list),
    "emptied list": (lambda: [1, 2], lambda v: v.clear(), list),
    "dict": (lambda: {"b": 1, "a": 2}, lambda v: v.update(c=3), lambda v: list(v.items())),
    "reordered dict": (lambda: {"b": 1, "a": 2}, lambda v: v.update(b=v.pop("b")), lambda v: list(v.items())),
    "OrderedDict": (
        lambda: collections.OrderedDict(b=1, a=2),
        lambda v: v.move_to_end("b"),
        lambda v: list(v.items()),
    ),
    "defaultdict": (lambda: collections.defaultdict(list, a=[1]), lambda v: v["b"].append(1), dict),
    "Counter": (lambda: collections.Counter("aab"), lambda v: v.update("abc"), dict),
    "set": (lambda: {1, 2}, lambda v: v.add(3), set),
    "deque": (lambda: collections.deque([1, 2, 3], maxlen=3), lambda v: v.append(4), list),
    "nested containers": (lambda: {"a": [{"b": (1, [2])}]}, lambda v: v["a"][0]["b"][1].append(3), lambda v: repr(v)),
    "UserDict": (lambda: collections.UserDict(a=1), lambda v: v.update(b=2), dict),
    "numpy array": (lambda: np.arange(3.0), lambda v: v.__iadd__(1), lambda v: v.copy()),
    "object array": (lambda: np.array([None, "a"], dtype=object), lambda v: v.__setitem__(0, 1), lambda v: list(v)),
    "plain object": (AverageMeter, lambda v: v.update(2.0), lambda v: (v.total, v.count, list(v.seen))),
    "object in a list": (lambda: [AverageMeter()], lambda v: v[0].update(2.0), lambda v: (v[0].count, list(v[0].seen))),
    "object in a tuple": (
        lambda: (AverageMeter(),),
        lambda v: v[0].update(2.0),
        lambda v: (v[0].count, list(v[0].seen)),
    ),
    "dataclass": (
        lambda: Nested(AverageMeter(), {"a": [1]}),
        change_nested,
        lambda v: (v.meter.count, list(v.meter.seen), repr(v.by_name)),
    ),
    "object with slots": (SlottedChild, change_slots, lambda v: (v.count, list(v.seen), v.word, "unset" in dir_set(v))),
    "torch.Generator": (
        lambda: torch.Generator().manual_seed(1),
        lambda v: torch.rand(1, generator=v),
        lambda v: v.get_state().tolist(),
    ),
    "numpy Generator": (lambda: np.random.default_rng(1), lambda v: v.random(), lambda v: repr(v.bit_generator.state)),
    "numpy legacy generator": (lambda: np.random.RandomState(1), lambda v: v.rand(), lambda v: repr(v.get_state())),
    "Python generator": (lambda: random.Random(1), lambda v: v.random(), lambda v: v.getstate()),
}


def dir_set(value: Any) -> set[str]:
    """Return the slots that are filled."""
    return {name for name in ("count", "seen", "unset", "word") if getattr(value, name, None) is not None}


@pytest.mark.parametrize("kind", CONTENTS)
def test_contents_come_back_in_the_same_object(kind: str) -> None:
    make, change, contents = CONTENTS[kind]
    value = make()
    holder = Holder(value)
    before = contents(value)
    state = ModuleState(holder)
    change(value)
    assert not same(contents(value), before)
    state.restore()
    assert same(contents(value), before)
    assert holder.inner.value is value


@pytest.mark.parametrize("kind", CONTENTS)
def test_replaced_attributes_come_back_as_the_same_object(kind: str) -> None:
    make, _, contents = CONTENTS[kind]
    value = make()
    holder = Holder(value)
    before = contents(value)
    state = ModuleState(holder)
    holder.inner.value = make()
    state.restore()
    assert holder.inner.value is value
    assert same(contents(value), before)


@pytest.mark.parametrize("value", [0, 1.5, "a", None, True, (1, 2), frozenset({1}), 2 + 1j, torch.float32])
def test_immutable_attributes_come_back(value: Any) -> None:
    holder: Any = Holder(value)
    state = ModuleState(holder)
    holder.inner.value = "other"
    state.restore()
    assert holder.inner.value is value


def test_new_attributes_go_and_deleted_ones_return() -> None:
    holder: Any = Holder([1])
    names = list(holder.inner.__dict__)
    state = ModuleState(holder)
    holder.inner.fresh = 1
    del holder.inner.value
    state.restore()
    assert sorted(holder.inner.__dict__) == sorted(names)
    state.restore()
    assert holder.inner.value == [1]


def test_new_attributes_of_plain_objects_go() -> None:
    meter = AverageMeter()
    state = ModuleState(Holder(meter))
    meter.fresh = 1  # type: ignore[attr-defined]
    del meter.count
    state.restore()
    assert sorted(vars(meter)) == ["count", "seen", "total"]


def test_restoring_twice_restores_twice() -> None:
    value = [1]
    state = ModuleState(Holder(value))
    for _ in range(2):
        value.append(2)
        state.restore_attributes()
        assert value == [1]


def test_submodules_parameters_buffers_and_hooks_made_on_the_way_go() -> None:
    holder = Holder()
    parameter = holder.inner.weight
    state = ModuleState(holder)
    holder.head = nn.Linear(1, 1)
    holder.inner.scale = nn.Parameter(torch.ones(1))
    holder.inner.register_buffer("ema", torch.zeros(1), persistent=False)
    holder.inner.register_forward_hook(lambda *_: None)
    holder.inner.register_forward_pre_hook(lambda *_: None)
    holder.inner.register_full_backward_hook(lambda *_: None)
    holder.inner.weight = nn.Parameter(torch.ones(1, 1))
    state.restore()
    assert [name for name, _ in holder.named_modules()] == ["", "inner"]
    assert [name for name, _ in holder.named_parameters()] == ["inner.weight", "inner.bias"]
    assert holder.inner.weight is parameter
    assert not dict(holder.named_buffers())
    assert not holder.inner._non_persistent_buffers_set
    assert not holder.inner._forward_hooks
    assert not holder.inner._forward_pre_hooks
    assert not holder.inner._backward_hooks


def test_removed_submodules_come_back_in_their_place() -> None:
    net = nn.Sequential(nn.Linear(1, 1), nn.Tanh(), nn.Linear(1, 1))
    modules = list(net)
    state = ModuleState(net)
    net[1] = nn.ReLU()
    del net[0]
    state.restore()
    assert all(a is b for a, b in zip(net, modules, strict=True))


class WithBuffers(nn.Module):
    total: Tensor
    alias: Tensor
    empty: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.tensor([1.0, float("nan"), 2.0]))
        self.register_buffer("alias", self.total)
        self.register_buffer("empty", None)
        self.shortcut = self.total
        self.view = self.total[:1]


def change_in_place(module: WithBuffers) -> None:
    module.total += 1


def change_through_alias(module: WithBuffers) -> None:
    module.shortcut.mul_(2)


def change_through_data(module: WithBuffers) -> None:
    module.total.data.mul_(2)


def change_through_view(module: WithBuffers) -> None:
    module.view.fill_(7)


def replace(module: WithBuffers) -> None:
    module.total = torch.zeros(5)


def remove(module: WithBuffers) -> None:
    del module.total


def fill(module: WithBuffers) -> None:
    module.empty = torch.ones(1)


CHANGES = [change_in_place, change_through_alias, change_through_data, change_through_view, replace, remove, fill]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("substitute", [False, True])
def test_buffers_come_back_as_the_same_tensors_with_the_same_values(
    change: Callable[[WithBuffers], None], *, substitute: bool
) -> None:
    module = WithBuffers()
    total, values = module.total, module.total.clone()
    state = ModuleState(module)
    if substitute:
        state.substitute_buffers()
        assert module.total is not total
        assert module.alias is module.total
    with torch.no_grad():
        change(module)
    state.restore()
    assert list(module._buffers) == ["total", "alias", "empty"]
    assert module.total is total
    assert module.alias is total
    assert module.empty is None
    torch.testing.assert_close(total, values, rtol=0, atol=0, equal_nan=True)


def test_each_substitute_starts_from_the_values_found() -> None:
    module = WithBuffers()
    state = ModuleState(module)
    values = module.total.clone()
    for _ in range(2):
        state.substitute_buffers()
        torch.testing.assert_close(module.total, values, equal_nan=True)
        module.total += 1


def test_batch_norm_statistics_come_back_although_their_version_does_not_move() -> None:
    module = nn.BatchNorm1d(2)
    state = ModuleState(module)
    module(torch.randn(4, 2))
    state.restore()
    assert module.running_mean is not None
    assert not module.running_mean.any()
    assert module.num_batches_tracked == 0


def test_modes_come_back_submodule_by_submodule() -> None:
    frozen = nn.BatchNorm1d(1).eval()
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), frozen))
    modes = [m.training for m in module.modules()]
    state = ModuleState(module)
    state.set_training(False)
    assert not any(m.training for m in module.modules())
    state.restore_modes()
    assert [m.training for m in module.modules()] == modes
    module.eval()
    state.restore()
    state.restore_modes()
    assert [m.training for m in module.modules()] == modes


class Box:
    def __init__(self, module: nn.Module) -> None:
        self.module = module


@pytest.mark.parametrize("hide", [lambda m: [m], lambda m: {"a": (m,)}, Box], ids=["list", "dict of tuples", "object"])
def test_modules_hidden_from_torch_are_covered_as_the_others_are(hide: Callable[[nn.Module], Any]) -> None:
    hidden: Any = nn.BatchNorm1d(2)
    hidden.calls = [0]
    holder = Holder(hide(hidden))
    state = ModuleState(holder)
    weight = hidden.weight
    state.set_training(False)
    assert not hidden.training
    hidden.train()
    hidden(torch.randn(4, 2))
    hidden.eval()
    hidden.calls.append(1)
    state.restore_modes()
    state.restore()
    assert hidden.training
    assert hidden.calls == [0]
    assert hidden.num_batches_tracked == 0
    assert any(tensor is weight for tensor in state.tensors)


def test_tensors_outside_buffers_are_listed_for_a_guard_that_watches_writes() -> None:
    kept = [torch.zeros(1) for _ in range(4)]
    meter = AverageMeter()
    meter.tensor = kept[3]  # type: ignore[attr-defined]
    state = ModuleState(Holder([kept[0], {"a": (kept[1], [kept[2]])}, meter]))
    for tensor in kept:
        assert sum(t is tensor for t in state.tensors) == 1


METRICS: dict[str, Callable[[], torchmetrics.Metric]] = {
    "accuracy": lambda: torchmetrics.Accuracy(task="multiclass", num_classes=2),
    "mean": torchmetrics.MeanMetric,
    "concatenation": torchmetrics.CatMetric,
    "collection": lambda: torchmetrics.MetricCollection([torchmetrics.MeanMetric(), torchmetrics.MaxMetric()]),  # type: ignore[dict-item]
}


def feed(metric: Any) -> None:
    if isinstance(metric, MulticlassAccuracy):
        metric(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]))
    else:
        metric(torch.tensor([1.0, 2.0]))


@pytest.mark.parametrize("kind", METRICS)
@pytest.mark.parametrize("fed_before", [0, 1])
def test_metric_objects_compute_as_if_they_had_not_been_fed(kind: str, fed_before: int) -> None:
    metric, expected = METRICS[kind](), METRICS[kind]()
    for _ in range(fed_before):
        feed(metric)
        feed(expected)
    state = ModuleState(Holder(metric))
    feed(metric)
    metric.compute()
    state.restore()
    feed(metric)
    feed(expected)
    assert repr(metric.compute()) == repr(expected.compute())


def test_objects_that_lead_back_to_the_module_are_visited_once() -> None:
    holder: Any = Holder()
    box: Any = Box(holder)
    box.itself = box
    holder.inner.value = [box]
    holder.inner.value.append(holder.inner.value)
    state = ModuleState(holder)
    holder.inner.value.clear()
    state.restore()
    assert holder.inner.value[0] is box


def test_a_container_of_very_many_entries_is_restored_itself() -> None:
    value = [[0] for _ in range(10_001)]
    state = ModuleState(Holder(value))
    value.pop()
    state.restore()
    assert len(value) == 10_001


def test_numpy_arrays_of_more_than_16_mib_are_taken_for_data() -> None:
    data, read_only = np.zeros(2**24 + 1, dtype=np.uint8), np.zeros(1)
    read_only.flags.writeable = False
    state = ModuleState(Holder([data, read_only]))
    data[0] = 1
    state.restore()
    assert data[0] == 1


def test_a_long_chain_of_objects_is_no_obstacle() -> None:
    first = box = AverageMeter()
    for _ in range(2_000):
        box.next = AverageMeter()  # type: ignore[attr-defined]
        box = box.next  # type: ignore[attr-defined]
    state = ModuleState(Holder(first))
    box.count = 1
    state.restore()
    assert box.count == 0


def test_a_scripted_submodule_is_covered() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is on its way out
        scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    module = nn.Sequential(scripted, nn.Tanh())
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    state = ModuleState(module)
    for _ in range(2):
        state.substitute_buffers()
        module(torch.randn(4, 2))
        state.restore_attributes()
    state.restore()
    assert before
    for name, buffer in module.named_buffers():
        assert torch.equal(buffer, before[name])
