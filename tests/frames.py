"""A frame whose orthogonal matrix is known."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_callbacks.stability import Frame


class Turned(Frame):
    """Turns the entries of a tensor, read row by row, by a matrix Q."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        n = torch.Size(shape).numel()
        generator = torch.Generator().manual_seed(n)
        self.matrix, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))

    def analyze(self, tensor: Tensor) -> Tensor:
        return (self.matrix.to(tensor.dtype) @ tensor.reshape(-1)).view(tensor.shape)

    def synthesize(self, tensor: Tensor) -> Tensor:
        return (self.matrix.T.to(tensor.dtype) @ tensor.reshape(-1)).view(tensor.shape)
