"""Tiles of a computation that is too large to be held: bounded memory, and no more work than needed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

MAX_BYTES = 2**27  # that the temporaries of a method may take at once, beyond what it is given and what it returns
TILE_BYTES = 2**22  # of a tile that is filled and used up at once: the CPU's cache holds it, and it is paged in once
_PANEL = 32  # the fewest columns of a Gram matrix computed together; what lies below them is known by symmetry


def pieces(size: int, most: int) -> Iterator[slice]:
    """Yield the slices that cut a range into even pieces of at most so many, and at least one."""
    count = -(-size // max(1, most))
    edges = [size * i // max(1, count) for i in range(count + 1)]
    yield from itertools.starmap(slice, itertools.pairwise(edges))


def blocks(
    num_rows: int, num_columns: int, most: int, of_column: int = 1
) -> Iterator[tuple[slice, slice]]:  # rows, columns
    """Yield what cuts a matrix into blocks of at most so many entries, and at least one column of one row.

    Sides are powers of two where they are cut, which products of matrices like best, and as equal as they can be.
    """
    rows = min(num_rows, max(_floor(math.isqrt(most)), _floor(most // (num_columns * of_column))))
    columns = min(num_columns, _floor(most // (rows * of_column)))
    for row in range(0, num_rows, rows):
        for column in range(0, num_columns, columns):
            yield slice(row, min(row + rows, num_rows)), slice(column, min(column + columns, num_columns))


def group_pieces(
    part: slice,  # of all rows, those of one group after those of another
    rows: int,  # a group
) -> Iterator[tuple[slice, slice]]:
    """Yield the groups, and the rows in each, that make up the part: at most one piece at each end, one between."""
    start = part.start
    while start < part.stop:
        group, first = divmod(start, rows)
        whole = (part.stop - start) // rows if first == 0 else 0
        if whole:
            yield slice(group, group + whole), slice(0, rows)
            start += whole * rows
        else:
            last = min(rows, first + part.stop - start)
            yield slice(group, group + 1), slice(first, last)
            start += last - first


def tile_bytes(tensor: Tensor) -> int:
    """Return how much a tile may take where this tensor lives: other devices want few large operations."""
    return TILE_BYTES if tensor.device.type == "cpu" else MAX_BYTES // 4


def promoted(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in one dtype, at least float32, without their graph."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return tuple(t if t.dtype == dtype and not t.requires_grad else t.detach().to(dtype) for t in tensors)


def mirrored(
    upper: Tensor,  # (N, N)
    panel: int,
) -> Tensor:  # (N, N)
    """Copy what lies above the diagonal's blocks, `pieces` of this size, to below them, and return the matrix."""
    for piece in pieces(len(upper), panel):
        upper[piece.stop :, piece] = upper[piece, piece.stop :].mT
    return upper


def _floor(number: int) -> int:
    """Return the largest power of two up to the number, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


class Scratch:
    """Memory that is filled again and again: fresh memory costs as much as filling it.

    Args:
        like: Names dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        self._memory = like.new_empty(0)

    def take(self, *shape: int) -> Tensor:
        """Return a contiguous tensor with any content; what was taken before is lost."""
        if self._memory.numel() < math.prod(shape):
            self._memory = self._memory.new_empty(math.prod(shape))
        return self._memory[: math.prod(shape)].view(shape)


class GramSum:
    """K = Σ J Jᵀ over tiles J of columns: by panels of the upper triangle.

    Args:
        like: Names dtype and device.
        num_samples: N.
    """

    def __init__(self, like: Tensor, num_samples: int) -> None:
        self._sum = like.new_zeros(num_samples, num_samples)
        self._panel = max(_PANEL if like.device.type == "cpu" else 256, num_samples // 8)

    def add(
        self,
        J: Tensor,  # (N, m)
    ) -> None:
        """Add J Jᵀ."""
        for piece in pieces(len(J), self._panel):
            self._sum[: piece.stop, piece].addmm_(J[: piece.stop], J[piece].T)

    def value(self) -> Tensor:  # (N, N)
        """Return the sum."""
        return mirrored(self._sum, self._panel)
