"""Blocks of flat tensors that stay in the cache while an update passes over them several times."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

BLOCK = 1 << 16
"""Entries a block and a thread: diffGrad's five tensors and its scratch, in float32, fill 1.5 MiB."""


def block_size() -> int:
    """Return how many entries a block has: PyTorch cuts each into one piece a thread."""
    return BLOCK * torch.get_num_threads()


def blocks(*tensors: Tensor | None, size: int | None = None) -> Iterator[tuple[Any, ...]]:
    """Yield tensors of one shape cut into flat views of the same entries, in the order of memory.

    Elementwise in-place operations on the views are operations on the tensors; done block by block, several of them
    read and write the slow memory once. Tensors of no more than one block are yielded as they are, and so are those
    that do not lie in memory alike, or not densely, which is right too.

    Args:
        tensors: Of one shape; None is yielded as None.
        size: Most entries a block; by default `block_size()`.

    Yields:
        One view of each tensor, (n,) with n ≤ size, or the tensors themselves.

    Example:
        >>> import torch
        >>> w, g = torch.ones(2, 3), torch.arange(6.0).view(2, 3)
        >>> for w_block, g_block in blocks(w, g, size=4):
        ...     w_block -= g_block
        >>> w
        tensor([[ 1.,  0., -1.],
                [-2., -3., -4.]])
    """
    given = [t for t in tensors if t is not None]
    size = size or block_size()
    if given[0].numel() <= size or not lie_alike(*given):
        yield tensors
        return
    parts = (itertools.repeat(None) if t is None else flat(t).split(size) for t in tensors)
    yield from zip(*parts, strict=False)


def flat(tensor: Tensor) -> Tensor:
    """Return the entries of a dense tensor in the order of memory, (n,)."""
    return tensor.as_strided((tensor.numel(),), (1,))


def lie_alike(*tensors: Tensor) -> bool:
    """Return whether tensors of one shape fill their memory without gaps, each in the same order of its entries."""
    if all(t.is_contiguous() for t in tensors):
        return True
    strides = tensors[0].stride()
    return all(t.stride() == strides for t in tensors) and _is_dense(tensors[0])


def _is_dense(tensor: Tensor) -> bool:
    expected = 1
    for stride, length in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= length
    return True
