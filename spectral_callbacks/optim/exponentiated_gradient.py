"""Exponentiated gradient descent: every step multiplies, so that no weight changes its sign."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_callbacks.optim.base import Group, check_lr, check_not_negative, local, new_step, require
from spectral_callbacks.optim.log_normality import log_magnitudes
from spectral_callbacks.optim.mirror import (
    Kernel,
    MirrorDescent,
    Place,
    Row,
    called,
    gradient,
    rate,
    stream,
    widened,
    write_back,
)
from spectral_callbacks.optim.seeded_noise import seeded_noise
from spectral_callbacks.stability import Edge, stability_rule
from spectral_callbacks.stability.torch_optim import sgd


class ExponentiatedGradient(MirrorDescent):
    """w <- w exp(clamp(-lr sign(w) d, ±max_log_step)), with d the gradient or its momentum.

    Weights move in proportion to their size and keep their sign, as synapses do (Dale's law); sparse and log-normal
    weights are what this favours. The learning rate is a relative change per unit of gradient, and wants to be 10 to 35
    times that of SGD. With momentum b and dampening d as in `torch.optim.SGD`:

        d_t = ±g_t + weight_decay sign(w),  m_1 = d_1,  m_t = b m_{t-1} + (1 - dampening) d_t,

    d = m, or d_t + b m_t with `nesterov`. The decay is multiplicative, a factor exp(-lr weight_decay) a step, and
    enters the momentum, as in the authors' code. Divergence is sudden, just above the best lr:
    the clamp bounds a step, and a gradient that is not finite raises before any weight has moved.

    A zero never moves. Parameters that hold one are refused; initialise weights with `log_normal_weights_`, biases with
    `split_bias`, or give such parameters to another optimizer. A weight stops at the smallest normal number of its
    dtype, 1e-38 (6e-5 in float16), where it would underflow for good. In bfloat16 relative steps below 0.2 % round
    away: keep the weights in float32.

    With a temperature T the exponent gets noise √(2 lr T) z after the clamp, for Langevin dynamics in ln |w| with the
    drift -sign(w) g: it samples exp(-∫ g/(T |w|) dw) / |w|, not the Gibbs measure. z is a function of `seed`, the step
    and the parameter, so that a resumed run goes on as it would have.

    State: nothing; `momentum_buffer` with momentum, `step` with a temperature.

    Args:
        params: Parameters, named parameters or groups.
        lr: Learning rate.
        momentum: b, in [0, 1).
        dampening: In [0, 1).
        weight_decay: Multiplicative decay per unit of lr.
        nesterov: Nesterov's momentum; needs momentum, and no dampening.
        max_log_step: Largest change of ln |w| in a step; `math.inf` for none. 0.3 never binds at a good lr.
        temperature: T of the noise; 0 for none.
        seed: Of the noise.
        maximize: Climb instead.
        foreach: Update lists of tensors at once; None does so on CUDA. On the CPU blocks that fit the cache are faster.
        differentiable: Let autograd see the step.

    Raises:
        ValueError: If some setting breaks its rule, a parameter is complex, which has no sign, or one holds a zero; of
            a zero that was loaded after construction, in the first step.

    References:
        Cornford et al. 2024, Brain-like learning with exponentiated gradients, and github.com/linclab/EG_optimiser;
        Kivinen and Warmuth 1997; Dale meets Langevin, arXiv:2510.02730 (the noise as an optimizer is our extension).

    Example:
        >>> w = torch.tensor([0.5, -0.5, 2.0], requires_grad=True)
        >>> optimizer = ExponentiatedGradient([w], lr=0.1)
        >>> for _ in range(10):  # a constant gradient
        ...     w.grad = torch.tensor([1.0, 1.0, -1.0])
        ...     optimizer.step()
        >>> w.detach()  # w exp(∓1)
        tensor([ 0.1839, -1.3591,  5.4366])
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        *,
        nesterov: bool = False,
        max_log_step: float = 0.3,
        temperature: float = 0.0,
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
    ) -> None:
        self._checked: set[Tensor] = set()
        settings = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov,
            "max_log_step": max_log_step, "temperature": temperature, "seed": seed, "maximize": maximize,
            "foreach": foreach, "differentiable": differentiable,
        }  # fmt: skip
        super().__init__(params, settings)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy, a pickle or a state dictionary, which may hold zeros."""
        super().__setstate__(state)
        self._checked = set()

    def diagnostics(self, parameter: Tensor) -> dict[str, Tensor]:
        """Return what the signs and the magnitudes of a parameter tell.

        Args:
            parameter: One of those that this optimizer trains.

        Returns:
            "zero_share", of entries that are 0; "log_abs_mean", "log_abs_std" and "log_abs_skewness" of ln |w|, and
            "log_normality", the largest distance of its distribution function to the normal one of the same mean and
            deviation, 0 for log-normal weights, about 0.6 / √n for a sample of n of them. Once observed, and after a
            step: "sign_flips", the number of entries of another sign than at the first step observed, which is 0; and
            "max_log_step", the largest |lr d| of the last step after the clamp.
        """
        kept = dict(self.observations(parameter))
        weights = local(parameter.detach())
        signs = kept.pop("signs", None)
        if signs is not None:
            kept["sign_flips"] = (weights.sign() != signs).sum()
        return {**kept, **log_magnitudes(weights)}

    def _check(self, group: Group) -> None:
        check_lr(group["lr"])
        for name in ("momentum", "dampening"):
            require(0 <= group[name] < 1, name, group[name], "in [0, 1)")
        for name in ("weight_decay", "temperature"):
            check_not_negative(name, group[name])
        require(group["max_log_step"] > 0, "max_log_step", group["max_log_step"], "positive; math.inf is no bound")
        seed = group["seed"]
        require(isinstance(seed, int) and seed >= 0, "seed", seed, "a whole number, 0 or more")
        fits = not group["nesterov"] or (group["momentum"] > 0 and not group["dampening"])
        require(fits, "nesterov", group["nesterov"], "False without momentum or with dampening")

    def _refuse_group(self, places: list[Place]) -> None:
        super()._refuse_group(places)
        self._refuse_zeros((group, i, j) for group, i, j in places if group["params"][j].requires_grad)

    @torch.no_grad()
    def _refuse(self) -> None:
        super()._refuse()
        stepping = [
            (group, i, j)
            for i, group in enumerate(self.param_groups)
            for j, p in enumerate(group["params"])
            if p.grad is not None and p not in self._checked
        ]
        if stepping:  # once: loading fills parameters after the optimizer was made
            self._refuse_zeros(stepping)
            self._checked.update(group["params"][j] for group, _, j in stepping)

    @torch.no_grad()
    def _refuse_zeros(self, places: Iterable[Place]) -> None:
        frozen = [called(group, i, j) for group, i, j in places if _has_zero(group["params"][j])]
        if frozen:
            raise ValueError(
                f"{type(self).__name__} never moves a weight that is zero, and some are in {', '.join(frozen)}. "
                "Initialise weights by spectral_callbacks.init.log_normal_weights_(module) and biases by "
                "split_bias(module), or give these parameters to another optimizer."
            )

    def _update(self, group: Group, parameters: list[Tensor]) -> None:
        noisy = group["temperature"] > 0
        index = {p: i for i, p in enumerate(p for g in self.param_groups for p in g["params"])} if noisy else {}
        if group["differentiable"]:
            for p in parameters:
                self._differentiable(group, p, self._noise(group, p, index))
            return
        b = group["momentum"]
        fresh = [p for p in parameters if b and "momentum_buffer" not in self.state[p]]
        started = [p for p in parameters if not b or "momentum_buffer" in self.state[p]]
        for chosen, keep, take in ((fresh, 0.0, 1.0), (started, b, 1 - group["dampening"])):  # m₁ = d₁, undampened
            kernel = functools.partial(_multiply, group=group, keep=keep, take=take)
            if self._observations is None:
                stream(kernel, (self._row(group, p, index) for p in chosen), group["foreach"])
                continue
            for p in chosen:
                self._observed(kernel, p, self._row(group, p, index), self._observations.setdefault(p, {}))

    def _observed(self, kernel: Kernel, p: Tensor, row: Row, kept: dict[str, Tensor]) -> None:
        if "signs" not in kept:
            kept["signs"] = local(p.detach()).sign().to(torch.int8)
        steps: list[Tensor] = []
        stream(functools.partial(kernel, steps=steps), [row], foreach=False)
        if steps:
            kept["max_log_step"] = torch.stack(steps).max()

    def _row(self, group: Group, p: Tensor, index: Mapping[Tensor, int]) -> Row:
        """Return the local parts of a parameter, its gradient, its buffer and its noise."""
        buffer = None
        if group["momentum"]:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffer = local(self.state[p]["momentum_buffer"])
        return local(p), gradient(p), buffer, self._noise(group, p, index)

    def _noise(self, group: Group, p: Tensor, index: Mapping[Tensor, int]) -> Tensor | None:
        """Return what the noise adds to a parameter's exponent, √(2 lr T) z."""
        if not group["temperature"]:
            return None
        step = self.state[p].setdefault("step", new_step(p, group))
        step += 1
        z = seeded_noise(p, group["seed"], int(step), index[p])
        return z * (2 * rate(group["lr"], z) * group["temperature"]) ** 0.5

    def _differentiable(self, group: Group, p: Tensor, noise: Tensor | None) -> None:
        """Move one parameter by operations that autograd can follow: nothing that it keeps is overwritten."""
        s, d = p.sign(), -gradient(p) if group["maximize"] else gradient(p)
        d = d + group["weight_decay"] * s
        if group["momentum"]:
            before = self.state[p].get("momentum_buffer")
            buffer = d if before is None else group["momentum"] * before + (1 - group["dampening"]) * d
            self.state[p]["momentum_buffer"] = buffer
            d = d + group["momentum"] * buffer if group["nesterov"] else buffer
        exponent = (-group["lr"] * s * d).clamp(-group["max_log_step"], group["max_log_step"])
        if noise is not None:
            exponent = exponent + noise
        range_ = torch.finfo(p.dtype)
        p.copy_(s * (p.clone() * exponent.exp()).abs().clamp(range_.tiny, range_.max))


