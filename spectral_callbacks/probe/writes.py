"""Copy on write: tensors that code may change, and that are put back afterwards."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class CopyOnWrite(TorchDispatchMode):
    """While active, saves each given tensor just before an operation writes to it, also through `.data` or a view.

    Version counters do not tell: writes through `.data`, the usual way to update a moving average of weights, leave
    them as they were. A kernel that writes without saying so in its schema (BatchNorm to its running statistics) is not
    seen.

    Args:
        tensors: What to protect. Tensors without a storage of their own (fake, sparse) are passed over.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._protected = {
            t.untyped_storage().data_ptr() for t in tensors if t.layout == torch.strided and t.numel() > 0
        }
        self._saved: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    @property
    def written(self) -> set[int]:
        """Storage addresses of the protected tensors that were written to."""
        return {target.untyped_storage().data_ptr() for target, _ in self._saved.values()}

    def restore(self) -> None:
        """Undo the writes; version counters move, so a graph that needs the written values fails instead of lying."""
        with torch.no_grad():
            for target, copy in reversed(self._saved.values()):
                target.copy_(copy)
        self._saved.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Save what `func` is about to write, and run it."""
        kwargs = kwargs or {}
        for place, name in _written_arguments(func):
            argument = kwargs.get(name) if name in kwargs else (args[place] if place < len(args) else None)
            for target in argument if isinstance(argument, (list, tuple)) else [argument]:
                if isinstance(target, Tensor) and target.untyped_storage().data_ptr() in self._protected:
                    region = (target.data_ptr(), target.shape, target.stride(), target.dtype)
                    if region not in self._saved:
                        self._saved[region] = (target.detach(), target.detach().clone())
        return func(*args, **kwargs)


@functools.cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    if not isinstance(func, torch._ops.OpOverload):
        return ()
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
