"""Isolation: run a model's own loss in the middle of training, and leave no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, TypeVar

import torch
from torch import nn

from spectral_callbacks.probe.backends import SubstitutedOperations, exact_backends
from spectral_callbacks.probe.randomness import RandomState, seed_generators
from spectral_callbacks.probe.state import ModuleState
from spectral_callbacks.probe.writes import CopyOnWrite

Mode = Literal["train", "eval"]
_T = TypeVar("_T")


class WrittenParametersError(RuntimeError):
    """The loss writes to a trainable parameter, so it is no function of them."""


class Isolation:
    """The inside of `undisturbed`: evaluates closures, each from the state the module was found in.

    Args:
        module: Whose state is protected.
        randomness: The state of the random generators that training will go on with.
        also: Other objects whose state is protected.
    """

    def __init__(self, module: nn.Module, randomness: RandomState, also: Iterable[object] = ()) -> None:
        self._module = module
        self._randomness = randomness
        self._state = ModuleState(module, also)
        self._mode: Mode = "train"
        self._gradients = [(p, p.grad) for p in module.parameters()]

    def evaluate(self, closure: Callable[[], _T], *, seed: int | None) -> _T:
        """Return what the closure returns, from the same buffers, attributes and random numbers at every call.

        Args:
            closure: Runs the module.
            seed: Seeds every global generator; None lets the closure draw what training draws next.

        Raises:
            WrittenParametersError: If the closure writes to a trainable parameter. The parameter is put back first.
        """
        self._state.substitute_buffers()
        if seed is None:
            self._randomness.restore()
        else:
            seed_generators(seed)
        writes = CopyOnWrite([*self._module.parameters(), *self._state.tensors])
        try:
            with torch.enable_grad(), SubstitutedOperations(), writes:
                result = closure()
        finally:
            written = writes.written
            writes.restore()
            self._state.restore_attributes()
            self.set_training(self._mode)
        self._refuse_moved_parameters(written)
        return result

    def set_training(self, mode: Mode) -> None:
        """Put every submodule into `eval` mode, or each into the mode that training uses."""
        self._mode = mode
        if mode == "eval":
            self._state.set_training(False)
        else:
            self._state.restore_modes()

    def hide_gradients(self) -> None:
        """Take `.grad` away: a backward() inside a custom autograd function would add to it."""
        for p, _ in self._gradients:
            p.grad = None

    def restore(self) -> None:
        """Bring modes, buffers, attributes and gradients back."""
        for p, gradient in self._gradients:
            p.grad = gradient
        self._state.restore_modes()
        self._state.restore()

    def _refuse_moved_parameters(self, written: set[int]) -> None:
        if not written:
            return
        moved = [
            name
            for name, p in self._module.named_parameters()
            if p.requires_grad and p.untyped_storage().data_ptr() in written
        ]
        if moved:
            more = ", ..." if len(moved) > 3 else ""
            raise WrittenParametersError(
                f"the loss writes to the trainable parameters {', '.join(moved[:3])}{more}, so it is no function of "
                "them; they were put back. Pass loss= that computes the loss without this write."
            )


@contextlib.contextmanager
def undisturbed(module: nn.Module, *, mode: Mode = "train", also: Iterable[object] = ()) -> Iterator[Isolation]:
    """Isolate what happens inside from training, bit for bit.

    Restored on the way out, also after an exception: the global random generators (torch on the CPU and on every CUDA
    device, numpy, `random`), buffers, modes, Python attributes of every submodule (so that metric objects survive),
    frozen parameters, `.grad` (None inside), and the backend switches of `twice_differentiable`.

    Args:
        module: The model in training, unwrapped.
        mode: "train" leaves every submodule in the mode training has it in; "eval" switches all of them.
        also: Other objects whose attributes are restored, for example a data loader.

    Yields:
        The isolation, whose `evaluate` runs a closure from one and the same state each time.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
        >>> before = torch.get_rng_state()
        >>> with undisturbed(module) as isolation:
        ...     loss = isolation.evaluate(lambda: module(torch.ones(4, 2)).sum(), seed=0)
        >>> module[1].num_batches_tracked.item(), torch.equal(before, torch.get_rng_state())
        (0, True)
    """
    randomness = RandomState.capture()
    isolation = Isolation(module, randomness, also)
    try:
        isolation.set_training(mode)
        isolation.hide_gradients()
        with torch.inference_mode(False), torch.enable_grad(), exact_backends():
            yield isolation
    finally:
        try:
            isolation.restore()
        finally:
            randomness.restore()
