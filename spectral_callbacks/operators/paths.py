"""Paths: the linear maps that take a parameter to the tensor that an operation on samples works with."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Hashable, Sequence
from typing import ClassVar, final

import torch
import torch.nn.functional as F
from torch import Size, Tensor

from spectral_callbacks.operators import tiles
from spectral_callbacks.operators.factors import Factor, LatestRows
from spectral_callbacks.operators.steps import Step


@final
@dataclasses.dataclass(frozen=True)
class Path:
    """A linear map from a parameter p to a tensor w, each entry of which is a multiple of one entry of p.

    Attributes:
        in_shape: Of p.
        steps: In the order in which they are applied.

    Example:
        >>> import torch
        >>> from spectral_callbacks.operators.steps import Permute
        >>> path = Path(torch.Size((2, 3))).then(Permute(torch.Size((2, 3)), (1, 0)))
        >>> path.push(torch.zeros(5, 2, 3)).shape, path.is_isometry
        (torch.Size([5, 3, 2]), True)
    """

    TRANSPOSITION: ClassVar[Hashable] = ("Permute", 1, 0)

    in_shape: Size
    steps: tuple[Step, ...] = ()

    @property
    def shape(self) -> Size:
        """Of w."""
        return self.steps[-1].shape if self.steps else self.in_shape

    @property
    def key(self) -> Hashable:
        """Of what kind the steps are, the same for every batch that the same code runs on."""
        return tuple(step.key for step in self.steps)

    @functools.cached_property
    def gain(self) -> float | None:
        """Factor by which `pull` multiplies all inner products; None where that depends on the direction."""
        gains = [step.gain for step in self.steps]
        return None if None in gains else math.prod(gain for gain in gains if gain is not None)

    @property
    def is_isometry(self) -> bool:
        """Whether `pull` keeps all inner products: rearrangements, and parts of a tensor."""
        return self.gain == 1

    def then(self, step: Step) -> Path:
        """Return this path, and one more step."""
        return Path(self.in_shape, (*self.steps, step))

    def before_transposition(self) -> Path | None:
        """Return the path without its last step, if that swaps the axes of a matrix."""
        swaps = bool(self.steps) and self.steps[-1].key == self.TRANSPOSITION
        return Path(self.in_shape, self.steps[:-1]) if swaps else None

    def push(self, V: Tensor) -> Tensor:  # (k, *in_shape) -> (k, *shape)
        """Apply it to k tensors."""
        for step in self.steps:
            V = step.push(V)
        return V

    def pull(self, U: Tensor) -> Tensor:  # (k, *shape) -> (k, *in_shape)
        """Apply its adjoint to k tensors."""
        for step in reversed(self.steps):
            U = step.pull(U)
        return U

    @functools.cached_property
    def entries(self) -> tuple[Tensor, Tensor]:  # (w.numel(),), (w.numel(),)
        """For each entry of w, which entry of p it is a multiple of, and the multiplier."""
        index = torch.arange(self.in_shape.numel()).reshape(1, *self.in_shape)
        for step in self.steps:
            index = step.source(index)
        by = self.push(torch.ones(1, *self.in_shape, dtype=torch.float64))
        return index.reshape(-1), by.reshape(-1)

    @functools.cached_property
    def stretch(self) -> int | None:
        """The entry of p at which w begins, if w is a stretch of entries of p, in their order."""
        index, by = self.entries
        return int(index[0]) if bool((index.diff() == 1).all() & (by == 1).all()) else None


@final
class Along(Factor):
    """Gradients by a parameter p, from those by a tensor w that a path makes of it.

    Inner products are those by w, where the path only rearranges, takes a part or multiplies by a number.

    Args:
        factor: The gradients by w.
        path: From p to w.

    Example:
        >>> import torch
        >>> from spectral_callbacks.operators.factors import Rows
        >>> from spectral_callbacks.operators.steps import Part
        >>> part = Path(torch.Size([3])).then(Part(torch.Size([3]), 0, range(1, 2)))
        >>> Along(Rows(torch.tensor([[2.0], [5.0]])), part).combined(torch.eye(2)).tolist()
        [[0.0, 2.0, 0.0], [0.0, 5.0, 0.0]]
    """

    def __init__(self, factor: Factor, path: Path) -> None:
        self.num_samples = factor.num_samples
        self.shape = path.in_shape
        self._factor = factor
        self._path = path

    @property
    def kind(self) -> Hashable:
        """That of the factor, along the same path; the factor's own where the path is empty."""
        kind = self._factor.kind
        return kind if kind is None or not self._path.steps else (Along, kind, self._path.steps)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those of the factor."""
        return self._factor.tensors

    def joined(self, tensors: Sequence[tuple[Tensor, ...]]) -> Factor:
        """Return the sum of the factors, along the same path."""
        return Along(self._factor.joined(tensors), self._path)

    def gram(self) -> Tensor:
        """Return the inner products of the gradients."""
        return self.gram_after(LatestRows())

    def gram_after(self, latest: LatestRows) -> Tensor:
        """Return the inner products, with what the factor before left."""
        gain = self._path.gain
        if gain is None:
            return super().gram()
        gram = self._factor.gram_after(latest)
        return gram if gain == 1 else gram * gain

    def block(self, part: slice) -> Tensor:
        """Return the gradients by some rows of p, from those by the rows of w that they go into."""
        if not self._path.steps:
            return self._factor.block(part)
        first, last = (edge * self.shape[1:].numel() for edge in (part.start, part.stop))
        start = self._path.stretch
        return self._gathered(first, last) if start is None else self._cut(first - start, last - start)

    def products(self, V: Tensor) -> Tensor:  # (k, *shape) -> (N, k)
        """Return the inner products with k tensors."""
        return self._factor.products(self._path.push(V))

    def combined(self, C: Tensor) -> Tensor:  # (N, k) -> (k, *shape)
        """Return k sums of the gradients, weighted by the columns of C."""
        return self._path.pull(self._factor.combined(C))

    def _cut(self, first: int, last: int) -> Tensor:  # (N, last - first)
        """Return entries in the order of w, which may lie outside of it."""
        width = self._path.shape[1:].numel()
        low, high = max(first, 0), min(last, self._path.shape.numel())
        if low >= high:
            return self._factor.block(slice(0, 1)).new_zeros(self.num_samples, last - first)
        rows = slice(low // width, -(-high // width))
        J = self._factor.block(rows)[:, low - rows.start * width : high - rows.start * width]
        return F.pad(J, (low - first, last - high))

    def _gathered(self, first: int, last: int) -> Tensor:  # (N, last - first)
        """Return entries in the order of p, each from all entries of w that it goes into."""
        index, by = self._path.entries
        width = self._path.shape[1:].numel()
        inside = ((index >= first) & (index < last)).view(-1, width)
        touched = inside.any(1).nonzero()
        start, stop = (int(touched[0]), int(touched[-1]) + 1) if len(touched) else (0, 1)
        pieces = tiles.pieces(stop - start, tiles.TILE_BYTES // (8 * self.num_samples * width))
        result: Tensor | None = None
        for rows in (slice(start + piece.start, start + piece.stop) for piece in pieces):
            J = self._factor.block(rows)
            result = J.new_zeros(len(J), last - first) if result is None else result
            columns = inside[rows].reshape(-1).nonzero().reshape(-1)
            to, times = index[rows.start * width + columns] - first, by[rows.start * width + columns]
            result.index_add_(1, to.to(J.device), J[:, columns.to(J.device)] * times.to(J.device, J.dtype))
        if result is None:
            raise ValueError(
                f"a path from {tuple(self.shape)} to {tuple(self._path.shape)} has no entry; leave it out."
            )
        return result
