"""A residual network that estimates the Hyvärinen score of noisy positive data."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScoreNetwork(nn.Module):
    """The Hyvärinen score x ∘ ∇ln p_s(x) of data under multiplicative noise x₀ exp(s z), by a residual MLP.

    In y = ln x the noise is additive, so that the preconditioning of Karras et al. 2022 (arXiv:2206.00364) applies: the
    denoiser D(y, s) = c_skip y + c_out F(c_in y, s) has inputs and targets of variance 1 at every s, and the score is
    h = (D - y) / s² - 1.

    Args:
        num_features: Length of a sample.
        width: Units of a hidden layer.
        num_blocks: Residual blocks, of two layers each.

    Example:
        >>> ScoreNetwork(num_features=4, width=8)(torch.ones(3, 4), torch.ones(3)).shape
        torch.Size([3, 4])
    """

    def __init__(self, num_features: int = 64, width: int = 256, num_blocks: int = 4) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("std", torch.ones(()))
        self.entrance = nn.Linear(num_features, width)
        self.scale = nn.Sequential(_Waves(width), nn.Linear(width, width), nn.SiLU())
        self.blocks = nn.ModuleList(_Block(width) for _ in range(num_blocks))
        self.exit = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_features))

    def measure(self, x: Tensor) -> None:
        """Take mean and deviation of ln x from the data, (n, features); one of each for all features."""
        deviation, mean = torch.std_mean(x.log())
        self.std.copy_(deviation)
        self.mean.copy_(mean)

    def forward(self, x: Tensor, noise_scale: Tensor) -> Tensor:
        """Return the score, (n, features) and (n,) -> (n, features)."""
        s = noise_scale[:, None]
        y = x.log() - self.mean
        variance = s.square() + self.std.square()
        hidden = self.entrance(y * variance.rsqrt())
        embedding = self.scale(noise_scale.log() / 4)
        for block in self.blocks:
            hidden = block(hidden, embedding)
        denoised = self.std.square() / variance * y + s * self.std * variance.rsqrt() * self.exit(hidden)
        return (denoised - y) / s.square() - 1


class _Waves(nn.Module):
    """Sines and cosines of a number, of random frequencies that are not trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frequencies: Tensor
        self.register_buffer("frequencies", 2 * torch.pi * torch.randn(width // 2))

    def forward(self, number: Tensor) -> Tensor:  # (n,) -> (n, width)
        angles = number[:, None] * self.frequencies
        return torch.cat([angles.sin(), angles.cos()], 1)


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, width)
        self.second = nn.Linear(width, width)

    def forward(self, hidden: Tensor, embedding: Tensor) -> Tensor:
        inner = nn.functional.silu(self.first(self.norm(hidden) + embedding))
        return hidden + self.second(inner)
