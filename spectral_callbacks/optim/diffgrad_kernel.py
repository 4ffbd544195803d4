"""One step of Adam times a friction as a compiled kernel: one pass over the memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from spectral_callbacks.optim.blocks import flat
from spectral_callbacks.optim.compiled import FlatKernel
from spectral_callbacks.optim.friction import Number, Settings, Slot

_WORTH_A_KERNEL = 1 << 13  # entries


def step_compiled(slots: Sequence[Slot], settings: Settings, steps: Sequence[Number]) -> list[int]:
    """Step tensors by one compiled kernel and return the indices of those that it left alone.

    Those are the small ones, which are done before a kernel is called, those that do not lie in memory as it reads
    them, and all of them where there is no compiler.
    """
    numbers: dict[Any, Tensor] = {}
    left = []
    for i, (slot, step) in enumerate(zip(slots, steps, strict=True)):
        p = slot.parameter
        if p.numel() < _WORTH_A_KERNEL or not slot.lies_alike:
            left.append(i)
            continue
        dtype = torch.promote_types(p.dtype, torch.float32)
        key = p.device, dtype, step
        if key not in numbers:
            scalars = [torch.as_tensor(x, dtype=dtype, device=p.device) for x in _numbers(settings, step)]
            numbers[key] = torch.stack(scalars)
        # Not as views: PyTorch would compile anew for each number of dimensions of what they are views of.
        if not _kernel.run(*(None if t is None else flat(t).data for t in slot), numbers[key], settings.relative):
            return [*left, *range(i, len(slots))]
        torch.autograd.graph.increment_version(p)  # so that a graph that needs it as it was notices
    return left


def diffgrad_kernel(
    p: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    previous: Tensor,
    largest: Tensor | None,
    friction: Tensor | None,
    numbers: Tensor,
    relative: bool,
) -> None:
    """Step one flat tensor: one pass over the memory, where the others take a dozen."""
    size, inverse_root, sign, coupled, kept, weight1, beta2, weight2, eps = numbers.unbind()
    g = sign * g + coupled * p
    average = m + weight1 * (g - m)
    second = beta2 * v + weight2 * g * g
    m.copy_(average)
    v.copy_(second)
    if largest is not None:
        second = torch.maximum(largest, second)
        largest.copy_(second)
    denominator = second.sqrt() * inverse_root + eps
    change = (previous - g).abs()
    if relative:
        change = change / denominator
    slowing = 1 + torch.exp(-change)  # 1 / ξ
    if friction is not None:
        friction.copy_(1 / slowing)
    p.copy_(kept * p - size * average / (slowing * denominator))
    previous.copy_(g)


_kernel = FlatKernel(diffgrad_kernel)


def _numbers(settings: Settings, step: Number) -> tuple[Number, ...]:
    sign = -1.0 if settings.maximize else 1.0
    kept = 1 - settings.lr * settings.decoupled
    size, root = settings.scales(step)
    return (
        size,
        1 / root,
        sign,
        settings.coupled,
        kept,
        1 - settings.beta1,
        settings.beta2,
        1 - settings.beta2,
        settings.eps,
    )
