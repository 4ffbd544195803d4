"""Planted faults: autograd functions whose derivatives go wrong in one known way each."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class NestedBackward(torch.autograd.Function):
    """A checkpoint of one's own, `apply(x, module)`: runs backward() inside the backward pass, which adds to `.grad`.

    The module's parameters are reached by `loss.backward()`, and by nothing else.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module) -> Tensor:
        ctx.module, ctx.x = module, x.detach()
        with torch.no_grad():
            return module(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            y = ctx.module(x)
        torch.autograd.backward(y, gradients[0])
        return x.grad, None


class OnceSquare(torch.autograd.Function):
    """x² with the right derivative and, as it says itself, no second one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return 2 * ctx.saved_tensors[0] * gradients[0]


class _SkewedSlope(torch.autograd.Function):
    """2 x g, whose derivative by x is planted to land one component further."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(x, gradient)
        return 2 * x * gradient

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (v,) = gradients
        x, gradient = ctx.saved_tensors
        return (2 * v * gradient).roll(1, dims=-1), 2 * x * v


class SkewedSquare(torch.autograd.Function):
    """x² with the right derivative and a second one that is not symmetric."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _SkewedSlope.apply(ctx.saved_tensors[0], *gradients)