def _has_zero(parameter: Tensor) -> bool:
    return not parameter.is_meta and bool((local(parameter.detach()) == 0).any())


def _multiply(
    weights: list[Tensor],
    gradients: list[Tensor],
    buffers: list[Any],
    noises: list[Any],
    *,
    group: Group,
    keep: float,
    take: float,
    steps: list[Tensor] | None = None,
) -> None:
    """Multiply the weights in place; the buffers become keep m + take d, and `steps` receives the largest |lr d|."""
    wide = widened(weights)
    signs = torch._foreach_sign(wide)
    d = torch._foreach_neg(gradients) if group["maximize"] else gradients
    if group["weight_decay"]:
        d = torch._foreach_add(d, signs, alpha=group["weight_decay"])
    if group["momentum"]:
        torch._foreach_mul_(buffers, keep)
        torch._foreach_add_(buffers, d, alpha=take)
        d = torch._foreach_add(d, buffers, alpha=group["momentum"]) if group["nesterov"] else buffers
    factors = torch._foreach_mul(signs, d)
    torch._foreach_mul_(factors, rate(group["lr"], factors[0]))
    torch._foreach_clamp_max_(factors, group["max_log_step"])
    torch._foreach_clamp_min_(factors, -group["max_log_step"])
    if steps is not None:
        steps += [f.abs().max() for f in factors]
    torch._foreach_neg_(factors)
    if group["temperature"]:
        torch._foreach_add_(factors, noises)
    torch._foreach_exp_(factors)
    torch._foreach_mul_(wide, factors)
    # From here magnitudes: none may underflow to zero, where it would stay, nor overflow.
    torch._foreach_abs_(wide)
    torch._foreach_clamp_min_(wide, torch.finfo(weights[0].dtype).tiny)
    torch._foreach_clamp_max_(wide, torch.finfo(weights[0].dtype).max)
    torch._foreach_mul_(wide, signs)
    write_back(weights, wide)


@stability_rule(ExponentiatedGradient)
def exponentiated_gradient(parameter: Tensor, group: Group, state: Mapping[str, Any]) -> Edge:
    """D = |w|, at the thresholds of SGD with the same momentum; the multiplicative decay moves no edge.

    In l = ln |w| a step is l <- l - lr F[s g + wd], with s = sign(w) and the filter F of the momentum. It rests where
    s g = -wd. There dw = |w| s dl makes it dw <- dw - lr F[|w| H dw]: the decay, a constant force on l, is gone. The
    clamp does not bind near rest, and noise has no part in what is linear.
    """
    edge = sgd(parameter, {**group, "weight_decay": 0.0}, state)
    return dataclasses.replace(edge, preconditioner=parameter.detach().abs())
