"""Multiplicative samplers, against log-normal laws that have closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.optim import multiplicative_langevin_sample, reverse_diffusion

MEAN, STD = 0.3, 0.7


def score(x: Tensor) -> Tensor:
    """x d/dx ln p(x) of a log-normal law."""
    return -1 - (x.abs().log() - MEAN) / STD**2


def noisy_score(x: Tensor, s: Tensor) -> Tensor:
    """The same after multiplicative noise of scale s."""
    return -1 - (x.abs().log() - MEAN) / (STD**2 + s[:, None] ** 2)


def test_score_is_the_derivative_of_the_log_density() -> None:
    x = torch.tensor([0.4, 1.0, 2.5], dtype=torch.float64, requires_grad=True)
    law = torch.distributions.LogNormal(torch.tensor(MEAN).double(), torch.tensor(STD).double())
    (slope,) = torch.autograd.grad(law.log_prob(x).sum(), x)
    torch.testing.assert_close(score(x.detach()), x.detach() * slope)


def test_langevin_samples_the_law_of_its_score(generator: torch.Generator) -> None:
    """With d = 0.01 the deviation of ln x is that of its AR(1), 0.5 % too large."""
    n, d = 40_000, 0.01
    x0 = torch.ones(n, dtype=torch.float64)
    x = multiplicative_langevin_sample(score, x0, step_size=d, num_steps=300, generator=generator)
    y = x.log()
    std = STD / math.sqrt(1 - d / (2 * STD**2))
    assert x.min() > 0
    assert abs(y.mean() - MEAN) < 4 * std / math.sqrt(n)
    assert abs(y.std() / std - 1) < 4 / math.sqrt(2 * n)
    assert abs(y.mean() / MEAN - 1) < 0.06  # 2 % of the scale of ln x
    assert abs(y.std() / STD - 1) < 0.02


def test_langevin_keeps_every_sign(generator: torch.Generator) -> None:
    x0 = torch.tensor([1.0, -1.0]).repeat(50)
    x = multiplicative_langevin_sample(score, x0, step_size=0.1, num_steps=20, generator=generator)
    assert torch.equal(x.sign(), x0)
    assert torch.equal(x0, torch.tensor([1.0, -1.0]).repeat(50))


def test_reverse_diffusion_turns_noise_into_the_data(generator: torch.Generator) -> None:
    """A reverse step from s to s' is exact up to O(v): with 400 scales ln x is within 2 % of its law."""
    n, largest = 20_000, 5.0
    start = (MEAN + math.hypot(STD, largest) * torch.randn(n, 1, generator=generator, dtype=torch.float64)).exp()
    scales = torch.logspace(math.log10(largest), -2, 400).tolist()
    y = reverse_diffusion(noisy_score, start, scales, generator=generator).log()
    assert abs(y.mean() - MEAN) < 4 * STD / math.sqrt(n) + 0.01
    assert abs(y.std() / STD - 1) < 0.02


def test_the_last_scale_ends_at_the_posterior_mean(generator: torch.Generator) -> None:
    x = torch.tensor([[0.5], [3.0]], dtype=torch.float64)
    s = 0.4
    y = reverse_diffusion(noisy_score, x, [s], generator=generator).log()
    posterior = (x.log() * STD**2 + MEAN * s**2) / (STD**2 + s**2)
    torch.testing.assert_close(y, posterior)


def test_samples_are_fixed_by_the_generator_alone() -> None:
    def draw(seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        x = multiplicative_langevin_sample(score, torch.ones(5, 1), step_size=0.1, num_steps=3, generator=g)
        return reverse_diffusion(noisy_score, x, [1.0, 0.5], generator=g)

    state = torch.get_rng_state()
    first = draw(0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))


def test_no_graph_is_kept(generator: torch.Generator) -> None:
    w = torch.ones(1, requires_grad=True)
    x = multiplicative_langevin_sample(
        lambda x: w * score(x), torch.ones(3), step_size=0.1, num_steps=1, generator=generator
    )
    assert not x.requires_grad


def test_what_cannot_be_sampled_is_refused(generator: torch.Generator) -> None:
    with pytest.raises(ValueError, match=r"step_size is 0\.0, and must be positive"):
        multiplicative_langevin_sample(score, torch.ones(1), step_size=0.0, num_steps=1, generator=generator)
    with pytest.raises(ValueError, match=r"num_steps is -1"):
        multiplicative_langevin_sample(score, torch.ones(1), step_size=0.1, num_steps=-1, generator=generator)
    with pytest.raises(ValueError, match=r"x0 \(1,\) is zero in 1 of"):
        multiplicative_langevin_sample(score, torch.zeros(1), step_size=0.1, num_steps=1, generator=generator)
    for scales in ([1.0, 1.0], [0.5, 1.0], [1.0, 0.0]):
        with pytest.raises(ValueError, match=r"noise_scales is .* positive and decreasing"):
            reverse_diffusion(noisy_score, torch.ones(1, 1), scales, generator=generator)
