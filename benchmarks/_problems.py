"""Networks and batches that the benchmarks measure on, trained a little where that matters."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pydoc_data.topics import topics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss as a function of the weights: a network in eval mode, a criterion and one batch.

    Attributes:
        name: What the tables call it.
        model: The network.
        criterion: (outputs, targets) -> scalar.
        inputs: Of the batch.
        targets: Of the batch.
    """

    name: str
    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    inputs: Tensor
    targets: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        """The weights, in the order of the module."""
        return list(self.model.parameters())

    @property
    def size(self) -> int:
        """Number n of weights."""
        return sum(p.numel() for p in self.model.parameters())

    def loss(self) -> Tensor:  # ()
        """Return the loss with its graph."""
        return self.criterion(self.model(self.inputs), self.targets)

    def gradient(self) -> tuple[Tensor, ...]:
        """Return the gradient: the unit of cost."""
        return torch.autograd.grad(self.loss(), self.parameters)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside, and put it back after."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def digits() -> tuple[Tensor, Tensor]:  # (1797, 64), (1797,)
    """Return scikit-learn's digits, gray values in [0, 1]."""
    x, y = load_digits(return_X_y=True)
    return torch.tensor(x, dtype=torch.float32) / 16, torch.tensor(y)


def shuffled(num_samples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of full mini-batches, epoch after epoch, each in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(num_samples, generator=generator).split(batch_size):
            if len(chosen) == batch_size:
                yield chosen


def train(problem: Problem, optimizer: torch.optim.Optimizer, batches: Iterator[tuple[Tensor, Tensor]]) -> Problem:
    """Take one step a batch in train mode; return the problem in eval mode, which all peers insist on."""
    problem.model.train()
    for inputs, targets in batches:
        optimizer.zero_grad()
        problem.criterion(problem.model(inputs), targets).backward()
        optimizer.step()
    optimizer.zero_grad()
    problem.model.eval()
    return problem


def tanh_mlp(width: int, seed: int) -> nn.Sequential:
    """Return a 64-width-width-10 network."""
    with seeded(seed):
        return nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 10))


def mlp(*, seed: int = 0, num_steps: int = 300) -> Problem:
    """64-256-256-10 tanh, cross-entropy on all 1,797 digits, after SGD with momentum."""
    x, y = digits()
    model = tanh_mlp(256, seed)
    stream = itertools.islice(shuffled(len(x), 64, seed), num_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return train(Problem("MLP", model, F.cross_entropy, x, y), optimizer, ((x[i], y[i]) for i in stream))


class Block(nn.Module):
    """Two convolutions beside a shortcut; a wider block halves the image."""

    def __init__(
        self,
        width_in: int,
        width: int,
        norm: Callable[[int], nn.Module] = nn.BatchNorm2d,
        activation: Callable[[Tensor], Tensor] = F.relu,
    ) -> None:
        super().__init__()
        self.activation = activation
        stride = 1 if width_in == width else 2
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = norm(width)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:  # (batch, width_in, height, width)
        """Return the features."""
        y = self.norm2(self.conv2(self.activation(self.norm1(self.conv1(x)))))
        return self.activation(y + self.shortcut(x))


def images() -> tuple[Tensor, Tensor]:  # (1797, 1, 16, 16), (1797,)
    """Return the digits upsampled to 16x16."""
    x, y = digits()
    return F.interpolate(x.view(-1, 1, 8, 8), scale_factor=2, mode="bilinear"), y


def resnet(*, seed: int = 0, num_steps: int = 100) -> Problem:
    """ResNet-8 of width 8 with BatchNorm, cross-entropy on 256 digits upsampled to 16x16, after SGD with momentum."""
    x, y = images()
    with seeded(seed):
        model = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
            Block(8, 8), Block(8, 16), Block(16, 32),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip
    stream = itertools.islice(shuffled(len(x), 64, seed), num_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    problem = Problem("ResNet", model, F.cross_entropy, x[:256], y[:256])
    return train(problem, optimizer, ((x[i], y[i]) for i in stream))


class _Bottleneck(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if width_in != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(width_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


def resnet50(seed: int, *, width: int = 64) -> nn.Sequential:
    """Return a ResNet-50, module for module (151 of them), of another width, for gray images."""
    with seeded(seed):
        stages, width_in = [], width
        for stage, depth in enumerate((3, 4, 6, 3)):
            blocks = []
            for place in range(depth):
                blocks.append(_Bottleneck(width_in, width << stage, stride=2 if stage and not place else 1))
                width_in = 4 * width << stage
            stages.append(nn.Sequential(*blocks))
        return nn.Sequential(
            nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width_in, 10),
        )  # fmt: skip


class Attention(nn.Module):
    """A pre-norm block whose attention is written out, so that every peer can differentiate it twice."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        """Return the new residual stream."""
        batch, length, width = x.shape
        q, k, v = (
            t.view(batch, length, self.num_heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scores = q @ k.transpose(-2, -1) * (width // self.num_heads) ** -0.5
        mixed = scores.masked_fill(future, float("-inf")).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.norm2(x))


class CharTransformer(nn.Module):
    """A decoder-only transformer over characters; its outputs are logits, one class dimension last.

    Args:
        num_symbols: Size of the alphabet.
        length: Longest sequence.
        width: Of the residual stream.
        num_layers: Number of blocks.
    """

    def __init__(self, num_symbols: int, *, length: int, width: int = 144, num_layers: int = 4) -> None:
        super().__init__()
        self.symbol = nn.Embedding(num_symbols, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(Attention(width, num_heads=4) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_symbols)

    def forward(self, symbols: Tensor) -> Tensor:  # (batch, length) -> (batch * length, num_symbols)
        """Return the logits of the next character at every place."""
        x = self.symbol(symbols) + self.place[: symbols.shape[1]]
        return self.head(self.norm(self.blocks(x))).flatten(0, 1)


def text() -> tuple[Tensor, int]:  # (num_characters,)
    """Return Python's own help texts as integers, and the size of their alphabet."""
    characters = "".join(topics[name] for name in sorted(topics))
    alphabet = {c: i for i, c in enumerate(sorted(set(characters)))}
    return torch.tensor([alphabet[c] for c in characters]), len(alphabet)


def transformer(*, seed: int = 0, num_steps: int = 100, batch_size: int = 8, length: int = 128) -> Problem:
    """Char transformer, 4 layers of width 144 (n = 1.0 million), on Python's help texts, after AdamW.

    A batch of 8 sequences of 128 characters, not more: SciPy's runs take minutes as it is.
    """
    symbols, num_symbols = text()
    generator = torch.Generator().manual_seed(seed)

    def batch() -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(symbols) - length, (batch_size, 1), generator=generator)
        chosen = symbols[starts + torch.arange(length + 1)]
        return chosen[:, :-1], chosen[:, 1:].flatten()

    with seeded(seed):
        model = CharTransformer(num_symbols, length=length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    problem = Problem("transformer", model, F.cross_entropy, *batch())
    return train(problem, optimizer, (batch() for _ in range(num_steps)))
