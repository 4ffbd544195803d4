"""Choices that a loss made by its data, as far as its graph shows them: which rows it moved, how much it averaged over.

Which entry belongs to which sample is found out on one batch. A later batch may run through the same operations and
move other rows (sorting by length, routing, packing), or weigh its samples otherwise (ignored targets, masked means).
Where the choices are the same, what was found out still holds.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

from spectral_callbacks.operators.nodes import LEAF, NoKernelError, saved, signed

_MEAN = 1  # torch's number for reduction="mean"


def choice_of(node: Any, name: str) -> Hashable:
    """Return what an operation has chosen by the data; None where it chooses nothing, or hooks hold what it has saved.

    Rows that stay where they are count as no choice, so that batches of every size agree.

    Args:
        node: The operation.
        name: Its name.
    """
    choose = _CHOICES.get(name)
    try:
        found = None if choose is None else choose(node)
    except NoKernelError:
        found = None
    return None if found is None else (name, found)


def _counted(node: Any) -> Hashable:
    """The weight of a target in a mean, 0 where it is ignored, averaged over the targets; none where that is 1."""
    if node._saved_reduction != _MEAN:
        return None
    target, weight = saved(node, "target"), saved(node, "weight")
    counted = target[target != signed(node._saved_ignore_index)]
    total = counted.numel() if weight is None else weight.double()[counted].sum().item()
    return None if total == target.numel() else _rounded(total, target.numel())


def _divisor(node: Any) -> Hashable:
    """The number that a sum over everything is divided by, a term."""
    total: Any = node.next_functions[0][0]
    if total is None or total.name() != "SumBackward0":
        return None
    other = saved(node, "other")
    return None if other.ndim else _rounded(other.item(), math.prod(total._saved_self_sym_sizes))


def _rows_taken(node: Any) -> Hashable:
    """Which, by a list of indices; none where one of them leaves rows in place: `x[torch.arange(len(x)), last]`."""
    if _is_table(node):
        return None
    given = [t for t in saved(node, "indices") if t is not None]
    return None if any(map(_stays, given)) else tuple(map(_print, given))


def _masked(node: Any) -> Hashable:
    mask = saved(node, "mask")
    return None if bool(mask.all()) else _print(mask)


def _along_rows(name: str) -> Callable[[Any], Hashable]:
    def choose(node: Any) -> Hashable:
        if node._saved_dim != 0 or _is_table(node):
            return None
        index = saved(node, name)
        return None if index.ndim == 1 and _stays(index) else _print(index)

    return choose


def _is_table(node: Any) -> bool:
    """Whether rows of a parameter are looked up, not those of samples moved."""
    source = node.next_functions[0][0]
    return source is not None and source.name() == LEAF


def _stays(index: Tensor) -> bool:
    """Whether a mask, or indices, leave everything where it is."""
    if index.dtype in (torch.bool, torch.uint8):
        return bool(index.all())
    flat = index.reshape(-1)
    return bool((flat == torch.arange(len(flat), device=flat.device)).all())


def _print(t: Tensor) -> Hashable:
    return tuple(t.shape), zlib.crc32(t.detach().cpu().contiguous().numpy().tobytes())


def _rounded(number: float, by: int) -> str:
    return f"{number / max(1, by):.9g}"


_CHOICES: dict[str, Callable[[Any], Hashable]] = {
    **dict.fromkeys(("NllLossBackward0", "NllLoss2DBackward0"), _counted),
    "DivBackward0": _divisor,
    **dict.fromkeys(("IndexBackward0", "UnsafeIndexBackward0", "IndexPutBackward0"), _rows_taken),
    **dict.fromkeys(("MaskedSelectBackward0", "MaskedScatterBackward0"), _masked),
    **dict.fromkeys(("SortBackward0", "TopkBackward0"), _along_rows("indices")),
    **{
        f"{kind}Backward0": _along_rows("index")
        for kind in ("IndexSelect", "IndexAdd", "IndexCopy", "Gather", "Scatter", "ScatterAdd", "ScatterReduce")
    },
}
