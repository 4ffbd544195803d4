"""The lines of a parameter that is spread over several processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from spectral_callbacks.optim.lines import Lines


class ShardedLines(Lines):
    """`Lines` of a DTensor, with whole lines on each process.

    Rows that are sharded over the first dimension, as by FSDP2, are where they should be. Where the lines are columns,
    or the sharding is another, each step exchanges the gradient once and the parameter twice. State is sharded by
    lines.
    """

    def __init__(self, parameter: Tensor) -> None:
        super().__init__(parameter)
        whole = cast(DTensor, parameter)
        self._mesh = whole.device_mesh
        self._is_split = [placement.is_shard() for placement in whole.placements]
        self._local_shape = whole.to_local().shape
        self._own = cast(DTensor, whole.flatten(1)).placements
        self._by_line = self._placements(Shard(1 if self._are_columns else 0))

    def total(self, sums: Tensor) -> Tensor:
        """See `Lines`: one reduction over the processes."""
        return DTensor.from_local(sums, self._mesh, self._placements(Partial())).full_tensor()

    def on_all(self, function: Callable[[Tensor], Tensor], numbers: Tensor) -> Tensor:
        """See `Lines`: every process gathers the numbers, and does the same."""
        result = function(self._sharded(numbers.contiguous()).full_tensor())
        whole = DTensor.from_local(result, self._mesh, self._placements(Replicate()))
        return whole.redistribute(placements=self._placements(Shard(0))).to_local()

    def zeros(self, count: int, dtype: torch.dtype) -> Tensor:
        """See `Lines`: a DTensor."""
        part = self.of(self._parameter)
        return self._sharded(part.new_zeros(part.shape[0], count, dtype=dtype))

    def _sharded(self, part: Tensor) -> DTensor:
        shape = torch.Size((self.num_lines, part.shape[1]))
        stride = (part.shape[1], 1)
        return DTensor.from_local(part, self._mesh, self._placements(Shard(0)), shape=shape, stride=stride)

    def _part(self, tensor: Tensor) -> Tensor:
        return cast(DTensor, tensor.flatten(1)).redistribute(placements=self._by_line).to_local()

    def _whole(self, matrix: Tensor) -> Tensor:
        stride = (self._shape[1], 1)
        whole = DTensor.from_local(matrix.contiguous(), self._mesh, self._by_line, shape=self._shape, stride=stride)
        return whole.redistribute(placements=self._own).to_local().reshape(self._local_shape)

    def _placements(self, split: Placement) -> list[Placement]:
        return [split if is_split else Replicate() for is_split in self._is_split]
