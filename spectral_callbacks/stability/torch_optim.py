"""The stability rules of torch.optim: the metric D, and the threshold 2 / K of the filter's gain K at z = -1.

Every rule reads the state that the last step left, and the bias corrections of that step t. Notation: b the momentum or
β₁, v the second moment, η the learning rate; `spectral_callbacks.stability.edge` derives the edge.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from spectral_callbacks.stability.edge import Edge, NoThresholdError, NotSteppedYetError, no_threshold, stability_rule

Group = dict[str, Any]
State = Mapping[str, Any]


@stability_rule(torch.optim.SGD)
def sgd(parameter: Tensor, group: Group, state: State) -> Edge:
    """Gradient descent, with torch's momentum b, dampening d, Nesterov and coupled weight decay.

    Heavy ball v' = b v + (1 - d) g has the gain K = (1 - d) / (1 + b); Nesterov's g + b v' has (1 + 2b) / (1 + b).
    """
    b, dampening = float(group["momentum"]), float(group["dampening"])
    if not b:
        threshold = 2.0
    elif dampening >= 1:
        raise NoThresholdError(f"SGD with dampening={dampening} does not move by its gradients; no ratio is logged.")
    elif group["nesterov"]:
        threshold = (2 + 2 * b) / (1 + 2 * b)
    else:
        threshold = (2 + 2 * b) / (1 - dampening)
    return Edge.from_threshold(threshold, **_settings(group))


@stability_rule(torch.optim.ASGD)
def asgd(parameter: Tensor, group: Group, state: State) -> Edge:
    """Gradient descent at the learning rate that its state has scheduled, with the decoupled decay `lambd`.

    What it averages does not act on what it steps.
    """
    scheduled = {"lr": state["eta"]} if state else {}
    return Edge.from_threshold(2.0, decoupled=float(group["lambd"]), **_settings(group | scheduled))


@stability_rule(torch.optim.Adam)
def adam(parameter: Tensor, group: Group, state: State) -> Edge:
    """D = 1 / (√(v / (1 - β₂^t)) + ε), with AMSGrad's largest v; η / (1 - b^t); the threshold of a moving average."""
    t = steps_taken(state)
    b, beta2 = map(float, group["betas"])
    second = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    metric = 1 / ((second / (1 - beta2**t)).sqrt() + float(group["eps"]))
    return Edge.from_threshold(ema_threshold(b), correction=1 / (1 - b**t), preconditioner=metric, **_settings(group))


@stability_rule(torch.optim.AdamW)
def adamw(parameter: Tensor, group: Group, state: State) -> Edge:
    """Adam with decoupled decay: η ((1 - b) λ + (1 + b) wd) = 2 + 2b late in training."""
    return adam(parameter, {"decoupled_weight_decay": True, **group}, state)  # torch 2.6 says so by the class alone


@stability_rule(torch.optim.SparseAdam)
def sparse_adam(parameter: Tensor, group: Group, state: State) -> Edge:
    """Adam with ε before the bias correction: D = √(1 - β₂^t) / (√v + ε), for entries that all have a gradient.

    An entry without one stands still at that step, which moves the edge of a mode that it has a part in.
    """
    t = steps_taken(state)
    b, beta2 = map(float, group["betas"])
    metric = math.sqrt(1 - beta2**t) / (state["exp_avg_sq"].sqrt() + float(group["eps"]))
    return Edge.from_threshold(ema_threshold(b), correction=1 / (1 - b**t), preconditioner=metric, **_settings(group))


@stability_rule(torch.optim.NAdam)
def nadam(parameter: Tensor, group: Group, state: State) -> Edge:
    """Adam's metric; a step along c₀ g + c₁ m', so that K = c₀ + c₁ (1 - b) / (1 + b).

    c₀ = (1 - μ_t) / (1 - Πμ) and c₁ = μ_{t+1} / (1 - μ_{t+1} Πμ): the bias corrections are in the gain.
    """
    t = steps_taken(state)
    b, beta2 = map(float, group["betas"])
    mu, mu_next = (b * (1 - 0.5 * 0.96 ** (s * float(group["momentum_decay"]))) for s in (t, t + 1))
    product = float(state["mu_product"])
    gain = (1 - mu) / (1 - product) + mu_next / (1 - mu_next * product) * (1 - b) / (1 + b)
    metric = 1 / ((state["exp_avg_sq"] / (1 - beta2**t)).sqrt() + float(group["eps"]))
    return Edge.from_threshold(2 / gain, preconditioner=metric, **_settings(group))


