"""Small networks, one for each operation whose second derivative has been wrong somewhere. All are smooth."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclasses.dataclass(frozen=True)
class Case:
    """A network in training, a loss of its outputs, and a batch."""

    module: nn.Module
    batch: tuple[Tensor, Tensor]

    def loss(self, module: nn.Module, batch: tuple[Tensor, Tensor], *, shift: float = 0.0) -> Tensor:
        """Mean cross-entropy; the shift takes shift/2 ‖w‖² away, which moves all eigenvalues down by it."""
        inputs, targets = batch
        loss = F.cross_entropy(module(inputs), targets)
        if not shift:  # torch cannot add the ridge's dense gradient to a sparse one
            return loss
        ridge = torch.stack([p.square().sum() for p in module.parameters() if p.requires_grad]).sum()
        return loss - shift / 2 * ridge


class _Attention(nn.Module):
    """Self-attention over the rows of each sample."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.attention, nn.MultiheadAttention):
            x, _ = self.attention(x, x, x, need_weights=False)
        else:
            x = self.attention(x)
        return self.head(x.mean(1))


class _Recurrent(nn.Module):
    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.recurrent(x)
        return self.head(states[:, -1])


class _Checkpointed(nn.Module):
    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.first = nn.Linear(4, 5)
        self.second = nn.Sequential(nn.Tanh(), nn.Linear(5, 5), nn.Tanh())
        self.head = nn.Linear(5, 3)
        self._use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.second, self.first(x), use_reentrant=self._use_reentrant)
        return self.head(hidden)


class _Tied(nn.Module):
    """One matrix embeds and reads out; its gradient would be sparse if the embedding were alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.hidden = nn.Linear(4, 4)
        self.readout = nn.Linear(4, 6, bias=False)
        self.readout.weight = self.embedding.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.readout(self.frozen(self.hidden(self.embedding(tokens)).tanh()).tanh())


class _Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 3, sparse=True)
        self.head = nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).tanh())


def _weight_norm() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3))


def _hooked_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch asks to move to the parametrization
        hooked = nn.utils.weight_norm(nn.Linear(4, 6))
    return nn.Sequential(hooked, nn.Tanh(), nn.Linear(6, 3))


def _transformer(**options: bool) -> nn.Module:
    return _Attention(nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, activation="gelu", batch_first=True, **options))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 3)),
    "LayerNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)),
    "RMSNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Tanh(), nn.Linear(6, 3)),
    "BatchNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)),
    "GroupNorm": lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Tanh(), nn.Linear(6, 3)),
    "convolution": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 3, (2, 2)), nn.BatchNorm2d(3), nn.SiLU(), nn.Flatten(), nn.Linear(36, 3)
    ),
    "attention": lambda: _Attention(nn.MultiheadAttention(4, 2, batch_first=True)),
    "transformer": _transformer,
    "transformer, norm first": functools.partial(_transformer, norm_first=True),
    "LSTM": lambda: _Recurrent(nn.LSTM(4, 4, batch_first=True)),
    "GRU": lambda: _Recurrent(nn.GRU(4, 4, batch_first=True)),
    "weight norm": _weight_norm,
    "weight norm by a hook": _hooked_weight_norm,
    "checkpoint": functools.partial(_Checkpointed, use_reentrant=False),
    "reentrant checkpoint": functools.partial(_Checkpointed, use_reentrant=True),
    "tied and frozen": _Tied,
    "sparse embedding": _Sparse,
}

_SEQUENCES = ("convolution", "attention", "transformer", "transformer, norm first", "LSTM", "GRU")
_TOKENS = ("tied and frozen", "sparse embedding")


def case(name: str, dtype: torch.dtype = torch.float32) -> Case:
    """The network with random weights, and 12 samples: the same numbers in every precision."""
    torch.manual_seed(1)
    module = NETWORKS[name]().train()
    if name in _TOKENS:
        inputs = torch.randint(0, 6, (12,))
    else:
        inputs = torch.randn(12, 5, 4) if name in _SEQUENCES else torch.randn(12, 4)
    with torch.no_grad():  # away from the symmetries of an initialization
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    if inputs.is_floating_point():
        inputs = inputs.to(dtype)
    return Case(module.to(dtype), (inputs, torch.randint(0, 3, (12,))))
