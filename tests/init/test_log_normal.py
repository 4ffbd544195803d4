"""Log-normal weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from spectral_callbacks.init import log_normal_, log_normal_weights_


def drawn(ratio: float = 1.0, generator: torch.Generator | None = None, **settings: bool) -> Tensor:
    return log_normal_(torch.empty(2000, 256, dtype=torch.float64), ratio, generator=generator, **settings)


@pytest.mark.parametrize(("ratio", "mu", "sigma"), [(1.0, -4.0150, 0.8326), (1.5, -3.6896, 0.6064)])
def test_logarithms_have_the_mean_and_the_deviation_of_the_ratio(
    ratio: float, mu: float, sigma: float, generator: torch.Generator
) -> None:
    logarithms = drawn(ratio, generator).abs().log()
    n = logarithms.numel()
    assert abs(logarithms.mean().item() - mu) < 4 * sigma / math.sqrt(n) + 5e-5
    assert abs(logarithms.std().item() - sigma) < 4 * sigma / math.sqrt(2 * n) + 5e-5
    standard = (logarithms - logarithms.mean()) / logarithms.std()
    assert abs(standard.pow(3).mean()) < 4 * math.sqrt(6 / n)


@pytest.mark.parametrize("ratio", [1.0, 1.5])
def test_variance_is_that_of_pytorch_and_the_mean_is_zero(ratio: float, generator: torch.Generator) -> None:
    w = drawn(ratio, generator)
    assert abs(w.square().mean().item() * 3 * 256 - 1) < 0.02
    assert abs(w.mean().item()) < 4 / math.sqrt(3 * 256 * w.numel())
    theirs = nn.Linear(256, 2000).weight
    assert w.std().item() == pytest.approx(theirs.std().item(), rel=0.02)


def test_fan_in_of_a_convolution_counts_its_window(generator: torch.Generator) -> None:
    w = log_normal_(torch.empty(500, 4, 3, 3), gain=2.0, generator=generator)
    assert w.square().mean().item() == pytest.approx(4 / 36, rel=0.05)


def test_each_weight_has_a_sign_of_its_own_or_each_input_one(generator: torch.Generator) -> None:
    signs = drawn(generator=generator).sign()
    assert set(signs.flatten().tolist()) == {-1, 1}
    assert signs.mean(0).abs().max() < 0.2
    by_input = drawn(generator=generator, same_sign_inputs=True).sign()
    assert (by_input == by_input[0]).all()
    assert 80 < (by_input[0] > 0).sum() < 176
    conv = log_normal_(torch.empty(6, 5, 3, 3), generator=generator, same_sign_inputs=True).sign()
    assert (conv == conv[:1, :, :1, :1]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_hold_no_zero(dtype: torch.dtype, generator: torch.Generator) -> None:
    w = log_normal_(torch.empty(300, 300, dtype=dtype), mean_std_ratio=0.05, gain=1e-4, generator=generator)
    assert not (w == 0).any()


def test_the_generator_is_the_only_source(generator: torch.Generator) -> None:
    state = torch.get_rng_state()
    first = drawn(generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, drawn(generator=torch.Generator().manual_seed(0)))


def test_every_weight_of_a_module_is_drawn_and_nothing_else(generator: torch.Generator) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 8)), nn.LSTM(8, 8))
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    assert log_normal_weights_(net, generator=generator) is net
    for name, p in net.named_parameters():
        assert torch.equal(p.detach(), before[name]) == (p.ndim < 2)
        assert p.requires_grad


def test_what_has_no_fan_in_or_no_law_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        log_normal_(torch.empty(3))
    with pytest.raises(ValueError, match=r"mean_std_ratio is 0\.0"):
        log_normal_(torch.empty(3, 3), 0.0)
    with pytest.raises(ValueError, match=r"gain is inf"):
        log_normal_(torch.empty(3, 3), gain=math.inf)
