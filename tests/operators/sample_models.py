"""Models whose parameters meet the samples in one way each: name -> (model, shape of a sample)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import l1_unstructured

T, E, VOCABULARY = 5, 8, 11


class Function(nn.Module):
    """A function of the inputs, and of parameters or modules with names."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part if isinstance(part, nn.Module) else nn.Parameter(part))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class PositionalModel(nn.Module):
    """Words and positions: a table (an embedding, or a parameter) in one of several places."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.token = nn.Embedding(VOCABULARY, E)
        self.head = nn.Linear(E, VOCABULARY)
        self.table = nn.Embedding(2 * T, E)
        self.entries = nn.Parameter(torch.randn(1, 2 * T, E)) if "parameter" in kind else None

    def forward(self, x: Tensor) -> Tensor:
        h, positions = self.token(x), torch.arange(x.shape[1])
        match self.kind, self.entries:
            case "embedding", _:
                h = h + self.table(positions)
            case "embedding, (1, T)", _:
                h = self.table(2 + positions[None]) + h
            case "embedding, (N, T)", _:
                h = h + self.table(positions.expand(len(x), -1))
            case "embedding, (T, N, E)", _:
                h = (h.transpose(0, 1) + self.table(positions).unsqueeze(1)).transpose(0, 1)
            case "embedding, scaled", _:
                h = h * self.table(positions) + 0.3 * self.table(positions)
            case "parameter", Tensor() as entries:
                h = h + entries[:, : x.shape[1]]
            case "parameter, a part of (T, E)", Tensor() as entries:
                h = h + entries[0, T:]
            case unknown:
                raise ValueError(f"no model places positions as {unknown}.")
        return self.head(torch.tanh(h))


class TiedLanguageModel(nn.Module):
    """The words' embedding is the weight of the head, too."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, E, padding_idx=padding_idx)
        self.hidden = nn.Linear(E, E)
        self.head = nn.Linear(E, VOCABULARY, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.token(x))))


def time_first(module: nn.Module) -> nn.Module:
    """Let (N, T, E) pass a module that takes (T, N, E)."""
    return Function(lambda m, x: m.inner(x.transpose(0, 1)).transpose(0, 1), inner=module)


def spread(module: nn.Module) -> nn.Module:
    """Give gains and biases that are neither one nor zero."""
    for p in module.parameters():
        nn.init.normal_(p)
    return module


def attention(*, need_weights: bool, batch_first: bool, cross: bool = False, **options: Any) -> nn.Module:
    inner = nn.MultiheadAttention(E, 2, batch_first=batch_first, **options)

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.first(x) if batch_first else m.first(x).transpose(0, 1)
        y = torch.tanh(x)[..., : inner.kdim] if cross else x
        out = m.inner(x, y, y, need_weights=need_weights)[0]
        return out if batch_first else out.transpose(0, 1)

    return Function(forward, inner=inner, first=nn.Linear(E, E))


def _convolution(kind: Any, dims: int, **options: Any) -> nn.Module:
    return nn.Sequential(kind(4, 6, 3, **options), nn.Tanh(), nn.AdaptiveAvgPool2d(3) if dims == 2 else nn.Tanh())


def _decoder() -> nn.Module:
    layer = nn.TransformerDecoderLayer(E, 2, 16, batch_first=True, dropout=0.0, norm_first=True)
    return Function(
        lambda m, x: m.layer(m.memory(x), m.other(x)), layer=layer, memory=nn.Linear(E, E), other=nn.Linear(E, E)
    )


def _parts(m: Any, x: Tensor) -> Tensor:
    first, second, third = m.w[0], m.w.unbind()[1], m.w[2:].squeeze(0)
    fourth = m.w.permute(1, 2, 0)[:, ::2, -1]
    left, right = m.w[1].split([3, E - 3], dim=-1)
    return torch.cat(
        [x @ first + x @ second + x @ third.T, x @ fourth, x @ right, x @ left, x @ m.w[0].chunk(2, -1)[1]], -1
    )


def _elementwise(m: Any, x: Tensor) -> Tensor:
    return torch.tanh(torch.rsub(m.a, m.b / (1 + x * x), alpha=2) - x / m.c)


def _first(module: nn.Module) -> nn.Module:
    return Function(lambda m, x: m.inner(x)[0], inner=module)


def _cell(m: Any, x: Tensor) -> Tensor:
    state = (x.new_zeros(len(x), 3), x.new_zeros(len(x), 3))
    for t in range(x.shape[1]):
        state = m.cell(x[:, t], state)
    return state[0]


