from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_callbacks.operators import Cut, Hessian
from spectral_callbacks.probe import Probe, undisturbed
from spectral_callbacks.probe.outputs import NoOutputsError, cut, intercepted, named_module
from tests.oracles import relative_error


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.encoder = nn.Sequential(self.first, nn.Tanh())
        self.head = nn.Linear(4, 2)
        self.never = nn.Linear(2, 2)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.head(self.encoder(x))
        return self.kept


X, Y = torch.linspace(-1, 1, 15).double().view(5, 3), torch.linspace(0, 1, 10).double().view(5, 2)


@pytest.fixture
def net() -> Net:
    return Net().double()


def cut_of(module: nn.Module, name: str, loss: Callable[[], Tensor]) -> Cut:
    return cut(module, name, loss, list(module.parameters()))


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in module.modules())


@pytest.mark.parametrize("name", ["", "head"])
def test_the_loss_is_cut_at_the_outputs(net: Net, name: str) -> None:
    found = cut_of(net, name, lambda: F.mse_loss(net(X), Y))
    assert [z.shape for z in found.outputs] == [(5, 2)]
    assert torch.equal(found.outputs[0], found.leaves[0])
    assert found.loss.item() == pytest.approx(F.mse_loss(net(X), Y).item(), rel=1e-15)
    (slope,) = torch.autograd.grad(found.loss, found.leaves)
    torch.testing.assert_close(slope, 2 * (net(X) - Y).detach() / 10)
    weight = torch.autograd.grad(found.outputs, [net.first.weight], [slope])
    torch.testing.assert_close(weight, torch.autograd.grad(F.mse_loss(net(X), Y), [net.first.weight]))
    assert hooks(net) == 0


class Named(NamedTuple):
    logits: Tensor
    kind: str


@dataclasses.dataclass
class Returned:
    logits: Tensor
    more: list[Any]


RETURNED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "tuple": (lambda z: (z, torch.arange(3)), lambda out: out[0]),
    "list": (lambda z: [torch.arange(3), z], lambda out: out[1]),
    "dict": (lambda z: {"logits": z, "name": "x"}, lambda out: out["logits"]),
    "named tuple": (lambda z: Named(z, "x"), lambda out: out.logits),
    "dataclass": (lambda z: Returned(z, [3, None]), lambda out: out.logits),
    "nested": (lambda z: {"a": [Returned(torch.arange(2), [(z,)])]}, lambda out: out["a"][0].more[0][0]),
    "twice": (lambda z: (z, z), lambda out: (out[0] + out[1]) / 2),
}


@pytest.mark.parametrize("kind", RETURNED)
def test_outputs_are_found_wherever_they_are_nested(net: Net, kind: str) -> None:
    pack, unpack = RETURNED[kind]

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Any:
            return pack(self.net(x))

    module = Wrapped()
    found = cut_of(module, "", lambda: F.mse_loss(unpack(module(X)), Y))
    assert len(found.outputs) == 1
    (slope,) = torch.autograd.grad(found.loss, found.leaves)
    torch.testing.assert_close(slope, 2 * (net(X) - Y).detach() / 10)


def test_every_floating_tensor_of_every_call_counts(net: Net) -> None:
    lstm = nn.LSTM(3, 2).double()
    found = cut_of(lstm, "", lambda: lstm(X)[0].sum() * lstm(-X)[1][1].sum())
    assert [tuple(z.shape) for z in found.outputs] == [(5, 2), (1, 2), (1, 2)] * 2


def test_a_loss_may_write_to_the_outputs(net: Net) -> None:
    found = cut_of(net, "head", lambda: F.mse_loss(net(X).mul_(2), Y))
    (slope,) = torch.autograd.grad(found.loss, found.leaves)
    torch.testing.assert_close(slope, 4 * (2 * net(X) - Y).detach() / 10)
    assert torch.equal(found.leaves[0], net(X))


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.compile(Net(), backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("name", ["", "net", "net.head"])
def test_a_compiled_module_goes_by_its_own_name(name: str) -> None:
    torch.compiler.reset()
    module = Compiled().double()
    before = F.mse_loss(module(X), Y)  # compiles it
    with undisturbed(module) as isolation:
        found = isolation.evaluate(lambda: cut_of(module, name, lambda: F.mse_loss(module(X), Y)), seed=0)
        assert found.loss.item() == pytest.approx(before.item(), rel=1e-12)
        assert len(found.outputs) == 1
    assert hooks(module) == 0


def test_a_module_that_compiled_itself_is_seen(net: Net) -> None:
    torch.compiler.reset()
    net.compile(backend="aot_eager")
    with undisturbed(net) as isolation:
        found = isolation.evaluate(lambda: cut_of(net, "head", lambda: F.mse_loss(net(X), Y)), seed=0)
    assert len(found.outputs) == 1


def test_a_module_with_two_names_goes_by_both(net: Net) -> None:
    both = nn.ModuleDict({"one": net, "other": net})
    found = [named_module(both, f"{name}.head", knob="outputs") for name in both]
    assert found[0] is found[1] is net.head


# ---- Errors


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("haed", r"outputs='haed' names no submodule of Net; did you mean 'head'\? outputs=\"\" is the module itself"),
        ("encoder.O", r"did you mean 'encoder\.[01]' or 'encoder\.[01]' or 'encoder'\?"),
        ("zzz", r"names no submodule of Net; it has 'first', 'encoder', 'head', 'never'; outputs="),
    ],
)
def test_an_unknown_name_is_answered_with_what_comes_close(net: Net, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_of(net, name, lambda: net(X).sum())


def test_a_module_without_submodules_says_only_what_its_own_name_is() -> None:
    linear = nn.Linear(3, 2).double()
    with pytest.raises(ValueError, match=r"names no submodule of Linear; outputs=\"\" is the module itself\."):
        cut_of(linear, "head", lambda: linear(X).sum())


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("never", lambda net: net(X).sum()),
        ("", lambda net: net.forward(X).sum()),
        ("head", lambda net: F.linear(X @ X.mT[:, :4], net.head.weight).sum()),
    ],
)
def test_a_submodule_that_does_not_run_is_named(net: Net, name: str, run: Callable[[Net], Tensor]) -> None:
    with pytest.raises(
        ValueError, match=f"outputs='{name}' did not run while the loss was evaluated; name a submodule"
    ):
        cut_of(net, name, lambda: run(net))
    assert hooks(net) == 0


