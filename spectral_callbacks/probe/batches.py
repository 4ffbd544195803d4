"""Batches of any nesting: the tensors inside, their size, a copy that stays."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """Yield the tensors of a nest of mappings, sequences and dataclasses, in order."""
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors_of(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from tensors_of(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from tensors_of(getattr(batch, field.name))


def num_samples(batch: Any) -> int:
    """Return the length of dimension 0 of the first tensor that has one, and 1 where none has.

    Example:
        >>> import torch
        >>> num_samples({"weight": torch.tensor(2.0), "x": torch.zeros(8, 3)})
        8
    """
    return next((tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim > 0), 1)
