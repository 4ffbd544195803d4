"""Activations: the right tensor of the right layer, and a clear word where there is none."""

from __future__ import annotations

import contextlib
import re
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from spectral_callbacks.probe import Layer, Probe, activations, find_layers


class Net(nn.Module):
    """Layers that return all that a layer can return."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5))
        self.lstm = nn.LSTM(4, 2, batch_first=True)
        self.packed = Packing()
        self.mapping = Mapping()
        self.twice = nn.ReLU(inplace=True)
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.encoder(x)
        out, _ = self.lstm(h[:, None])
        self.packed(out)
        named = self.mapping(out)
        return self.twice(self.twice(named["last_hidden_state"])).sum() + named["tuple"][0].sum()


class Packing(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return pack_padded_sequence(x, torch.ones(len(x), dtype=torch.long), batch_first=True)


class Mapping(nn.Module):
    def forward(self, x: Tensor) -> Any:
        return OrderedDict(last_hidden_state=2 * x, tuple=(x[:, 0], x), nothing=None)


BATCH = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def opened(module: nn.Module, batch: Any = BATCH) -> Iterator[Probe]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with Probe(module, optimizer, [batch], loss=lambda net, x: net(x).sum(), mode="eval") as probe:
        yield probe


def refuse(layer: Layer, reason: str) -> None:
    raise AssertionError(reason)


def outputs(module: nn.Module, *patterns: str) -> dict[str, Tensor]:
    with opened(module) as probe:
        layers = find_layers(module, patterns)
        ((_, found),) = activations(probe, layers, seed=0, left_out=refuse)
    return {layer.name: x for layer, x in found.items()}


def test_they_are_what_the_layers_return_in_eval_mode_without_a_graph() -> None:
    net = Net()
    found = outputs(net, "encoder", "encoder.0")
    h = net.encoder[0](BATCH)
    torch.testing.assert_close(found, {"encoder": h.tanh(), "encoder.0": h})
    assert not any(x.requires_grad for x in found.values())
    assert net.training


def test_entries_of_tuples_and_mappings_are_named_behind_colons() -> None:
    net = Net()
    found = outputs(net, "lstm:0", "lstm:1:0", "mapping:last_hidden_state", "mapping:tuple:1")
    out, (h, _) = net.lstm(net.encoder.eval()(BATCH)[:, None])
    assert {name: x.shape for name, x in found.items()} == {
        "lstm:0": out.shape,
        "lstm:1:0": h.shape,
        "mapping:last_hidden_state": out.shape,
        "mapping:tuple:1": out.shape,
    }
    torch.testing.assert_close(found["lstm:0"], out.detach())
    torch.testing.assert_close(found["mapping:last_hidden_state"], 2 * out.detach())


def test_what_follows_in_place_does_not_reach_them() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True))
    torch.testing.assert_close(outputs(net, "0")["0"], net[0](BATCH).detach())


def test_patterns_match_whole_names_dots_included() -> None:
    names = [layer.name for layer in find_layers(Net(), ["enc*", "encoder.[01]"])]
    assert names == ["encoder", "encoder.0", "encoder.1", "encoder.2"]


def test_a_layer_that_is_named_and_met_by_a_pattern_is_there_once_and_counts_as_named() -> None:
    found = find_layers(Net(), ["encoder.*", "encoder.1"])
    assert [(layer.name, layer.is_chosen) for layer in found] == [
        ("encoder.0", False),
        ("encoder.1", True),
        ("encoder.2", False),
    ]


def test_names_of_a_compiled_module_are_those_it_had() -> None:
    net = Net()
    net.encoder = torch.compile(net.encoder, backend="eager")  # pyright: ignore[reportAttributeAccessIssue]
    assert [layer.name for layer in find_layers(net, ["encoder.0", "encoder"])] == ["encoder.0", "encoder"]
    assert [layer.name for layer in find_layers(net, ["encoder*"])] == [
        *("encoder", "encoder.0", "encoder.1", "encoder.2")
    ]
    found = outputs(net, "encoder.0", "encoder")
    torch.testing.assert_close(found["encoder"], found["encoder.0"].tanh())


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["encodr"], r"layers='encodr' names no submodule of Net; did you mean 'encoder'"),
        (["encodr.*"], r"layers='encodr\.\*' matches no submodule of Net; it has 'encoder\.\d'"),
        ([], r"layers=\[\] names no layer"),
    ],
)
def test_a_layer_that_is_not_there_is_refused_with_the_names_that_come_close(patterns: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_layers(Net(), patterns)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("lstm", r"'lstm' returned tuple, and features are one tensor; name the entry that is meant: lstm:0, lstm:1\."),
        ("mapping", r"returned OrderedDict.*mapping:last_hidden_state, mapping:tuple, mapping:nothing\."),
        ("mapping:nothing", r"'mapping:nothing' returned NoneType, and features are one tensor; name a submodule"),
        ("mapping:hidden", r"returned OrderedDict without an entry 'hidden'; name the entry that is meant"),
        ("lstm:7", r"returned tuple without an entry '7'; name the entry"),
        ("lstm:x", r"returned tuple without an entry 'x'"),
        ("encoder:0", r"'encoder:0' returned Tensor, which has no entries; leave ':0' out"),
        ("packed", r"'packed' returned a PackedSequence"),
        ("packed:0", r"PackedSequence, which has no entries"),
        ("twice", r"'twice' ran 2 times in one evaluation"),
        ("unused", r"'unused' did not run"),
    ],
)
def test_a_layer_without_one_tensor_is_refused_if_named_and_left_out_if_met(pattern: str, message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        outputs(net, pattern)
    name, *path = pattern.split(":")
    left: list[str] = []
    with opened(net) as probe:
        layers = find_layers(net, [":".join([f"{name[:-1]}[{name[-1]}]", *path]), "encoder.0"])
        ((_, found),) = activations(probe, layers, seed=0, left_out=lambda layer, reason: left.append(reason))
    assert [layer.name for layer in found] == ["encoder.0"]
    assert len(left) == 1
    assert re.search(message, left[0])


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left(fails: bool) -> None:
    net = Net()
    with pytest.raises(ValueError) if fails else contextlib.nullcontext():  # noqa: PT011
        outputs(net, "lstm" if fails else "lstm:0")
    assert not any(module._forward_hooks for module in net.modules())


def test_batches_come_one_at_a_time() -> None:
    net = nn.Sequential(nn.Linear(3, 4))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ran: list[int] = []

    def loss(module: nn.Module, x: Tensor) -> Tensor:
        ran.append(len(x))
        return module(x).sum()

    with Probe(net, optimizer, list(BATCH.split(2)), loss=loss) as probe:
        seen = activations(probe, find_layers(net, ["0"]), seed=0, left_out=refuse)
        assert [(len(batch), len(ran)) for batch, _ in seen] == [(2, 1), (2, 2), (1, 3)]