def _linear(*sizes: int) -> nn.Module:
    return nn.Sequential(nn.Linear(sizes[0], sizes[1]), nn.Tanh(), nn.Linear(sizes[1], sizes[2]))


_N = torch.randn
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "MLP": (lambda: _linear(E, 7, 3), (E,)),
    "linear, (N, T, E)": (lambda: _linear(E, 7, 3), (T, E)),
    "linear, (T, N, E)": (lambda: time_first(_linear(E, 7, E)), (T, E)),
    "linear, no bias": (lambda: nn.Linear(E, 3, bias=False), (T, E)),
    "linear to one number": (lambda: nn.Linear(E, 1), (E,)),
    "linear twice in series": (lambda: Function(lambda m, x: m.f(torch.tanh(m.f(x))), f=nn.Linear(E, E)), (T, E)),
    "conv1d": (lambda: _convolution(nn.Conv1d, 1, padding=1), (4, 9)),
    "conv1d, grouped": (lambda: _convolution(nn.Conv1d, 1, groups=2, stride=2, dilation=2, padding=3), (4, 9)),
    "conv1d, same": (lambda: _convolution(nn.Conv1d, 1, padding="same", bias=False), (4, 9)),
    "conv1d, circular": (lambda: _convolution(nn.Conv1d, 1, padding=2, padding_mode="circular"), (4, 9)),
    "conv2d": (lambda: _convolution(nn.Conv2d, 2, stride=(2, 1), padding=(0, 2)), (4, 7, 6)),
    "conv2d, depthwise": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4), nn.Tanh(), nn.Conv2d(8, 2, 1)),
        (4, 7, 6),
    ),
    "conv3d": (lambda: _convolution(nn.Conv3d, 3, groups=2, dilation=(1, 2, 1)), (4, 5, 6, 4)),
    "conv2d, transposed": (
        lambda: _convolution(nn.ConvTranspose2d, 2, stride=2, output_padding=1, groups=2),
        (4, 4, 3),
    ),
    "conv twice": (lambda: Function(lambda m, x: m.f(torch.tanh(m.f(x))), f=nn.Conv1d(4, 4, 3, padding=1)), (4, 9)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(E, E), spread(nn.LayerNorm(E)), nn.Tanh()), (T, E)),
    "layer norm, two axes": (lambda: nn.Sequential(spread(nn.LayerNorm([T, E])), nn.Tanh()), (T, E)),
    "layer norm, (T, N, E)": (lambda: time_first(nn.Sequential(spread(nn.LayerNorm(E)), nn.Tanh())), (T, E)),
    "RMS norm": (lambda: nn.Sequential(nn.Linear(E, E), spread(nn.RMSNorm(E)), nn.Tanh()), (T, E)),
    "group norm": (lambda: nn.Sequential(nn.Conv1d(4, 6, 1), spread(nn.GroupNorm(3, 6)), nn.Tanh()), (4, 9)),
    "group norm, features": (lambda: nn.Sequential(spread(nn.GroupNorm(2, E)), nn.Tanh()), (E,)),
    "instance norm 1d": (lambda: nn.Sequential(spread(nn.InstanceNorm1d(4, affine=True)), nn.Tanh()), (4, 9)),
    "instance norm 2d": (lambda: nn.Sequential(spread(nn.InstanceNorm2d(4, affine=True)), nn.Tanh()), (4, 5, 3)),
    "batch norm": (lambda: nn.Sequential(nn.Conv1d(4, 6, 1), spread(nn.BatchNorm1d(6)), nn.Tanh()).eval(), (4, 9)),
    "batch norm, features": (lambda: nn.Sequential(nn.Linear(E, 6), spread(nn.BatchNorm1d(6))).eval(), (E,)),
    "PReLU": (lambda: nn.Sequential(nn.Linear(E, E), nn.PReLU()), (T, E)),
    "PReLU, channels": (lambda: nn.Sequential(nn.Conv1d(4, 6, 1), nn.PReLU(6)), (4, 9)),
    "layer scale": (lambda: Function(lambda m, x: x + m.s * m.f(x), s=_N(E), f=nn.Linear(E, E)), (T, E)),
    "layer scale, channels": (
        lambda: Function(lambda m, x: m.f(x) * m.s[:, None, None], s=_N(6), f=nn.Conv2d(4, 6, 1)),
        (4, 3, 5),
    ),
    "numbers": (lambda: Function(lambda m, x: torch.tanh(m.a * x - m.b), a=_N(1)[0], b=_N(1)), (T, E)),
    "sums and quotients": (lambda: Function(_elementwise, a=_N(E), b=_N(E), c=1 + torch.rand(T, 1)), (T, E)),
    "class token": (
        lambda: Function(
            lambda m, x: m.f(torch.cat([m.token.expand(len(x), -1, -1), x], 1)), token=_N(1, 1, E), f=nn.Linear(E, E)
        ),
        (T, E),
    ),
    "class token, (T, N, E)": (
        lambda: time_first(
            Function(
                lambda m, x: m.f(torch.cat([m.token.repeat(2, x.shape[1], 1), x]).cumsum(0) ** 2),
                token=_N(1, 1, E), f=nn.Linear(E, E),
            )
        ),
        (T, E),
    ),
    "mask token": (
        lambda: Function(
            lambda m, x: m.f(torch.where(x[..., :1] > 0, m.token, x)), token=_N(E), f=nn.Linear(E, E)
        ),
        (T, E),
    ),
    "self-attention": (lambda: attention(need_weights=False, batch_first=True), (T, E)),
    "self-attention, weights": (lambda: attention(need_weights=True, batch_first=True), (T, E)),
    "self-attention, (T, N, E)": (lambda: attention(need_weights=False, batch_first=False), (T, E)),
    "self-attention, (T, N, E), weights": (lambda: attention(need_weights=True, batch_first=False), (T, E)),
    "self-attention, bias_k": (lambda: attention(need_weights=False, batch_first=True, add_bias_kv=True), (T, E)),
    "cross-attention": (lambda: attention(need_weights=False, batch_first=True, cross=True), (T, E)),
    "cross-attention, (T, N, E), weights": (
        lambda: attention(need_weights=True, batch_first=False, cross=True),
        (T, E),
    ),
    "cross-attention, other widths": (
        lambda: attention(need_weights=False, batch_first=True, cross=True, kdim=4, vdim=4),
        (T, E),
    ),
    "encoder layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(E, 2, 16, batch_first=True, dropout=0.0), nn.Linear(E, 2)),
        (T, E),
    ),
    "decoder layer": (_decoder, (T, E)),
    "GRU": (lambda: _first(nn.GRU(E, 3, 2, batch_first=True, bidirectional=True)), (T, E)),
    "RNN, (T, N, E)": (lambda: time_first(_first(nn.RNN(E, 3))), (T, E)),
    "LSTM, in float64": (lambda: _first(nn.LSTM(E, 3, batch_first=True)), (T, E)),
    "LSTM cell": (lambda: Function(_cell, cell=nn.LSTMCell(E, 3)), (T, E)),
    "pruned": (lambda: l1_unstructured(nn.Linear(E, 3), "weight", 0.5), (T, E)),
    "weights scaled, masked, shifted": (
        lambda: Function(
            lambda m, x: F.linear(x, -(m.w / 3) * torch.linspace(0, 1, E, dtype=x.dtype) + m.v, m.c / 2),
            w=_N(3, E), v=_N(3, E), c=_N(3),
        ),
        (T, E),
    ),
    "parts of a weight": (lambda: Function(_parts, w=_N(3, E, E)), (T, E)),
    "matrix on the left": (
        lambda: Function(
            lambda m, x: torch.tanh(m.w @ x.T + torch.addmm(x.T, m.v.T, x.T, alpha=0.5)).T, w=_N(E, E), v=_N(E, E)
        ),
        (E,),
    ),
    "vector": (lambda: Function(lambda m, x: torch.tanh(x @ m.w), w=_N(E)), (T, E)),
    "einsum over heads": (
        lambda: Function(lambda m, x: torch.einsum("nthe,hef->nthf", x.unflatten(-1, (2, 4)), m.w), w=_N(2, 4, 3)),
        (T, E),
    ),
    "matrices by head, expanded": (
        lambda: Function(lambda m, x: torch.tanh(x.unflatten(-1, (2, 4)).mT @ m.w), w=_N(4, 2, 3)),
        (4, E),
    ),
    "addmm": (
        lambda: Function(lambda m, x: torch.addmm(m.b, x, m.w, beta=0.5, alpha=2.0), b=_N(3), w=_N(E, 3)),
        (E,),
    ),
}  # fmt: skip
