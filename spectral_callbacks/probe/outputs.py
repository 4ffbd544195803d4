"""Outputs: what a named submodule returns while a loss is evaluated, caught by a forward hook."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from spectral_callbacks.operators import Cut
from spectral_callbacks.probe.batches import mapped, tensors_of

_COMPILED = "_orig_mod"  # the name torch.compile puts between a module and its own
_LISTED = 6


class NoOutputsError(ValueError):
    """A quantity that needs the model's outputs was asked for, and no one said where they are."""


def plain_name(dotted: str) -> str:
    """Return a dotted name without what torch.compile puts into it.

    Example:
        >>> plain_name("net._orig_mod.0")
        'net.0'
    """
    return ".".join(part for part in dotted.split(".") if part != _COMPILED)


def named_module(module: nn.Module, name: str, *, knob: str) -> nn.Module:
    """Return the submodule of this name; of a compiled one the module that was compiled.

    Args:
        module: The root, whose own name is "".
        name: Dotted; any of its names, where it has several.
        knob: What the user called it by, for the error.

    Raises:
        ValueError: If there is none of this name; it names those that come close.
    """
    by_name: dict[str, nn.Module] = {}
    for dotted, submodule in module.named_modules(remove_duplicate=False):
        by_name[plain_name(dotted)] = submodule
    if plain_name(name) in by_name:
        return by_name[plain_name(name)]
    close = difflib.get_close_matches(name, by_name, n=3, cutoff=0.5)
    known = [dotted for dotted in by_name if dotted and "." not in dotted][:_LISTED]
    hint = f"did you mean {' or '.join(map(repr, close))}? " if close else f"it has {', '.join(map(repr, known))}; "
    raise ValueError(
        f"{knob}={name!r} names no submodule of {type(module).__name__}; {hint if close or known else ''}"
        f'{knob}="" is the module itself.'
    )


@contextlib.contextmanager
def intercepted(module: nn.Module, name: str, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Let a function replace every floating tensor that a submodule returns, in every call, wherever it is nested.

    Args:
        module: The root.
        name: Of the submodule.
        replace: Is given the tensors in the order in which they are returned.

    Raises:
        ValueError: If there is no such submodule, or it did not run, or returned no floating tensor.
    """
    num_calls, num_tensors = 0, 0

    def hook(_module: nn.Module, _arguments: Any, output: Any) -> Any:
        nonlocal num_calls, num_tensors
        num_calls += 1
        num_tensors += sum(t.is_floating_point() for t in tensors_of(output))
        return mapped(output, lambda t: replace(t) if t.is_floating_point() else t)

    handle = named_module(module, name, knob="outputs").register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
    if not num_calls:
        raise ValueError(
            f"outputs={name!r} did not run while the loss was evaluated; name a submodule that the loss calls as "
            "`module(x)` (a call of `.forward` or of another method, and TorchScript, pass unseen)."
        )
    if not num_tensors:
        raise ValueError(f"outputs={name!r} returned no floating tensor; name a submodule that returns what is scored.")


def cut(module: nn.Module, name: str, loss: Callable[[], Tensor], parameters: Sequence[Tensor]) -> Cut:
    """Evaluate a loss with its graph cut at the outputs of a submodule.

    Every floating tensor of every call counts as an output; a loss that uses only some of them is flat in the others.

    Args:
        module: The root.
        name: Of the submodule.
        loss: Runs the module.
        parameters: That the loss must depend on through the outputs alone.

    Raises:
        ValueError: If the submodule does not exist or run, or the loss depends on a parameter in another way.
    """
    outputs: list[Tensor] = []
    leaves: list[Tensor] = []

    def replace(output: Tensor) -> Tensor:
        leaf = output.detach().clone().requires_grad_()
        outputs.append(output)
        leaves.append(leaf)
        return leaf.clone()  # the loss may write to it

    with intercepted(module, name, replace):
        value = loss()
    if value.requires_grad:
        around = torch.autograd.grad(value.sum(), parameters, retain_graph=True, allow_unused=True)
        by_id = {id(p): of for of, p in module.named_parameters()}
        beside = [by_id.get(id(p), "?") for p, g in zip(parameters, around, strict=True) if g is not None]
        if beside:
            more = ", ..." if len(beside) > 3 else ""
            raise ValueError(
                f"the loss depends on {', '.join(beside[:3])}{more} other than through outputs={name!r}, so it is no "
                "function of these outputs; name the last submodule that has parameters, and keep penalties on the "
                "weights out of the loss (pass loss= without them; weight_decay is the optimizer's)."
            )
    return Cut(tuple(outputs), tuple(leaves), value)
