"""A parameter seen as a matrix of lines."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spectral_callbacks.optim.base import local


class Lines:
    """A parameter of two or more dimensions as a matrix (lines, width), its shorter side the width.

    Dimensions after the first are one: the filters of a convolution are the rows of a matrix. Where there are at least
    as many rows as columns the lines are the rows, else they are the columns. What is done to each line alone needs no
    word from other processes; a parameter that is spread over several has a subclass, with some of the lines on each.

    Args:
        parameter: (rows, ...), real, of two or more dimensions.

    Attributes:
        width: The shorter side.
        num_lines: The longer side, over all processes.

    Example:
        >>> import torch
        >>> lines = Lines(torch.zeros(2, 3, 4))
        >>> lines.num_lines, lines.width, lines.of(torch.ones(2, 3, 4)).shape
        (12, 2, torch.Size([12, 2]))
    """

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter
        rows = parameter.shape[0]
        self._shape = torch.Size((rows, parameter.numel() // rows))
        self._are_columns = self._shape[0] < self._shape[1]
        self.width, self.num_lines = sorted(self._shape)

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of the matrix."""
        return self._shape[0], self._shape[1]

    def of(
        self,
        tensor: Tensor,  # the parameter's shape
    ) -> Tensor:  # (lines of this process, width)
        """Return a tensor's lines: a view where it can be one, and in float32 where it has a half type."""
        matrix = self._part(tensor)
        lines = matrix.t() if self._are_columns else matrix
        return lines.to(working_dtype(lines))

    def to_tensor(
        self,
        lines: Tensor,  # (lines of this process, width)
    ) -> Tensor:  # the shape of the parameter's part on this process
        """Return the tensor that has these lines: the inverse of `of`."""
        return self._whole(lines.t() if self._are_columns else lines)

    def write(
        self,
        lines: Tensor,  # (lines of this process, width)
    ) -> None:
        """Make these the parameter's lines, where they are not a view of it."""
        p = local(self._parameter)
        if lines.untyped_storage().data_ptr() != p.untyped_storage().data_ptr():
            p.copy_(self.to_tensor(lines))

    def total(
        self,
        sums: Tensor,  # over the lines of this process
    ) -> Tensor:
        """Return sums over all lines."""
        return sums

    def on_all(
        self,
        function: Callable[[Tensor], Tensor],
        numbers: Tensor,  # (lines of this process, r)
    ) -> Tensor:  # (lines of this process, r)
        """Return this process's part of a function of the numbers (lines, r) of all lines."""
        return function(numbers)

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:  # (lines, count)
        """Return zeros, `count` a line."""
        return self._parameter.new_zeros(self.num_lines, count, dtype=dtype)

    def _part(self, tensor: Tensor) -> Tensor:
        """Return the whole lines that this process has of a tensor, as the rows or columns of a matrix."""
        return tensor.flatten(1)

    def _whole(self, matrix: Tensor) -> Tensor:
        """Return the inverse of `_part`."""
        return matrix.reshape(self._parameter.shape)


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Return the precision that a tensor is computed in: float32 for half types, else its own."""
    return torch.float32 if tensor.dtype in (torch.float16, torch.bfloat16) else tensor.dtype


def lines_of(parameter: Tensor) -> Lines:
    """Return the lines of a plain parameter, or of a DTensor."""
    if local(parameter) is parameter:
        return Lines(parameter)
    from spectral_callbacks.optim.sharded_lines import ShardedLines  # DTensor costs a second to import

    return ShardedLines(parameter)
