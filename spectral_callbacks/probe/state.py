"""State of a module beyond its parameters: buffers, modes, and the Python attributes that a forward pass may change."""

from __future__ import annotations

import collections
import functools
import random
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_INTERNAL = frozenset(nn.Module().__dict__)
_ATOMS = frozenset(
    {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, range}
)
_FOREIGN = frozenset(
    {
        "torch",
        "lightning",
        "pytorch_lightning",
        "lightning_fabric",
        "lightning_utilities",
        "builtins",
        "numpy",
        "typing",
        "types",
        "functools",
        "logging",
        "threading",
        "_thread",
        "weakref",
        "inspect",
    }
)
_OPAQUE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)
_LARGE_CONTAINER = 10_000  # entries; a larger one is restored itself, but not what its entries hold
_LARGE_ARRAY = 2**24  # bytes; a larger numpy array attribute is taken for data and not copied


class ModuleState:
    """A snapshot of what running a module may change, its parameters apart.

    Covered, on every submodule, also on those hidden in plain containers: `training`, buffers, added and replaced
    attributes, contents of lists, dicts, sets and deques, attributes of plain objects of the user's own classes, small
    numpy arrays and random generators. Tensors among them are listed in `tensors` for a guard that watches writes.

    Not covered: files, sockets and globals; generators of other libraries; iterators; numpy arrays of more than 16 MiB.

    Args:
        module: The root.
    """

    def __init__(self, module: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self._undo: list[Callable[[], None]] = []
        self._buffers: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: set[int] = set()
        self._visit_module(module)

    def substitute_buffers(self) -> None:
        """Let every buffer be a fresh copy, so that a graph may keep what a forward pass makes of it.

        Writing back into the buffers themselves is not an option: BatchNorm changes them without a trace in `_version`,
        and a graph may hold them.
        """
        copies: dict[int, Tensor] = {}
        for live, saved in self._buffers:
            for name, buffer in saved.items():
                if buffer is None:
                    live[name] = None
                    continue
                if id(buffer) not in copies:
                    copies[id(buffer)] = self._originals[id(buffer)][1].clone()
                live[name] = copies[id(buffer)]

    def set_training(self, mode: bool) -> None:
        """Set the mode of every submodule; restoring brings each one's own back."""
        for module, _ in self._modes:
            module.training = mode

    def restore(self) -> None:
        """Bring everything back, buffers as the very tensors they were."""
        for undo in self._undo:
            undo()
        for live, saved in self._buffers:
            if len(live) != len(saved) or any(live.get(name) is not buffer for name, buffer in saved.items()):
                live.clear()
                live.update(saved)
        with torch.no_grad():
            for buffer, copy in self._originals.values():
                if not torch.equal(buffer, copy):  # reached through an alias
                    buffer.copy_(copy)

    def restore_attributes(self) -> None:
        """Bring back the Python state alone, so that the next forward pass starts from it."""
        for undo in self._undo:
            undo()

    def restore_modes(self) -> None:
        """Give every submodule its own mode back."""
        for module, training in self._modes:
            module.training = training

    def _visit_module(self, root: nn.Module) -> None:
        for module in root.modules():
            if id(module) in self._seen:
                continue
            self._seen.add(id(module))
            self._modes.append((module, module.training))
            buffers: dict[str, Tensor | None] = module._buffers
            if buffers:
                self._buffers.append((buffers, dict(buffers)))
                for buffer in buffers.values():
                    if buffer is not None and id(buffer) not in self._originals:
                        self._originals[id(buffer)] = (buffer, buffer.detach().clone())
            attributes = {name: value for name, value in module.__dict__.items() if name not in _INTERNAL}
            self._undo.append(_attribute_restorer(module.__dict__, attributes))
            self._visit(attributes.values())

    def _visit(self, values: Iterable[Any]) -> None:
        for value in values:
            kind = type(value)
            if kind in _ATOMS or id(value) in self._seen or isinstance(value, _OPAQUE):
                continue
            self._seen.add(id(value))
            if isinstance(value, Tensor):
                self.tensors.append(value)
            elif isinstance(value, nn.Module):
                self._visit_module(value)
            elif isinstance(value, (list, collections.deque, set, dict)):
                self._visit_container(value)
            elif isinstance(value, (tuple, frozenset)):
                self._visit(value)
            elif isinstance(value, np.ndarray):
                if value.nbytes <= _LARGE_ARRAY and value.flags.writeable:
                    self._undo.append(_array_restorer(value))
            elif isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
                self._undo.append(_generator_restorer(value))
            elif kind.__module__.partition(".")[0] not in _FOREIGN and isinstance(
                attributes := getattr(value, "__dict__", None), dict
            ):
                saved = dict(attributes)
                self._undo.append(_attribute_restorer(attributes, saved))
                self._visit(saved.values())

    def _visit_container(self, container: Any) -> None:
        entries = list(container.values()) if isinstance(container, dict) else list(container)
        self._undo.append(_container_restorer(container))
        if len(entries) <= _LARGE_CONTAINER:
            self._visit(entries)


def _attribute_restorer(live: dict[str, Any], saved: dict[str, Any]) -> Callable[[], None]:
    size = len(live)

    def restore() -> None:
        if len(live) != size:
            for name in [name for name in live if name not in saved and name not in _INTERNAL]:
                del live[name]
        for name, value in saved.items():
            if name not in live or live[name] is not value:
                live[name] = value

    return restore


def _container_restorer(container: Any) -> Callable[[], None]:
    if isinstance(container, list):
        items = list(container)

        def restore() -> None:
            container[:] = items
    else:
        copy = dict(container) if isinstance(container, dict) else list(container)

        def restore() -> None:
            container.clear()
            if isinstance(container, collections.deque):
                container.extend(copy)
            else:
                container.update(copy)

    return restore


def _array_restorer(array: np.ndarray) -> Callable[[], None]:
    copy = array.copy()

    def restore() -> None:
        array[...] = copy

    return restore


def _generator_restorer(generator: Any) -> Callable[[], None]:
    if isinstance(generator, np.random.Generator):
        bits, bits_state = generator.bit_generator, generator.bit_generator.state
        return lambda: setattr(bits, "state", bits_state)
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    return functools.partial(generator.set_state, generator.get_state())
