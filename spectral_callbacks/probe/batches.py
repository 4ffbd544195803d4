"""Batches of any nesting: the tensors inside, their size, a copy that stays."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
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
    return mapped(batch, lambda t: t.detach().clone().requires_grad_(t.requires_grad))


def mapped(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a deep copy in which every tensor is what the function makes of it; one that occurs twice, once.

    Example:
        >>> import torch
        >>> mapped({"x": torch.ones(2), "labels": [2]}, lambda t: 3 * t)
        {'x': tensor([3., 3.]), 'labels': [2]}
    """
    tensors = {id(t): t for t in tensors_of(batch)}
    return copy.deepcopy(batch, {key: function(t) for key, t in tensors.items()})


def selected(batch: Any, indices: Tensor) -> Any:
    """Return a deep copy that holds only some samples: these entries of dimension 0 of every tensor that has one.

    Args:
        batch: Its tensors are as long as it has samples; those without a dimension are shared by all samples.
        indices: (m,), of dtype int64.

    Raises:
        ValueError: If the tensors differ in length, or there is none, so that samples are not defined.

    Example:
        >>> import torch
        >>> selected({"x": torch.arange(4), "scale": torch.tensor(2.0)}, torch.tensor([3, 0]))
        {'x': tensor([3, 0]), 'scale': tensor(2.)}
    """
    check_samples(batch)
    return mapped(batch, lambda t: t.detach()[indices.to(t.device)] if t.ndim > 0 else t.detach().clone())


def joined(batches: Sequence[Any]) -> Any:
    """Return the samples of several batches as one: their tensors one after the other, all else as in the first.

    Raises:
        ValueError: If their tensors do not fit together.

    Example:
        >>> import torch
        >>> joined([{"x": torch.zeros(1, 2)}, {"x": torch.ones(1, 2)}])
        {'x': tensor([[0., 0.],
                [1., 1.]])}
    """
    if len(batches) == 1:
        return batches[0]
    if len({signature(batch) for batch in batches}) > 1:
        raise ValueError(
            "the batches hold tensors of different shapes, and samples are compared in one batch; pad them to one "
            "shape, or pass num_batches=1."
        )
    lists = [list({id(t): t for t in tensors_of(batch)}.values()) for batch in batches]
    whole = {id(same[0]): torch.cat(same) if same[0].ndim else same[0] for same in zip(*lists, strict=True)}
    return mapped(batches[0], lambda t: whole[id(t)])


def signature(batch: Any) -> tuple[Hashable, ...]:
    """Return what batches of other samples have in common: the types and shapes of the tensors, their lengths apart.

    Example:
        >>> import torch
        >>> signature([torch.zeros(8, 3), torch.tensor(1)])
        ((torch.float32, (3,)), (torch.int64, None))
    """
    return tuple((t.dtype, tuple(t.shape[1:]) if t.ndim else None) for t in tensors_of(batch))


def shares(
    batches: Sequence[Any],
    indices: Tensor,  # (m,) of dtype int64, counted over the batches in order
) -> Iterator[tuple[int, Tensor]]:
    """Yield, for each batch that samples fall into, its place and their indices within it.

    Raises:
        ValueError: If there is no index, or no such sample.
    """
    total = sum(map(num_samples, batches))
    whole = indices.dtype in (torch.int32, torch.int64) and indices.ndim == 1 and len(indices)
    if not whole or indices.min() < 0 or indices.max() >= total:
        raise ValueError(
            f"indices={indices.tolist()} must be a vector of at least one int from 0 to {total - 1}, each a sample of "
            "the batches."
        )
    first = 0
    for place, batch in enumerate(batches):
        own = indices[(indices >= first) & (indices < first + num_samples(batch))] - first
        first += num_samples(batch)
        if len(own):
            yield place, own


def check_samples(batch: Any) -> None:
    """Raise unless all tensors of the batch that have a dimension 0 agree in its length.

    Raises:
        ValueError: Naming the shapes.
    """
    lengths = list(dict.fromkeys(t.shape[0] for t in tensors_of(batch) if t.ndim > 0))
    if len(lengths) != 1:
        found = f"tensors of lengths {', '.join(map(str, lengths))}" if lengths else "no tensor with a dimension"
        raise ValueError(
            f"the batch holds {found}, and a sample is one entry of dimension 0 of every tensor; make batches whose "
            "tensors share dimension 0 (numbers without a dimension are shared by all samples), or leave this "
            "per-sample quantity out."
        )


def num_samples(batch: Any) -> int:
    """Return the length of dimension 0 of the first tensor that has one, and 1 where none has.

    Example:
        >>> import torch
        >>> num_samples({"weight": torch.tensor(2.0), "x": torch.zeros(8, 3)})
        8
    """
    return next((tensor.shape[0] for tensor in tensors_of(batch) if tensor.ndim > 0), 1)