def test_a_submodule_without_floating_outputs_is_named(net: Net) -> None:
    class Words(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    module = nn.Sequential(net, Words())
    with pytest.raises(ValueError, match="outputs='1' returned no floating tensor"):
        cut_of(module, "1", lambda: module(X).double().sum())


AROUND: dict[str, tuple[str, Callable[[Net], Tensor], str]] = {
    "penalty": ("", lambda net: net(X).sum() + net.head.weight.square().sum(), "head.weight"),
    "later layers": ("encoder", lambda net: net(X).sum(), "head.weight, head.bias"),
    "attribute": ("encoder", lambda net: net(X).sum() * 0 + net.kept.sum(), "head.weight, head.bias"),
    "everything": ("", lambda net: net(X).sum() + sum(p.sum() for p in net.parameters()), r"first.*, \.\.\."),
}


@pytest.mark.parametrize("way", AROUND)
def test_a_loss_that_goes_around_the_outputs_is_refused(net: Net, way: str) -> None:
    name, loss, parameters = AROUND[way]
    with pytest.raises(
        ValueError, match=f"the loss depends on {parameters} other than through outputs='{name}', .* weight_decay"
    ):
        cut_of(net, name, lambda: loss(net))
    assert hooks(net) == 0


def test_parameters_that_are_not_measured_may_come_after_the_outputs(net: Net) -> None:
    found = cut(net, "encoder", lambda: F.mse_loss(net(X), Y), list(net.encoder.parameters()))
    assert [z.shape for z in found.outputs] == [(5, 4)]


def test_the_hook_goes_also_after_an_error(net: Net) -> None:
    def broken() -> Tensor:
        net(X)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cut_of(net, "head", broken)
    assert hooks(net) == 0


def test_interception_replaces_what_the_rest_sees(net: Net) -> None:
    with intercepted(net, "encoder", torch.zeros_like):
        assert torch.equal(net(X), net.head.bias.expand(5, 2))
    assert not torch.equal(net(X), net.head.bias.expand(5, 2))


# ---- Of a probe


def mse(module: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(module(batch[0]), batch[1])


def probe_of(net: Net, outputs: str | None) -> Probe:
    return Probe(net, torch.optim.SGD(net.parameters(), lr=0.1), [(X, Y)], loss=mse, outputs=outputs)


def test_a_probe_without_outputs_says_what_to_pass(net: Net) -> None:
    with probe_of(net, None) as probe:
        for quantity in (probe.gauss_newton, probe.sample_curvature):
            with pytest.raises(
                NoOutputsError, match=r"needs the model's outputs, and outputs= is None; pass the dotted"
            ):
                quantity()
        probe.per_sample_gram()
    assert issubclass(NoOutputsError, ValueError)


def test_outputs_may_be_named_by_whoever_looks(net: Net) -> None:
    mine = torch.Generator()
    with probe_of(net, None) as probe:
        seen = probe.seen_by(mine, "head")
        assert seen.outputs == "head"
        assert seen.generator is mine
        assert probe.outputs is None
        assert seen.gauss_newton() is probe.seen_by(mine, "head").gauss_newton()
        assert seen.gauss_newton() is not probe.seen_by(mine, "").gauss_newton()
        assert seen.seen_by(mine).outputs == "head"
        same = [probe.seen_by(mine, name).gauss_newton().to_dense() for name in ("", "head")]
        assert seen.operator(Hessian) is probe.operator(Hessian)
    assert torch.equal(*same)


@pytest.mark.parametrize("name", ["", "head"])
def test_gauss_newton_leaves_no_trace(net: Net, name: str) -> None:
    given = [torch.full_like(p, 7.0) for p in net.parameters()]
    for p, g in zip(net.parameters(), given, strict=True):
        p.grad = g
    attributes, random = dict(vars(net)), torch.get_rng_state()
    with probe_of(net, name) as probe:
        assert probe.gauss_newton().to_dense().any()
    assert dict(vars(net)) == attributes
    assert net.kept is None
    assert hooks(net) == 0
    assert torch.equal(random, torch.get_rng_state())
    for p, g in zip(net.parameters(), given, strict=True):
        assert p.grad is g
        assert (g == 7).all()


def test_gauss_newton_sees_the_mask_of_dropout_that_the_loss_sees() -> None:
    module = nn.Sequential(nn.Linear(3, 20), nn.Dropout(0.5), nn.Linear(20, 2)).double()
    module[0].requires_grad_(False)  # what is left is linear, so that the Hessian is the same matrix
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with Probe(module, optimizer, [(X, Y), (Y @ torch.ones(2, 3).double(), Y)], loss=mse, outputs="") as probe:
        G, H = probe.gauss_newton().to_dense(), probe.operator(Hessian).to_dense()
    assert relative_error(G, H) < 1e-12
