"""Multiplicative denoising score matching."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spectral_callbacks.optim import multiplicative_score_matching_loss

MEAN, STD = 0.3, 0.7


def test_the_minimiser_is_the_score_of_the_noisy_data(generator: torch.Generator) -> None:
    """Among h = a + b ln x the least squares of the loss gives x ∘ ∇ln p_s of the noisy log-normal law."""
    n = 200_000
    x0 = (MEAN + STD * torch.randn(n, 1, generator=generator, dtype=torch.float64)).exp()
    s = torch.full((n,), 0.5, dtype=torch.float64)
    z = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def h(x: Tensor, scale: Tensor) -> Tensor:
        return coefficients[0] + coefficients[1] * x.log()

    # The loss is quadratic in the coefficients: one Newton step ends at its minimum.
    def loss() -> Tensor:
        return multiplicative_score_matching_loss(h, x0, s, noise=z)

    (slope,) = torch.autograd.grad(loss(), coefficients, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, coefficients, retain_graph=True)[0] for g in slope])
    found = -torch.linalg.solve(hessian, slope.detach())
    variance = STD**2 + 0.5**2
    expected = torch.tensor([-1 + MEAN / variance, -1 / variance], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=4 * 2 / math.sqrt(n))


@pytest.mark.parametrize("std", [0.5, 2.0])
def test_with_the_weight_every_scale_of_an_ignorant_denoiser_costs_one(std: float, generator: torch.Generator) -> None:
    """The best linear denoiser of ln x, of variance σ², errs by s²σ² / (s² + σ²), and the weight is its inverse."""
    n = 100_000
    for scale in (0.05, 0.5, 5.0):
        x0 = (std * torch.randn(n, 1, generator=generator, dtype=torch.float64)).exp()

        def linear(x: Tensor, s: Tensor) -> Tensor:
            return -1 - x.log() / (std**2 + s[:, None] ** 2)

        s = torch.full((n,), scale, dtype=torch.float64)
        loss = multiplicative_score_matching_loss(linear, x0, s, data_std=std, generator=generator)
        assert abs(loss.item() - 1) < 4 * math.sqrt(2 / n)


def test_loss_is_the_definition_written_out() -> None:
    x0 = torch.tensor([[1.0, 2.0], [0.5, 4.0]], dtype=torch.float64)
    z = torch.tensor([[0.3, -1.0], [2.0, 0.0]], dtype=torch.float64)
    scales, std = [0.5, 2.0], 1.5

    def h(x: Tensor, s: Tensor) -> Tensor:
        return x * s[:, None]

    plain = weighted = 0.0
    for i, s in enumerate(scales):
        for j in range(2):
            x = x0[i, j].item() * math.exp(s * z[i, j].item())
            square = (x * s + 1 + z[i, j].item() / s) ** 2
            plain += s**2 * square / 4
            weighted += (s**2 + std**2) / (s * std) ** 2 * s**4 * square / 4
    s = torch.tensor(scales, dtype=torch.float64)
    assert multiplicative_score_matching_loss(h, x0, s, noise=z).item() == pytest.approx(plain, rel=1e-13)
    assert multiplicative_score_matching_loss(h, x0, s, noise=z, data_std=std).item() == pytest.approx(
        weighted, rel=1e-13
    )
