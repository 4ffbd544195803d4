"""Readers: how to see, at an operation that a parameter meets the samples in, the gradients of single samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Size, Tensor

from spectral_callbacks.operators.convolutions import Convolution
from spectral_callbacks.operators.factors import Factor, Rows
from spectral_callbacks.operators.lookups import Lookup
from spectral_callbacks.operators.nodes import NoKernelError, coefficient, refuse_hooks, saved, signed
from spectral_callbacks.operators.outer_products import Outer
from spectral_callbacks.operators.paths import Path


@dataclasses.dataclass(frozen=True)
class Contribution:
    """What one use of a parameter adds to the gradients of the samples.

    Attributes:
        tensors: Each with items first: rows of a matrix, images of a convolution, words.
        build: Makes a factor of the same tensors, items grouped by samples, (N, items of a sample, ...).
    """

    tensors: tuple[Tensor, ...]
    build: Callable[..., Factor]


class Reading(NamedTuple):
    """How an operation is read.

    Attributes:
        path: To the tensor that the factors are gradients by.
        contribution: Takes the gradient of the operation's output, before the operation runs backward.
        repeats: Whether it does no more than repeat the tensor along the axes of the samples, and act entry by entry.
    """

    path: Path
    contribution: Callable[[Tensor], Contribution]
    repeats: bool = False


def reading_of(node: Any, slot: int, path: Path) -> Reading | None:
    """Return how to read an operation at one of its inputs, or None where there is no kernel.

    Nothing that it has saved is looked at before its contribution is asked for.

    Args:
        node: The operation.
        slot: Place of the input among its differentiable inputs.
        path: From the parameter to this input.

    Raises:
        NoKernelError: If there is one, and this use of the operation is none that it treats.
    """
    read = _READERS.get((node.name(), slot))
    return None if read is None else read(node, slot, path)


def _matrix_product(node: Any, slot: int, path: Path, names: tuple[str, str], scale: float = 1.0) -> Reading:
    """Of y = a b, or G of them: with w = b the items are the rows of a and y, with w = a the columns of b and y."""
    refuse_hooks(node, names[1 - slot])
    axis = -2 if slot else -1
    before = path.before_transposition()
    swaps = (slot == 0) != (before is not None)  # of the two sides; the gradient stands left for w = a, and for w = bᵀ
    inner, shape = (path, path.shape) if before is None else (before, before.shape)

    def contribution(gradient: Tensor) -> Contribution:
        other = saved(node, names[1 - slot]).movedim(axis, 0)
        own = (gradient if scale == 1 else gradient * scale).movedim(axis, 0)
        sides = (own, other) if swaps else (other, own)
        return Contribution(sides, lambda left, right: Outer(_grouped(left), _grouped(right), shape))

    return Reading(inner, contribution)


def _grouped(t: Tensor) -> Tensor:  # (N, I, r) or (N, I, G, r) -> (N, G, I, r)
    return t.unsqueeze(1) if t.ndim == 3 else t.transpose(1, 2)


def _addmm(node: Any, slot: int, path: Path) -> Reading:
    if slot:
        return _matrix_product(node, slot - 1, path, ("mat1", "mat2"), float(node._saved_alpha))
    beta = float(node._saved_beta)
    return _broadcast(node, path, lambda gradient: gradient if beta == 1 else gradient * beta)


def _mm(node: Any, slot: int, path: Path) -> Reading:
    return _matrix_product(node, slot, path, ("self", "mat2"))


def _mv(node: Any, slot: int, path: Path) -> Reading:
    refuse_hooks(node, "self")
    return _rows(path, lambda gradient: gradient[:, None] * saved(node, "self"))


def _linear(node: Any, slot: int, path: Path) -> Reading:
    if slot == 2:
        return _broadcast(node, path, lambda gradient: gradient)
    refuse_hooks(node, "input")

    def contribution(gradient: Tensor) -> Contribution:
        sides = (t.reshape(-1, t.shape[-1]) for t in (gradient, saved(node, "input")))
        return Contribution(tuple(sides), lambda left, right: Outer(_grouped(left), _grouped(right), path.shape))

    return Reading(path, contribution)


def _convolution(node: Any, slot: int, path: Path) -> Reading:
    if slot == 2:
        return _rows(path, lambda gradient: gradient.flatten(2).sum(2))
    refuse_hooks(node, "input")
    geometry = node._saved_stride, node._saved_padding, node._saved_dilation, node._saved_groups
    if node._saved_transposed and any(o >= s for o, s in zip(node._saved_output_padding, geometry[0], strict=True)):
        raise NoKernelError(f"{node.name()} with output_padding >= stride")

    def contribution(gradient: Tensor) -> Contribution:
        images = saved(node, "input"), gradient
        if node._saved_transposed:  # a convolution backward: what it takes is what it gives
            images = images[::-1]
        return Contribution(images, lambda input, output: Convolution(input, output, path.shape, *geometry))

    return Reading(path, contribution)


def _embedding(node: Any, slot: int, path: Path) -> Reading:
    if node._saved_scale_grad_by_freq:
        raise NoKernelError(f"{node.name()} with scale_grad_by_freq=True")
    refuse_hooks(node, "indices")
    padding_idx = signed(node._saved_padding_idx)

    def contribution(gradient: Tensor) -> Contribution:
        indices = saved(node, "indices").reshape(-1)
        return Contribution(
            (indices, gradient.reshape(len(indices), -1)),
            lambda i, g: Lookup(i, g, path.shape, None if padding_idx < 0 else padding_idx),
        )

    return Reading(path, contribution)


def _layer_norm(node: Any, slot: int, path: Path) -> Reading:
    if slot == 2:
        return _broadcast(node, path, lambda gradient: gradient)
    refuse_hooks(node, "input", "result1", "result2")

    def local(gradient: Tensor) -> Tensor:
        return gradient * (saved(node, "input") - saved(node, "result1")) * saved(node, "result2")

    return _broadcast(node, path, local)


def _rms_norm(node: Any, slot: int, path: Path) -> Reading:
    refuse_hooks(node, "input", "result1")
    return _broadcast(node, path, lambda gradient: gradient * saved(node, "input") * saved(node, "result1"))


def _group_norm(node: Any, slot: int, path: Path) -> Reading:
    if slot == 2:
        return _rows(path, lambda gradient: gradient.flatten(1).unflatten(1, (path.shape.numel(), -1)).sum(2))
    refuse_hooks(node, "input", "result1", "result2")

    def rows(gradient: Tensor) -> Tensor:  # (R, C)
        grouped = (len(gradient), node._saved_group, -1)
        mean, inverse_deviation = saved(node, "result1")[..., None], saved(node, "result2")[..., None]
        normalized = (saved(node, "input").reshape(grouped) - mean) * inverse_deviation
        product = gradient.reshape(grouped) * normalized
        return product.reshape(len(gradient), path.shape.numel(), -1).sum(2)

    return _rows(path, rows)


def _batch_norm(node: Any, slot: int, path: Path) -> Reading:
    if node._saved_training:
        raise NoKernelError(f"{node.name()} in train mode, which couples the samples of a batch")
    if slot == 2:
        return _rows(path, lambda gradient: gradient.flatten(1).unflatten(1, (path.shape.numel(), -1)).sum(2))
    refuse_hooks(node, "input", "running_mean", "running_var")
    eps = node._saved_eps if node.name().startswith("Native") else node._saved_epsilon

    def rows(gradient: Tensor) -> Tensor:  # (R, C)
        channels = (len(gradient), path.shape.numel(), -1)
        mean, variance = saved(node, "running_mean")[:, None], saved(node, "running_var")[:, None]
        normalized = (saved(node, "input").reshape(channels) - mean) * (variance + eps).rsqrt()
        return (gradient.reshape(channels) * normalized).sum(2)

    return _rows(path, rows)


def _sum(node: Any, slot: int, path: Path) -> Reading | None:
    by = coefficient(node, slot)
    return _repeated(node, path, lambda gradient: gradient if by == 1 else gradient * by)


def _product(node: Any, slot: int, path: Path) -> Reading | None:
    name = "self" if slot else "other"
    refuse_hooks(node, name)
    return _repeated(node, path, lambda gradient: gradient * saved(node, name))


def _quotient(node: Any, slot: int, path: Path) -> Reading | None:
    refuse_hooks(node, "self", "other")

    def local(gradient: Tensor) -> Tensor:
        other = saved(node, "other")
        return -gradient * saved(node, "self") / other.square() if slot else gradient / other

    return _repeated(node, path, local)


def _where(node: Any, slot: int, path: Path) -> Reading | None:
    refuse_hooks(node, "condition")
    return _repeated(node, path, lambda gradient: gradient * (saved(node, "condition") != bool(slot)))


def _prelu(node: Any, slot: int, path: Path) -> Reading | None:
    refuse_hooks(node, "self")
    return _repeated(node, path, lambda gradient: gradient * saved(node, "self").clamp(max=0))


def _repeat(node: Any, slot: int, path: Path) -> Reading:
    repeats = node._saved_repeats
    sizes = (*(1,) * (len(repeats) - len(path.shape)), *path.shape)

    def rows(gradient: Tensor) -> Tensor:  # (R, ...)
        blocks = gradient.reshape([size for pair in zip(repeats, sizes, strict=True) for size in pair])
        return blocks.permute(*range(0, blocks.ndim, 2), *range(1, blocks.ndim, 2)).flatten(0, len(repeats) - 1)

    return _rows(path, rows)._replace(repeats=True)


def _repeated(node: Any, path: Path, local: Callable[[Tensor], Tensor]) -> Reading | None:
    """An operation that acts entry by entry; None where it does not repeat the tensor along any axis."""
    return _broadcast(node, path, local)._replace(repeats=True) if _axes(path.shape, output_shape(node)) else None


def _broadcast(node: Any, path: Path, local: Callable[[Tensor], Tensor]) -> Reading:
    """The items lie along the axes of the output that the tensor does not have."""
    axes = _axes(path.shape, output_shape(node))

    def rows(gradient: Tensor) -> Tensor:
        first = local(gradient).movedim(axes, tuple(range(len(axes))))
        return first.reshape(-1, *first.shape[len(axes) :])

    return _rows(path, rows)


def _rows(path: Path, rows: Callable[[Tensor], Tensor]) -> Reading:
    """The gradients by the tensor are given item by item."""

    def build(items: Tensor) -> Rows:
        one = items.shape[1] == 1  # then the rows stay where they are, which LatestRows can tell
        total = items[:, 0] if one else items.sum(1, dtype=torch.promote_types(items.dtype, torch.float32))
        return Rows(total.reshape(len(items), *path.shape))

    return Reading(path, lambda gradient: Contribution((rows(gradient),), build))


def output_shape(node: Any) -> Size:
    """Of an operation."""
    return Size(node._input_metadata[0].shape)


def _axes(shape: Size, output: Size) -> tuple[int, ...]:
    """Return the axes of an output along which a tensor repeats; of batches of one sample, those where it could."""
    extra = len(output) - len(shape)
    own = [i for i in range(extra, len(output)) if shape[i - extra] == 1]
    grown = [i for i in own if output[i] != 1]
    return (*range(extra), *(grown if grown or extra else own))


_READERS: dict[tuple[str, int], Callable[[Any, int, Path], Reading | None]] = {
    (f"{name}Backward0", slot): read
    for names, slots, read in (
        ("Addmm", (0, 1, 2), _addmm),
        ("Mm Bmm", (0, 1), _mm),
        ("Mv", (1,), _mv),
        ("Linear", (1, 2), _linear),
        ("Convolution", (1, 2), _convolution),
        ("Embedding", (0,), _embedding),
        ("NativeLayerNorm", (1, 2), _layer_norm),
        ("FusedRmsNorm", (1,), _rms_norm),
        ("NativeGroupNorm", (1, 2), _group_norm),
        ("NativeBatchNorm CudnnBatchNorm", (1, 2), _batch_norm),
        ("Add Sub Rsub", (0, 1), _sum),
        ("Expand", (0,), _sum),
        ("Mul", (0, 1), _product),
        ("Div", (0, 1), _quotient),
        ("Where", (0, 1), _where),
        ("PreluKernel", (1,), _prelu),
        ("Repeat", (0,), _repeat),
    )
    for name in names.split()
    for slot in slots
}
