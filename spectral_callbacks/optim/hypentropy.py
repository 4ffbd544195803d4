"""Mirror descent by the hypentropy: exponentiated gradient descent whose weights may cross zero."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_callbacks.optim.base import Group, check_lr, check_not_negative, local, require
from spectral_callbacks.optim.mirror import MirrorDescent, gradient, rate, stream, widened, write_back
from spectral_callbacks.stability import Edge, stability_rule


class HypentropyGD(MirrorDescent):
    """w <- beta sinh(asinh(w / beta) - clamp(lr g, ±max_log_step)), which is EG± without its state.

    EG± keeps w = u - v with u <- u exp(-lr g) and v <- v exp(lr g). The product uv = c never changes, so that with
    beta = 2√c the weight alone is the state. Where |w| ≫ beta this is exponentiated gradient descent, where |w| ≪ beta
    gradient descent at the learning rate lr beta; it keeps no sign and needs none, and zeros move. EG± as published
    rescales u and v to a given sum; this does not.

    The weight decay is coupled: g + weight_decay w, the gradient of a quadratic penalty. A gradient that is not finite
    raises before any weight has moved. State: none.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate, in the coordinate asinh(w / beta).
        beta: The size at which weights pass from additive to multiplicative steps.
        weight_decay: Of the quadratic penalty.
        max_log_step: Largest step of asinh(w / beta); `math.inf` for none.
        maximize: Climb instead.
        foreach: Update lists of tensors at once; None does so on CUDA. On the CPU blocks that fit the cache are faster.
        differentiable: Let autograd see the step.

    Raises:
        ValueError: If some setting breaks its rule, or a parameter is complex.

    References:
        Ghai, Hazan and Singer 2020, Exponentiated gradient meets gradient descent, arXiv:1902.01903; Kivinen and
        Warmuth 1997 (EG±).

    Example:
        >>> w = torch.tensor([0.0, 3.0], requires_grad=True)
        >>> optimizer = HypentropyGD([w], lr=0.1, beta=1.0)
        >>> w.grad = torch.ones(2)
        >>> optimizer.step()
        >>> w.detach()
        tensor([-0.1002,  2.6983])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.1,
        beta: float = 1.0,
        weight_decay: float = 0.0,
        *,
        max_log_step: float = 0.3,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        settings = {
            "lr": lr, "beta": beta, "weight_decay": weight_decay, "max_log_step": max_log_step, "maximize": maximize,
            "foreach": foreach, "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(params, settings)

    def diagnostics(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return "multiplicative_share", of entries with |w| > beta, which move by factors rather than sums."""
        beta = next(group["beta"] for group in self.param_groups for p in group["params"] if p is parameter)
        return {"multiplicative_share": (local(parameter.detach()).abs() > beta).float().mean()}

    def _check(self, group: Group) -> None:
        check_lr(group["lr"])
        require(0 < group["beta"] < math.inf, "beta", group["beta"], "a finite positive number")
        check_not_negative("weight_decay", group["weight_decay"])
        require(group["max_log_step"] > 0, "max_log_step", group["max_log_step"], "positive; math.inf is no bound")

    def _update(self, group: Group, parameters: list[Tensor]) -> None:
        if group["differentiable"]:
            for p in parameters:
                _differentiable(group, p)
            return

        def move(weights: list[Tensor], gradients: list[Tensor]) -> None:
            _move(weights, gradients, group)

        stream(move, ((local(p), gradient(p)) for p in parameters), group["foreach"])


def _move(weights: list[Tensor], gradients: list[Tensor], group: Group) -> None:
    """Move the weights in place, with a = lr g, by w cosh(a) - √(w² + β²) sinh(a).

    Written as w - 2u (√(w² + β²) √(1 + u²) - w u) with u = sinh(a / 2) it adds a small step to w, is exact at
    a = 0, and cancels nothing at large |a|.
    """
    wide = widened(weights)
    d = widened(gradients)
    if group["maximize"]:
        d = torch._foreach_neg(d)
    if group["weight_decay"]:
        d = torch._foreach_add(d, wide, alpha=group["weight_decay"])
    u = torch._foreach_mul(d, rate(group["lr"], d[0]) / 2)
    torch._foreach_clamp_max_(u, group["max_log_step"] / 2)
    torch._foreach_clamp_min_(u, -group["max_log_step"] / 2)
    _sinh_(u)
    cosh = torch._foreach_mul(u, u)
    torch._foreach_add_(cosh, 1)
    torch._foreach_sqrt_(cosh)
    root = torch._foreach_mul(wide, wide)
    torch._foreach_add_(root, group["beta"] ** 2)
    torch._foreach_sqrt_(root)
    torch._foreach_mul_(root, cosh)
    torch._foreach_addcmul_(root, wide, u, value=-1)
    torch._foreach_addcmul_(wide, u, root, value=-2)
    write_back(weights, wide)


def _sinh_(u: list[Tensor] | tuple[Tensor, ...]) -> None:
    """Turn u into sinh(u) = (E + E / (E + 1)) / 2, E = exp(u) - 1.

    PyTorch's own sinh rounds an entry by its place in the tensor on the CPU, and a shard has other places.
    """
    torch._foreach_expm1_(u)
    second = torch._foreach_add(u, 1)
    second = torch._foreach_div(u, second)
    torch._foreach_add_(u, second)
    torch._foreach_mul_(u, 0.5)


def _differentiable(group: Group, p: Tensor) -> None:
    """Move one parameter by operations that autograd can follow: nothing that it keeps is overwritten."""
    w = p.clone()
    d = (-gradient(p) if group["maximize"] else gradient(p)) + group["weight_decay"] * w
    a = (group["lr"] * d).clamp(-group["max_log_step"], group["max_log_step"])
    p.copy_(w * a.cosh() - (w.square() + group["beta"] ** 2).sqrt() * a.sinh())


@stability_rule(HypentropyGD)
def hypentropy(parameter: Tensor, group: Group, state: Mapping[str, Any]) -> Edge:
    """D = √(w² + β²), the inverse of the Hessian of the hypentropy, at threshold 2; the decay is in the gradient."""
    return Edge.from_threshold(
        2.0,
        learning_rate=float(group["lr"]),
        preconditioner=(parameter.detach().square() + group["beta"] ** 2).sqrt(),
        coupled=float(group["weight_decay"]),
        ascends=bool(group["maximize"]),
    )
