"""What FactorImbalance logs of pairs of factors, and how it finds them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.callbacks import FactorImbalance
from spectral_callbacks.callbacks.factor_pairs import FactorPair, find_pairs, named_parameters
from spectral_callbacks.linalg import Status
from tests.callbacks.runs import Regression, complaints, fit, series, steps


class Adapter(nn.Module):
    """A frozen matrix and a trained product of two, as LoRA has them."""

    def __init__(self, n: int, m: int, k: int) -> None:
        super().__init__()
        self.base = nn.Linear(n, m).requires_grad_(False)
        self.lora_A = nn.Linear(n, k, bias=False)
        self.lora_B = nn.Linear(k, m, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


class Adapted(Regression):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(Adapter(3, 6, 2), nn.Tanh(), Adapter(6, 2, 3))


def watcher(pairs: Any = ("*.lora_A:*.lora_B",), **options: Any) -> FactorImbalance:
    return FactorImbalance(list(pairs), **{"every_n_steps": 1, "on_error": "raise", **options})


# ---- Readings


def test_the_numbers_are_those_of_the_dense_matrices() -> None:
    torch.manual_seed(0)
    net = Adapted()
    adapter: Any = copy.deepcopy(net.net[0])
    callback = watcher(rank=1)
    fit(net, callback)
    B, A = adapter.lora_B.weight.double(), adapter.lora_A.weight.double()
    first = callback.history[0]
    expected = (B.T @ B - A @ A.T).norm().item()
    assert first["imbalance/frobenius/net.0.lora_A-lora_B"] == pytest.approx(expected)
    s = torch.linalg.svdvals(B @ A)
    assert first["imbalance/excess_energy/net.0.lora_A-lora_B"] == pytest.approx(s[1:].square().sum().item(), rel=1e-6)
    assert "imbalance/frobenius/net.2.lora_A-lora_B" in first
    assert not [tag for tag in first if "/rank" in tag]
    assert series(callback, "imbalance/status") == [Status.CONVERGED] * 4


def test_the_rank_is_where_singular_values_fall_most_if_none_is_given() -> None:
    net = Adapted()
    adapter: Any = net.net[2]
    with torch.no_grad():
        adapter.lora_A.weight.copy_(torch.diag(torch.tensor([1.0, 1.0, 1e-3])) @ torch.eye(3, 6))
        adapter.lora_B.weight.copy_(torch.eye(2, 3))
    callback = watcher()
    fit(net, callback)
    assert callback.history[0]["imbalance/rank/net.2.lora_A-lora_B"] == 2
    assert callback.history[0]["imbalance/excess_energy/net.2.lora_A-lora_B"] == 0


class Decaying(Regression):
    """A pair of 1 × 1 factors whose product, and loss, is set by hand to a power law in the step."""

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.seen: list[Tensor] = []

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        value = (self.trainer.fit_loop.epoch_loop._batches_that_stepped + 1) ** (self.exponent / 4)
        for layer in (self.first, self.second):
            layer.weight.data.copy_(torch.diag(torch.tensor([1.0, value])))

    def loss(self, batch: Any) -> Tensor:
        return (self.second.weight @ self.first.weight)[1, 1] ** 2

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("exponent", [-2.0, -1.0])
def test_the_rates_are_slopes_of_a_power_law(exponent: float) -> None:
    callback = watcher([("first", "second")], rank=1)
    fit(Decaying(exponent), callback, max_epochs=10)
    last = callback.history[-1]
    for tag in ("", "/first-second"):
        assert last[f"imbalance/rate_exponent{tag}"] == pytest.approx(exponent, abs=1e-3)
        assert 0 <= last[f"imbalance/rate_exponent_error{tag}"] < 1e-3
    assert ["imbalance/rate_exponent" in entry for entry in callback.history[:7]] == [False] * 5 + [True] * 2


def test_a_rate_looks_back_one_decade_and_a_new_fit_begins_anew() -> None:
    callback = watcher([("first", "second")], rank=1, every_n_steps="geometric")
    fit(Decaying(-2.0), callback, max_epochs=50)
    (rate, *_) = callback._rates.values()
    assert all(step >= steps(callback)[-1] / 10 for step, _ in rate._points)
    assert len(rate._points) < 15
    callback.history.clear()
    fit(Decaying(-1.0), callback, max_epochs=3)
    assert callback.history[-1]["imbalance/rate_exponent"] == pytest.approx(-1, abs=1e-3)


class Manual(Adapted):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimization_has_all_but_the_rate_of_the_loss() -> None:
    callback = watcher(rank=1)
    fit(Manual(), callback, max_epochs=3)
    assert len(callback.history) == 12
    assert "imbalance/rate_exponent" not in callback.history[-1]
    assert "imbalance/rate_exponent/net.0.lora_A-lora_B" in callback.history[-1]


def own_loss(module: Any, batch: Any) -> Tensor:
    return module.loss(batch)


def test_under_manual_optimization_a_loss_brings_its_rate() -> None:
    callback = watcher(rank=1, loss=own_loss)
    fit(Manual(), callback, max_epochs=3)
    assert "imbalance/rate_exponent" in callback.history[-1]


def test_factors_that_are_not_finite_are_said_and_the_others_logged() -> None:
    class Broken(Adapted):
        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                adapter: Any = self.net[0]
                adapter.lora_A.weight.data[0, 0] = math.inf

    callback = watcher(every_n_steps=2)
    with pytest.warns(UserWarning, match="nonfinite"):
        fit(Broken(), callback)
    assert series(callback, "imbalance/status") == [Status.CONVERGED, Status.NONFINITE]
    assert "imbalance/frobenius/net.0.lora_A-lora_B" not in callback.history[1]
    assert "imbalance/frobenius/net.2.lora_A-lora_B" in callback.history[1]


# ---- Pairs


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Adapter(4, 5, 2), Adapter(5, 4, 2)])
        self.down, self.up = nn.Linear(7, 2), nn.Linear(2, 6)
        self.squeeze, self.expand = nn.Conv2d(3, 2, 3), nn.Conv2d(2, 4, 1)
        self.F, self.G = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(4, 2))
        self.tied = self.down
        adapters = {"lora_A": nn.Linear(3, 2, bias=False), "lora_B": nn.Linear(2, 3, bias=False)}
        self.peft = nn.ModuleDict({name: nn.ModuleDict({"default": layer}) for name, layer in adapters.items()})


PAIRS: dict[str, tuple[Any, dict[str, tuple[str, str]]]] = {
    "modules": (("down", "up"), {"down-up": ("down.weight", "up.weight")}),
    "one string": ("down:up", {"down-up": ("down.weight", "up.weight")}),
    "a list, as YAML has it": (["down", "up.weight"], {"down-up": ("down.weight", "up.weight")}),
    "parameters": (("G", "F"), {"G-F": ("G", "F")}),
    "a second name of a module": ("tied:up", {"tied-up": ("tied.weight", "up.weight")}),
    "convolutions": ("squeeze:expand", {"squeeze-expand": ("squeeze.weight", "expand.weight")}),
    "a matrix with itself": ("F:F", {"F": ("F", "F")}),
    "stars": (
        "*.lora_A.weight:*.lora_B.weight",
        {
            "blocks.0.lora_A-lora_B": ("blocks.0.lora_A.weight", "blocks.0.lora_B.weight"),
            "blocks.1.lora_A-lora_B": ("blocks.1.lora_A.weight", "blocks.1.lora_B.weight"),
        },
    ),
    "stars for modules": (
        "blocks.*.lora_A:blocks.*.lora_B",
        {
            "blocks.0.lora_A-lora_B": ("blocks.0.lora_A.weight", "blocks.0.lora_B.weight"),
            "blocks.1.lora_A-lora_B": ("blocks.1.lora_A.weight", "blocks.1.lora_B.weight"),
        },
    ),
    "stars for names that end in an adapter's": (
        "*.lora_A.*:*.lora_B.*",
        {
            "blocks.0.lora_A-lora_B": ("blocks.0.lora_A.weight", "blocks.0.lora_B.weight"),
            "blocks.1.lora_A-lora_B": ("blocks.1.lora_A.weight", "blocks.1.lora_B.weight"),
            "peft.lora_A.default-lora_B.default": ("peft.lora_A.default.weight", "peft.lora_B.default.weight"),
        },
    ),
}


@pytest.mark.parametrize("way", PAIRS)
def test_pairs_are_found(way: str) -> None:
    wanted, expected = PAIRS[way]
    found = find_pairs(Zoo(), [wanted])
    assert {tag: (pair.first, pair.second) for tag, pair in found.items()} == expected


def test_pairs_that_are_called_alike_are_told_apart() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"x": nn.Linear(2, 2), "y": nn.Linear(2, 2)})

    found = find_pairs(Two(), ["a.x:a.y", "a.y:a.x", "a.x:a.y"])
    assert sorted(found) == ["a.x-y", "a.y-x"]


def product(pair: FactorPair, net: nn.Module) -> Tensor:
    F, G = pair.factors(named_parameters(net))
    return F @ G.T


def test_the_product_is_what_the_network_computes() -> None:
    net, x = Zoo(), torch.randn(3, 7)
    (pair,) = find_pairs(net, ["down:up"]).values()
    expected = (x @ net.down.weight.T) @ net.up.weight.T
    torch.testing.assert_close(x @ product(pair, net).T, expected.detach())
    (pair,) = find_pairs(net, ["squeeze:expand"]).values()
    images = torch.randn(1, 3, 3, 3)
    through = nn.functional.conv2d(nn.functional.conv2d(images, net.squeeze.weight), net.expand.weight).flatten()
    torch.testing.assert_close(product(pair, net) @ images.flatten(), through.detach())
    (pair,) = find_pairs(net, ["G:F"]).values()
    torch.testing.assert_close(product(pair, net), (net.F @ net.G.T).detach())


BAD_PAIRS: list[tuple[Any, str]] = [
    (("dwn", "up"), r"pairs names 'dwn', which is no parameter.*Did you mean 'down'"),
    (("down", "zzzz"), r"pairs names 'zzzz', .* It has F, G, blocks.0"),
    (("down.bias", "up"), r"down.bias \(2,\) is no matrix"),
    (("down", "base"), r"pairs names 'base'"),
    ("*.lora_A:*.lora_C", r"'\*.lora_A' matches 2 matrices and '\*.lora_C' 0"),
    ("down", r"pairs holds 'down', and must hold pairs of names"),
    (("a", "b", "c"), r"pairs holds \('a', 'b', 'c'\)"),
]


@pytest.mark.parametrize(("pair", "message"), BAD_PAIRS)
def test_names_that_are_no_pair_are_refused_with_what_there_is(pair: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_pairs(Zoo(), [pair])


def test_matrices_that_are_no_factors_are_refused_with_their_shapes() -> None:
    expected = r"blocks.0.base.weight \(5, 4\) and up.weight \(6, 2\) are no factors of one matrix"
    with pytest.raises(ValueError, match=expected):
        find_pairs(Zoo(), ["blocks.0.base:up"])


def test_a_wrong_name_is_said_when_the_fit_begins_and_training_goes_on() -> None:
    callback = watcher([("net.0.lora_A", "net.0.lora_Z")], on_error="warn")
    with pytest.warns(UserWarning, match=r"'net.0.lora_Z', which is no.*Did you mean 'net.0.lora_[AB]'") as warned:
        trainer = fit(Adapted(), callback)
    assert len(complaints(warned)) == 1
    assert trainer.global_step == 4
    assert callback.history == []


MAKE: list[tuple[Callable[[], Any], str]] = [
    (lambda: FactorImbalance([]), r"pairs=\[\] must be a list of pairs"),
    (lambda: FactorImbalance("a:b"), r"pairs='a:b' must be a list of pairs"),
    (lambda: FactorImbalance(["a:b"], rank=0), r"rank=0 must be at least 1"),
]


@pytest.mark.parametrize(("make", "message"), MAKE)
def test_bad_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
