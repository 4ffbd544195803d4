"""Nodes of the autograd graph: what they have saved, and which of them are steps of a path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Size
from torch._C._autograd import SavedTensor

from spectral_callbacks.operators.steps import Part, Permute, Reshape, Scale, Step, Take

LEAF = "torch::autograd::AccumulateGrad"  # the name of the node that a parameter is


class NoKernelError(Exception):
    """An operation that takes a parameter in a way from which samples cannot be told apart; says which."""


def step_of(node: Any, slot: int, output: int, in_shape: Size) -> tuple[Step, ...] | None:
    """Return what an operation of the autograd graph does to one of its inputs, seen at one of its outputs.

    Args:
        node: The operation.
        slot: Place of the input among its differentiable inputs.
        output: Place of the output.
        in_shape: Of the input.

    Returns:
        No step where it changes nothing, None where the operation is none of a path.

    Raises:
        NoKernelError: If it would be one, and does not show what it has saved.
    """
    build = _STEPS.get(node.name())
    return None if build is None else build(node, slot, in_shape, output, Size(node._input_metadata[output].shape))


def saved(node: Any, name: str) -> Any:
    """Return what an operation has saved for the backward pass.

    Hooks that pack saved tensors, as those of activation checkpointing, may allow but one look at them, which belongs
    to the backward pass; so what such hooks hold is left alone.

    Raises:
        NoKernelError: If hooks hold it.
    """
    refuse_hooks(node, name)
    return getattr(node, f"_saved_{name}")


def refuse_hooks(node: Any, *names: str) -> None:
    """Find out whether saved tensors can be looked at, without looking.

    Raises:
        NoKernelError: If hooks hold one of them.
    """
    held = [getattr(node, f"_raw_saved_{name}") for name in names]
    single = [t for own in held for t in (own if isinstance(own, tuple) else (own,))]
    if not _HOOKS_ARE_SHOWN or any(t.unpack_hook is not None for t in single):
        raise NoKernelError(f"{node.name()} within activation checkpointing, or other hooks on saved tensors")


def signed(number: int) -> int:
    """Return a number that was saved as an unsigned one: -1 as 2⁶⁴ - 1."""
    return number - 2**64 if number >= 2**63 else number


# older versions of torch do not tell whether there are hooks
_HOOKS_ARE_SHOWN = "unpack_hook" in dir(SavedTensor)


def _expand(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...] | None:
    return () if shape == in_shape else None


def _reshape(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...]:
    return () if shape == in_shape else (Reshape(in_shape, shape),)


def _transpose(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...]:
    a, b = (-2, -1) if node.name() == "TBackward0" else (node._saved_dim0, node._saved_dim1)
    dims = list(range(len(in_shape)))
    if len(dims) > 1:
        a, b = (signed(axis) % len(dims) for axis in (a, b))
        dims[a], dims[b] = dims[b], dims[a]
    return (Permute(in_shape, tuple(dims)),)


def _permute(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...]:
    return (Permute(in_shape, tuple(signed(d) % len(in_shape) for d in node._saved_dims)),)


def _slice(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...]:
    dim = signed(node._saved_dim) % len(in_shape)
    start, end = (None if edge is None else signed(edge) for edge in (node._saved_start, node._saved_end))
    return _part(in_shape, dim, range(in_shape[dim])[start : end : node._saved_step])


def _select(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...]:
    dim = signed(node._saved_dim) % len(in_shape)
    return _part(in_shape, dim, signed(node._saved_index) % in_shape[dim])


def _unbind(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...]:
    return _part(in_shape, signed(node._saved_dim) % len(in_shape), output)


def _split(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...]:
    dim = signed(node._saved_dim) % len(in_shape)
    start = sum(node._input_metadata[i].shape[dim] for i in range(output))
    return _part(in_shape, dim, range(start, start + shape[dim]))


def _part(in_shape: Size, dim: int, places: range | int) -> tuple[Step, ...]:
    return () if places == range(in_shape[dim]) else (Part(in_shape, dim, places),)


def _plus(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...] | None:
    if shape != in_shape:
        return None
    by = coefficient(node, slot)
    return () if by == 1 else (Scale(in_shape, torch.tensor(by, dtype=torch.float64)),)


def coefficient(node: Any, slot: int) -> float:
    """Return what a sum or a difference multiplies one of its terms by."""
    match node.name(), slot:
        case "NegBackward0", _:
            return -1.0
        case "AddBackward0", 1:
            return float(node._saved_alpha)
        case ("SubBackward0", 1) | ("RsubBackward0" | "RsubBackward1", 0):
            return -float(node._saved_alpha)
        case _:
            return 1.0


def _times(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...] | None:
    if shape != in_shape:
        return None
    other = saved(node, "self" if slot else "other").detach()
    return (Scale(in_shape, other),)


def _over(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...] | None:
    if shape != in_shape or slot:
        return None
    other = saved(node, "other").detach()
    return (Scale(in_shape, (other if other.is_floating_point() else other.double()).reciprocal()),)


def _embedding(node: Any, slot: int, in_shape: Size, output: int, shape: Size) -> tuple[Step, ...] | None:
    """Positions are no part of the batch: they count up, where the classes and words of samples do not."""
    indices = saved(node, "indices").detach()
    flat = indices.reshape(-1)
    counts_up = len(flat) > 1 and bool((flat.diff() == 1).all())
    padding = signed(node._saved_padding_idx)
    if not counts_up or node._saved_scale_grad_by_freq or bool((flat == padding).any()):
        return None
    return (Take(in_shape, indices),)


_Build = Callable[[Any, int, Size, int, Size], tuple[Step, ...] | None]
_STEPS: dict[str, _Build] = {
    **dict.fromkeys(("TBackward0", "TransposeBackward0"), _transpose),
    **dict.fromkeys(("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0"), _reshape),
    **dict.fromkeys(("ToCopyBackward0", "AliasBackward0", "CloneBackward0", "UnsqueezeBackward0"), _reshape),
    **{f"SqueezeBackward{i}": _reshape for i in range(6)},
    **dict.fromkeys(("SplitBackward0", "SplitWithSizesBackward0"), _split),
    **dict.fromkeys(("AddBackward0", "AddBackward1", "SubBackward0", "SubBackward1"), _plus),
    **dict.fromkeys(("RsubBackward0", "RsubBackward1", "NegBackward0"), _plus),
    "ExpandBackward0": _expand,
    "PermuteBackward0": _permute,
    "SliceBackward0": _slice,
    "SelectBackward0": _select,
    "UnbindBackward0": _unbind,
    "MulBackward0": _times,
    "DivBackward0": _over,
    "EmbeddingBackward0": _embedding,
}
