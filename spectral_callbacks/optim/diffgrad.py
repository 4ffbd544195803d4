"""diffGrad: Adam, slowed down where the gradient does not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor

from spectral_callbacks.optim.base import (
    Group,
    Optimizer,
    State,
    check_betas,
    check_lr,
    check_not_negative,
    local,
    new_step,
    require,
)
from spectral_callbacks.optim.diffgrad_kernel import step_compiled
from spectral_callbacks.optim.friction import Settings, Slot, step_alone, step_blocks, step_lists
from spectral_callbacks.stability import Edge, NotSteppedYetError, stability_rule
from spectral_callbacks.stability.torch_optim import adam

Friction = Literal["absolute", "relative"]


class DiffGrad(Optimizer):
    """Adam, whose step is multiplied entry by entry by a friction ξ between ½ and 1.

    With g the gradient and m̂, v̂ Adam's corrected averages,

        w <- w - lr ξ m̂ / (√v̂ + ε),    ξ = 1 / (1 + exp(-|g - g_previous|)),    g_previous = 0 at first.

    Where the gradient changes by much less than 1 from step to step, ξ is ½, and this is Adam at half the learning
    rate; in nets ξ rarely leaves ½ by 1 %. ξ depends on the scale of the loss. `friction="relative"` measures the
    change in units of √v̂ + ε, so that it does not.

    The formula is the paper's, with ε beside √v̂ as in `torch.optim.Adam`; the published code adds ε to √v, which
    slows small gradients down early on. With ξ ≡ 1 the trajectory is that of `torch.optim.Adam`.

    The state of a parameter holds `step`, `exp_avg`, `exp_avg_sq` and `previous_grad` (12 bytes an entry in float32),
    and `max_exp_avg_sq` under AMSGrad. On the CPU the step goes through each tensor in blocks that stay in the cache.

    Args:
        params: Parameters, or dictionaries of parameter groups.
        lr: Learning rate; a tensor of one element where a compiled or captured step is to follow a schedule.
        betas: Rates b and β₂ of the averages of g and g².
        eps: ε. Below 6e-8 it is 0 in float16, as in Adam: keep weights in float32 there, or take 1e-4.
        weight_decay: Added to the gradient times w, before ξ sees it, as in all published code; with
            `decoupled_weight_decay` w shrinks by lr · weight_decay instead, and ξ sees the gradient alone.
        amsgrad: Use the largest v so far.
        friction: "absolute", the paper's, or "relative", ξ = 1 / (1 + exp(-|g - g_previous| / (√v̂ + ε))).
        decoupled_weight_decay: See `weight_decay`.
        previous_grad_dtype: dtype in which g_previous is kept, or its name; None for the parameter's. "bfloat16" saves
            2 bytes an entry and moves ξ by at most |g| / 1024.
        foreach: Step all tensors of a group by one call an operation; by default on a GPU. False is one by one.
        maximize: Climb.
        capturable: The step may be captured in a CUDA graph: it makes no number of a tensor.
        differentiable: The step may be differentiated through.
        fused: Step by a compiled kernel: one pass over the memory, after one compilation of some seconds that serves
            all shapes and steps. Where there is no compiler, one warning says so and the step is the default one.

    Raises:
        ValueError: If some setting breaks its rule.

    References:
        Dubey et al., diffGrad: An Optimization Method for Convolutional Neural Networks, IEEE TNNLS 2020,
        arXiv:1909.11015.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        >>> optimizer = DiffGrad([w], lr=0.1)
        >>> for _ in range(2):
        ...     w.grad = w.detach().clone()  # of w² / 2
        ...     _ = optimizer.step()
        >>> round(w.item(), 10)
        0.875207006
    """

    own_dtypes: ClassVar[frozenset[str]] = frozenset({"previous_grad"})
    flags: ClassVar[Mapping[str, Any]] = {
        "amsgrad": False,
        "friction": "absolute",
        "decoupled_weight_decay": False,
        "previous_grad_dtype": None,
        "foreach": None,
        "maximize": False,
        "capturable": False,
        "differentiable": False,
        "fused": None,
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        friction: Friction = "absolute",
        decoupled_weight_decay: bool = False,
        previous_grad_dtype: torch.dtype | str | None = None,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "friction": friction,
            "decoupled_weight_decay": decoupled_weight_decay,
            "previous_grad_dtype": previous_grad_dtype,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        check_lr(group["lr"])
        check_betas(group["betas"])
        for name in ("eps", "weight_decay"):
            check_not_negative(name, group[name])
        _dtype(group["previous_grad_dtype"])
        require(group["friction"] in get_args(Friction), "friction", group["friction"], '"absolute" or "relative"')
        require(not (group["fused"] and group["foreach"]), "fused", True, "False or None where foreach=True")
        require(
            not (group["fused"] and group["differentiable"]), "fused", True, "False or None where differentiable=True"
        )

    def diagnostics(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return "friction": ξ of the last step, of the parameter's shape; empty unless observed before that step.

        Of a complex parameter it is that of the real and the imaginary parts, in one more dimension.
        """
        return {name: _real(value) for name, value in self.observations(parameter).items()}

    def _update(self, group: Group, parameters: list[Tensor]) -> None:
        compiling = torch.compiler.is_compiling()
        recorded = compiling or group["capturable"] or group["differentiable"]
        lr = group["lr"] if recorded else float(group["lr"])
        beta1, beta2 = group["betas"]
        decay, decoupled = group["weight_decay"], group["decoupled_weight_decay"]
        settings = Settings(
            lr.squeeze() if isinstance(lr, Tensor) else lr,
            float(beta1),
            float(beta2),
            group["eps"],
            coupled=0.0 if decoupled else decay,
            decoupled=decay if decoupled else 0.0,
            maximize=group["maximize"],
            relative=group["friction"] == "relative",
        )
        slots = [self._slot(p, self._state(p, group), group) for p in parameters]
        steps: list[float | Tensor] = []
        for p, slot in zip(parameters, slots, strict=True):
            step = self.state[p]["step"].add_(1)
            on_host = step.device.type == "cpu" and not recorded
            steps.append(step.item() if on_host else step.to(torch.promote_types(step.dtype, slot.parameter.dtype)))
        if group["fused"] and any(slot.parameter.is_meta for slot in slots):
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point tensors with memory, and one is on meta: "
                "materialize the module (to_empty) before its first step."
            )
        if group["fused"] and not compiling:
            left = step_compiled(slots, settings, steps)
            slots, steps = [slots[i] for i in left], [steps[i] for i in left]
        foreach, devices = group["foreach"], {slot.parameter.device.type for slot in slots}
        if foreach or (foreach is None and devices == {"cuda"} and not group["differentiable"]):
            step_lists(slots, settings, steps)
        elif foreach is None and devices == {"cpu"} and not recorded:
            step_blocks(slots, settings, steps)
        else:
            for slot, step in zip(slots, steps, strict=True):
                step_alone(slot, settings, step)

    def _state(self, p: Tensor, group: Group) -> State:
        state = self.state[p]
        if not state:
            state["step"] = new_step(p, group)
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            dtype = _dtype(group["previous_grad_dtype"])
            if dtype is not None and p.is_complex():
                dtype = torch.promote_types(dtype, torch.complex64)
            state["previous_grad"] = torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)
        if group["amsgrad"] and "max_exp_avg_sq" not in state:
            state["max_exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        return state

    def _slot(self, p: Tensor, state: State, group: Group) -> Slot:
        friction = None
        if self._observations is not None:
            kept = self._observations.setdefault(p, {})
            if "friction" not in kept:
                kept["friction"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            friction = kept["friction"]
        return Slot(
            _real(local(p)),
            _real(local(cast(Tensor, p.grad), like=p)),
            _real(local(state["exp_avg"])),
            _real(local(state["exp_avg_sq"])),
            _real(local(state["previous_grad"])),
            _real(local(state["max_exp_avg_sq"])) if group["amsgrad"] else None,
            None if friction is None else _real(local(friction)),
        )


@stability_rule(DiffGrad)
def diffgrad(parameter: Tensor, group: Group, state: Mapping[str, Any]) -> Edge:
    """Adam's edge in the metric D = ξ / (√(v / (1 - β₂^t)) + ε): ξ ≡ ½ doubles the learning rate at the edge."""
    edge = adam(parameter, group, state)
    if "friction" not in state:  # it is kept from the next step on
        raise NotSteppedYetError
    return dataclasses.replace(edge, preconditioner=edge.preconditioner * state["friction"])


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    found = vars(torch).get(given) if isinstance(given, str) else given
    valid = found is None if given is None else isinstance(found, torch.dtype) and found.is_floating_point
    require(valid, "previous_grad_dtype", given, 'a real floating-point dtype, its name as "bfloat16", or None')
    return found


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
