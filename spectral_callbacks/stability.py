"""Stability of an optimizer on a quadratic: where its edge lies, one rule an optimizer."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch


@dataclasses.dataclass(frozen=True)
class Edge:
    """The edge of stability of one parameter group: learning_rate (λ + shift) = threshold.

    Attributes:
        learning_rate: η of the group.
        threshold: What η (λ + shift) reaches when the slowest mode of the update rule leaves the unit disc.
        shift: What the rule adds to the curvature λ, for example weight decay.
    """

    learning_rate: float
    threshold: float
    shift: float = 0.0

    @property
    def curvature(self) -> float:
        """The curvature λ at the edge; infinite at learning rate 0."""
        return self.threshold / self.learning_rate - self.shift if self.learning_rate else float("inf")

    @property
    def weight(self) -> float:
        """η / threshold: the scale that puts the edge at 1."""
        return self.learning_rate / self.threshold

    def ratio(self, curvature: float) -> float:
        """Return η (λ + shift) / threshold, which is 1 at the edge."""
        return self.weight * (curvature + self.shift)


class NoThresholdError(ValueError):
    """No finite linear threshold is known for an optimizer; the message says why."""


Rule = Callable[[dict[str, Any]], Edge]
_rules: dict[type[torch.optim.Optimizer], Rule] = {}


def stability_rule(optimizer: type[torch.optim.Optimizer]) -> Callable[[Rule], Rule]:
    """Register the stability rule of an optimizer class: a function from a parameter group to its edge.

    Subclasses that do not override `step` share it.

    Example:
        >>> class HalfSGD(torch.optim.SGD):
        ...     def step(self, closure=None): ...  # moves by half the learning rate
        >>> @stability_rule(HalfSGD)
        ... def half_sgd(group):
        ...     return Edge(group["lr"], threshold=4.0)
        >>> edges(HalfSGD([torch.zeros(1)], lr=0.5))[0].curvature
        8.0
    """

    def register(rule: Rule) -> Rule:
        _rules[optimizer] = rule
        return rule

    return register


def edges(optimizer: torch.optim.Optimizer) -> tuple[Edge, ...]:
    """Return the edge of each parameter group at its present learning rate.

    Args:
        optimizer: Of a class with a rule, or of a subclass that leaves its `step` alone.

    Raises:
        NoThresholdError: If there is no rule, or none applies to these settings.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9, weight_decay=0.5)
        >>> [edge] = edges(optimizer)
        >>> edge.threshold, round(edge.curvature, 6)  # η (λ + wd) = 2 + 2β
        (3.8, 37.5)
    """
    for kind in type(optimizer).__mro__:
        rule = _rules.get(kind)
        if rule is None:
            continue
        if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(kind.step):
            break
        return tuple(rule(group) for group in optimizer.param_groups)
    raise NoThresholdError(
        f"no stability rule is known for {type(optimizer).__name__}; the largest eigenvalue is logged without a ratio. "
        "Register one with spectral_callbacks.stability_rule."
    )


@stability_rule(torch.optim.SGD)
def sgd(group: dict[str, Any]) -> Edge:
    """Gradient descent, with torch's momentum b, dampening d, Nesterov and coupled weight decay wd.

    Heavy ball with w' = w - η v', v' = b v + (1 - d)(λ + wd) w leaves the unit disc at z = -1, where
    η (λ + wd) = (2 + 2b) / (1 - d); Nesterov's look-ahead moves that to (2 + 2b) / (1 + 2b).
    """
    if group["maximize"]:
        raise NoThresholdError(
            "SGD(maximize=True) climbs the loss, and its edge is about the smallest eigenvalue; no ratio is logged."
        )
    momentum, dampening = group["momentum"], group["dampening"]
    if not momentum:
        threshold = 2.0
    elif dampening >= 1:
        raise NoThresholdError(f"SGD with dampening={dampening} does not move by its gradients; no ratio is logged.")
    elif group["nesterov"]:
        threshold = (2 + 2 * momentum) / (1 + 2 * momentum)
    else:
        threshold = (2 + 2 * momentum) / (1 - dampening)
    return Edge(float(group["lr"]), threshold, float(group["weight_decay"]))
