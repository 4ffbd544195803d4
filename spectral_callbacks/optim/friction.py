"""One step of Adam times a friction, as each machine likes it: tensor by tensor, in lists, in blocks.

With g the gradient and ' marking what the step leaves behind,

    m' = b m + (1 - b) g,    v' = β₂ v + (1 - β₂) g²,    d = √(v' / (1 - β₂^t)) + ε,
    ξ = 1 / (1 + exp(-|g - g_previous|)),    w' = w - lr ξ m' / ((1 - b^t) d).

What is computed is 1 / ξ: PyTorch's sigmoid rounds an entry by its place in the tensor on the CPU, so that a shard of a
parameter would not step as the whole does.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spectral_callbacks.optim.blocks import block_size, blocks, lie_alike

Number = float | Tensor

_fused_adam: Callable[..., None] | None = vars(torch).get("_fused_adam_")  # private to PyTorch: it may go, or change


class Slot(NamedTuple):
    """What the step of one parameter reads and writes: real tensors of one shape."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    previous_gradient: Tensor
    largest: Tensor | None  # v so far, for AMSGrad
    friction: Tensor | None  # where to leave ξ

    @property
    def lies_alike(self) -> bool:
        """Whether all of it lies in memory in one order, without gaps."""
        return lie_alike(*(t for t in self if t is not None))


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a group; `lr` is a tensor where the graph has to hold it."""

    lr: Number
    beta1: float
    beta2: float
    eps: float
    coupled: float
    decoupled: float
    maximize: bool
    relative: bool

    def scales(self, step: Number) -> tuple[Number, Number]:
        """Return lr / (1 - b^t) and √(1 - β₂^t)."""
        return self.lr / _bias(self.beta1, step), _bias(self.beta2, step) ** 0.5

    def seen(self, parameter: Tensor, gradient: Tensor) -> Tensor:
        """Return the gradient that the step goes by: the one given, or a new tensor."""
        if self.maximize:
            gradient = -gradient
        return gradient.add(parameter, alpha=self.coupled) if self.coupled else gradient

    def decay(self, parameter: Tensor) -> None:
        """Apply the decoupled weight decay."""
        if self.decoupled:
            parameter.mul_(1 - self.lr * self.decoupled)


def step_alone(slot: Slot, settings: Settings, step: Number) -> None:
    """Step one tensor, in operations that can be recorded, differentiated and compiled."""
    size, root = settings.scales(step)
    p, g, m, v, previous, largest, friction = slot
    g = settings.seen(p, g)
    settings.decay(p)
    m.lerp_(g, 1 - settings.beta1)
    v.mul_(settings.beta2).addcmul_(g, g, value=1 - settings.beta2)
    second = v
    if largest is not None:
        second = torch.maximum(_kept(largest), _kept(v))
        largest.copy_(second)
    denominator = _denominator(second, settings, root)
    slowing = (previous - g).abs_()
    if settings.relative:
        slowing = slowing / denominator
    slowing = slowing.neg_().exp_() + 1
    p.sub_((_kept(m) / (denominator * slowing)).mul_(size))
    previous.copy_(g)
    if friction is not None:
        friction.copy_(slowing.reciprocal())


def step_lists(slots: Sequence[Slot], settings: Settings, steps: Sequence[Number]) -> None:
    """Step all tensors by one call an operation, which is quick on a GPU; they need the memory of one more each.

    A gradient that is negated or decayed is another, and the change of one kept in a dtype of its own.
    """
    alike: dict[tuple[Any, ...], list[int]] = {}
    for i, slot in enumerate(slots):
        alike.setdefault((slot.parameter.device, slot.parameter.dtype, slot.previous_gradient.dtype), []).append(i)
    for indices in alike.values():
        _step_list([slots[i] for i in indices], settings, [settings.scales(steps[i]) for i in indices])


def step_blocks(slots: Sequence[Slot], settings: Settings, steps: Sequence[Number]) -> None:
    """Step each tensor in blocks, of which the slow memory is read and written once; nothing is allocated but a block.

    Where it can, PyTorch's fused Adam updates both averages of a block in one pass. Pointed at zeros instead of the
    weights, it leaves the step -lr m / ((1 - b^t) d) there.
    """
    scratch: dict[torch.dtype, tuple[Tensor, Tensor]] = {}
    counts: dict[Number, Tensor] = {}
    most = min(block_size(), max(slot.parameter.numel() for slot in slots))
    for slot, step in zip(slots, steps, strict=True):
        dtype = slot.parameter.dtype
        if _fused_adam is None or dtype not in (torch.float32, torch.float64) or not slot.lies_alike:
            for block in blocks(*slot):
                step_alone(Slot(*block), settings, step)
            continue
        if dtype not in scratch:
            scratch[dtype] = slot.parameter.new_empty(most), slot.parameter.new_ones(())
        if step not in counts:
            counts[step] = torch.tensor(float(step), dtype=torch.float32)
        for block in blocks(*slot):
            _step_block(Slot(*block), settings, counts[step], *scratch[dtype], _fused_adam)


def _step_list(slots: Sequence[Slot], settings: Settings, scales: Sequence[tuple[Number, Number]]) -> None:
    p, g, m, v, previous, largest, friction = (list(column) for column in zip(*slots, strict=True))
    sizes, roots = (list(column) for column in zip(*scales, strict=True))
    if settings.maximize:
        g = torch._foreach_neg(g)
    if settings.coupled:
        g = torch._foreach_add(g, p, alpha=settings.coupled)
    if settings.decoupled:
        torch._foreach_mul_(p, 1 - settings.lr * settings.decoupled)
    torch._foreach_lerp_(m, g, 1 - settings.beta1)
    torch._foreach_mul_(v, settings.beta2)
    torch._foreach_addcmul_(v, g, g, 1 - settings.beta2)
    if largest[0] is not None:
        torch._foreach_maximum_(largest, v)
        v = largest
    if friction[0] is not None:
        torch._foreach_zero_(friction)
        torch._foreach_add_(friction, previous)
        slowing = friction
        torch._foreach_sub_(slowing, g)
    elif previous[0].dtype == p[0].dtype:
        slowing = previous
        torch._foreach_sub_(slowing, g)
    else:
        slowing = torch._foreach_sub(previous, g)
    torch._foreach_abs_(slowing)
    denominators = torch._foreach_sqrt(v)
    torch._foreach_div_(denominators, roots)
    torch._foreach_add_(denominators, settings.eps)
    if settings.relative:
        torch._foreach_div_(slowing, denominators)
    torch._foreach_neg_(slowing)
    torch._foreach_exp_(slowing)
    torch._foreach_add_(slowing, 1)
    torch._foreach_mul_(denominators, slowing)
    torch._foreach_reciprocal_(denominators)
    torch._foreach_mul_(denominators, m)
    torch._foreach_mul_(denominators, sizes)
    torch._foreach_sub_(p, denominators)
    if friction[0] is not None:
        torch._foreach_reciprocal_(friction)
    torch._foreach_zero_(previous)  # not _foreach_copy_, which some kinds of tensor do not have
    torch._foreach_add_(previous, g)


def _step_block(
    slot: Slot, settings: Settings, step: Tensor, scratch: Tensor, one: Tensor, fused: Callable[..., None]
) -> None:
    p, g, m, v, previous, largest, friction = slot
    g = settings.seen(p, g)
    settings.decay(p)
    direction = scratch.as_strided(p.size(), p.stride()).zero_()
    fused(
        [direction],
        [g],
        [m],
        [v],
        [] if largest is None else [largest],
        [step],
        lr=settings.lr,
        beta1=settings.beta1,
        beta2=settings.beta2,
        weight_decay=0.0,
        eps=settings.eps,
        amsgrad=largest is not None,
        maximize=False,
    )
    if friction is not None:
        slowing = torch.sub(previous, g, out=friction)
    elif previous.dtype == p.dtype:
        slowing = previous.sub_(g)
    else:
        slowing = previous - g
    if settings.relative:
        slowing.div_(_denominator(v if largest is None else largest, settings, settings.scales(step.item())[1]))
    slowing.abs_().neg_().exp_().add_(one)  # a number would become a tensor at each block
    p.addcdiv_(direction, slowing)
    if friction is not None:
        slowing.reciprocal_()
    previous.copy_(g)


def _kept(tensor: Tensor) -> Tensor:
    """Return what the backward pass still finds after the next step has overwritten the tensor."""
    return tensor.clone() if torch.is_grad_enabled() else tensor


def _denominator(second: Tensor, settings: Settings, root: Number) -> Tensor:
    return (second.sqrt() / root).add_(settings.eps)


def _bias(beta: float, step: Number) -> Number:
    """Return 1 - β^t, without cancellation in float32."""
    if isinstance(step, Tensor):
        return -torch.expm1(step * math.log(beta)) if beta else 1.0
    return 1 - beta**step
