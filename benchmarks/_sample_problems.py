"""Networks and batches of N samples each, whose per-sample gradients the benchmarks compare."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from _problems import Attention, Block, Problem, digits, images, seeded, tanh_mlp, text

LENGTH = 64  # of a sequence


class GPT(nn.Module):
    """A decoder-only transformer over characters, every parameter in a module that per-sample tools know.

    Args:
        num_symbols: Size of the alphabet.
        width: Of the residual stream.
        num_layers: Number of blocks.
        num_heads: Of the attention.
    """

    def __init__(self, num_symbols: int, *, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.symbol = nn.Embedding(num_symbols, width)
        self.place = nn.Embedding(LENGTH, width)
        self.blocks = nn.Sequential(*(Attention(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_symbols)

    def forward(self, symbols: Tensor) -> Tensor:  # (N, T) -> (N, T, num_symbols)
        """Return the logits of the next symbol at every place."""
        places = torch.arange(symbols.shape[1], device=symbols.device).expand_as(symbols)
        return self.head(self.norm(self.blocks(self.symbol(symbols) + self.place(places))))


def token_cross_entropy(
    outputs: Tensor,  # (N, T, num_symbols)
    targets: Tensor,  # (N, T)
) -> Tensor:
    """Return the mean over all tokens."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())


def mlp(num_samples: int) -> Problem:
    """64-256-256-10 tanh, 85 thousand weights, on digits."""
    x, y = digits()
    return Problem("MLP", tanh_mlp(256, seed=0), F.cross_entropy, x[:num_samples], y[:num_samples])


def resnet(num_samples: int, *, width: int = 24) -> Problem:
    """ResNet-8 with GroupNorm, 174 thousand weights, on digits upsampled to 16x16.

    Its activation is smooth: at a kink, rounding decides between two gradients that differ by 1e-3.
    """
    x, y = images()

    def norm(channels: int) -> nn.GroupNorm:
        return nn.GroupNorm(8, channels)

    def block(width_in: int, width: int) -> Block:
        return Block(width_in, width, norm, F.silu)

    with seeded(0):
        model = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1, bias=False), norm(width), nn.SiLU(),
            block(width, width), block(width, 2 * width), block(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10),
        )  # fmt: skip
    return Problem("ResNet", model, F.cross_entropy, x[:num_samples], y[:num_samples])


def gpt(num_samples: int, *, width: int = 144, num_layers: int = 4, num_heads: int = 4) -> Problem:
    """GPT of 1 million weights on sequences of 64 characters of Python's help texts."""
    symbols, num_symbols = text()
    starts = torch.randint(len(symbols) - LENGTH, (num_samples, 1), generator=torch.Generator().manual_seed(0))
    chosen = symbols[starts + torch.arange(LENGTH + 1)]
    with seeded(0):
        model = GPT(num_symbols, width=width, num_layers=num_layers, num_heads=num_heads)
    return Problem("GPT", model, token_cross_entropy, chosen[:, :-1], chosen[:, 1:])


def large_gpt(num_samples: int) -> Problem:
    """The same of 10.7 million weights."""
    return gpt(num_samples, width=384, num_layers=6, num_heads=6)


MLP, RESNET, SMALL_GPT, LARGE_GPT = "MLP, 85 k", "ResNet, 174 k", "GPT, 1 M", "GPT, 10.7 M"
_BUILDERS: dict[str, Callable[[int], Problem]] = {
    MLP: mlp,
    RESNET: resnet,
    SMALL_GPT: gpt,
    LARGE_GPT: large_gpt,
}


def build(name: str, num_samples: int) -> Problem:
    """Return a problem by name."""
    return _BUILDERS[name](num_samples)
