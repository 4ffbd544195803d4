"""Biases of two parts."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.init import SplitBias, split_bias


def parts(layer: nn.Module, name: str = "bias") -> tuple[Tensor, Tensor]:
    both = dict(layer.get_submodule(f"parametrizations.{name}").named_parameters())
    return both["original0"].detach(), both["original1"].detach()


LAYERS = [
    nn.Linear(16, 5000), nn.Conv2d(4, 5000, 2), nn.LayerNorm(5000), nn.BatchNorm1d(5000), nn.GroupNorm(2, 5000),
]  # fmt: skip


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_parts_are_uniform_and_of_opposite_signs(layer: nn.Module, generator: torch.Generator) -> None:
    layer = split_bias(copy.deepcopy(layer), generator)
    bound = 0.25 if isinstance(layer, nn.Linear | nn.Conv2d) else 1e-4  # 1/√16
    positive, negative = parts(layer)
    for part in (positive, -negative):
        assert part.min() > 0
        assert part.max() < math.sqrt(2) * bound
        assert part.max() > 0.99 * math.sqrt(2) * bound
    bias = layer.bias
    assert isinstance(bias, Tensor)
    assert torch.equal(bias.detach(), positive + negative)
    deviation = bound / math.sqrt(3)  # PyTorch's own of U(-bound, bound)
    assert abs(bias.mean().item()) < 4 * deviation / math.sqrt(5000)
    assert bias.std().item() == pytest.approx(deviation, rel=0.05)


def test_a_layer_computes_with_the_sum(generator: torch.Generator) -> None:
    first, norm = nn.Linear(4, 3), nn.LayerNorm(3)
    weights = first.weight, norm.weight
    net = split_bias(nn.Sequential(first, nn.Tanh(), norm), generator)
    x = torch.randn(5, 4, generator=generator)
    hidden = torch.tanh(x @ weights[0].T + sum(parts(first)))
    expected = nn.functional.layer_norm(hidden, (3,), weights[1], sum(parts(norm), torch.zeros(3)))
    torch.testing.assert_close(net(x), expected)


def test_both_parts_receive_the_gradient_of_the_bias() -> None:
    layer = split_bias(nn.Linear(2, 3))
    layer(torch.ones(4, 2)).sum().backward()
    for name, p in layer.named_parameters():
        if "bias" in name:
            assert torch.equal(p.grad, torch.full((3,), 4.0))  # pyright: ignore[reportArgumentType]


def test_attention_is_split_and_its_fast_path_sees_the_sum(generator: torch.Generator) -> None:
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    split_bias(block, generator)
    assert not [name for name, p in block.named_parameters() if p.ndim == 1 and (p == 0).any()]
    x = torch.randn(2, 3, 8, generator=generator)
    with torch.no_grad():
        for layer in (block.linear2, block.self_attn.out_proj):
            setattr(layer, "bias", torch.ones(8))  # noqa: B010 - PyTorch's types want a Parameter here
        fast = block(x)
    torch.testing.assert_close(fast, block.train()(x), rtol=1e-4, atol=1e-5)


def test_an_assigned_bias_is_kept_and_stays_split() -> None:
    layer = split_bias(nn.Linear(4, 3))
    setattr(layer, "bias", torch.tensor([0.0, 1.0, -2.0]))  # noqa: B010 - PyTorch's types want a Parameter here
    positive, negative = parts(layer)
    torch.testing.assert_close(layer.bias, torch.tensor([0.0, 1.0, -2.0]))
    assert positive.min() > 0
    assert negative.max() < 0
    p, n = SplitBias(0.5).right_inverse(torch.tensor([1.0, -1.0]))
    assert torch.equal(p, torch.tensor([1.5, 0.5]))
    assert torch.equal(n, torch.tensor([-0.5, -1.5]))


def test_a_state_dict_and_a_deep_copy_hold_both_parts(generator: torch.Generator) -> None:
    net = split_bias(nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)), generator)
    x = torch.randn(4, 2, 5, generator=generator)
    net(x)
    net.eval()
    other = split_bias(nn.Sequential(nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3))).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(x), net(x))
    assert torch.equal(copy.deepcopy(net)(x), net(x))


def test_splitting_twice_is_splitting_once(generator: torch.Generator) -> None:
    net = split_bias(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2, bias=False)), generator)
    before = [p.detach().clone() for p in net.parameters()]
    names = [name for name, _ in net.named_parameters()]
    assert split_bias(net) is net
    assert [name for name, _ in net.named_parameters()] == names
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before, strict=True))


def test_a_frozen_bias_stays_frozen() -> None:
    layer = nn.Linear(2, 3)
    layer.bias.requires_grad_(False)
    split_bias(layer)
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == ["weight"]
