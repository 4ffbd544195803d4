"""Edge of stability of each parameter, and the registry of the rules that know it.

The mathematics of every rule. With its metric D held where it is, an optimizer moves linearly on a quadratic:

    w' = w - η (D F[g] + wd w),    g = (±H + wc) w,

with the decoupled weight decay wd, the coupled one wc, -H where it maximizes, and a filter F, a sum of g and of moving
averages of g with positive weights: z / (z - b) for a heavy ball of momentum b. A mode z^t w grows where |z| > 1.

As η or H grows, modes of positive curvature leave the unit disc at z = -1 and nowhere else. For with
y = (±H + wc) w a mode has w = -η D F(z) y / (z - 1 + η wd), so that the sum of -η D F(z) |y|² / (z - 1 + η wd) over
the entries is w*(±H + wc)w, a real number; yet on the upper half of the unit circle each of its terms has a positive
imaginary part. That needs no more than symmetry, and holds where parameters differ in η, D, F, wd and wc. (Modes of
negative curvature leave at z = 1, at every η.)

At z = -1 the weights alternate in sign, and the filter is one number, its gain K = F(-1). The whole condition is then
-w = w - η (D K g + wd w): the edge is where an eigenvalue of η K D (±H + wc) + η wd reaches 2, that is

    η (λ + shift) = threshold    with    threshold = 2 / K,    shift = wd / K,

λ being the largest eigenvalue of D^½ (±H + wc) D^½, which is symmetric and has the eigenvalues of D (±H + wc). What
scales the gradient's part of the step alone, as a bias correction c does, makes that ηc (λ + wd / (cK)) = 2 / K.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor

from spectral_callbacks.stability.frame import Frame
from spectral_callbacks.stability.observable import ObservableOptimizer


@dataclasses.dataclass(frozen=True)
class Edge:
    """The edge of stability of one parameter: learning_rate (λ + shift) = threshold.

    λ is the largest eigenvalue of D^½ (±H + weight_decay) D^½. For parameters with edges of their own the condition is
    joint: with S = (weight · D)^½, the largest eigenvalue of S (±H + weight_decay) S + weight · shift reaches 1.

    Attributes:
        learning_rate: η in effect, with the bias correction of the first moment at the present step in it.
        threshold: What η (λ + shift) reaches when the slowest mode of the update rule leaves the unit disc.
        shift: What is added to λ outside the metric: decoupled weight decay, and any decay in the plain metric.
        weight_decay: What is added to the Hessian inside the metric: coupled weight decay.
        preconditioner: D, of the parameter's shape; None is the identity. Not compared by `==`.
        frame: Where D is diagonal, if not in the parameter's own entries: its diagonal is then that of Q D Qᵀ with the
            frame's Q. Not compared by `==`.
        ascends: The optimizer climbs, so that the curvature that counts is that of -H.
    """

    learning_rate: float
    threshold: float
    shift: float = 0.0
    weight_decay: float = 0.0
    preconditioner: Tensor | None = dataclasses.field(default=None, compare=False)
    ascends: bool = False
    frame: Frame | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def from_threshold(
        cls,
        threshold: float,
        *,
        learning_rate: float,
        correction: float = 1.0,
        preconditioner: Tensor | None = None,
        coupled: float = 0.0,
        decoupled: float = 0.0,
        ascends: bool = False,
        frame: Frame | None = None,
    ) -> Self:
        """Return the edge of a rule that moves by -learning_rate (correction D F[g + coupled w] + decoupled w).

        Args:
            threshold: 2 / K, where K = F(-1) is what the filter makes of gradients that alternate in sign. It is
                (2 + 2b) / (1 - b) for the moving average m' = b m + (1 - b) g.
            learning_rate: η, not corrected.
            correction: What scales the gradient's part of the step alone.
            preconditioner: D, or None for the identity.
            coupled: Weight decay that is added to the gradient.
            decoupled: Weight decay that is not.
            ascends: See `Edge`.
            frame: See `Edge`.

        Example:
            >>> edge = Edge.from_threshold(2 + 2 * 0.9, learning_rate=0.1, decoupled=0.5)
            >>> edge.threshold, edge.shift  # η (λ + (1 + b) wd) = 2 + 2b
            (3.8, 0.95)
        """
        shift = decoupled * threshold / (2 * correction) if decoupled else 0.0
        if preconditioner is None:
            shift, coupled = shift + coupled, 0.0  # in the plain metric inside and outside are the same
        return cls(learning_rate * correction, threshold, shift, coupled, preconditioner, ascends, frame)

    @property
    def is_plain(self) -> bool:
        """Whether λ is the largest eigenvalue of the Hessian as it is."""
        return self.preconditioner is None and not self.weight_decay and not self.ascends

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


class NotSteppedYetError(NoThresholdError):
    """The metric of an adaptive optimizer is not known before its first step."""

    def __init__(self) -> None:
        super().__init__("the optimizer has not stepped yet; its metric, and a ratio in it, is known after one step.")


Rule = Callable[[Tensor, dict[str, Any], Mapping[str, Any]], Edge]
_rules: dict[type[torch.optim.Optimizer], Rule] = {}


def stability_rule(optimizer: type[torch.optim.Optimizer]) -> Callable[[Rule], Rule]:
    """Register the stability rule of an optimizer class.

    It is a function from a parameter, its group and its state to the parameter's edge. The state is empty before the
    parameter's first step; a rule that needs it then raises `NotSteppedYetError`. What an `ObservableOptimizer` keeps
    beside its state is in it too, from the first step after the first call of `edges`. Subclasses that do not override
    `step` share the rule.

    Example:
        >>> import torch
        >>> class SlowAdagrad(torch.optim.Adagrad):
        ...     def step(self, closure=None): ...  # w -= lr m / (1 + √sum), with a moving average m of the gradients
        >>> @stability_rule(SlowAdagrad)
        ... def slow_adagrad(parameter, group, state):
        ...     if not state["step"]:
        ...         raise NotSteppedYetError
        ...     metric = 1 / (1 + state["sum"].sqrt())
        ...     return Edge.from_threshold(2 * 1.9 / 0.1, learning_rate=group["lr"], preconditioner=metric)
        >>> w = torch.zeros(2)
        >>> optimizer = SlowAdagrad([w], lr=0.5)
        >>> optimizer.state[w] = {"step": 7, "sum": torch.tensor([0.0, 9.0])}
        >>> [[edge]] = edges(optimizer)
        >>> edge.preconditioner, round(edge.curvature, 6)  # λ_max of D^½ H D^½ at the edge: (2 + 2b) / (1 - b) / η
        (tensor([1.0000, 0.2500]), 76.0)
    """

    def register(rule: Rule) -> Rule:
        _rules[optimizer] = rule
        return rule

    return register


def no_threshold(optimizer: type[torch.optim.Optimizer], reason: str) -> None:
    """Register that an optimizer class has no finite threshold: `edges` raises `NoThresholdError` with the reason."""

    def rule(parameter: Tensor, group: dict[str, Any], state: Mapping[str, Any]) -> Edge:
        raise NoThresholdError(
            f"{optimizer.__name__} has no finite threshold: {reason}; the largest eigenvalue is logged without a ratio."
        )

    stability_rule(optimizer)(rule)


@torch.no_grad()
def edges(optimizer: torch.optim.Optimizer) -> tuple[tuple[Edge, ...], ...]:
    """Return the edge of each parameter, at its present learning rate and in the metric of the last step.

    Once some parameter has stepped, one that an adaptive optimizer never stepped, as without a gradient, does not move:
    it has learning rate 0, so that it weighs nothing.

    Args:
        optimizer: Of a class with a rule, or of a subclass that leaves its `step` alone.

    Returns:
        One tuple a parameter group, with one edge a parameter.

    Raises:
        NoThresholdError: If there is no rule, or none applies to these settings.
        NotSteppedYetError: If there will be one after the first step.

    Example:
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9, weight_decay=0.5)
        >>> [[edge]] = edges(optimizer)
        >>> edge.threshold, round(edge.curvature, 6)  # η (λ + wd) = 2 + 2β
        (3.8, 37.5)
    """
    rule = _rule_of(optimizer)
    observable = optimizer if isinstance(optimizer, ObservableOptimizer) else None
    if observable is not None:
        observable.observe()
    found: list[tuple[Edge, ...]] = []
    not_yet: NotSteppedYetError | None = None
    some_stepped = False
    for group in optimizer.param_groups:
        row: list[Edge] = []
        for p in group["params"]:
            state: Mapping[str, Any] = optimizer.state.get(p, {})  # `state[p]` would create an entry
            if observable is not None:
                state = {**state, **observable.observations(p)}
            try:
                row.append(rule(p, group, state))
                some_stepped = True
            except NotSteppedYetError as error:
                not_yet = error
                row.append(Edge(0.0, 2.0, ascends=bool(group.get("maximize", False))))
        found.append(tuple(row))
    if not_yet is not None and not some_stepped:
        raise not_yet
    if len({edge.ascends for row in found for edge in row}) > 1:
        raise NoThresholdError(
            f"some parameter groups of {type(optimizer).__name__} have maximize=True and others False: it follows the "
            "gradient of no single function, and no symmetric matrix says where it is stable; no ratio is logged."
        )
    return tuple(found)


def _rule_of(optimizer: torch.optim.Optimizer) -> Rule:
    for kind in type(optimizer).__mro__:
        rule = _rules.get(kind)
        if rule is None:
            continue
        if inspect.unwrap(type(optimizer).step) is not inspect.unwrap(kind.step):
            break
        return rule
    raise NoThresholdError(
        f"no stability rule is known for {type(optimizer).__name__}; the largest eigenvalue is logged without a ratio. "
        "Register one with spectral_callbacks.stability_rule."
    )
