"""Batches of any nesting: the tensors inside, their size, a copy that stays."""

from __future__ import annotations

import copy
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


def copied(batch: Any) -> Any:
    """Return a deep copy, its tensors detached; of tensors that are views only the part in view is copied.

    Example:
        >>> import torch
        >>> batch = {"x": torch.zeros(1), "labels": [2]}
        >>> copied(batch).pop("labels").clear()
        >>> _ = copied(batch)["x"].add_(1)
        >>> batch
        {'x': tensor([0.]), 'labels': [2]}
    """
    memo = {id(t): t.detach().clone().requires_grad_(t.requires_grad) for t in tensors_of(batch)}
    return copy.deepcopy(batch, memo)


def num_samples(batch: Any) -> int:
    """Return the length of dimension 0 of the first tensor that has one, and 1 where none has.

    Example:
        >>> import torch
        >>> num_samples({"weight": torch.tensor(2.0), "x": torch.zeros(8, 3)})
        8
    """
    return next((tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim > 0), 1)
