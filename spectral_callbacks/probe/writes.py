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

    A tensor that is given other memory (`p.data = ...`) gets its own back.

    Version counters do not tell: writes through `.data`, the usual way to update a moving average of weights, leave
    them as they were. A kernel that writes without saying so in its schema (BatchNorm to its running statistics) is not
    seen.

    Args:
        tensors: What to protect. Tensors without a storage of their own (fake, sparse) are passed over.
    """

    supports_higher_order_operators = True

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        super().__init__()
        self._memory = [(t, t.detach()) for t in tensors if t.layout == torch.strided and t.numel() > 0]
        self._protected = {memory.untyped_storage().data_ptr() for _, memory in self._memory}
        self._saved: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    @property
    def written(self) -> set[int]:
        """Storage addresses of the protected tensors that were written to."""
        moved = [memory for tensor, memory in self._memory if not _is_same_memory(tensor, memory)]
        return {t.untyped_storage().data_ptr() for t in [*moved, *(target for target, _ in self._saved.values())]}

    def restore(self) -> None:
        """Undo the writes; version counters move, so a graph that needs the written values fails instead of lying."""
        written = self.written
        with torch.no_grad():
            for tensor, memory in self._memory:
                if not _is_same_memory(tensor, memory):
                    tensor.data = memory
                if memory.untyped_storage().data_ptr() in written and not tensor.is_inference():
                    torch.autograd.graph.increment_version(tensor)
            for target, copy in reversed(self._saved.values()):
                target.copy_(copy)
        self._saved.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Save what `func` is about to write, and run it."""
        kwargs = kwargs or {}
        for place, name in _written_arguments(func):
            argument = kwargs.get(name) if name in kwargs else (args[place] if place < len(args) else None)
            for target in argument if isinstance(argument, (list, tuple)) else [argument]:
                if not isinstance(target, Tensor) or target.layout != torch.strided:
                    continue
                if target.untyped_storage().data_ptr() in self._protected:
                    region = (target.data_ptr(), target.shape, target.stride(), target.dtype)
                    if region not in self._saved:
                        self._saved[region] = (target.detach(), target.detach().clone())
        return func(*args, **kwargs)


def _is_same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride() and a.dtype == b.dtype


@functools.cache
def _written_arguments(func: Any) -> tuple[tuple[int, str], ...]:
    if not isinstance(func, torch._ops.OpOverload):
        return ()
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
