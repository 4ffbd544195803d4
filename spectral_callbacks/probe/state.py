"""State of a module beyond its parameters: buffers, modes, and the Python attributes that a forward pass may change."""

from __future__ import annotations

import collections
import functools
import operator
import random
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

_SEPARATE = ("training", "_buffers")  # a module's attributes with a snapshot of their own
_UNSET = object()
_ATOMS = frozenset(
    {int, float, complex, bool, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, range}
)
_FOREIGN = frozenset(
    {
        "torch",
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
_LIGHTNING = frozenset({"lightning", "pytorch_lightning", "lightning_fabric", "spectral_callbacks"})  # with subclasses
_OPAQUE = (type, types.FunctionType, types.MethodType, types.BuiltinFunctionType, types.ModuleType)
_LARGE_CONTAINER = 10_000  # entries; a larger one is restored itself, but not what its entries hold
_LARGE_ARRAY = 2**24  # bytes; a larger numpy array attribute is taken for data and not copied


class ModuleState:
    """A snapshot of what running a module may change, its parameters apart.

    Covered, on every submodule, also on those hidden in plain containers: `training`, buffers, submodules, hooks, added
    and replaced attributes, contents of lists, dicts, sets and deques, attributes and slots of plain objects of the
    user's own classes, small numpy arrays and random generators. Tensors among them, parameters included, are listed in
    `tensors` for a guard that watches writes.

    Not covered: files, sockets and globals (class attributes are such); generators of other libraries; iterators; numpy
    arrays of more than 16 MiB.

    Args:
        module: The root.
        also: Other objects whose state is kept, for example a data set with random numbers of its own.
    """

    def __init__(self, module: nn.Module, also: Iterable[object] = ()) -> None:
        self.tensors: list[Tensor] = []
        self._undo: list[Callable[[], None]] = []
        self._buffers: list[tuple[dict[str, Tensor | None], dict[str, Tensor | None]]] = []
        self._modes: list[tuple[nn.Module, bool]] = []
        self._originals: dict[int, tuple[Tensor, Tensor]] = {}
        self._seen: set[int] = set()
        self._pending: list[Any] = [module]
        for value in also:
            self._visit_object(value)
        while self._pending:
            self._visit(self._pending.pop())

    def substitute_buffers(self) -> None:
        """Let every buffer be a fresh copy, so that a graph may keep what a forward pass makes of it.

        Writing back into the buffers themselves is not an option: BatchNorm changes them without a trace in `_version`,
        and a graph may hold them.
        """
        copies: dict[int, Tensor] = {}
        for live, saved in self._buffers:
            if len(live) != len(saved):
                _restore_dict(live, saved)
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
            if module.training is not mode:
                module.training = mode

    def restore(self) -> None:
        """Bring everything back, buffers as the very tensors they were."""
        self.restore_attributes()
        for live, saved in self._buffers:
            _restore_dict(live, saved)
        with torch.no_grad():
            for buffer, copy in self._originals.values():
                if buffer.layout == torch.strided and not torch.equal(buffer, copy):  # reached through an alias
                    buffer.copy_(copy)

    def restore_attributes(self) -> None:
        """Bring back the Python state alone, so that the next forward pass starts from it."""
        for undo in self._undo:
            undo()

    def restore_modes(self) -> None:
        """Give every submodule its own mode back."""
        for module, training in self._modes:
            if module.training is not training:
                module.training = training

    def _visit_module(self, module: nn.Module) -> None:
        self._modes.append((module, module.training))
        buffers: dict[str, Tensor | None] = module._buffers
        self._buffers.append((buffers, dict(buffers.items())))
        for buffer in buffers.values():
            if buffer is not None and id(buffer) not in self._originals:
                self._originals[id(buffer)] = (buffer, buffer.detach().clone())
        attributes = dict(module.__dict__)
        self._undo.append(functools.partial(_restore_dict, module.__dict__, attributes, _SEPARATE))
        self._pending.extend(value for name, value in attributes.items() if name not in _SEPARATE)
        self._pending.extend(module.children())  # of a scripted module, which has no plain dict of them

    def _visit(self, value: Any) -> None:
        kind = type(value)
        if kind in _ATOMS or id(value) in self._seen or isinstance(value, _OPAQUE):
            return
        self._seen.add(id(value))
        if isinstance(value, Tensor):
            self.tensors.append(value)
            if value.is_leaf:
                self._undo.append(functools.partial(_restore_requires_grad, value, value.requires_grad))
        elif isinstance(value, nn.Module):
            self._visit_module(value)
        elif isinstance(value, (list, collections.deque, set, dict)):
            self._visit_container(value)
        elif isinstance(value, (tuple, frozenset)):
            self._pending.extend(value)
        elif isinstance(value, np.ndarray):
            if value.nbytes <= _LARGE_ARRAY and value.flags.writeable:
                self._undo.append(_array_restorer(value))
        elif isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            self._undo.append(_generator_restorer(value))
        elif isinstance(value, (Dataset, Sampler)) or not _is_foreign(kind):
            self._visit_object(value)

    def _visit_object(self, value: Any) -> None:
        if isinstance(attributes := getattr(value, "__dict__", None), dict):
            self._visit_container(attributes)
        slots = [
            (slot, _read(slot, value))
            for kind in type(value).__mro__
            for slot in vars(kind).values()
            if isinstance(slot, types.MemberDescriptorType)
        ]
        if slots:
            self._undo.append(functools.partial(_restore_slots, value, slots))
            self._pending.extend(filled for _, filled in slots if filled is not _UNSET)

    def _visit_container(self, container: Any) -> None:
        if isinstance(container, dict):
            self._undo.append(functools.partial(_restore_dict, container, dict(container)))
        else:
            self._undo.append(functools.partial(_restore_entries, container, list(container)))
        if len(container) <= _LARGE_CONTAINER:
            self._pending.extend(container.values() if isinstance(container, dict) else container)


def _is_foreign(kind: type) -> bool:
    roots = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return roots[0] in _FOREIGN or any(root in _LIGHTNING for root in roots)


def _restore_dict(live: dict[str, Any], saved: dict[str, Any], separate: tuple[str, ...] = ()) -> None:
    """Give a dict its entries back, in their order; those named in `separate` keep their values."""
    if not live and not saved:  # as most registries of hooks are
        return
    if len(live) == len(saved) and all(
        name is known and (value is original or name in separate)
        for (name, value), (known, original) in zip(live.items(), saved.items(), strict=True)
    ):
        return
    if isinstance(live, dict):
        kept = {name: live[name] for name in separate if name in live}
        live.clear()
        live.update(saved | kept)
    else:  # of a scripted module, whose names are fixed
        for name, value in saved.items():
            live[name] = value


def _restore_requires_grad(tensor: Tensor, requires_grad: bool) -> None:
    if tensor.requires_grad != requires_grad:
        tensor.requires_grad_(requires_grad)


def _restore_entries(live: Any, saved: list[Any]) -> None:
    if len(live) == len(saved) and all(map(operator.is_, live, saved)):
        return
    live.clear()
    (live.update if isinstance(live, set) else live.extend)(saved)


def _read(slot: types.MemberDescriptorType, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return _UNSET


def _restore_slots(value: Any, saved: list[tuple[types.MemberDescriptorType, Any]]) -> None:
    for slot, filled in saved:
        if _read(slot, value) is filled:
            continue
        if filled is _UNSET:
            slot.__delete__(value)
        else:
            slot.__set__(value, filled)


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