@stability_rule(torch.optim.RAdam)
def radam(parameter: Tensor, group: Group, state: State) -> Edge:
    """SGD on the corrected average while ρ_t ≤ 5; then Adam with ε before the correction, and rectified step sizes."""
    t = steps_taken(state)
    b, beta2 = map(float, group["betas"])
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    correction, metric = 1 / (1 - b**t), None
    if rho > 5:
        correction *= math.sqrt((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho))
        metric = math.sqrt(1 - beta2**t) / (state["exp_avg_sq"].sqrt() + float(group["eps"]))
    return Edge.from_threshold(ema_threshold(b), correction=correction, preconditioner=metric, **_settings(group))


@stability_rule(torch.optim.Adamax)
def adamax(parameter: Tensor, group: Group, state: State) -> Edge:
    """D = 1 / u, the decayed largest |g| + ε, which has no bias; η / (1 - b^t); Adam's threshold."""
    t = steps_taken(state)
    b = float(group["betas"][0])
    metric = 1 / state["exp_inf"]
    return Edge.from_threshold(ema_threshold(b), correction=1 / (1 - b**t), preconditioner=metric, **_settings(group))


@stability_rule(torch.optim.RMSprop)
def rmsprop(parameter: Tensor, group: Group, state: State) -> Edge:
    """D = 1 / (√v + ε), of the variance if centered; heavy-ball momentum b, 2 / K = 2 + 2b."""
    steps_taken(state)
    variance = state["square_avg"]
    if group["centered"]:
        variance = variance - state["grad_avg"].square()
    metric = 1 / (variance.sqrt() + float(group["eps"]))
    return Edge.from_threshold(2 + 2 * float(group["momentum"]), preconditioner=metric, **_settings(group))


@stability_rule(torch.optim.Adagrad)
def adagrad(parameter: Tensor, group: Group, state: State) -> Edge:
    """D = 1 / (√sum + ε), at the learning rate η / (1 + (t - 1) lr_decay)."""
    t = steps_taken(state)
    metric = 1 / (state["sum"].sqrt() + float(group["eps"]))
    correction = 1 / (1 + (t - 1) * float(group["lr_decay"]))
    return Edge.from_threshold(2.0, correction=correction, preconditioner=metric, **_settings(group))


@stability_rule(torch.optim.Adadelta)
def adadelta(parameter: Tensor, group: Group, state: State) -> Edge:
    """D = √(Δ + ε) / √(v + ε), with the average Δ of its own squared steps."""
    steps_taken(state)
    eps = float(group["eps"])
    metric = ((state["acc_delta"] + eps) / (state["square_avg"] + eps)).sqrt()
    return Edge.from_threshold(2.0, preconditioner=metric, **_settings(group))


@stability_rule(torch.optim.Adafactor)
def adafactor(parameter: Tensor, group: Group, state: State) -> Edge:
    """D = 1 / √v, v factored into rows and columns for matrices, at α = max(ε₂, RMS(w)) min(η, 1 / √t).

    Valid while the update is not clipped, RMS(D g) ≤ d: beyond, its size is bounded, and so is an oscillation.
    """
    t = steps_taken(state)
    eps1, eps2 = group["eps"]
    eps1 = torch.finfo(parameter.dtype).eps if eps1 is None else float(eps1)
    if parameter.ndim > 1:
        rows, columns = state["row_var"], state["col_var"]
        second = rows @ columns / rows.mean(dim=-2, keepdim=True).clamp(min=eps1)
    else:
        second = state["variance"]
    scale = max(float(eps2), float(parameter.norm()) / math.sqrt(parameter.numel()))
    settings = _settings(group | {"decoupled_weight_decay": scale > 0})  # at scale 0 nothing moves, and it has no part
    correction = scale / max(1.0, settings["learning_rate"] * math.sqrt(t))
    return Edge.from_threshold(2.0, correction=correction, preconditioner=second.clamp(min=eps1**2).rsqrt(), **settings)


no_threshold(torch.optim.Rprop, "it moves by the sign of the gradient, by steps that do not grow with the curvature")
no_threshold(torch.optim.LBFGS, "it divides by curvature that it estimates itself, so that its edge moves with it")
if muon := vars(torch.optim).get("Muon"):  # since torch 2.9
    no_threshold(muon, "it orthogonalizes the momentum, so that its steps have one size whatever the gradient's")


def _settings(group: Group) -> dict[str, Any]:
    """Return what the groups of torch.optim share, as `Edge.from_threshold` names it."""
    decay = float(group.get("weight_decay", 0.0))
    kind = "decoupled" if group.get("decoupled_weight_decay", False) else "coupled"
    return {"learning_rate": float(group["lr"]), "ascends": bool(group["maximize"]), kind: decay}


def ema_threshold(b: float) -> float:
    """Return the threshold 2 / K of the moving average m' = b m + (1 - b) g, whose gain K is (1 - b) / (1 + b)."""
    return (2 + 2 * b) / (1 - b)


def steps_taken(state: State) -> float:
    """Return the step t that the metric comes from; step 0 is a state that was made ahead of the first."""
    if not state or not float(state["step"]):
        raise NotSteppedYetError
    return float(state["step"])
